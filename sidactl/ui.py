"""What people meet: data on stdout, everything else on stderr, and progress.

Nothing heavy is imported here; rich comes in only where something is drawn on a terminal.
"""

import errno
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.text import visible

if TYPE_CHECKING:
    from rich.console import RenderableType
from sidactl.units import format_bytes, format_count, format_duration

_RATE_WINDOW_SEC = 30.0

_RATE_FROM_SEC = 2.0
"""a speed measured over less says nothing yet"""

_MAX_EVERY_SEC = 600.0

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
        console = Console(file=file, force_terminal=True)
        with console.capture() as captured:
            console.print(drawn)
        _write(file, captured.get().removesuffix("\n"))
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
    """How far a piece of work has come, told on stderr; made by `progress` or a `Display`."""

    def __init__(
        self,
        title: str,
        total: int | None,
        unit: str,
        every_sec: float,
        clock: Callable[[], float],
        live: bool,
    ) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._every_sec, self._clock, self._live = every_sec, clock, live
        self._started_sec = self._printed_sec = clock()
        self._done = 0
        self._first_sec: float | None = None  # when the speed's first update came
        self._mark = 0.0, 0  # when how many were done, as the speed last saw it
        self._gained = self._weight = 0.0  # the speed's sums of images and seconds, in which older ones fade
        self._facts: dict[str, str] = {}
        self._untold = False

    def update(self, done: int, facts: Mapping[str, str | float] | None = None) -> None:
        """Says that `done` units are done; a fact once told stays on show until it is told anew.

        The speed counts from the first update on, so a resumed run may begin anywhere, and is averaged over about 30 s.
        """
        now, first = self._clock(), self._first_sec is None
        if self._first_sec is None or done < self._mark[1]:
            self._first_sec, self._mark, self._gained, self._weight = now, (now, done), 0.0, 0.0
        elapsed_sec, gained = now - self._mark[0], done - self._mark[1]
        if elapsed_sec > 0 and gained > 0:
            fading = math.exp(-elapsed_sec / _RATE_WINDOW_SEC)
            self._gained = self._gained * fading + gained / elapsed_sec * (1 - fading)
            self._weight = self._weight * fading + 1 - fading
            self._mark = (now, done)
        self._done = done
        # A new dict: the display reads the old one from its own thread.
        self._facts = self._facts | {_folded(name): _fact(value) for name, value in (facts or {}).items()}
        self._untold = True
        if not self._live and first:
            self.tell()
        elif not self._live and now - self._printed_sec >= self._every_sec:
            self.tell()
            self._every_sec = min(2 * self._every_sec, max(_MAX_EVERY_SEC, self._every_sec))

    def tell(self) -> None:
        """The present state as one line with the time of day, if it was not told yet."""
        if self._untold:
            note(
                f"{time.strftime('%H:%M:%S')} {self._title}: {', '.join([self._count(), *self._pace(), *self._told()])}"
            )
        self._untold, self._printed_sec = False, self._clock()

    def note(self, line: str) -> None:
        """One line on stderr, above the display where there is one."""
        note(line)

    def _count(self) -> str:
        write, unit = (format_bytes, "") if self._unit == "bytes" else (format_count, f" {self._unit}")
        if self._total is None:
            return f"{write(self._done)}{unit}"
        done = min(self._done, self._total)  # the last step of a training takes a whole batch
        percent = f" ({100 * done // self._total}%)" if self._total else ""
        return f"{write(done)} / {write(self._total)}{unit}{percent}"

    def _pace(self) -> list[str]:
        told = []
        if self._weight and self._first_sec is not None and self._mark[0] - self._first_sec >= _RATE_FROM_SEC:
            rate = self._gained / self._weight
            number = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
            is_bytes = self._unit == "bytes"
            told.append(f"{format_bytes(round(rate)) if is_bytes else f'{number} {self._unit}'}/s")
            if self._total is not None and self._total > self._done:
                told.append(f"{format_duration((self._total - self._done) / rate)} left")
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


class Display:
    """Where the progress of a command and of its parts is shown, one at a time; made by `display`."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self._live = stack, _is_terminal(sys.stderr)
        self._whole: Progress | None = None
        self._shown: Progress | None = None
        self._parts: dict[str, Progress] = {}

    def show(
        self,
        title: str,
        total: int | None,
        unit: str = "images",
        *,
        every_sec: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> Progress:
        """The command's own progress, in place of that of a part; what it is called and counts is taken once."""
        if self._whole is None:
            self._whole = Progress(_folded(title), total, unit, every_sec, clock, self._live)
        self._turn_to(self._whole)
        return self._whole

    def part(self, title: str, unit: str = "images") -> Callable[[int, int], None]:
        """Takes how many units of a part are done, and how many there are; shown meanwhile, under its own title."""

        def tick(done: int, total: int) -> None:
            if title not in self._parts:
                progress = Progress(_folded(title), total or None, unit, 10.0, time.monotonic, self._live)
                self._parts[title] = progress
            self._turn_to(self._parts[title])
            self._parts[title].update(done)
            if done >= total > 0:  # the next time it is another, such as the next evaluation
                finished = self._parts.pop(title)
                if not self._live:
                    finished.tell()

        return tick

    def close(self) -> None:
        """Leaves the command's own progress in its last state."""
        if self._whole:
            self._turn_to(self._whole)
        if self._shown and not self._live:
            self._shown.tell()

    def _turn_to(self, progress: Progress) -> None:
        if self._shown is progress:
            return
        before, self._shown = self._shown, progress
        if not self._live:
            if before:
                before.tell()
        elif before is None:
            self._draw()

    def _draw(self) -> None:
        from rich.console import Console
        from rich.live import Live

        def drawn() -> "RenderableType":
            assert self._shown
            return self._shown.drawn()

        console = Console(file=sys.stderr, force_terminal=True)
        # What others write scrolls by above the display; a stdout that is no terminal is data and stays alone.
        live = Live(
            get_renderable=drawn, console=console, redirect_stdout=_is_terminal(sys.stdout), redirect_stderr=True
        )
        self._stack.enter_context(live)


@contextmanager
def display() -> Iterator[Display]:
    """A `Display` for the time of a `with` block: drawn on a terminal, else a line now and then.

    Lines come after 10 s, then after twice as long each time, at most 10 minutes; the first and the last state are told
    in any case. A display inside another display is not possible. Results are printed after the block, not within.
    """
    with ExitStack() as stack:
        shown = Display(stack)
        try:
            yield shown
        finally:
            shown.close()


@contextmanager
def progress(
    title: str,
    total: int | None,
    unit: str = "images",
    *,
    every_sec: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """A `Progress` for the time of a `with` block, in a `display` of its own, whose first line comes after `every_sec`.

    total: None where the end is not known. Bytes are told as kB, MB, GB.
    """
    with display() as shown:
        yield shown.show(title, total, unit, every_sec=every_sec, clock=clock)


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
    """A line, at once; a reader that has gone away (`| head -1`) is no error, nor is a stderr that takes nothing.

    Raises SidaError, exit code 1, where stdout takes no data.
    """
    try:
        print(_encodable(text, file), file=file, flush=True)
    except OSError as error:
        if file is sys.stdout and not isinstance(error, BrokenPipeError):
            raise stdout_error(error) from None
        _forget(file)


def _forget(file: TextIO) -> None:
    """Lets go what is left in the buffer, which would fail again when Python exits."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def stdout_error(error: OSError) -> SidaError:
    """What is told where stdout takes no data; nothing more goes there."""
    _forget(sys.stdout)
    reason = "it is closed" if error.errno == errno.EBADF else error.strerror
    return SidaError(
        f"the result cannot be written to stdout: {reason}",
        "What was made is kept: repeat the command with another stdout.",
        exit_code=EXIT_FAILED,
    )


def _encodable(text: str, file: TextIO) -> str:
    """The text with escapes in place of what the file's encoding has no bytes for."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        text.encode(encoding, getattr(file, "errors", None) or "strict")
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def mend_streams() -> None:
    """Puts something in the place of standard streams that were closed before the process began.

    The next file opened would else become one of them. Nothing can be read from such a stdin, nothing is said on such a
    stderr, and writing to such a stdout fails. Names that are no text in the locale are written as the bytes they are.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # stdout for reading alone: what is written there must not get lost in silence
            opened = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            assert opened == number, "the lower ones are open"
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")
