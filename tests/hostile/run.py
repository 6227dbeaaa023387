"""Tries files at their doors, each in a process of its own that may take 2 GB and 20 s; prints what was wrong.

python -m tests.hostile.run corpus [DOOR]     all of the corpus, or what is for one door
python -m tests.hostile.run some              every twelfth of the corpus
python -m tests.hostile.run fuzz COUNT [SEED] sound files with seeded damage
"""

import ctypes
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sidactl.errors import SidaError
from tests.hostile.corpus import Content, corpus
from tests.hostile.doors import DOORS

MAX_BYTES, MAX_SECONDS = 2 << 30, 20
HUNG_SECONDS = 200
"""by the clock: a file whose reader waits for ever takes no time of the processor, and a busy machine has little"""


class Outcome(NamedTuple):
    """What became of a file: read (then as what), refused (in which words), or a fault (which)."""

    kind: str
    told: str


def attempt(door: str, content: Content) -> Outcome:
    """Enters a door with a file, in a forked process."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receiving)
        _enter(door, content, folder, sending)
    os.close(sending)
    told, ends = b"", time.monotonic() + HUNG_SECONDS + 1
    while select.select([receiving], [], [], max(0, ends - time.monotonic()))[0] and (
        part := os.read(receiving, 65536)
    ):
        told += part
    os.close(receiving)
    if not told:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    left = [path.name for path in folder.rglob("OVERWRITTEN")] + ["OVERWRITTEN"] * Path("OVERWRITTEN").exists()
    shutil.rmtree(folder, ignore_errors=True)
    if left:
        return Outcome("executed", "a file that the content named was written")
    if not told:
        return Outcome("ended", f"status {status}, or no answer in {HUNG_SECONDS} s")
    return Outcome(*json.loads(told))


def _enter(door: str, content: Content, folder: Path, sending: int) -> None:
    os.chdir(folder)
    sink = os.open("output", os.O_CREAT | os.O_WRONLY)
    os.dup2(sink, 1), os.dup2(sink, 2)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # not to outlive the parent
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    path = folder / door
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MAX_BYTES, resource.RLIM_INFINITY))
    signal.alarm(HUNG_SECONDS)
    outcome = Outcome("read", "")
    started = time.process_time()
    try:
        outcome = Outcome("read", str(DOORS[door].enter(path, folder / "run"))[:2000])
    except SidaError as error:
        text = str(error).replace(str(folder), "FOLDER")  # whose name is drawn, and may have a bug in it
        outcome = Outcome("refused" if text.isprintable() and "bug" not in text else "unprintable", text[:2000])
    except BaseException:
        outcome = Outcome("fault", traceback.format_exc()[-2000:])
    signal.alarm(0)
    if (seconds := time.process_time() - started) > MAX_SECONDS:
        outcome = Outcome("slow", f"{seconds:.0f} s, {outcome}")
    os.write(sending, json.dumps(outcome).encode())
    os._exit(0)


def damaged(sound: bytes, chance: random.Random) -> bytes:
    """One or a few seeded changes: bits, bytes, a cut, a part repeated, removed or zeroed, another's length."""
    data = bytearray(sound)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at = chance.randrange(len(data)) if data else 0
        size = chance.choice((1, 2, 4, 8, 64, 512))
        match chance.randrange(8) if data else 7:
            case 0 | 1:
                data[at] ^= 1 << chance.randrange(8)
            case 2:
                data[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 3:
                del data[at:]
            case 4:
                del data[at : at + size]
            case 5:
                data[at:at] = data[at : at + size]
            case 6:
                data[at : at + size] = bytes(len(data[at : at + size]))
            case 7:
                data[at:at] = chance.randbytes(size)
    return bytes(data)


def fuzz(count: int, seed: int) -> Iterator[tuple[str, str, Content]]:
    for number in range(count):
        name = list(DOORS)[number % len(DOORS)]
        yield name, f"damage {seed}-{number}", damaged(sound(name), random.Random(f"{seed}-{number}"))


@cache
def sound(door: str) -> bytes:
    return DOORS[door].sound()


@cache
def as_sound(door: str) -> Outcome:
    """What a file with no damage is read as."""
    return attempt(door, sound(door))


def warm_up(names: Iterable[str]) -> None:
    """Enters doors with sound files: what is imported or made at first use is then there for all forked processes."""
    for name in names:
        with tempfile.TemporaryDirectory(prefix="hostile-") as folder, suppress(SidaError):
            path = Path(folder) / name
            path.write_bytes(sound(name))
            DOORS[name].enter(path, Path(folder) / "run")


def main(words: list[str]) -> int:
    torch.set_num_threads(1)
    is_verbose = "-v" in words
    words = [word for word in words if word != "-v"]
    is_fuzz = words[0] == "fuzz"
    if not is_fuzz:
        cases = [(d, n, c) for (d, n), c in corpus().items() if len(words) < 2 or d == words[1]]
        cases = cases[:: 12 if words[0] == "some" else 1]
    else:
        cases = list(fuzz(int(words[1]), int(words[2]) if len(words) > 2 else 0))
    tally: Counter[str] = Counter()
    faults: list[Any] = []
    warm_up({door for door, _, _ in cases})
    for door, name, content in cases:
        outcome = attempt(door, content)
        if is_fuzz and DOORS[door].is_checked and outcome.kind == "read" and outcome != as_sound(door):
            outcome = Outcome("other", f"{outcome.told}, without damage {as_sound(door).told}")
        tally[outcome.kind] += 1
        if outcome.kind not in ("read", "refused"):
            faults.append([door, name, *outcome])
            print(f"{door}: {name}: {outcome.kind}\n{outcome.told}", file=sys.stderr, flush=True)
        elif is_verbose:
            print(f"{door}: {name}: {outcome.kind}: {outcome.told}", flush=True)
    print(json.dumps({"tried": len(cases), "of": dict(tally), "faults": len(faults)}))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
