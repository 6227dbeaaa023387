"""Where the golden reference numbers are: beside the checkout, in `../shared`, or where $SIDACTL_GOLDEN says."""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("SIDACTL_GOLDEN") or Path(__file__).resolve().parents[2] / "shared")


def _path(folder: str, name: str) -> Path:
    if not (ROOT / folder).is_dir():
        pytest.skip(f"golden reference data not found: no folder {folder!r} in ../shared beside the checkout")
    path = ROOT / folder / name
    assert path.exists(), f"golden file missing: {folder}/{name}"
    return path


def golden(name: str) -> Path:
    """Path of a file of networks, losses, trajectories, samplers or augmentation; skips where there is none."""
    return _path("golden", name)


def golden_metrics(name: str) -> Path:
    """Path of a file of metrics, detectors or datasets; skips where there is none."""
    return _path("golden_metrics", name)


def golden_objectives(name: str) -> Path:
    """Path of a file of the methods beside the SiD family; skips where there is none."""
    return _path("golden_objectives", name)
