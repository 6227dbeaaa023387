"""Commands killed at random moments: the same command again gives the same bytes. For test_kill.py, or by thousands.

`python -m tests.kills COUNT --results FILE` goes on until COUNT processes were really killed, over all commands, the
quick ones more often. A line of FILE is a finished run; those in it are not repeated. Failed runs are told by command
and seed, with what they left.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

import sidactl
from sidactl.store import Store, rehash
from tests.web import Site, serving

BATCH_SIZE = 64
CHECKPOINT_EVERY = 128
COMMANDS = {
    "distill": (
        "distill --teacher tiny-digits --mode sida --device cpu --duration 448 --generator-from none "
        f"--adversarial-from 256 --batch-size {BATCH_SIZE} --evaluate-every 256 --evaluate-num 64 "
        f"--checkpoint-every {CHECKPOINT_EVERY}"
    ),
    "finetune-sid2a": (
        "finetune-sid2a --teacher tiny-digits --generator generator/start --device cpu --duration 512 "
        f"--generator-from 128 --adversarial-from 256 --batch-size {BATCH_SIZE} --evaluate-every 256 --evaluate-num 64 "
        f"--checkpoint-every {CHECKPOINT_EVERY}"
    ),
    "train-teacher": "train-teacher tiny-digits --name mine --device cpu --duration 1280 --batch-size 64",
    "sample": "sample tiny-digits --num 300 --device cpu --name drawn",
    "fid": "fid tiny-digits --num 200 --device cpu",
    "prec-recall": "prec-recall tiny-digits --num 200 --device cpu",
    "evaluate": "evaluate tiny-digits --num 200 --device cpu",
    "prepare folder": "prepare-data {pictures} --resolution 16x16 --name pictures",
    "prepare zip": "prepare-data {zip} --transform center-crop --resolution 8x8",
    "prepare long": "prepare-data {large} --resolution 8x8 --workers 1",
    "prepare latents": "prepare-data {large} --resolution 16x16 --workers 1 --latents --device cpu",
    "fetch url": "fetch-teacher {url}",
    "fetch file": "fetch-teacher {file} --name fetched",
    "fetch builtin": "fetch-teacher tiny-digits",
    "export files": "export samples/drawn {out}/it --force",
    "export png": "export samples/drawn {out}/it --to png --force",
    "export npz": "export samples/drawn {out}/it --to npz --force",
    "export safetensors": "export generator/start {out}/it --to safetensors --force",
    "export state-dict": "export generator/start {out}/it --to state-dict --force",
    "gc": "gc",
}
FROM_PREPARED = ("distill", "train-teacher", "sample", "prec-recall", "evaluate")
"""begin with teacher and dataset in the run directory, so that their own work is what is killed"""
FROM_FURNISHED = ("finetune-sid2a", *(name for name in COMMANDS if name.startswith("export ")))
"""begin with a generator and samples, too"""
LONG = (
    "distill",
    "finetune-sid2a",
    "train-teacher",
    "fid",
    "prec-recall",
    "evaluate",
    "prepare long",
    "prepare latents",
)
"""take many seconds, so that of thousand kills fewer are theirs"""

PAGE_BYTES = 4096
SLOWLY = 1 << 14, 0.02
"""bytes of a piece, and seconds between two, in which networks are downloaded"""


@dataclass
class Watched:
    """What a process did to its run directory."""

    first_sec: float = 0.0
    """from its start to its first change"""
    duration_sec: float = 0.0
    num_changes: int = 0
    """as seen from outside"""
    peak_bytes: int = 0
    largest_bytes: int = 0


@dataclass(frozen=True)
class Whole:
    """A command that ran undisturbed: what it printed and left, and what it did meanwhile."""

    stdout: str
    kept: dict[str, bytes]
    watched: Watched
    num_operations: int
    """of its own that change the disk"""


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
    scratch.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SIDACTL_")}
    environment |= {"SIDACTL_RUN": str(root), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=before
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def command_line(*words: str, fatal: int | None = None) -> list[str]:
    """A command line; fatal: the change of the disk before which it dies, none for 0, and then they are counted."""
    if "--latents" in words:  # which takes a stand-in of the VAE there
        fatal = fatal or 0
    return [sys.executable, "-m", *(["sidactl"] if fatal is None else ["tests.mortal", str(fatal)]), *words]


def run(words: Sequence[str], root: Path, before: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    with started(words, root, before) as process:
        stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def sizes(root: Path) -> dict[str, int]:
    """Every file of the run directory, and of what is exported from it, with its size."""
    found = {}
    for place in (root, outside(root)):
        for folder, _, names in os.walk(place):
            for name in names:
                path = os.path.join(folder, name)
                with suppress(FileNotFoundError):
                    found[path] = os.stat(path).st_size
    return found


def outside(root: Path) -> Path:
    """Where exports of a run directory go."""
    return root.with_name("out")


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
    """Every object, ref and answer of the run directory, and all that was exported from it."""
    return {
        str(path.relative_to(root.parent)): path.read_bytes()
        for folder in (root / "objects", root / "refs", root / "asked", outside(root))
        for path in folder.rglob("*")
        if path.is_file()
    }


class Bench:
    """The commands with what they work on; each runs undisturbed once."""

    def __init__(self, folder: Path, prepared: Path, site: Site) -> None:
        self.folder, self.prepared, self.site = folder, prepared, site
        self._wholes: dict[str, Whole] = {}

    def words(self, command: str, root: Path, fatal: int | None = None) -> list[str]:
        given = re.findall(r"{(\w+)}", COMMANDS[command])
        places = {name: outside(root) if name == "out" else getattr(self, name) for name in given}
        return command_line(*(word.format(**places) for word in COMMANDS[command].split()), fatal=fatal)

    def begin(self, command: str, folder: Path) -> Path:
        """A run directory as the command finds it."""
        root = folder / "run"
        if command in FROM_PREPARED:
            shutil.copytree(self.prepared, root)
        elif command in FROM_FURNISHED:
            shutil.copytree(self.furnished, root)
        elif command == "gc":
            shutil.copytree(self.furnished, root)
            for kind in ("generator", "samples"):
                shutil.rmtree(root / "refs" / kind)
            for path in root.glob("objects/**/*"):
                os.utime(path, (0, 0))  # else gc spares what may be about to get a name
        else:
            root.mkdir(parents=True)
        outside(root).mkdir()
        return root

    def whole(self, command: str) -> Whole:
        if command not in self._wholes:
            root = self.begin(command, self.folder / command)
            with started(self.words(command, root, fatal=0), root) as process:
                watched = watch(process, root, lambda seconds, changes: False)
                stdout, stderr = process.communicate()
            assert process.returncode == 0, stderr
            num_operations = told_number(r"^(\d+) changes$", stderr)
            self._wholes[command] = Whole(plain(stdout, root), kept(root), watched, num_operations)
        return self._wholes[command]

    @cached_property
    def furnished(self) -> Path:
        """A run directory with a generator and samples, too."""
        root = Path(shutil.copytree(self.prepared, self.folder / "furnished" / "run"))
        for line in (
            "distill --teacher tiny-digits --mode sid --device cpu --duration 96 --generator-from none --batch-size 32 "
            "--no-score --teacher-score none --name start",
            "sample tiny-digits --num 40 --device cpu --name drawn",
        ):
            done = run(command_line(*line.split()), root)
            assert done.returncode == 0, done.stderr
        return root

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
        return sidactl.export("teacher/tiny-digits", to, form="safetensors", run=self.prepared)

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


def assert_clean(root: Path) -> None:
    assert list(rehash(Store.open(root))) == []


def plain(stdout: str, root: Path) -> str:
    """What a command printed, without the place where it ran."""
    return stdout.replace(str(root.parent), "")


def told_number(pattern: str, stderr: str) -> int:
    """The first number that the pattern finds; 0 for none."""
    found = re.search(pattern, stderr, re.MULTILINE)
    return int(found[1].replace(",", "")) if found else 0


def assert_goes_on(bench: Bench, command: str, root: Path, tally: Counter[str]) -> None:
    """The same command again ends as the undisturbed one did, and goes on from what was saved."""
    assert_clean(root)
    saved, whole, num_requests = Saved.of(root), bench.whole(command), len(bench.site.requests)
    done = run(bench.words(command, root), root)
    assert done.returncode == 0, done.stderr
    if command == "gc":  # it prints what was left to remove
        assert {*done.stdout.splitlines()} <= {*whole.stdout.splitlines()}
    else:
        assert plain(done.stdout, root) == whole.stdout
    assert kept(root) == whole.kept
    assert_clean(root)
    nimg = told_number(r"^going on from the checkpoint at ([\d,]+) images$", done.stderr)
    if re.search("^(distill|train-teacher) ", done.stderr, re.MULTILINE):  # else it had all been done
        assert nimg >= max(saved.images_checkpointed, saved.images_trained - CHECKPOINT_EVERY)
    first = told_number(r"^[\d:]+ prepare-data: ([\d,]+) / ", done.stderr)
    if first and saved.images_prepared:
        assert first > saved.images_prepared
    asked = [request for _, request, _ in bench.site.requests[num_requests:] if request]
    if command == "fetch url" and 0 < saved.bytes_downloaded < bench.file.stat().st_size:
        assert asked == [f"bytes={saved.bytes_downloaded}-"]

    # What takes room goes; an empty lock may stay.
    sidactl.gc(run=root)
    left = [*root.glob("live/*"), *root.glob("tmp/*"), *root.with_name("scratch").rglob("*")]
    assert [path for path in left if path.parent.name == "live" or (path.is_file() and path.stat().st_size)] == []
    tally["repeated to the same bytes, with nothing lost and verify clean"] += 1
    tally["  of these going on from what was saved"] += nimg > 0 or (first and saved.images_prepared) > 0 or bool(asked)


def kill_and_go_on(bench: Bench, command: str, seed: int, folder: Path, tally: Counter[str]) -> int:
    """Kills a command at random moments, and repeats it; how often it was really killed.

    A quick one several times, since what it leaves is looked at once.
    """
    chance, root = random.Random(f"{command} {seed}"), bench.begin(command, folder)
    whole = bench.whole(command)
    working_sec = whole.watched.duration_sec - whole.watched.first_sec
    tally["runs with kills"] += 1
    num_killed = 0
    for _ in range(chance.randint(1, 2 if command in LONG else 5) if seed else 1):
        # By time most moments fall into the work, by changes and operations into the storing of what came out.
        part, way = chance.random(), chance.choice(("time", "time", "changes", "operation"))
        fatal = 1 + int(part * whole.num_operations) if way == "operation" else None

        def is_moment(seconds: float, changes: int, part: float = part, way: str = way) -> bool:
            if way == "time":
                return seconds >= part * working_sec
            return way == "changes" and changes > part * whole.watched.num_changes

        with started(bench.words(command, root, fatal), root) as process:
            watch(process, root, is_moment)
            if fatal is None:
                process.kill()
            _, stderr = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), stderr
        num_killed += process.returncode != 0
        assert_clean(root)
        if command == "gc":
            assert whole.kept.items() <= kept(root).items()
        if process.returncode == 0:
            break
    tally["  of these really killed"] += num_killed > 0
    tally["  kills"] += num_killed
    assert_goes_on(bench, command, root, tally)
    return num_killed


def order() -> Iterator[tuple[str, int]]:
    """Runs without end, as (command, seed), always the same: of long commands one for four of the quick."""
    chance, num_runs = random.Random(0), Counter[str]()
    while True:
        (command,) = chance.choices([*COMMANDS], [1 if name in LONG else 4 for name in COMMANDS])
        yield command, num_runs[command]
        num_runs[command] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="kills, with those that are in FILE")
    parser.add_argument("--results", type=Path, required=True, metavar="FILE")
    asked = parser.parse_args()
    asked.results.touch()
    runs = [json.loads(line) for line in whole_lines(asked.results)]
    known, num_killed = {(each["command"], each["seed"]) for each in runs}, sum(each["killed"] for each in runs)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    done = run(command_line("fid", "tiny-digits", "--num", "64", "--device", "cpu"), folder / "prepared" / "run")
    assert done.returncode == 0, done.stderr
    with serving({}) as site, asked.results.open("a") as file:
        site.piece_bytes, site.pause_sec = SLOWLY
        bench = Bench(folder / "bench", folder / "prepared" / "run", site)
        for command, seed in order():
            if num_killed >= asked.count:
                break
            if (command, seed) in known:
                continue
            tally, started_sec, place = Counter[str](), time.monotonic(), folder / f"{command} {seed}".replace(" ", "-")
            try:
                kill_and_go_on(bench, command, seed, place, tally)
                outcome = "same bytes"
                shutil.rmtree(place)
            except Exception as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                outcome = f"line {frame.lineno}, {frame.line}: {type(error).__name__}: {error}"[:2000]
                print(f"failed: {command!r} with seed {seed}, see {place}: {outcome}", file=sys.stderr, flush=True)
            record = {"command": command, "seed": seed, "killed": tally["  kills"], "outcome": outcome}
            runs.append(record | {"seconds": round(time.monotonic() - started_sec, 1)})
            file.write(json.dumps(runs[-1]) + "\n")
            file.flush()
            num_killed += record["killed"]
    failed = [each for each in runs if each["outcome"] != "same bytes"]
    print(f"{'command':20}{'runs':>6}{'kills':>7}{'failed':>8}")
    for command in (*COMMANDS, "all"):
        own = [each for each in runs if command in (each["command"], "all")]
        kills, failures = sum(each["killed"] for each in own), sum(each in failed for each in own)
        print(f"{command:20}{len(own):6}{kills:7}{failures:8}")
    for each in failed:
        print(f"failed: {each['command']!r} with seed {each['seed']}")
    if not failed:
        shutil.rmtree(folder)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
