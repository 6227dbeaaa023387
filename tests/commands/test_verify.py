"""What verify says brings back what was damaged: the same objects, from the commands that made them."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import sidactl
from sidactl import fetch_teacher, fid, prepare_data
from sidactl.store import Store

COMMANDS: dict[str, Callable[[Path], object]] = {
    "teacher": lambda run: fetch_teacher("tiny-digits", run=run, force=True),
    "dataset": lambda run: prepare_data("tiny-digits", run=run, force=True),
    "detector": lambda run: fid("tiny-digits", num=64, run=run, device="cpu", force=True),
    "stats": lambda run: fid("tiny-digits", num=64, run=run, device="cpu", force=True),
}
SAID = {
    "teacher": "that made it (fetch-teacher)",
    "dataset": "that made it (prepare-data)",
    "detector": "that needs it",
    "stats": "that needs it",
}


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("broken", ["file", "manifest"])
def test_the_command_that_verify_names_brings_back_the_same(fresh_run: Path, kind: str, broken: str) -> None:
    store = Store.open(fresh_run)
    (artifact,) = store.artifacts(kind=kind)
    before = {path: path.read_bytes() for path in (fresh_run / "objects").rglob("*") if path.is_file()}
    name, entry = next(iter(artifact.files.items()))
    sha256 = entry.sha256 if broken == "file" else artifact.oid
    path = fresh_run / "objects" / sha256[:2] / sha256[2:]
    path.chmod(0o644)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    ((where, problem),) = sidactl.verify(run=fresh_run)
    assert where == sha256
    assert re.match(
        f"file {name} of {kind} {artifact.oid[:12]}" if broken == "file" else "(artifact (of ref|that answers)|input) ",
        problem,
    )
    said = re.fullmatch(r".*Remove it: (rm -rf \S+), then repeat the command (.*) with --force", problem)
    assert said
    assert said[2] == SAID[kind]
    subprocess.run(["bash", "-c", said[1]], check=True)
    COMMANDS[kind](fresh_run)
    assert sidactl.verify(run=fresh_run) == []
    after = {path: path.read_bytes() for path in before}
    assert after == before
