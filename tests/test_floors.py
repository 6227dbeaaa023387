"""A module imports from floors below its own; on its own floor only from what stands before it in the list."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sidactl"
# Floor by floor, from the ground up; within a floor a module may import those on its left.
FLOORS = [
    ["errors", "text", "inputs", "recipe", "catalog", "store", "outputs", "signing", "heartbeat", "live"],
    ["diffusion", "losses", "augment", "codec", "metrics", "pictures", "nets"],
    [
        "engine",
        "data",
        "sources",
        "prepare",
        "pickles",
        "teachers",
        "download",
        "loop",
        "trainer",
        "sampling",
        "detectors",
    ],
    ["artifacts", "features", "references", "preflight", "scores", "ops", "inventory", "bench"],
    ["ui", "logs", "cli"],
]
ORDER = [module for floor in FLOORS for module in floor]
STANDARD_LIBRARY_ONLY = FLOORS[0]
HEAVY = {"torch", "numpy", "scipy", "PIL", "rich", "safetensors"}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py"))


def name_of(path: Path) -> str:
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


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_imports_nothing_from_above(path: Path) -> None:
    own = ORDER.index(name_of(path))
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("sidactl.")} - {"__version__"}
    above = {name for name in ours if ORDER.index(name) >= own and name != name_of(path)}
    assert not above, f"{name_of(path)} imports {sorted(above)}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_has_a_floor_and_opens_with_a_sentence(path: Path) -> None:
    assert name_of(path) in ORDER
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert docstring.split("\n")[0].rstrip().endswith((".", ";", ",")) or "\n\n" in docstring


@pytest.mark.parametrize(
    "module", [*STANDARD_LIBRARY_ONLY, "artifacts", "features", "preflight", "scores", "ops", "inventory", "ui", "cli"]
)
def test_what_answers_quickly_imports_nothing_heavy_at_its_top(module: str) -> None:
    top = {name.split(".")[0] for name in imports(PACKAGE / f"{module}.py", top_level=True)}
    assert not top & HEAVY
