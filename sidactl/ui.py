"""What people meet: data on stdout, everything else on stderr, progress, and how counts and seeds are written and read.

Nothing heavy is imported here; rich comes in only where something is drawn on a terminal.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from typing import TYPE_CHECKING, TextIO

from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.text import visible

if TYPE_CHECKING:
    from rich.console import RenderableType

_RATE_WINDOW_SEC = 30.0
_COUNT = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,15}))?([kMG]?)", re.IGNORECASE)
_ZEROS = {"": 0, "k": 3, "m": 6, "g": 9}
_SEEDS = re.compile(r"\s*([0-9]{1,15})(?:-([0-9]{1,15}))?\s*")
_BREAKS = re.compile(r"\s*[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]\s*")


def print_data(text: str) -> None:
    """One line on stdout: an oid, a number, or what is known by a name; what would not be seen in it is escaped."""
    assert text, "data is not empty"
    _write(sys.stdout, visible(text))


def print_json(value: object) -> None:
    """One JSON document on stdout; SidaError if it holds a NaN or an infinity, which JSON has no word for."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as error:
        raise SidaError(
            "JSON output must hold finite numbers, got NaN or infinity", "Run without --json.", exit_code=EXIT_FAILED
        ) from error
    _write(sys.stdout, text)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str | int | float | None]],
    *,
    title: str | None = None,
    file: TextIO | None = None,
) -> None:
    """A table on `file` (default stdout): drawn on a terminal, else as plain aligned columns.

    Columns of numbers are right-aligned; a cell without content (None) is a dash where there is no terminal.
    """
    file = file or sys.stdout
    title = None if title is None else visible(title)
    given = [list(row) for row in rows]
    assert all(len(row) == len(columns) for row in given), "a row of another length"
    numeric = [_is_numeric([row[i] for row in given]) for i in range(len(columns))]
    if _is_terminal(file):
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=box.SIMPLE_HEAD, title=Text(title) if title else None, title_justify="left")
        for name, right in zip(columns, numeric, strict=True):
            drawn.add_column(Text(name), justify="right" if right else "left", overflow="fold")
        for row in given:
            drawn.add_row(*[Text("" if cell is None else _fact(cell)) for cell in row])
        Console(file=file, force_terminal=True).print(drawn)
        return
    cells = [list(columns), *(["-" if cell is None else _fact(cell) or "-" for cell in row] for row in given)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    _write(file, "\n".join(([title] if title else []) + lines))


def note(message: str) -> None:
    """One line on stderr."""
    _write(sys.stderr, _folded(message))


def warn(message: str) -> None:
    """One line on stderr that begins with "warning:"."""
    note(f"warning: {message}")


def fail(error: SidaError) -> int:
    """Tells the error in one line on stderr and returns the exit code it asks for; any of several processes does."""
    who = "" if _speaks() else f"process {os.environ['RANK']}: "
    _print(sys.stderr, _folded(f"{who}error: {error}"))
    return error.exit_code


class Progress:
    """How far a piece of work has come, told on stderr; made by `progress`."""

    def __init__(
        self, title: str, total: int | None, unit: str, every_sec: float, clock: Callable[[], float], live: bool
    ) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._every_sec, self._clock, self._live = every_sec, clock, live
        self._started_sec = self._printed_sec = clock()
        self._done = 0
        self._mark: tuple[float, int] | None = None  # when how many were done, as the speed last saw it
        self._rate: float | None = None
        self._facts: dict[str, str] = {}
        self._untold = False

    def update(self, done: int, facts: Mapping[str, str | float] | None = None) -> None:
        """Says that `done` units are done; a fact once told stays on show until it is told anew.

        The speed counts from the first update on, so a resumed run may begin anywhere, and is averaged over about 30 s.
        """
        now, first = self._clock(), self._mark is None
        if self._mark is None or done < self._mark[1]:
            self._mark, self._rate = (now, done), None
        elapsed_sec, gained = now - self._mark[0], done - self._mark[1]
        if elapsed_sec > 0 and gained > 0:
            newest = gained / elapsed_sec
            previous = newest if self._rate is None else self._rate
            self._rate = newest + (previous - newest) * math.exp(-elapsed_sec / _RATE_WINDOW_SEC)
            self._mark = (now, done)
        self._done = done
        # A new dict: the display reads the old one from its own thread.
        self._facts = self._facts | {_folded(name): _fact(value) for name, value in (facts or {}).items()}
        self._untold = True
        if not self._live and (first or now - self._printed_sec >= self._every_sec):
            self.tell()

    def tell(self) -> None:
        """The present state as one line, if it was not told yet."""
        if self._untold:
            note(f"{self._title}: {', '.join([self._count(), *self._pace(), *self._told()])}")
        self._untold, self._printed_sec = False, self._clock()

    def note(self, line: str) -> None:
        """One line on stderr, above the display where there is one."""
        note(line)

    def _count(self) -> str:
        write, unit = (format_bytes, "") if self._unit == "bytes" else (format_count, f" {self._unit}")
        if self._total is None:
            return f"{write(self._done)}{unit}"
        percent = f" ({100 * self._done // self._total}%)" if self._total else ""
        return f"{write(self._done)} / {write(self._total)}{unit}{percent}"

    def _pace(self) -> list[str]:
        told = []
        if self._rate is not None:
            number = f"{self._rate:,.0f}" if self._rate >= 100 else f"{self._rate:.3g}"
            is_bytes = self._unit == "bytes"
            told.append(f"{format_bytes(round(self._rate)) if is_bytes else f'{number} {self._unit}'}/s")
            if self._total is not None and self._total > self._done:
                told.append(f"{format_duration((self._total - self._done) / self._rate)} left")
        return [*told, f"{format_duration(self._clock() - self._started_sec)} so far"]

    def _told(self) -> list[str]:
        return [f"{name} {value}" for name, value in self._facts.items()]

    def drawn(self) -> "RenderableType":
        """The present state as the live display shows it."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        lines = Table.grid()
        lines.add_row(Text.assemble((self._title, "bold"), "  ", self._count()))
        lines.add_row(ProgressBar(self._total, self._done, width=64, complete_style="cyan", finished_style="green"))
        lines.add_row(Text("   ".join(self._pace())))
        if self._facts:
            lines.add_row(Text("   ".join(self._told())))
        return lines


@contextmanager
def progress(
    title: str,
    total: int | None,
    unit: str = "images",
    *,
    every_sec: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """A `Progress` for the time of a `with` block: a live display on a terminal, else at most a line per `every_sec`.

    Without a terminal the first and the last state are told in any case. `total` None: the end is not known. Bytes
    are told as kB, MB, GB. One at a time: a display inside another display is not possible. stdout is never touched.
    """
    live = _is_terminal(sys.stderr)
    shown = Progress(_folded(title), total, unit, every_sec, clock, live)
    if not live:
        try:
            yield shown
        finally:
            shown.tell()
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(file=sys.stderr, force_terminal=True)
    # stderr is taken over so that notes and warnings scroll by above the display; stdout is data and stays alone.
    with Live(get_renderable=shown.drawn, console=console, redirect_stdout=False, redirect_stderr=True):
        yield shown


def format_count(count: int) -> str:
    """50000 -> '50k', 200000000 -> '200M', 1797 -> '1,797': exact, with a suffix where that is shorter."""
    for size, suffix, decimals in ((10**6, "M", 2), (10**3, "k", 1)):
        if count >= size and count % (size // 10**decimals) == 0:
            digits = f"{count % size * 10**decimals // size:0{decimals}}".rstrip("0")
            return f"{count // size:,}{'.' if digits else ''}{digits}{suffix}"
    return f"{count:,}"


def parse_count(text: str, flag: str) -> int:
    """'500', '10_000', '50k', '1.5M', '1G' -> that many images; SidaError names `flag` otherwise."""
    match = _COUNT.fullmatch(text.strip().replace("_", ""))
    whole, fraction, suffix = match.groups(default="") if match else ("", "", "")
    zeros, fraction = _ZEROS[suffix.lower()], fraction.rstrip("0")
    if not match or len(fraction) > zeros:
        raise SidaError(f"{flag} must be a whole number of images such as 500, 50k or 1.5M, got {text!r}")
    return int(whole + fraction.ljust(zeros, "0"))


def parse_seeds(text: str, flag: str = "--seeds") -> Sequence[int]:
    """'0-63,100,200-203' -> the seeds in this order, both ends of a range included.

    Consecutive seeds come as a `range`, however many they are.
    SidaError for anything else, for a range that runs downwards and for a seed that is named twice.
    """
    ranges: list[range] = []
    for part in text.split(","):
        match = _SEEDS.fullmatch(part)
        if not match:
            raise SidaError(f"{flag} must be seeds and ranges of seeds such as 0-63,100, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise SidaError(f"{flag} must have ranges that run upwards, got '{part.strip()}'", f"Write {last}-{first}.")
        if ranges and ranges[-1].stop == first:
            ranges[-1] = range(ranges[-1].start, last + 1)
        else:
            ranges.append(range(first, last + 1))
    ascending = sorted(ranges, key=lambda seeds: seeds.start)
    for before, after in pairwise(ascending):
        if after.start < before.stop:
            raise SidaError(f"{flag} must name each seed once, got {after.start} twice in {text!r}")
    return ranges[0] if len(ranges) == 1 else list(chain.from_iterable(ranges))


def format_duration(duration_sec: float) -> str:
    """3.25 -> '3.2s', 185 -> '3m 05s', 8040 -> '2h 14m', 273600 -> '3d 04h': two units at most, rounded down."""
    if duration_sec < 10:
        return f"{math.floor(duration_sec * 10) / 10:.1f}s"
    minutes, seconds = divmod(int(duration_sec), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days:,}d {hours:02}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {seconds:02}s" if minutes else f"{seconds}s"


def format_bytes(num_bytes: int) -> str:
    """512 -> '512 B', 95600000 -> '95.6 MB': powers of 1000, three digits."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}" if size < 999.5 else f"{size:,.0f} {units[0]}"


def _fact(value: str | float) -> str:
    return visible(value) if isinstance(value, str) else str(value) if isinstance(value, int) else f"{value:.5g}"


def _is_numeric(cells: Sequence[str | int | float | None]) -> bool:
    known = [cell for cell in cells if cell is not None]
    return bool(known) and all(isinstance(cell, int | float) for cell in known)


def _folded(text: str) -> str:
    """A message in one line: its line breaks, with the blanks around them, become one blank; the rest is `visible`."""
    return visible(_BREAKS.sub(" ", text).strip())


def _speaks() -> bool:
    """Of the processes that torchrun starts the first one alone speaks."""
    return os.environ.get("RANK", "0") == "0"


def _is_terminal(file: TextIO) -> bool:
    """Whether displays can be drawn; NO_COLOR does not matter here, rich draws without colours then."""
    return _speaks() and file.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def _write(file: TextIO, text: str) -> None:
    if _speaks():
        _print(file, text)


def _print(file: TextIO, text: str) -> None:
    """A line, at once; a reader that has gone away (`| head -1`) is no error."""
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        # What is left in the buffer would fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
