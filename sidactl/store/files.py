"""Writing and reading single files so that a kill, a full disk or a second process leaves them whole."""

import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from sidactl.digests import file_sha256
from sidactl.errors import NO_LOCKS, SidaError

Data: TypeAlias = bytes | memoryview

_CHUNK_BYTES = 1 << 20


class UnwritableError(SidaError):
    """The run directory does not take what should be kept in it."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """The object that holds a file of an artifact."""

    sha256: str
    size_bytes: int


@contextmanager
def telling_os_errors(root: Path, verb: str) -> Iterator[None]:
    """Tells any OSError of the run directory in one line; `verb` is "read" or "written"."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "Free some space" if is_full else "Check what it is and its permissions,"
        if error.errno in NO_LOCKS:
            remedy = "Locks do not work on its file system: mount it with them,"
        done = "locked" if error.errno in NO_LOCKS else verb
        message = f"the run directory {root} cannot be {done}: {error.strerror}"
        kind = UnwritableError if verb == "written" else SidaError
        raise kind(message, f"{remedy} or choose another with --run DIR.") from error


def _chunks(source: Path | Data) -> Iterator[Data]:
    if not isinstance(source, Path):
        yield memoryview(source).cast("B")
        return
    try:
        with source.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except OSError as error:
        message = f"{source} cannot be read: {error.strerror}"
        raise SidaError(message, "Check the path, and that you may read it.") from error


def write_flushed(path: Path, source: Path | Data, mode: int) -> FileEntry:
    sha256, size_bytes = hashlib.sha256(), 0
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        for chunk in _chunks(source):
            sha256.update(chunk)
            size_bytes += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(sha256=sha256.hexdigest(), size_bytes=size_bytes)


def place(tmp: Path, target: Path) -> None:
    """Moves a flushed file to its place in one step, for good: the folder, and the folder's own entry, are flushed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(tmp, target)
    for folder in (target.parent, target.parent.parent):
        flush(folder)


def flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def append(path: Path, line: bytes) -> None:
    """Adds one line in a single write; takes back a line that fits only in part."""
    data = line.rstrip(b"\n") + b"\n"
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size_bytes = os.fstat(file.fileno()).st_size
        if file.write(data) != len(data):
            file.truncate(size_bytes)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def is_abandoned(path: Path) -> bool:
    """Whether the file is there and nobody holds its lock."""
    with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return os.fstat(file.fileno()).st_nlink > 0
    return False


def is_file(path: Path) -> bool:
    """Whether it can be read to its end: a folder cannot, and a pipe waits for ever."""
    return stat.S_ISREG(path.stat().st_mode)


def hash_file(path: Path) -> str:
    """SHA-256 of a file; empty of what is no regular one."""
    return file_sha256(path) if is_file(path) else ""


def sealed(said: Mapping[str, Any]) -> bytes:
    """JSON with a digest of its own, for files of unfinished work that say what others hold."""
    return json.dumps({**said, "digest": _seal(said)}).encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """What `sealed` was given. Raises ValueError where that is not what it wrote."""
    said = json_or_none(data)
    if not isinstance(said, dict) or said.pop("digest", None) != _seal(said):
        raise ValueError("it is damaged")
    return said


def _seal(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(said)).encode()).hexdigest()


def json_or_none(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
