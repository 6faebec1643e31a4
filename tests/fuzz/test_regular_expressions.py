"""No regular expression of the nodes takes more than linear time: a caption or a tag may be as long as it likes."""

from __future__ import annotations

import ast
import importlib
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from storydiffusion.devtools.pack_alias import PACK_ROOT
from storydiffusion.tests.helpers.fuzzing import NIGHTLY

METHODS = {"match", "search", "fullmatch", "sub", "findall", "split", "finditer"}
LONGEST = 2**14
ENOUGH = 0.02
"""Seconds after which a time says enough about how it grows."""


class Use(NamedTuple):
    """A regular expression and one of the ways in which the nodes use it."""

    pattern: str
    method: str


def patterns_in(value: Any) -> Iterator[re.Pattern[str]]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from patterns_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from patterns_in(entry)


def literal(node: ast.expr) -> str | None:
    """A text in the source, with "x" for what is put into it while it runs."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "x" for part in node.values)
        return "".join(map(str, parts))
    return None


def methods_by_name(trees: list[ast.Module]) -> dict[str, set[str]]:
    """The methods that are called on each name, or on an entry of it."""
    methods: dict[str, set[str]] = {}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and node.attr in METHODS:
            owner = node.value.value if isinstance(node.value, ast.Subscript) else node.value
            if isinstance(owner, ast.Name):
                methods.setdefault(owner.id, set()).add(node.attr)
    return methods


def compiled(trees: dict[Path, ast.Module]) -> Iterator[Use]:
    """Those that modules hold by name."""
    methods = methods_by_name(list(trees.values()))
    for path in trees:
        name = ".".join(["storydiffusion", *path.relative_to(PACK_ROOT).with_suffix("").parts])
        for key, value in vars(importlib.import_module(name)).items():
            if not key.startswith("__"):
                for pattern in patterns_in(value):
                    yield from (Use(pattern.pattern, method) for method in methods.get(key, {"match"}))


def written_where_used(trees: dict[Path, ast.Module]) -> Iterator[Use]:
    """Those in calls such as `re.sub(...)`; where one is handed on by a name, all f-strings that look like one."""
    for tree in trees.values():
        nodes = list(ast.walk(tree))
        for node in nodes:
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS):
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "re":
                found = [literal(node.args[0])]
                if found == [None]:
                    found = [literal(other) for other in nodes if isinstance(other, ast.JoinedStr)]
                    found = [text for text in found if text and "\\" in text]
                yield from (Use(text, node.func.attr) for text in found if text is not None)


def all_uses() -> list[Use]:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((PACK_ROOT / "nodes").rglob("*.py"))}
    return sorted({*compiled(trees), *written_where_used(trees)})


USES = all_uses()


def seeds(pattern: str) -> list[str]:
    """A few short texts that the pattern matches."""
    found: list[str] = []

    @settings(max_examples=6, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.from_regex(pattern))
    def collect(text: str) -> None:
        found.append(text[:12])

    collect()
    return list(dict.fromkeys(found))


class Pumped(NamedTuple):
    """A text with a part that repeats."""

    front: str
    part: str
    end: str

    def of_length(self, length: int) -> str:
        return self.front + self.part * (length // len(self.part)) + self.end


def pumped(pattern: str) -> list[Pumped]:
    """Matching texts in which a letter or two repeat, with ends that match and ends that don't."""
    found = []
    for text in ["", *seeds(pattern)]:
        for at in range(len(text) + 1):
            parts = {text[at : at + 1], text[at : at + 2], text[max(at - 1, 0) : at], "a", " ", "("} - {""}
            ends = ("", "\0", "a", text[at:])
            found += [Pumped(text[:at], part, end) for part in sorted(parts) for end in ends]
    return list(dict.fromkeys(found))


def seconds(use: Use, text: str, repeats: int = 1) -> float:
    pattern = re.compile(use.pattern)
    call = getattr(pattern, use.method)
    arguments = ("", text) if use.method == "sub" else (text,)
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        result = call(*arguments)
        if use.method == "finditer":
            list(result)
        times.append(time.perf_counter() - begun)
        if len(times) > 2 and min(times) > ENOUGH:
            break
    return min(times)


def steps(last: int) -> Iterator[int]:
    length = 4
    while length < last:
        yield length
        length += length // 4


def cost(use: Use, pump: Pumped) -> float:
    """Seconds per letter at some hundred letters, or where it is slow already."""
    spent = 0.0
    for length in steps(400):
        spent = seconds(use, pump.of_length(length))
        if spent > ENOUGH / 4:
            break
    return spent / length


def exponent(use: Use, pump: Pumped) -> float:
    """The power of the length with which time grows, up to a length at which it says enough."""
    times: list[tuple[int, float]] = []
    for length in steps(LONGEST):
        times.append((length, seconds(use, pump.of_length(length), repeats=5)))
        if times[-1][1] > ENOUGH:
            break
    long, after = times[-1]
    short, before = next(entry for entry in times if 4 * entry[0] >= long)
    return math.log(after / before) / math.log(long / short)


def growth(use: Use) -> float:
    """The exponent of the worst of many texts."""
    candidates = sorted(pumped(use.pattern), key=lambda pump: cost(use, pump), reverse=True)
    return max(exponent(use, pump) for pump in candidates[:3])


def test_regular_expressions_are_found() -> None:
    patterns = {use.pattern for use in USES}
    assert len(patterns) >= 20
    assert any("motion_modules" in pattern and pattern.startswith("^") for pattern in patterns)  # by name
    assert any(pattern.startswith(r"x\.motion_modules") for pattern in patterns)  # an f-string
    assert r"[\s_-]" in patterns  # where it is used
    assert any("pingfang" in pattern for pattern in patterns)  # in a dictionary


measures_time = pytest.mark.skipif(not NIGHTLY, reason="measures time, which other work disturbs: STORY_FUZZ=nightly")


@measures_time
@pytest.mark.parametrize(
    "use",
    [Use(r"\s*(\d+)\s*:\s*(\d*\.?\d+)\s*", "fullmatch"), Use(r"[\W_]+$", "sub"), Use("(a|a)*b", "search")],
    ids=["quadratic", "from every start", "exponential"],
)
def test_what_is_slow_is_found(use: Use) -> None:
    assert growth(use) > 1.5


@measures_time
@pytest.mark.parametrize("use", USES, ids=lambda use: ascii(use.pattern)[:30])
def test_time_grows_with_the_length_and_not_with_its_square(use: Use) -> None:
    # Other work on the machine can hold up one call in the middle; what is slow is so every time.
    assert any(growth(use) < 1.5 for _ in range(3))
