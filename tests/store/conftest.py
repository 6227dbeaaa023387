"""What tests of the run directory share."""

from pathlib import Path

import pytest

from sidactl.store import Store

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "run")


def object_path(store: Store, sha256: str) -> Path:
    return store.root / "objects" / sha256[:2] / sha256[2:]


def overwrite(store: Store, sha256: str, data: bytes) -> None:
    path = object_path(store, sha256)
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
