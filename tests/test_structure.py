"""The house's rules: who imports whom, what a node module holds, and what calls itself host-free."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from storydiffusion.devtools.pack_alias import PACK_ROOT

NODES, SMP = PACK_ROOT / "nodes", PACK_ROOT / "smp"
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview", "node_helpers"}
HOST |= {"server", "nodes", "execution", "app"}
FEATURES = sorted(path.parent.name for path in NODES.glob("*/__init__.py"))


def runtime_statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every statement but those for the type checker alone."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from runtime_statements(child)


def imports(path: Path, *, for_types: bool = False) -> Iterator[tuple[str, ...]]:
    """What a module imports, as the parts of names: ("comfy", "utils"), and own modules from the pack's root on."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if for_types else runtime_statements(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(name.name.split(".")) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                package = path.relative_to(PACK_ROOT).parent.parts
                module = ("storydiffusion", *package[: len(package) - node.level + 1], *module)
            yield from ((*module, name.name) for name in node.names)


def own(path: Path, **options: bool) -> set[tuple[str, ...]]:
    """The pack's own modules that a module imports."""
    return {name[1:] for name in imports(path, **options) if name[0] == "storydiffusion"}


def permitted() -> dict[str, set[str]]:
    """The table of nodes/README.md: {folder: what it may import}."""
    text = (NODES / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", text.partition("Who may import")[2], re.MULTILINE)
    return {folder: set(re.findall(r"`(\w+)`", cell)) for folder, cell in rows if folder in FEATURES}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_imports_what_the_table_says(feature: str) -> None:
    found = set()
    for path in (NODES / feature).glob("*.py"):
        for name in own(path, for_types=True):
            found.add(name[1] if name[0] == "nodes" else name[0])
    assert found - {feature} == permitted()[feature]


def test_the_table_has_no_circle() -> None:
    left = permitted()
    while left:
        free = [folder for folder, needed in left.items() if not needed & left.keys()]
        assert free, f"these import one another: {', '.join(left)}"
        left = {folder: needed for folder, needed in left.items() if folder not in free}


def test_smp_imports_neither_host_nor_nodes() -> None:
    for path in SMP.rglob("*.py"):
        outside = {name[0] for name in imports(path, for_types=True)} & HOST
        assert not outside, f"{path} imports {outside}"
        assert {name[0] for name in own(path, for_types=True)} <= {"smp"}, path


def test_own_imports_are_relative() -> None:
    for folder in (NODES, SMP):
        for path in folder.rglob("*.py"):
            absolute = {name[0] for name in imports(path, for_types=True)} & {"nodes", "smp"}
            assert not absolute, f"{path} imports {absolute} by an absolute name, which is the host's"


@pytest.mark.parametrize("path", sorted(NODES.glob("*/nodes.py")), ids=lambda path: path.parent.name)
def test_a_node_module_holds_node_classes_only(path: Path) -> None:
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ClassDef):
            assert [ast.unparse(base) for base in statement.bases] == ["io.ComfyNode"]
        else:
            allowed = isinstance(statement, ast.Import | ast.ImportFrom | ast.Expr | ast.If)
            assert allowed, f"{path}, line {statement.lineno}: {ast.unparse(statement)[:80]}"


def source_of(name: tuple[str, ...]) -> Path | None:
    """The file of a name such as ("nodes", "story", "tags", "Cast")."""
    candidates = (PACK_ROOT.joinpath(*name[:end]).with_suffix(".py") for end in (len(name), len(name) - 1))
    return next((path for path in candidates if path.is_file()), None)


def says_host_free(path: Path) -> bool:
    return "Host-free." in (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(NODES.rglob("*.py")) if says_host_free(path)],
    ids=lambda path: str(path.relative_to(NODES)),
)
def test_host_free_is_host_free_with_all_that_it_imports(path: Path) -> None:
    seen, waiting = set(), [path]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        outside = {name[0] for name in imports(module)} & HOST
        assert not outside, f"{path} is host-free, but {module} imports {outside}"
        found = (source_of(name) for name in own(module))
        waiting += [source for source in found if source and source not in seen]


def test_there_are_host_free_modules() -> None:
    assert sum(map(says_host_free, NODES.rglob("*.py"))) > 15


def test_tests_mirror_the_features() -> None:
    folders = {path.name for path in (PACK_ROOT / "tests").iterdir() if path.is_dir()}
    assert set(FEATURES) <= folders
