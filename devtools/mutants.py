"""Which single wrong lines would no test notice? A seeded sample of them is tried, one at a time, in a scratch copy.

COMFYUI_PATH=.dev/host/ComfyUI .dev/venv/bin/python devtools/mutants.py --count 20 --seed 0 [smp/predictor.py ...]

What survives wants a test, or makes no difference: that is for a person to tell.
"""

from __future__ import annotations

import argparse
import ast
import copy
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRATCH = ROOT / ".dev" / "mutants"
LOG = SCRATCH / "pytest.log"
MUTATED = ("nodes", "smp")
BESIDES: dict[str, tuple[str, ...]] = {
    "nodes/animatediff": ("tests/transition_video",),
    "nodes/host": ("tests/consistent_attention", "tests/animatediff", "tests/transition_video"),
    "nodes/motion_predictor": ("tests/transition_video", "tests/smp/test_training_decoding.py"),
    "nodes/story": ("tests/subjects", "tests/prompts"),
    "nodes/subjects": ("tests/consistent_attention", "tests/prompts"),
    "nodes/windows": ("tests/consistent_attention",),
    "smp": ("tests/motion_predictor",),
    "smp/training": (),
    "smp/evaluation": (),
}
"""Tests that cover a folder beside those of its own name; the longest name that fits counts."""
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
TOLD = ("print", "warn", "warning", "info", "add_argument", "ArgumentParser", "add_parser", "TypeVar")
"""Calls whose arguments are words for people."""


@dataclass(frozen=True)
class Mutation:
    """One expression, by its place in the text, and what stands there instead."""

    line: int
    start: int
    end: int
    old: str
    new: str

    def apply(self, source: str) -> str:
        text = source.encode()  # the parser counts bytes
        return (text[: self.start] + self.new.encode() + text[self.end :]).decode()


@dataclass(frozen=True)
class Mutant:
    file: str
    mutation: Mutation

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.mutation.old, self.mutation.new))
        return f"{self.file}:{self.mutation.line}  {old}  ->  {new}"


def mutations(source: str, *, schemas: bool = False) -> list[Mutation]:
    """Every wrong expression in a module; with `schemas`, what `define_schema` says is left as it is."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, wrong in _wrong(_told(ast.parse(source), schemas)):
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        old = source.encode()[start:end].decode()
        found.append(Mutation(node.lineno, start, end, old, f"({ast.unparse(wrong)})"))
    return found


def _told(tree: ast.AST, schemas: bool) -> Iterator[ast.AST]:
    """The nodes that say what is computed: no annotations, decorators, messages or texts."""
    left: list[ast.AST] = []
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        left += value if isinstance(value, list) else [value]
    for child in left:
        if not isinstance(child, ast.AST) or isinstance(child, (ast.Raise, ast.Assert, ast.JoinedStr)):
            continue
        if isinstance(child, ast.Call) and _called(child) in TOLD:
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(tree, ast.Module) and isinstance(child, ast.Assign) and isinstance(child.value, ast.Subscript):
            continue  # a name for a type
        if schemas and isinstance(child, ast.FunctionDef) and child.name == "define_schema":
            continue
        yield child
        yield from _told(child, schemas)


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _wrong(nodes: Iterable[ast.AST]) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Expressions and what is wrong in their place."""
    for node in nodes:
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield node.test, ast.UnaryOp(ast.Not(), node.test)
        elif isinstance(node, ast.comprehension):
            yield from ((test, ast.UnaryOp(ast.Not(), test)) for test in node.ifs)
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.BinOp):
            yield node.value, node.value.left
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Call) and node.value.args:
            yield node.value, node.value.args[0]
        if isinstance(node, ast.expr):
            yield from ((node, wrong) for wrong in _instead(node))


def _instead(node: ast.expr) -> Iterator[ast.expr]:
    wrong = copy.deepcopy(node)
    if isinstance(wrong, ast.Compare) and len(wrong.ops) == 1:
        wrong.ops = [COMPARISONS[type(wrong.ops[0])]()]
        yield wrong
    elif isinstance(wrong, ast.BinOp) and type(wrong.op) in OPERATORS:
        if _is_text(wrong.left) or _is_text(wrong.right):
            return  # any test notices paths and texts that are multiplied
        wrong.op = OPERATORS[type(wrong.op)]()
        yield wrong
    elif isinstance(wrong, ast.BoolOp):
        wrong.op = ast.Or() if isinstance(wrong.op, ast.And) else ast.And()
        yield wrong
    elif isinstance(wrong, ast.UnaryOp) and isinstance(wrong.op, (ast.Not, ast.USub)):
        yield wrong.operand
    elif isinstance(wrong, ast.Constant) and isinstance(wrong.value, (bool, int, float)):
        yield ast.Constant(not wrong.value if isinstance(wrong.value, bool) else wrong.value + 1)
    elif isinstance(wrong, ast.Call) and len(wrong.args) + len(wrong.keywords) > 1:
        (wrong.keywords or wrong.args).pop()
        yield wrong


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def sample(files: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """At most `count` lines of the files with something wrong in each: the same for the same seed and files."""
    lines: dict[tuple[str, int], list[Mutation]] = defaultdict(list)
    for file in files:
        source = (ROOT / file).read_text(encoding="utf-8")
        for mutation in mutations(source, schemas=Path(file).name == "nodes.py"):
            lines[file, mutation.line].append(mutation)
    chance = random.Random(seed)
    chosen = chance.sample(sorted(lines), min(count, len(lines)))
    return [Mutant(file, chance.choice(lines[file, line])) for file, line in chosen]


def covering(file: str) -> tuple[str, ...]:
    """Test files and folders that cover a file."""
    folder = "smp" if file.startswith("smp/") else "/".join(file.split("/")[:2])
    fits = max((name for name in BESIDES if file.startswith(f"{name}/")), key=len, default="")
    own = f"tests/{folder.removeprefix('nodes/')}"
    return tuple(path for path in (own, *BESIDES.get(fits, ())) if (ROOT / path).exists())


def tracked() -> list[str]:
    """Files of the repository as they stand now, new ones too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [file for file in listed if (ROOT / file).is_file()]


def make_copy() -> None:
    """A copy of the repository, and of the models that tests made: what a mutant writes there stays there."""
    shutil.rmtree(SCRATCH, ignore_errors=True)
    for file in tracked():
        (SCRATCH / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, SCRATCH / file)
    if (ROOT / ".dev" / "models").is_dir():
        shutil.copytree(ROOT / ".dev" / "models", SCRATCH / ".dev" / "models", copy_function=os.link)


def passes(tests: Sequence[str], seconds: float) -> bool:
    """Whether the copy passes its tests, quick ones first; tests that don't end in time have not passed."""
    comfyui = str(Path(os.environ["COMFYUI_PATH"]).resolve())
    settings = {"COMFYUI_PATH": comfyui, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for marked in ("not slow", "slow"):
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", marked, *tests]
        with LOG.open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, cwd=SCRATCH, env={**os.environ, **settings}, stdout=log, stderr=log, start_new_session=True
            )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # what a test had started ends with it
                process.wait()
        if code not in (0, 5):  # 5: none of them is marked so
            return False
    return True


def try_out(mutants: Sequence[Mutant], seconds: float) -> list[Mutant]:
    """Print whether each is noticed; the ones that aren't."""
    make_copy()
    for tests in sorted({covering(mutant.file) for mutant in mutants}):
        if not passes(tests, seconds):
            names = " ".join(tests)
            raise SystemExit(f"{names}: failing without any mutant, or not over in {seconds:.0f} s; see {LOG}.")
    survived = []
    for mutant in mutants:
        path, begun = SCRATCH / mutant.file, time.monotonic()
        source = path.read_text(encoding="utf-8")
        path.write_text(mutant.mutation.apply(source), encoding="utf-8")
        noticed = not passes(covering(mutant.file), seconds)
        path.write_text(source, encoding="utf-8")
        print(f"{'noticed' if noticed else 'NOT NOTICED'} ({time.monotonic() - begun:.0f} s)  {mutant}", flush=True)
        survived += [] if noticed else [mutant]
    return survived


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", default=MUTATED, help="files or folders; default: nodes and smp")
    parser.add_argument("--count", type=int, default=20, help="lines that are tried; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the sample; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=600, help="that tests may take; default: %(default)s")
    arguments = parser.parse_args()
    if "COMFYUI_PATH" not in os.environ:
        raise SystemExit("COMFYUI_PATH is not set; it is .dev/host/ComfyUI once `python dev.py` has run.")
    within = [file for file in tracked() if file.startswith(tuple(f"{folder}/" for folder in MUTATED))]
    files = [
        file
        for file in sorted(within)
        if file.endswith(".py") and any(f"{file}/".startswith(f"{asked.rstrip('/')}/") for asked in arguments.files)
    ]
    mutants = sample(files, arguments.count, arguments.seed)
    if not mutants:
        raise SystemExit(f"Nothing to mutate in {' '.join(arguments.files)}.")
    survived = try_out(mutants, arguments.seconds)
    noticed = len(mutants) - len(survived)
    low, high = likely_share(noticed, len(mutants))
    print(
        f"\n{noticed} of {len(mutants)} noticed (seed {arguments.seed}); of all lines {low:.2f} to {high:.2f} at 95 %"
    )


def likely_share(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: a standard error would be zero where all of a few are noticed."""
    z = 1.96
    middle = hits + z * z / 2
    spread = z * math.sqrt(hits * (count - hits) / count + z * z / 4)
    return (middle - spread) / (count + z * z), (middle + spread) / (count + z * z)


if __name__ == "__main__":
    main()
