"""Commands killed at random moments, or out of space at random points: the same command again gives the same bytes.

Nearly all of it is slow: `pytest -m slow -s tests/test_kill.py` prints how many runs there were, and what became of
them. Kills before single file operations are in test_ops.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sidactl import inventory
from tests.web import Site, serving

BATCH_SIZE = 64
CHECKPOINT_EVERY = 128
COMMANDS = {
    "distill": (
        "distill --teacher tiny-digits --mode sida --device cpu --duration 640 --generator-from none "
        f"--adversarial-from 256 --batch-size {BATCH_SIZE} --evaluate-every 320 --evaluate-num 64 "
        f"--checkpoint-every {CHECKPOINT_EVERY}"
    ),
    "sample": "sample tiny-digits --num 300 --device cpu --name drawn",
    "fid": "fid tiny-digits --num 200 --device cpu",
    "prepare folder": "prepare-data {pictures} --resolution 16x16 --name pictures",
    "prepare zip": "prepare-data {zip} --transform center-crop --resolution 8x8",
    "prepare long": "prepare-data {large} --resolution 8x8 --workers 1",
    "fetch url": "fetch-teacher {url}",
    "fetch file": "fetch-teacher {file} --name fetched",
    "fetch builtin": "fetch-teacher tiny-digits",
}
FROM_PREPARED = ("distill", "sample")
"""begin with teacher and dataset in the run directory, so that their own work is what is killed"""

# How many runs of each; the first of those named in QUICK are no slow ones.
KILLS = {
    "distill": 20,
    "sample": 8,
    "fid": 8,
    "prepare folder": 6,
    "prepare zip": 4,
    "prepare long": 6,
    "fetch url": 10,
    "fetch file": 6,
    "fetch builtin": 2,
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

PAGE_BYTES = 4096
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


@dataclass
class Watched:
    """What a process did to its run directory."""

    first_sec: float = 0.0
    """from its start to its first change"""
    duration_sec: float = 0.0
    num_changes: int = 0
    peak_bytes: int = 0
    largest_bytes: int = 0


@dataclass(frozen=True)
class Whole:
    """A command that ran undisturbed: what it printed and left, and what it did meanwhile."""

    stdout: str
    kept: dict[str, bytes]
    watched: Watched


@dataclass(frozen=True)
class Saved:
    """What a process that was stopped had brought into safety."""

    images_checkpointed: int
    images_trained: int
    images_prepared: int
    bytes_downloaded: int

    @classmethod
    def of(cls, root: Path) -> "Saved":
        events = [json.loads(line) for path in root.glob("live/*/events.jsonl") for line in whole_lines(path)]
        states = [json.loads(path.read_bytes()) for path in root.glob("live/*/state.json")]
        partial_files = [path for path in root.glob("tmp/download-*") if not path.suffix]
        return cls(
            images_checkpointed=max((e["nimg"] for e in events if e["event"] == "checkpoint"), default=0),
            images_trained=max((e["nimg"] for e in events), default=0),
            images_prepared=sum(state["state"]["done"] for state in states),
            bytes_downloaded=sum(path.stat().st_size for path in partial_files),
        )


def whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


@contextmanager
def started(
    words: Sequence[str], root: Path, before: Callable[[], None] | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """A process of sidactl on a run directory, which does not outlive the block; `before` is called in it."""
    scratch = root.with_name("scratch")
    scratch.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SIDACTL_")}
    environment |= {"SIDACTL_RUN": str(root), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=before
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def sidactl(*words: str) -> list[str]:
    return [sys.executable, "-m", "sidactl", *words]


def run(words: Sequence[str], root: Path, before: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    with started(words, root, before) as process:
        stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def sizes(root: Path) -> dict[str, int]:
    """Every file of the run directory with its size."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            with suppress(FileNotFoundError):
                found[path] = os.stat(path).st_size
    return found


def used_bytes(found: dict[str, int]) -> int:
    return sum(-(-size // PAGE_BYTES) * PAGE_BYTES for size in found.values())


def watch(process: "subprocess.Popen[str]", root: Path, is_moment: Callable[[float, int], bool]) -> Watched:
    """Watches a process until it ends or is_moment(seconds since its first change, number of changes) says so."""
    watched, started_sec, last = Watched(), time.monotonic(), sizes(root)
    while process.poll() is None:
        found, now_sec = sizes(root), time.monotonic() - started_sec
        if found != last:
            watched.first_sec = watched.first_sec or now_sec
            watched.num_changes += 1
            watched.peak_bytes = max(watched.peak_bytes, used_bytes(found))
            watched.largest_bytes = max([watched.largest_bytes, *found.values()])
            last = found
        watched.duration_sec = now_sec
        if watched.first_sec and is_moment(now_sec - watched.first_sec, watched.num_changes):
            break
        time.sleep(0.005)
    return watched


def kept(root: Path) -> dict[str, bytes]:
    """Every object, ref and answer of the run directory."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for folder in ("objects", "refs", "asked")
        for path in root.glob(f"{folder}/**/*")
        if path.is_file()
    }


class Bench:
    """The commands with what they work on; each runs undisturbed once."""

    def __init__(self, folder: Path, prepared: Path, site: Site) -> None:
        self.folder, self.prepared, self.site = folder, prepared, site
        self._wholes: dict[str, Whole] = {}

    def words(self, command: str) -> list[str]:
        given = re.findall(r"{(\w+)}", COMMANDS[command])
        places = {name: getattr(self, name) for name in given}
        return sidactl(*(word.format(**places) for word in COMMANDS[command].split()))

    def begin(self, command: str, folder: Path) -> Path:
        """A run directory as the command finds it."""
        root = folder / "run"
        if command in FROM_PREPARED:
            shutil.copytree(self.prepared, root)
        else:
            root.mkdir(parents=True)
        return root

    def whole(self, command: str) -> Whole:
        if command not in self._wholes:
            root = self.begin(command, self.folder / command)
            with started(self.words(command), root) as process:
                watched = watch(process, root, lambda seconds, changes: False)
                stdout, stderr = process.communicate()
            assert process.returncode == 0, stderr
            self._wholes[command] = Whole(stdout, kept(root), watched)
        return self._wholes[command]

    @cached_property
    def pictures(self) -> Path:
        return self._pictures("pictures", count=60, side=128)

    @cached_property
    def large(self) -> Path:
        """Takes long enough to prepare that what was done is saved meanwhile."""
        folder = self._pictures("large", count=8, side=2048)
        for path in list(folder.glob("*/*.png")):
            for index in range(19):
                os.link(path, path.with_stem(f"{path.stem}-{index}"))
        return folder

    @cached_property
    def zip(self) -> Path:
        with zipfile.ZipFile(self.folder / "pictures.zip", "w") as archive:
            for path in sorted(self.pictures.glob("*/*.png")):
                archive.write(path, path.relative_to(self.pictures))
        return self.folder / "pictures.zip"

    @cached_property
    def file(self) -> Path:
        """A network that says itself what it is."""
        to = self.folder / "model.safetensors"
        return inventory.export("teacher/tiny-digits", to, form="safetensors", run=self.prepared)

    @cached_property
    def url(self) -> str:
        self.site.files["/model.safetensors"] = self.file.read_bytes()
        return f"{self.site.url}/model.safetensors"

    def _pictures(self, name: str, *, count: int, side: int) -> Path:
        draw = np.random.default_rng(side)
        for index in range(count):
            path = self.folder / name / str(index % 2) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (side, side), np.uint8)).save(path, compress_level=1)
        return self.folder / name


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Iterator[Bench]:
    with serving({}) as site:
        site.piece_bytes, site.pause_sec = 1 << 14, 0.02
        yield Bench(tmp_path_factory.mktemp("bench"), prepared, site)


@pytest.fixture(scope="module")
def tally() -> Iterator[Counter[str]]:
    """Counts what happened and prints it at the end."""
    counts: Counter[str] = Counter()
    yield counts
    print("\n" + "\n".join(f"{name}: {count}" for name, count in counts.items()))


def assert_clean(root: Path) -> None:
    done = run(sidactl("verify"), root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "no problem found\n")


def told_number(pattern: str, stderr: str) -> int:
    """The first number that the pattern finds; 0 for none."""
    found = re.search(pattern, stderr, re.MULTILINE)
    return int(found[1].replace(",", "")) if found else 0


def assert_goes_on(bench: Bench, command: str, root: Path, tally: Counter[str]) -> None:
    """The same command again ends as the undisturbed one did, and goes on from what was saved."""
    assert_clean(root)
    saved, whole, num_requests = Saved.of(root), bench.whole(command), len(bench.site.requests)
    done = run(bench.words(command), root)
    assert done.returncode == 0, done.stderr
    assert done.stdout == whole.stdout
    assert kept(root) == whole.kept
    assert_clean(root)
    nimg = told_number(r"^going on from the checkpoint at ([\d,]+) images$", done.stderr)
    if re.search("^distill ", done.stderr, re.MULTILINE):  # else it had all been done
        assert nimg >= max(saved.images_checkpointed, saved.images_trained - CHECKPOINT_EVERY)
    first = told_number(r"^prepare-data: ([\d,]+) / ", done.stderr)
    if first and saved.images_prepared:
        assert first > saved.images_prepared
    asked = [request for _, request, _ in bench.site.requests[num_requests:] if request]
    if command == "fetch url" and 0 < saved.bytes_downloaded < bench.file.stat().st_size:
        assert asked == [f"bytes={saved.bytes_downloaded}-"]

    # What takes room goes; an empty lock may stay.
    inventory.gc(run=root)
    left = [*root.glob("live/*"), *root.glob("tmp/*"), *root.with_name("scratch").rglob("*")]
    assert [path for path in left if path.parent.name == "live" or (path.is_file() and path.stat().st_size)] == []
    tally["repeated to the same bytes, with nothing lost and verify clean"] += 1
    tally["  of these going on from what was saved"] += nimg > 0 or first > 1 or bool(asked)


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
    chance, root = random.Random(f"{command} {seed}"), bench.begin(command, tmp_path)
    whole = bench.whole(command).watched
    working_sec = whole.duration_sec - whole.first_sec
    tally["runs with kills"] += 1
    num_killed = 0
    for _ in range(chance.choice((1, 1, 2)) if seed else 1):
        # By time most moments fall into the work, by changes into the storing of what came out.
        part = chance.random()
        by_time = chance.random() < 0.6

        def is_moment(seconds: float, changes: int, part: float = part, by_time: bool = by_time) -> bool:
            return seconds >= part * working_sec if by_time else changes > part * whole.num_changes

        with started(bench.words(command), root) as process:
            watch(process, root, is_moment)
            process.kill()
            _, stderr = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), stderr
        num_killed += process.returncode != 0
        assert_clean(root)
    tally["  of these really killed"] += num_killed > 0
    tally["  kills"] += num_killed
    assert_goes_on(bench, command, root, tally)


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
    done = run([*in_little_room, *bench.words(command)], root)
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
    done = run(bench.words(command), root, partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)))
    tally["runs with a limit on files"] += 1
    if done.returncode:
        tally["  of these over the limit"] += 1
        assert_tells_that_there_is_no_room(done)
    assert_goes_on(bench, command, root, tally)
