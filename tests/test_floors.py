"""The order of the house: a module imports from its own folder and from those above it; none grows past one reading."""

import ast
from pathlib import Path

import pytest

from sidactl.commands import resolve, score, words
from tests.conftest import Forbid

PACKAGE = Path(__file__).parents[1] / "sidactl"
STANDARD_LIBRARY_ONLY = ["errors", "text", "units", "scopes", "launch", "digests", "store", "recipes", "catalog"]
# Folders, and the files that lie beside them, from the ground up: each imports from itself and from those before it.
ORDER = [
    "errors",
    "text",
    "units",
    "scopes",
    "launch",
    "digests",
    "store",
    "recipes",
    "catalog",
    "noise",
    "nets",
    "methods",
    "metrics",
    "report",
    "engine",
    "data",
    "foreign",
    "sampling",
    "detectors",
    "training",
    "commands",
    "cli",
]
QUICK = [*STANDARD_LIBRARY_ONLY, "commands", "cli"]
HEAVY = {"torch", "numpy", "scipy", "PIL", "rich", "safetensors"}
# What may know the run directory. Everything else gets its values and files handed in.
KNOW_THE_STORE = {"data", "training", "commands", "cli"}
LONGEST = 450
# Files that are longer than that, and may only become shorter. A file that fits is taken off the list.
LONG = {
    "store/objects.py": 511,
}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or not p.name.startswith("__"))


def folder_of(path: Path) -> str:
    """The folder that a module lies in, or its own name where it lies beside the folders."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Names imported: "sidactl.x" for ours, the first part for others; without those under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    nodes = tree.body if top_level else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"sidactl.{a.name}" for a in node.names} if node.module == "sidactl" else {node.module}
    return found


def ours(path: Path) -> set[str]:
    """The folders that a module imports from."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("sidactl.")} - {"__version__"}


def test_every_folder_has_its_place_in_the_order() -> None:
    assert {folder_of(path) for path in modules()} == set(ORDER)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_imports_nothing_from_above(path: Path) -> None:
    own = folder_of(path)
    above = {name for name in ours(path) if ORDER.index(name) > ORDER.index(own)}
    assert not above, f"{own} imports {sorted(above)}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_opens_with_a_sentence(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert docstring.split("\n")[0].rstrip().endswith((".", ";", ",")) or "\n\n" in docstring


def test_only_those_who_keep_something_know_the_store() -> None:
    found = {folder_of(path) for path in modules() if "store" in ours(path)} - {"store"}
    assert found == KNOW_THE_STORE


def test_files_fit_one_reading_and_those_that_do_not_only_shrink() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    long = {name: length for name, length in lengths.items() if length > LONGEST}
    assert long.keys() == LONG.keys()
    assert {name: length for name, length in long.items() if length > LONG[name]} == {}


@pytest.mark.parametrize("folder", QUICK)
def test_what_answers_quickly_imports_nothing_heavy_at_its_top(folder: str) -> None:
    for path in (path for path in modules() if folder_of(path) == folder and path.name != "bench.py"):
        top = {name.split(".")[0] for name in imports(path, top_level=True)}
        assert not top & HEAVY, path


def test_what_is_forbidden_is_so_by_every_name_until_the_end_of_the_block(forbidden: Forbid) -> None:
    usual = words.plain_name
    assert vars(score).get("load_net") is resolve.load_net
    with forbidden(words.plain_name, resolve.load_net):
        for call in (words.plain_name, vars(score)["load_net"]):
            with pytest.raises(pytest.fail.Exception, match="was called"):
                call("a name")
    assert words.plain_name is usual
    assert vars(score).get("load_net") is resolve.load_net
    assert words.plain_name("a name") == "a-name"
