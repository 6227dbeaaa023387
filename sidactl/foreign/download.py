"""Files from the network or from a mirror: streamed, resumed after an interruption, hashed. Not what is in them."""

import errno
import fcntl
import hashlib
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import url2pathname

from sidactl import launch
from sidactl.digests import file_sha256
from sidactl.errors import EXIT_FAILED, NO_LOCKS, MissingError, SidaError
from sidactl.foreign.http import Body, answered, check_url, reason_of, request
from sidactl.text import visible

OnCount = Callable[[int, int], None]
"""called with (bytes done, bytes in all); the latter is 0 where the server does not tell"""

OnLine = Callable[[str], None]
"""takes one line for people"""

MAX_BYTES = 16 * 10**9
"""of a file whose size the catalog does not tell: twice the largest network's, EDM2-XXL in float32, and a margin"""

CHUNK_BYTES = 1 << 20

_OF_MANY = re.compile(r"/[^/]+/([^/]+)/resolve/[^/]+/(config\.json|diffusion_pytorch_model\.safetensors)")
"""path of a file of the hub that is called as many others are: a mirror has it in a folder named as its repository"""


def to_stderr(line: str) -> None:
    """Prints one line on stderr; of the processes that torchrun starts the first one alone does."""
    if launch.is_rank0():
        print(visible(line), file=sys.stderr, flush=True)


def fetch(
    url: str,
    destination: Path,
    *,
    what: str,
    licence: str | None = None,
    sha256: str | None = None,
    size_bytes: int | None = None,
    max_bytes: int | None = None,
    offline: bool = False,
    mirror: str | None = None,
    progress: OnCount | None = None,
    say: OnLine = to_stderr,
) -> str:
    """Puts the file at `url` (http, https or file) at `destination`, whole, and returns its SHA-256.

    what, licence: named in the line that `say` gets before anything is downloaded.
    sha256, size_bytes: what the file must have; a digest that the server announces (as the Hugging Face hub does)
        counts where none is given.
    max_bytes: a larger file is refused, or left at this size where the server did not tell; by default size_bytes, or
        MAX_BYTES where that is not known.
    offline: no network, also if $SIDACTL_OFFLINE is set (and not 0); a mirror folder may still be read.
    mirror: a folder or base URL to take the file from instead (default $SIDACTL_MIRROR), where it lies under the whole
        path of the URL or under its last part; of what the hub calls as many others, as NAME/config.json.

    What came before an interruption stays beside `destination` as download-<hash of the URL>, and is continued where
    the server can and a digest or tag shows that it is of the same file. A process that finds another at the same URL
    and destination waits for it. Raises SidaError for all that goes wrong, on the network or on the disk.
    """
    places = _allowed_places(url, what, offline, mirror)
    partial = destination.with_name(f"download-{hashlib.sha256(url.encode()).hexdigest()[:32]}")
    lock = partial.with_suffix(".lock")
    with _disk(destination), exclusive(lock, lambda: say(f"waiting for another process to download {what}")):
        if destination.exists():  # by the process that we waited for
            announced = None
        else:
            announced = _complete(partial, places, what, licence, sha256, size_bytes, max_bytes, progress, say)
            os.replace(partial, destination)
        digest = file_sha256(destination)
        expected = sha256 or announced
        if expected not in (None, digest):
            destination.unlink()
            raise SidaError(
                f"{what} must have SHA-256 {expected}, got {digest}",
                "The file was removed: download it again, and ask its publisher if that does not help.",
                exit_code=EXIT_FAILED,
            )
    if expected is None:
        say(f"{what} has SHA-256 {digest}: none is known to compare it with, so this one is recorded")
    return digest


def refuse_forbidden(url: str, what: str, *, offline: bool = False, mirror: str | None = None) -> None:
    """Raises the SidaError with which `fetch` would refuse what $SIDACTL_OFFLINE, or `offline`, forbids.

    Also that for what a mirror folder, or a file, does not have; nobody on the network is asked.
    """
    places = _allowed_places(url, what, offline, mirror)
    if all(place.startswith("file:") and not _path_of(place).exists() for place in places):
        raise _nowhere(places)


def _allowed_places(url: str, what: str, offline: bool, mirror: str | None) -> Sequence[str]:
    places = _places(url, mirror or os.environ.get("SIDACTL_MIRROR"))
    if offline or os.environ.get("SIDACTL_OFFLINE", "0") not in ("", "0"):
        places = [place for place in places if place.startswith("file:")]
        if not places:
            raise MissingError(
                f"{what} must be downloaded from {url}, which offline forbids",
                "Allow it, or set SIDACTL_MIRROR to a folder that holds the file.",
            )
    return places


@contextmanager
def exclusive(lock: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the lock file `lock`, which goes at the end; calls `waiting` once if another process or thread has it."""
    waited = False
    while True:
        with _disk(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    waiting()
                waited = True
                fcntl.flock(fd, fcntl.LOCK_EX)
            except OSError as error:
                with _disk(lock):
                    raise error
            if os.fstat(fd).st_nlink:  # else the one before us removed it, and a third may have made a new one
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return
        finally:
            os.close(fd)


def _complete(
    partial: Path,
    places: Sequence[str],
    what: str,
    licence: str | None,
    sha256: str | None,
    size_bytes: int | None,
    max_bytes: int | None,
    progress: OnCount | None,
    say: OnLine,
) -> str | None:
    """Brings the partial file to its end; returns the digest that the server announced, if any."""
    limit = max_bytes or size_bytes or MAX_BYTES
    tag = partial.with_suffix(".tag")
    size = partial.stat().st_size if partial.exists() else 0
    is_first = True
    while True:
        validator = tag.read_text("latin-1") if tag.exists() else ""
        body = _open(places, size if validator or sha256 else 0, validator)
        with closing(body.stream):
            if size_bytes and body.total and body.total != size_bytes:
                raise SidaError(
                    f"{what} must have {size_bytes:,} bytes, {body.place} offers {body.total:,}",
                    "Check the address or the mirror.",
                    exit_code=EXIT_FAILED,
                )
            total = body.total or size_bytes
            if total and total > limit:
                raise _too_large(what, body.place, f"{total:,} bytes", limit)
            if is_first:
                verb = f"resuming {what} at {_megabytes(body.start)}" if body.start else f"downloading {what}"
                amount = _megabytes(total) if total else "of unknown size"
                say(f"{verb}: {amount} from {body.place}" + (f", licence: {licence}" if licence else ""))
            if body.start == 0:
                partial.write_bytes(b"")  # before its tag is: a tag must never stand for the bytes of another file
                tag.write_text(body.validator, "latin-1")
            before, is_first = size, False
            size, stopped = _append(partial, body, total or limit, progress)
        if size > (total or limit):
            if not total:
                raise _too_large(what, body.place, f"more than {limit:,} bytes", limit)
            tag.unlink(missing_ok=True)  # no part of this file is worth going on with
            raise SidaError(
                f"{what} must have {total:,} bytes, {body.place} sends more", "Try again.", exit_code=EXIT_FAILED
            )
        if stopped is None and total in (None, size):
            tag.unlink(missing_ok=True)
            return body.sha256
        if size - before < CHUNK_BYTES:  # else connecting again is worth it
            known = f"{total:,}" if total else "unknown"
            raise SidaError(
                f"{what} ended after {size:,} of {known} bytes from {body.place}{f': {stopped}' if stopped else ''}",
                "Repeat the same command to go on.",
                exit_code=EXIT_FAILED,
            )


def refuse_larger(what: str, path: Path, max_bytes: int | None) -> None:
    """Raises SidaError for a file of more than max_bytes, where that is a number."""
    if max_bytes is not None and (size_bytes := path.stat().st_size) > max_bytes:
        raise _too_large(what, str(path), f"{size_bytes:,} bytes", max_bytes)


def _too_large(what: str, place: str, size: str, limit: int) -> SidaError:
    return SidaError(
        f"{what} must have at most {limit:,} bytes, {place} offers {size}",
        "If that is right, pass a larger --max-bytes to fetch-teacher.",
        exit_code=EXIT_FAILED,
    )


def _append(partial: Path, body: Body, limit: int, progress: OnCount | None) -> tuple[int, str | None]:
    """Adds what comes, up to `limit` bytes in all; returns how many came, at most one more, and why it broke, if so."""
    size = body.start
    with partial.open("ab") as file:
        while True:
            try:
                chunk = body.stream.read1(max(1, min(CHUNK_BYTES, limit + 1 - size)))
            except TimeoutError as error:
                return size, reason_of(error)
            except (OSError, HTTPException):
                return size, ""
            if size + len(chunk) > limit:
                file.write(chunk[: max(0, limit - size)])
                return size + len(chunk), None
            if not chunk:
                return size, None
            size += file.write(chunk)
            if progress:
                progress(size, body.total or 0)


def _places(url: str, mirror: str | None) -> list[str]:
    """The URLs to try, in this order."""
    url = check_url(url)
    if mirror:
        base = (check_url(mirror) if "://" in mirror else Path(mirror).absolute().as_uri()).rstrip("/")
    if not mirror or url.startswith("file:"):
        return [url]
    path = urlsplit(url).path or "/"
    of_many = _OF_MANY.fullmatch(path)
    return [f"{base}{path}", f"{base}/{'/'.join(of_many.groups()) if of_many else path.rpartition('/')[2]}"]


def _open(places: Sequence[str], size: int, validator: str) -> Body:
    """The first place that has the file, asked to go on after `size` bytes. SidaError where none has."""
    for place in places:
        is_file = place.startswith("file:")
        try:
            body = _open_file(place) if is_file else request(place, size, validator)
        except HTTPError as error:
            error.close()
            if error.code in (404, 410):
                continue
            raise answered(place, error.code, str(error.reason)) from None
        except FileNotFoundError:
            continue
        except (OSError, HTTPException, ValueError) as error:
            if is_file:
                hint = "Check the path, and that you may read it."
            else:
                hint = "Check the connection, or set SIDACTL_MIRROR to a folder or base URL that has the file."
            raise SidaError(
                f"{place} cannot be {'read' if is_file else 'reached'}: {reason_of(error)}", hint, exit_code=EXIT_FAILED
            ) from error
        return body
    raise _nowhere(places)


def _nowhere(places: Sequence[str]) -> SidaError:
    if len(places) > 1:
        what, hint = (
            f"the mirror has neither {places[0]} nor {places[1]}",
            "Put the file there, or unset SIDACTL_MIRROR.",
        )
        return SidaError(what, hint, exit_code=EXIT_FAILED)
    return SidaError(f"{places[0]} is not there", "Check the address.", exit_code=EXIT_FAILED)


def _path_of(place: str) -> Path:
    return Path(url2pathname(urlsplit(place).path))


def _open_file(place: str) -> Body:
    path = _path_of(place)
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):  # a pipe would wait for ever, a device might have no end
        got = "a folder" if stat.S_ISDIR(about.st_mode) else "a pipe or device"
        raise SidaError(f"{place} must be a file, got {got}", "Name a file.")
    return Body(path.open("rb"), place, 0, about.st_size)


@contextmanager
def _disk(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise SidaError(
                f"{destination.parent} cannot be locked: {error.strerror}",
                "Locks do not work on its file system: choose another run directory with --run DIR.",
                exit_code=EXIT_FAILED,
            ) from error
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "Free some space" if is_full else "Check its permissions"
        raise SidaError(
            f"{destination.parent} cannot be written: {error.strerror or error}",
            f"{remedy}, then repeat the same command: what has come is kept.",
            exit_code=EXIT_FAILED,
        ) from error


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
