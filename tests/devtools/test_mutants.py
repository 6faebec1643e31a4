"""The mutation check: which expressions it makes wrong, and how."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from storydiffusion.devtools import mutants
from storydiffusion.devtools.mutants import ROOT, covering, mutations, sample


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b", {"x = (a <= b)"}),
        ("x = a - b", {"x = (a + b)"}),
        ("x = a and b", {"x = (a or b)"}),
        ("x = not a", {"x = (a)"}),
        ("x = 3", {"x = (4)"}),
        ("x = True", {"x = (False)"}),
        ("x = f(a, b)", {"x = (f(a))"}),
        ("x = f(a, b=c)", {"x = (f(a))"}),
        ("if a:\n    b()", {"if (not a):\n    b()"}),
        ("x = [a for a in b if a]", {"x = [a for a in b if (not a)]"}),
        ("def f():\n    return g(a)", {"def f():\n    return (a)"}),
        ("def f():\n    return a * b", {"def f():\n    return (a)", "def f():\n    return (a / b)"}),
        ("x = 'ä', 1", {"x = 'ä', (2)"}),  # the parser counts bytes
    ],
)
def test_an_expression_becomes_a_wrong_one(source: str, expected: set[str]) -> None:
    assert {mutation.apply(source) for mutation in mutations(source)} == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""Text."""',
        'raise ValueError("text" + name)',
        'x = f"{a + 1}"',
        "def f(a: Literal[1, 2]) -> Literal[3]: ...",
        "@dataclass(frozen=True, eq=False)\nclass A: ...",
        "Path = Callable[[int, 1], 2]",
        "print(a, b + 1)",
        "x: Literal[1] = a",
        "x = folder / 'name'",
    ],
)
def test_what_is_said_and_not_computed_stays(source: str) -> None:
    assert not mutations(source)


def test_schemas_stay() -> None:
    source = "class A:\n    def define_schema(cls):\n        return 1 + 2\n    def execute(cls):\n        return x < 2"
    assert {mutation.line for mutation in mutations(source)} == {3, 5}
    assert {mutation.line for mutation in mutations(source, schemas=True)} == {5}


def test_mutants_are_the_same_for_a_seed_and_can_be_parsed() -> None:
    files = ["smp/predictor.py", "nodes/motion_predictor/nodes.py"]
    chosen = sample(files, 30, seed=1)
    assert chosen == sample(files, 30, seed=1) != sample(files, 30, seed=2)
    assert len({(mutant.file, mutant.mutation.line) for mutant in chosen}) == 30  # a line is tried once
    for mutant in chosen:
        source = (ROOT / mutant.file).read_text(encoding="utf-8")
        wrong = mutant.mutation.apply(source)
        assert ast.dump(ast.parse(wrong)) != ast.dump(ast.parse(source))


def test_a_share_has_the_interval_that_tables_give() -> None:
    assert mutants.likely_share(10, 10) == pytest.approx((0.722, 1.0), abs=1e-3)
    assert mutants.likely_share(15, 20) == pytest.approx((0.531, 0.888), abs=1e-3)


def test_a_file_has_the_covering_its_folder_and_of_those_that_use_it() -> None:
    assert covering("nodes/clips/pairs.py") == ("tests/clips",)
    assert covering("smp/training/run/loop.py") == ("tests/smp",)
    assert covering("smp/predictor.py") == ("tests/smp", "tests/motion_predictor")
    python = [*(ROOT / "nodes").glob("*/*.py"), *(ROOT / "smp").rglob("*.py")]
    assert all(covering(path.relative_to(ROOT).as_posix()) for path in python)
    named = [path for paths in mutants.BESIDES.values() for path in paths]
    assert all((ROOT / path).exists() for path in [*named, *mutants.BESIDES])
    assert Path(mutants.__file__).parent == ROOT / "devtools"
