"""Commands killed at random moments, or out of space at random points: the same command again gives the same bytes.

Nearly all of it is slow: `pytest -m slow -s tests/test_kill.py` prints how many runs there were, and what became of
them; `python -m tests.kills` makes as many as are asked for. Kills before single file
operations are in commands/test_running.py.
"""

import random
import re
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.kills import PAGE_BYTES, SLOWLY, Bench, assert_goes_on, kill_and_go_on, run, sizes, used_bytes
from tests.web import serving

# How many runs of each; the first of those named in QUICK are no slow ones.
KILLS = {
    "distill": 20,
    "finetune-sid2a": 4,
    "train-teacher": 4,
    "sample": 8,
    "fid": 8,
    "prec-recall": 2,
    "evaluate": 2,
    "prepare folder": 6,
    "prepare zip": 4,
    "prepare long": 6,
    "prepare latents": 4,
    "fetch url": 10,
    "fetch file": 6,
    "fetch builtin": 2,
    "export files": 3,
    "export png": 2,
    "export npz": 2,
    "export safetensors": 2,
    "export state-dict": 2,
    "gc": 4,
}
FULL_DISKS = {
    "distill": 8,
    "sample": 4,
    "fid": 5,
    "prepare folder": 4,
    "prepare zip": 2,
    "fetch url": 4,
    "fetch file": 3,
}
LIMITS = {"distill": 4, "sample": 3, "fid": 3, "prepare folder": 2, "fetch url": 3, "fetch file": 1}
QUICK_KILLS = ("distill", "prepare folder", "fetch url")
QUICK_FULL_DISKS = ("prepare folder",)
QUICK_LIMITS = ("sample",)

FULL = re.compile(r"(No space left on device|File too large).*(Free some space|Mend that)")
# Mounts a small file system, runs a command there, and brings what it left to where there is room again.
IN_LITTLE_ROOM = """
set -e
root="$1" kept="$2" bytes="$3"; shift 3
mount -t tmpfs -o size=1g none "$root"
cp -a "$kept/." "$root"
mount -o "remount,size=$bytes" "$root"
status=0; "$@" || status=$?
rm -r "$kept"
cp -a "$root" "$kept"
exit "$status"
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Iterator[Bench]:
    with serving({}) as site:
        site.piece_bytes, site.pause_sec = SLOWLY
        yield Bench(tmp_path_factory.mktemp("bench"), prepared, site)


@pytest.fixture(scope="module")
def tally() -> Iterator[Counter[str]]:
    """Counts what happened and prints it at the end."""
    counts: Counter[str] = Counter()
    yield counts
    print("\n" + "\n".join(f"{name}: {count}" for name, count in counts.items()))


def params(counts: dict[str, int], quick: Sequence[str]) -> list[object]:
    """(command, seed) of so many runs of each; all but the first of the quick ones are slow."""
    return [
        pytest.param(command, seed, marks=[] if seed == 0 and command in quick else [pytest.mark.slow])
        for command, count in counts.items()
        for seed in range(count)
    ]


@pytest.mark.parametrize(("command", "seed"), params(KILLS, QUICK_KILLS))
def test_killed_at_random_moments_the_same_command_goes_on_to_the_same_bytes(
    bench: Bench, tally: Counter[str], tmp_path: Path, command: str, seed: int
) -> None:
    kill_and_go_on(bench, command, seed, tmp_path, tally)


def assert_tells_that_there_is_no_room(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode in (1, 2), done.stderr
    assert done.stdout == ""
    *before, error = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert FULL.search(error)
    assert not [line for line in before if re.search("error|exception|traceback|warning", line, re.IGNORECASE)]


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where file systems cannot be mounted."""
    folder = tmp_path_factory.mktemp("mount")
    try:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("a small file system needs unshare and mount, which are not here")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize(("command", "seed"), params(FULL_DISKS, QUICK_FULL_DISKS))
def test_on_a_full_disk_a_command_says_so_and_with_room_goes_on_to_the_same_bytes(
    bench: Bench, tally: Counter[str], tmp_path: Path, command: str, seed: int
) -> None:
    chance, root = random.Random(f"{command} {seed}"), bench.begin(command, tmp_path)
    least, most = used_bytes(sizes(root)), bench.whole(command).watched.peak_bytes
    room = max(PAGE_BYTES, least + int(chance.random() * (most - least)) // PAGE_BYTES * PAGE_BYTES)
    small = shutil.move(root, root.with_name("kept"))
    root.mkdir()
    in_little_room = ["unshare", "-rm", "sh", "-c", IN_LITTLE_ROOM, "sh", str(root), str(small), str(room)]
    done = run([*in_little_room, *bench.words(command, root)], root)
    root.rmdir()
    shutil.move(small, root)
    tally["runs on a small file system"] += 1
    if done.returncode:
        tally["  of these out of space"] += 1
        assert_tells_that_there_is_no_room(done)
    assert_goes_on(bench, command, root, tally)


@pytest.mark.parametrize(("command", "seed"), params(LIMITS, QUICK_LIMITS))
def test_where_files_cannot_grow_a_command_says_so_and_with_room_goes_on_to_the_same_bytes(
    bench: Bench, tally: Counter[str], tmp_path: Path, command: str, seed: int
) -> None:
    chance, root = random.Random(f"{command} {seed}"), bench.begin(command, tmp_path)
    limit = int(chance.random() * bench.whole(command).watched.largest_bytes)
    done = run(bench.words(command, root), root, partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)))
    tally["runs with a limit on files"] += 1
    if done.returncode:
        tally["  of these over the limit"] += 1
        assert_tells_that_there_is_no_room(done)
    assert_goes_on(bench, command, root, tally)
