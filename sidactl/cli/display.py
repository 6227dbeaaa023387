"""Progress: drawn on a terminal, otherwise a line now and then."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from sidactl.cli.console import fact, folded, is_terminal, note
from sidactl.units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from rich.console import RenderableType

_RATE_WINDOW_SEC = 30.0

_RATE_FROM_SEC = 2.0
"""a speed measured over less says nothing yet"""

_MAX_EVERY_SEC = 600.0


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
        self._facts = self._facts | {folded(name): fact(value) for name, value in (facts or {}).items()}
        self._untold = True
        if not self._live and first:
            self.tell()
        elif not self._live and now - self._printed_sec >= self._every_sec:
            self.tell()
            self._every_sec = min(2 * self._every_sec, max(_MAX_EVERY_SEC, self._every_sec))

    def tell(self) -> None:
        """The present state as one line with the time of day, if it was not told yet."""
        if self._untold:
            now = ", ".join([self._count(), *self._pace(), *self._all_facts()])
            note(f"{time.strftime('%H:%M:%S')} {self._title}: {now}")
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
        facts = []
        if self._weight and self._first_sec is not None and self._mark[0] - self._first_sec >= _RATE_FROM_SEC:
            rate = self._gained / self._weight
            number = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
            is_bytes = self._unit == "bytes"
            facts.append(f"{format_bytes(round(rate)) if is_bytes else f'{number} {self._unit}'}/s")
            if self._total is not None and self._total > self._done:
                facts.append(f"{format_duration((self._total - self._done) / rate)} left")
        return [*facts, f"{format_duration(self._clock() - self._started_sec)} so far"]

    def _all_facts(self) -> list[str]:
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
            lines.add_row(Text("   ".join(self._all_facts())))
        return lines


class Display:
    """Where the progress of a command and of its parts is shown, one at a time; made by `display`."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self._live = stack, is_terminal(sys.stderr)
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
            self._whole = Progress(folded(title), total, unit, every_sec, clock, self._live)
        self._turn_to(self._whole)
        return self._whole

    def begin(self, title: str, total: int | None) -> Progress:
        """Likewise of the next piece of work, where a command has several."""
        self._whole = None
        return self.show(title, total)

    def part(self, title: str, unit: str = "images") -> Callable[[int, int], None]:
        """Takes how many units of a part are done, and how many there are; shown meanwhile, under its own title."""

        def tick(done: int, total: int) -> None:
            if title not in self._parts:
                progress = Progress(folded(title), total or None, unit, 10.0, time.monotonic, self._live)
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
            get_renderable=drawn, console=console, redirect_stdout=is_terminal(sys.stdout), redirect_stderr=True
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
