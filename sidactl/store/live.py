"""A directory of live/, the only mutable place: one process at a time holds it."""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.store.artifact import PART
from sidactl.store.files import Data, append, flush, place, telling_os_errors, write_flushed

_LIVE_NAME = re.compile(rf"(?!lock$){PART}")

QUESTION = "question.json"
"""the file in a live directory that says in words what is worked on; see commands/question.py"""

_LOOKS_SEC = (0.02, 0.05, 0.1)


def _lock_in_time(fd: int) -> None:
    """Takes the lock; BlockingIOError where it stays taken for longer than whoever looks at it needs."""
    for wait_sec in _LOOKS_SEC:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(wait_sec)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock_live(path: Path) -> int:
    """A file descriptor that holds the lock of the live directory `path`, which is created."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        # The holder before us may be removing the directory: then no lock is there to open, or ours has lost its name.
        with suppress(FileNotFoundError), ExitStack() as stack:
            fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, fd)
            try:
                _lock_in_time(fd)
            except BlockingIOError:
                message = f"run {path.name[:12]} is already being worked on by process {os.pread(fd, 32, 0).decode()}"
                raise SidaError(message.strip(), "Wait for it, or stop it first.", exit_code=EXIT_FAILED) from None
            if os.fstat(fd).st_nlink:
                os.ftruncate(fd, 0)
                os.pwrite(fd, b"%d\n" % os.getpid(), 0)
                stack.pop_all()
                return fd


@dataclass(frozen=True)
class LiveDir:
    """A mutable directory that one process holds; files have plain names. What cannot be written is a SidaError.

    is_writer: false in the processes that work with the one that holds it; what they are to write is left to that one.
    """

    path: Path
    is_writer: bool = True

    def _file(self, name: str) -> Path:
        assert _LIVE_NAME.fullmatch(name), f"a plain file name is needed, got {name!r}"
        return self.path / name

    def write(self, name: str, data: Data) -> None:
        """Puts `data` under `name` in one step: a reader, or a kill, meets the old content or the new."""
        if not self.is_writer:
            return
        target, tmp = self._file(name), self.path / f".{name}.tmp"
        with telling_os_errors(self.path.parents[1], "written"):
            try:
                write_flushed(tmp, data, 0o666)
                place(tmp, target)
            finally:
                tmp.unlink(missing_ok=True)

    def append(self, name: str, line: bytes) -> None:
        """Adds one line (its newline may be left out)."""
        if not self.is_writer:
            return
        with telling_os_errors(self.path.parents[1], "written"):
            append(self._file(name), line)

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """A folder to fill, by several processes if need be; it comes under `name` in one step, flushed, at the end."""
        target, tmp = self._file(name), self.path / f".{name}.tmp"
        if not self.is_writer:
            yield tmp
            return
        with telling_os_errors(self.path.parents[1], "written"):
            try:
                shutil.rmtree(tmp, ignore_errors=True)
                tmp.mkdir()
                yield tmp
                for path in tmp.iterdir():
                    flush(path)
                self.remove(name)
                place(tmp, target)
            finally:
                shutil.rmtree(tmp, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Removes a file or folder at once; no error where there is none."""
        path = self._file(name)
        if not self.is_writer:
            return
        with telling_os_errors(self.path.parents[1], "written"):
            self._remove(path)

    def _remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            # Away in one step, so that a kill leaves no half of it under its name.
            gone = self.path / f".{path.name}.gone"
            shutil.rmtree(gone, ignore_errors=True)
            path.replace(gone)
            shutil.rmtree(gone)
        else:
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes everything in it but the events, which go to logs/<key>/ in the run directory; it stays locked."""
        if not self.is_writer:
            return
        root, events = self.path.parents[1], self.path / "events.jsonl"
        with telling_os_errors(root, "written"):
            if events.is_file():
                kept = root / "logs" / self.path.name[:16] / events.name
                kept.parent.mkdir(parents=True, exist_ok=True)
                events.replace(kept)
            # Backwards, so that no checkpoint is left without the best generator that it counts on.
            for path in sorted(self.path.iterdir(), reverse=True):
                if path.name.startswith(".") and path.is_dir() and not path.is_symlink():  # what a killed process left
                    shutil.rmtree(path)
                elif path.name != "lock":
                    self._remove(path)
