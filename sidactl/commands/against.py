"""How fast a step of ours is beside the published training script that a user has: in turn, as a ratio with its spread.

The script is a program of somebody else: it is started by the user's own command, in a process of its own, and all that
is taken from it are the lines that it prints. Nothing of it is imported or read.
"""

import dataclasses
import gc
import os
import queue
import re
import shlex
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sidactl import catalog
from sidactl.engine import devices, meter, threads
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.recipes import Recipe, SamplingForm, SidRecipe
from sidactl.text import visible
from sidactl.training import made_up

_PACE = re.compile(r"\bsec/kimg\s+(\d+(?:\.\d+)?)")
_SEEN = re.compile(r"(?<![/\w])kimg\s+(\d+(?:\.\d+)?)")

_WARM_UP_STEPS = 2

_GRACE_SEC = 40.0
"""between SIGTERM and SIGKILL: torchrun takes 30 s to end the processes that it has started"""

_MOST_SHOWN = 200
"""characters of a program's last line in an error"""


class Tick(NamedTuple):
    """A line of progress. sec_per_kimg: seconds per 1,000 images since the one before; nimg: seen so far, if told."""

    sec_per_kimg: float
    nimg: int | None


def tick_of(line: str) -> Tick | None:
    """What a line of progress says, such as `tick 3  kimg 30.2  sec/kimg 22.3`; None for any other line."""
    pace, seen = _PACE.search(line), _SEEN.search(line)
    if not pace or not float(pace[1]):
        return None
    return Tick(float(pace[1]), round(1000 * float(seen[1])) if seen else None)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Seconds per 1,000 images, theirs and ours in turn; ratios: theirs over ours, above 1 where ours is faster."""

    teacher: str
    mode: str
    stage: str
    """what was compared, as the images that their lines tell of say by the catalog's recipe"""
    setting: SamplingForm
    """of ours"""
    batch_size: int
    """images per pass of ours"""
    num_rounds: int
    device: str
    command: str
    theirs: Sequence[float]
    ours: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        return [theirs / ours for theirs, ours in zip(self.theirs, self.ours, strict=True)]

    def tables(self) -> Iterator[tuple[Sequence[str], Sequence[Sequence[str | float | None]], str]]:
        """Columns, rows and title of what people read."""
        title = f"{self.teacher}, {self.mode}, stage {self.stage}: theirs by {self.command}; ours {self.setting.name}, "
        title += f"{self.num_rounds} x {self.batch_size} images a step, {self.device}"
        rows: list[Sequence[str | float | None]] = []
        for name, values in (("theirs", self.theirs), ("ours", self.ours), ("theirs / ours", self.ratios)):
            rows.append([name, *(float(f"{n:.4g}") for n in (statistics.median(values), min(values), max(values)))])
        yield ["s/1k images", "median", "lowest", "highest"], rows, title

    def to_json(self) -> dict[str, Any]:
        """JSON values, the ratios and their median with them."""
        return {**dataclasses.asdict(self), "ratios": self.ratios, "ratio": statistics.median(self.ratios)}


def run(
    path: Path,
    command: str | None,
    teacher: str,
    *,
    mode: str = "sida",
    batch_size: int | None = None,
    num_rounds: int = 1,
    num_steps: int = 3,
    form: Mapping[str, Any] | None = None,
    device: str | None = None,
    within_sec: float = 900.0,
    least_sec: float = 20.0,
    tell: Callable[[str], None] = lambda message: None,
) -> Comparison:
    """Starts the command in the folder `path`, reads its pace, ends it, and times our step for as long; num_steps.

    Of every start the first line of progress is of its warming up and does not count, nor does one that two stages
    share; those that follow do, until they cover least_sec. within_sec: how long that may take. form: fields of
    SamplingForm for ours, whose precision is the recipe's if not given. Their pace is that of all their processes, ours
    of one device.
    Raises SidaError for a folder or script that is not there, a command that cannot be started or prints no pace in
    time, and, with exit code 1, where it ends before.
    """
    import torch

    words = _words(path, command)
    recipe, spec = made_up.recipe_of(teacher, mode, batch_size, num_rounds, num_steps, {})
    if not within_sec > 0:
        raise SidaError(f"--against-within must be above 0, got {within_sec:g}", "Pass it in seconds, such as 900.")
    published = next(r for name, r in catalog.TEACHERS[teacher].recipes.items() if name == mode)
    setting = SamplingForm(**{"precision": recipe.precision, **(form or {})})
    chosen = devices.pick_device(device)
    devices.keep_memory()  # as the loop does
    clock = partial(meter.when_done, time.perf_counter, chosen)
    stage, theirs, ours = "", list[float](), list[float]()
    for index in range(num_steps):
        tell(f"theirs, {index + 1} of {num_steps}: {shlex.join(words)}")
        pace, seconds, theirs_stage = _their_pace(words, path, published, within_sec, least_sec)
        if stage not in ("", theirs_stage):
            raise SidaError(
                f"all starts must be in the same stage, got {stage} and {theirs_stage}",
                "Have the command go on from the same state every time.",
            )
        stage = theirs_stage
        tell(f"ours, {index + 1} of {num_steps}: stage {stage}, beside {pace:g} s per 1,000 images")
        training = made_up.distillation_of(*made_up.in_setting(recipe, setting), spec, chosen)
        with threads.one_thread_if(threads.is_small(training.teacher)):
            spent = _timed(partial(made_up.step, training, stage), seconds, clock)
        theirs.append(pace)
        ours.append(1000 * spent / recipe.batch_size)
        del training  # whoever comes next finds the device's memory as empty as we did
        gc.collect()
        torch.cuda.empty_cache()
    return Comparison(
        teacher=teacher,
        mode=mode,
        stage=stage,
        setting=setting,
        batch_size=recipe.batch_size // num_rounds,
        num_rounds=num_rounds,
        device=str(chosen),
        command=shlex.join(words),
        theirs=theirs,
        ours=ours,
    )


def _timed(step: Callable[[], None], least_sec: float, clock: meter.Clock) -> float:
    """The median of what steps take, of as many as fill this time."""
    for _ in range(_WARM_UP_STEPS):
        step()
    spent: list[float] = []
    while sum(spent) < least_sec or not spent:
        spent.append(meter.seconds_of(step, clock))
    return statistics.median(spent)


def _words(path: Path, command: str | None) -> list[str]:
    """The command, split; raises SidaError unless the folder and the scripts that it names are there."""
    if not path.is_dir():
        raise SidaError(
            f"--against must be eager or the folder of a checkout, got {str(path)!r}, which is no folder",
            "Clone the published code, and name that folder.",
        )
    scripts = sorted(script.name for script in path.glob("*.py"))
    if command is None:
        there = f" (in it: {', '.join(scripts[:8])})" if scripts else ""
        raise SidaError(
            "--against FOLDER needs --against-command, since how the published script is run is not known here",
            f"Pass the command that you train with in that folder, in quotes, on one GPU{there}.",
        )
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise SidaError(
            f"--against-command must be a command as a shell takes it, got {command!r} ({error})", "See its quotes."
        ) from None
    if not words:
        raise SidaError("--against-command must be a command, got nothing", "Pass it in quotes.")
    named = [word for word in words if word.endswith(".py") and not word.startswith("-")]
    missing = [name for name in named if not (path / name).is_file()]
    if missing:
        there = f"it has {', '.join(scripts[:8])}" if scripts else "it has no script at all"
        raise SidaError(f"no script {missing[0]} in {path}", f"Name one of that folder in --against-command; {there}.")
    return words


def _their_pace(
    words: Sequence[str], path: Path, published: Recipe, within_sec: float, least_sec: float
) -> tuple[float, float, str]:
    """Seconds per 1,000 images, a median of the lines that count; the seconds that these cover; their stage."""
    deadline, ticks, paces = time.monotonic() + within_sec, list[Tick](), list[float]()
    stage, counted_sec, last_line = "", 0.0, ""
    with _started(words, path) as (process, lines):
        heard = time.monotonic()
        while not paces or counted_sec < least_sec:
            try:
                line = lines.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                if paces:
                    break
                raise _too_slow(words, len(ticks), within_sec, last_line) from None
            if line is None and paces:
                break
            if line is None:
                raise SidaError(
                    f"{shlex.join(words)} ended with code {process.wait()} before it had told its pace twice; "
                    f"its last line: {last_line or 'none'}",
                    f"Run it by hand in {path}.",
                    exit_code=EXIT_FAILED,
                )
            last_line = visible(line.strip())[:_MOST_SHOWN] or last_line
            tick = tick_of(line)
            if tick is None:
                continue
            now, before = time.monotonic(), ticks[-1] if ticks else None
            ticks.append(tick)
            own = _stage(published, tick)
            if paces and own != stage:
                break
            if before and own == _stage(published, before):
                stage, counted_sec = own, counted_sec + now - heard
                paces.append(tick.sec_per_kimg)
            heard = now
    return statistics.median(paces), counted_sec, stage


def _stage(published: Recipe, tick: Tick) -> str:
    """What a line's images were trained in; of one that does not tell them the last stage is taken for granted."""
    if tick.nimg is not None and not published.trains_generator(tick.nimg):
        return "fake score"
    if not isinstance(published, SidRecipe) or published.adversarial is None:
        return "SiD"
    is_adversarial = tick.nimg is None or published.is_adversarial(tick.nimg)
    return "SiDA" if is_adversarial else "SiD"


def _too_slow(words: Sequence[str], num_ticks: int, within_sec: float, last_line: str) -> SidaError:
    told = f"{num_ticks or 'no'} line{'s' * (num_ticks > 1)} with sec/kimg"
    return SidaError(
        f"{shlex.join(words)} printed {told} within {within_sec:g} s, and one is needed after the first, in one stage; "
        f"its last line: {last_line or 'none'}",
        "Pass a longer --against-within, or have it print its progress more often.",
    )


@contextmanager
def _started(
    words: Sequence[str], path: Path
) -> Iterator[tuple["subprocess.Popen[str]", "queue.SimpleQueue[str | None]"]]:
    """The program and the lines that it prints, None after the last; ended with all that it has started."""
    try:
        process = subprocess.Popen(
            words,
            cwd=path,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},  # else lines come long after their time
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise SidaError(f"{words[0]} cannot be started ({error.strerror})", "See --against-command.") from None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout
        with process.stdout as told:
            for line in told:
                lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield process, lines
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SEC)
        reader.join(_GRACE_SEC)
