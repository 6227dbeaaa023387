"""Data on stdout, everything else on stderr: lines, tables, JSON; nothing heavy is imported here."""

import errno
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TextIO

from sidactl import launch
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.text import visible

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
    if is_terminal(file):
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=box.SIMPLE_HEAD, title=Text(title) if title else None, title_justify="left")
        for name, right in zip(columns, numeric, strict=True):
            drawn.add_column(Text(name), justify="right" if right else "left", overflow="fold")
        for row in given:
            drawn.add_row(*[Text("" if cell is None else fact(cell)) for cell in row])
        console = Console(file=file, force_terminal=True)
        with console.capture() as captured:
            console.print(drawn)
        _write(file, captured.get().removesuffix("\n"))
        return
    cells = [list(columns), *(["-" if cell is None else fact(cell) or "-" for cell in row] for row in given)]
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
    _write(sys.stderr, folded(message))


def warn(message: str) -> None:
    """One line on stderr that begins with "warning:"."""
    note(f"warning: {message}")


def fail(error: SidaError) -> int:
    """Tells the error in one line on stderr and returns the exit code it asks for; any of several processes does."""
    who = "" if launch.is_rank0() else f"process {os.environ['RANK']}: "
    print_lines(sys.stderr, folded(f"{who}error: {error}"))
    return error.exit_code


def fact(value: str | float) -> str:
    return visible(value) if isinstance(value, str) else str(value) if isinstance(value, int) else f"{value:.5g}"


def _is_numeric(cells: Sequence[str | int | float | None]) -> bool:
    known = [cell for cell in cells if cell is not None]
    return bool(known) and all(isinstance(cell, int | float) for cell in known)


def folded(text: str) -> str:
    """A message in one line: its line breaks, with the blanks around them, become one blank; the rest is `visible`."""
    return visible(_BREAKS.sub(" ", text).strip())


def is_terminal(file: TextIO) -> bool:
    """Whether displays can be drawn; NO_COLOR does not matter here, rich draws without colours then."""
    return launch.is_rank0() and file.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def _write(file: TextIO, text: str) -> None:
    if launch.is_rank0():
        print_lines(file, text)


def print_lines(file: TextIO, text: str) -> None:
    """A line, at once; a reader that has gone away (`| head -1`) is no error, nor is a stderr that takes nothing.

    Raises SidaError, exit code 1, where stdout takes no data.
    """
    try:
        print(_encodable(text, file), file=file, flush=True)
    except OSError as error:
        if file is sys.stdout and not isinstance(error, BrokenPipeError):
            raise stdout_error(error) from None
        forget(file)


def forget(file: TextIO) -> None:
    """Lets go what is left in the buffer, which would fail again when Python exits."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def stdout_error(error: OSError) -> SidaError:
    """What is told where stdout takes no data; nothing more goes there."""
    forget(sys.stdout)
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
