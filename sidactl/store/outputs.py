"""Files and folders at a user's places: written whole or not at all, and never over what is no earlier export.

What is written lies in a folder of its own beside its place until it is whole. A kill at any moment leaves the old,
the new, or both; what it leaves besides goes with the next export to that folder.
"""

import errno
import fcntl
import filecmp
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidactl.errors import SidaError
from sidactl.store import KINDS

MANIFEST = "manifest.json"
"""in an exported folder: what it is of, and which files are its own"""

_MAX_MANIFEST_BYTES = 1 << 29
"""far more than it takes to list millions of pictures"""

_PREFIX = ".sidactl-export-"

_STAGE = re.compile(re.escape(_PREFIX) + "[a-z0-9_]{8}")

_IN_STAGE = re.compile(r"lock|(new|old)-\d")

_NO_REPLACE, _EXCHANGE, _AT_FDCWD = 1, 2, -100
"""of renameat2"""

_HINTS = {errno.ENAMETOOLONG: "Choose a shorter name.", errno.ENOTDIR: "Choose another place."}

_HINTS |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free some space, or choose another place.")

_TYPES = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFIFO: "a pipe"}

_NAME_ANOTHER = "Name a new folder or file in it."


def manifest_of(folder: Path) -> Mapping[str, Any] | None:
    """The manifest of a folder that was exported; None in any other folder."""
    path = folder / MANIFEST
    try:
        if not path.is_file() or path.stat().st_size > _MAX_MANIFEST_BYTES:  # a pipe would wait for ever
            return None
        manifest = json.loads(path.read_bytes())
        return manifest if manifest["kind"] in KINDS and re.fullmatch("[0-9a-f]{64}", manifest["oid"]) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


@dataclass(frozen=True)
class Output:
    """A file or folder to be made. `problem_of`: what is at a path, if that is no earlier one of this kind, else ""."""

    path: Path
    problem_of: Callable[[Path], str]


def type_of(path: Path) -> str:
    """What is at a path, in words, links not followed; empty where nothing is."""
    try:
        return _TYPES.get(stat.S_IFMT(os.lstat(path).st_mode), "a device or socket")
    except (FileNotFoundError, NotADirectoryError):
        return ""


@contextmanager
def whole(outputs: Sequence[Output], *, force: bool, run: Path) -> Iterator[list[Path]]:
    """Yields paths to be filled, one for each output; they take their places together when the block succeeds.

    All outputs are in one folder; the last one tells that all are there. With `force` earlier exports are replaced.
    Raises SidaError for all else that is there, for places that hold the current directory, home or a mount, or have
    to do with the run directory, and where the disk refuses; then nothing is changed.
    """
    *_, last = outputs
    with _os_errors_told(last.path), ExitStack() as stack:
        _refuse_place(last.path, run)
        for output in outputs:
            _refuse_content(output, force or output is not last)
        parent = last.path.parent
        _make_parents(parent, stack)
        _sweep(parent)
        stage = _make_stage(parent, [output.path.name for output in outputs], stack)
        staged = [stage / f"new-{index}" for index in range(len(outputs))]
        yield staged
        for path in staged:
            _finish(path, stat.S_IMODE((stage / "lock").stat().st_mode))
        with _locked(parent), ExitStack() as undo:
            for output in outputs:
                _refuse_content(output, force or output is not last)
            for output, path in zip(outputs, staged, strict=True):
                _place(path, output, force, undo)
            undo.pop_all()


@contextmanager
def _os_errors_told(path: Path) -> Iterator[None]:
    """Tells any OSError in one line."""
    try:
        yield
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "Check its folder and your permissions, or choose another place.")
        raise SidaError(f"{path} cannot be written: {error.strerror or error}", hint) from error


def _exists(path: Path) -> SidaError:
    return SidaError(f"{path} exists already", "Choose another name, or pass --force to replace it.")


def _refuse_place(path: Path, run: Path) -> None:
    if "\0" in str(path):
        raise SidaError("a path must not hold a zero byte, got one", "Choose another name.")
    place, root = Path(os.path.realpath(path)), Path(os.path.realpath(run))
    for what, folder in (("the current directory", Path.cwd()), ("the run directory", root), ("home", _home())):
        if any(_is_same(place, outer) for outer in (folder, *folder.parents)):
            raise SidaError(f"an export must be a place of its own, got {what} or what holds it: {path}", _NAME_ANOTHER)
    if any(_is_same(root, outer) for outer in place.parents):
        raise SidaError(f"an export must be outside of the run directory, got {path}", "Name a place elsewhere.")
    if os.path.ismount(path):
        raise SidaError(f"an export must be a place of its own, got a mount point: {path}", _NAME_ANOTHER)


def _home() -> Path:
    return Path(os.path.realpath(os.path.expanduser("~")))


def _is_same(path: Path, other: Path) -> bool:
    return path == other or (path.exists() and other.exists() and path.samefile(other))


def _refuse_content(output: Output, may_replace: bool) -> None:
    if not (found := type_of(output.path)):
        return
    if not may_replace:
        raise _exists(output.path)
    if found == "a symbolic link" or (found := output.problem_of(output.path)):
        message = f"only an earlier export can be replaced, got {found}: {output.path}"
        raise SidaError(message, "Choose another name, or move it away.")


def _make_parents(folder: Path, stack: ExitStack) -> None:
    """Makes the folder; what was made goes again if it is empty in the end."""
    missing = [outer for outer in (folder, *folder.parents) if not outer.exists()]
    for outer in reversed(missing):
        stack.callback(_remove_empty, outer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _make_stage(parent: Path, names: Sequence[str], stack: ExitStack) -> Path:
    """A folder of nobody else's beside the outputs, locked for as long as this process is at work."""
    while True:
        stage = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        # Another process may have taken it for a dead one's before it was locked.
        with suppress(FileNotFoundError, BlockingIOError), ExitStack() as held:
            held.callback(_discard, stage)
            fd = os.open(stage / "lock", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            held.callback(os.close, fd)
            _flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:
                os.write(fd, json.dumps(names).encode())
                stack.push(held.pop_all())
                return stage


def _flock(fd: int, lock: int) -> bool:
    """Whether it is locked now; not where the file system has no locks. BlockingIOError: another process has it."""
    try:
        fcntl.flock(fd, lock)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _sweep(parent: Path) -> None:
    """Removes what killed exports left in this folder, and puts back what they had moved aside."""
    for stage in [Path(entry.path) for entry in os.scandir(parent) if _STAGE.fullmatch(entry.name)]:
        with suppress(OSError, ValueError), ExitStack() as stack:
            held = set(os.listdir(stage))
            if stage.is_symlink() or not all(map(_IN_STAGE.fullmatch, held)):
                continue
            if not held:
                stage.rmdir()
                continue
            fd = os.open(stage / "lock", os.O_RDWR | os.O_NOFOLLOW)
            stack.callback(os.close, fd)
            if not _flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB):
                continue
            names = json.loads(os.pread(fd, 1 << 16, 0) or b"[]")
            for index, name in enumerate(names):
                old, place = stage / f"old-{index}", parent / os.path.basename(name)
                if type_of(old) and not type_of(place):
                    os.rename(old, place)
            _discard(stage)


def _discard(stage: Path) -> None:
    """Removes a stage, its lock last, so that a kill leaves nothing that could not be told from another's."""
    with suppress(OSError):
        for name in sorted(os.listdir(stage), key=lambda name: name == "lock"):
            remove(stage / name)
        stage.rmdir()


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder."""
    if type_of(path) == "a folder":
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _finish(path: Path, mode: int) -> None:
    """Flushes what was written, and gives a file the rights that this process's files have."""
    if path.is_file():
        path.chmod(mode)
    for file in [path] if path.is_file() else [Path(entry.path) for entry in os.scandir(path) if entry.is_file()]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time puts its outputs into this folder."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        _flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _place(staged: Path, output: Output, force: bool, undo: ExitStack) -> None:
    """Moves what is staged to its place; what was there is in the stage then."""
    target = output.path
    if not type_of(target):
        if not _renameat2(staged, target, _NO_REPLACE):
            os.rename(staged, target)
        undo.callback(os.rename, target, staged)
    elif not force:
        # What a killed export had brought to its place already is right as it is.
        if not (target.is_file() and staged.is_file() and filecmp.cmp(staged, target, shallow=False)):
            raise _exists(target)
    elif _renameat2(staged, target, _EXCHANGE):
        undo.callback(_renameat2, staged, target, _EXCHANGE)
        # Somebody may have put another thing there since we looked.
        _refuse_content(Output(staged, output.problem_of), may_replace=True)
    elif target.is_file():
        os.replace(staged, target)
    else:
        old = staged.with_name(staged.name.replace("new", "old"))
        os.rename(target, old)
        undo.callback(os.rename, old, target)
        os.rename(staged, target)
        undo.callback(os.rename, target, staged)


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """Renames in one step, not over anything or by exchange; False where the system cannot."""
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))
