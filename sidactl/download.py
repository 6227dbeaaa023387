"""Files from the network or from a mirror: streamed, resumed after an interruption, hashed. Not what is in them."""

import errno
import fcntl
import hashlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener, url2pathname

from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.text import visible

Progress = Callable[[int, int], None]
"""called with (bytes done, bytes in all); the latter is 0 where the server does not tell"""
Say = Callable[[str], None]
"""takes one line for people"""

TIMEOUT_SEC = 60.0
CHUNK_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def to_stderr(line: str) -> None:
    """Prints one line on stderr."""
    print(visible(line), file=sys.stderr, flush=True)


def fetch(
    url: str,
    destination: Path,
    *,
    what: str,
    licence: str | None = None,
    sha256: str | None = None,
    size_bytes: int | None = None,
    offline: bool = False,
    mirror: str | None = None,
    progress: Progress | None = None,
    say: Say = to_stderr,
) -> str:
    """Puts the file at `url` (http, https or file) at `destination`, whole, and returns its SHA-256.

    what, licence: named in the line that `say` gets before anything is downloaded.
    sha256, size_bytes: what the file must have; a digest that the server announces (as the Hugging Face hub does)
        counts where none is given.
    offline: no network, also if $SIDACTL_OFFLINE is set (and not 0); a mirror folder may still be read.
    mirror: a folder or base URL to take the file from instead (default $SIDACTL_MIRROR), where it lies under the whole
        path of the URL or under its last part.

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
            announced = _complete(partial, places, what, licence, sha256, size_bytes, progress, say)
            os.replace(partial, destination)
        with destination.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
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


def refuse_forbidden(url: str, what: str) -> None:
    """Raises the SidaError with which `fetch` would refuse to download what $SIDACTL_OFFLINE forbids."""
    _allowed_places(url, what, False, None)


def _allowed_places(url: str, what: str, offline: bool, mirror: str | None) -> Sequence[str]:
    places = _places(url, mirror or os.environ.get("SIDACTL_MIRROR"))
    if offline or os.environ.get("SIDACTL_OFFLINE", "0") not in ("", "0"):
        places = [place for place in places if place.startswith("file:")]
        if not places:
            raise SidaError(
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
            if os.fstat(fd).st_nlink:  # else the one before us removed it, and a third may have made a new one
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return
        finally:
            os.close(fd)


@dataclass(frozen=True)
class _Body:
    """What a place answered: bytes from `start` on of a file of `total` bytes."""

    stream: io.BufferedIOBase
    place: str
    start: int
    total: int | None
    validator: str = ""
    """a strong entity tag or a date, for If-Range"""
    sha256: str | None = None


def _complete(
    partial: Path,
    places: Sequence[str],
    what: str,
    licence: str | None,
    sha256: str | None,
    size_bytes: int | None,
    progress: Progress | None,
    say: Say,
) -> str | None:
    """Brings the partial file to its end; returns the digest that the server announced, if any."""
    tag = partial.with_suffix(".tag")
    size = partial.stat().st_size if partial.exists() else 0
    is_first = True
    while True:
        validator = tag.read_text() if tag.exists() else ""
        body = _open(places, size if validator or sha256 else 0, validator)
        with closing(body.stream):
            if size_bytes and body.total and body.total != size_bytes:
                raise SidaError(
                    f"{what} must have {size_bytes:,} bytes, {body.place} offers {body.total:,}",
                    "Check the address or the mirror.",
                    exit_code=EXIT_FAILED,
                )
            total = body.total or size_bytes
            if is_first:
                verb = f"resuming {what} at {_megabytes(body.start)}" if body.start else f"downloading {what}"
                amount = _megabytes(total) if total else "of unknown size"
                say(f"{verb}: {amount} from {body.place}" + (f", licence: {licence}" if licence else ""))
            if body.start == 0:
                partial.write_bytes(b"")  # before its tag is: a tag must never stand for the bytes of another file
                tag.write_text(body.validator)
            before, is_first = size, False
            size, is_whole = _append(partial, body, progress)
        if is_whole and total in (None, size):
            tag.unlink(missing_ok=True)
            return body.sha256
        if size - before < CHUNK_BYTES:  # else connecting again is worth it
            raise SidaError(
                f"{what} ended after {size:,} of {f'{total:,}' if total else 'unknown'} bytes from {body.place}",
                "Repeat the same command to go on.",
                exit_code=EXIT_FAILED,
            )


def _append(partial: Path, body: _Body, progress: Progress | None) -> tuple[int, bool]:
    """Adds what comes; returns the size of the file then, and False where the connection broke."""
    size = body.start
    with partial.open("ab") as file:
        while True:
            try:
                chunk = body.stream.read1(CHUNK_BYTES)
            except (OSError, HTTPException):
                return size, False
            if not chunk:
                return size, True
            size += file.write(chunk)
            if progress:
                progress(size, body.total or 0)


def _places(url: str, mirror: str | None) -> list[str]:
    """The URLs to try, in this order."""
    for given in [url, *([mirror] if mirror and "://" in mirror else [])]:
        if not given.startswith(("https://", "http://", "file://")):
            raise SidaError(f"a URL must begin with https://, http:// or file://, got {given}", "Give another.")
    path = "/" + url.partition("://")[2].partition("?")[0].partition("/")[2]
    if mirror is None or url.startswith("file:"):
        return [url]
    base = (mirror if "://" in mirror else Path(mirror).absolute().as_uri()).rstrip("/")
    return [f"{base}{path}", f"{base}/{path.rpartition('/')[2]}"]


def _open(places: Sequence[str], size: int, validator: str) -> _Body:
    """The first place that has the file, asked to go on after `size` bytes. SidaError where none has."""
    for place in places:
        try:
            body = _open_file(place) if place.startswith("file:") else _request(place, size, validator)
        except HTTPError as error:
            error.close()
            if error.code in (404, 410):
                continue
            raise SidaError(
                f"{place} answered {error.code} {error.reason}", "Try again later.", exit_code=EXIT_FAILED
            ) from None
        except FileNotFoundError:
            continue
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise SidaError(
                f"{place} cannot be reached: {getattr(reason, 'strerror', None) or reason}",
                "Check the connection, or set SIDACTL_MIRROR to a folder or base URL that has the file.",
                exit_code=EXIT_FAILED,
            ) from error
        return body
    if len(places) > 1:
        raise SidaError(
            f"the mirror has neither {places[0]} nor {places[1]}",
            "Put the file there, or unset SIDACTL_MIRROR.",
            exit_code=EXIT_FAILED,
        )
    raise SidaError(f"{places[0]} is not there", "Check the address.", exit_code=EXIT_FAILED)


def _open_file(place: str) -> _Body:
    path = Path(url2pathname(urlsplit(place).path))
    return _Body(path.open("rb"), place, 0, path.stat().st_size)


def _request(place: str, size: int, validator: str) -> _Body:
    headers = {"User-Agent": "sidactl", "Accept-Encoding": "identity"}
    if size:
        headers |= {"Range": f"bytes={size}-"} | ({"If-Range": validator} if validator else {})
    redirects = _Redirects()
    try:
        response = build_opener(redirects).open(Request(place, headers=headers), timeout=TIMEOUT_SEC)
    except HTTPError as error:
        if error.code == 416 and size:  # the partial file is not of this one
            error.close()
            return _request(place, 0, "")
        raise
    start, total = 0, response.headers.get("Content-Length")
    if response.status == 206:
        start, total = size, response.headers.get("Content-Range", "").rpartition("/")[2]
        if not response.headers.get("Content-Range", "").startswith(f"bytes {size}-"):
            response.close()
            return _request(place, 0, "")
    tag = response.headers.get("ETag", "W/")
    return _Body(
        stream=response,
        place=place,
        start=start,
        total=int(total) if total and total.isdecimal() else None,
        validator=response.headers.get("Last-Modified", "") if tag.startswith("W/") else tag,
        sha256=redirects.sha256,
    )


class _Redirects(HTTPRedirectHandler):
    """Follows redirects to http and https, never from https to http; keeps the digest that the hub sends with one."""

    sha256: str | None = None

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> Request | None:
        if urlsplit(newurl).scheme not in (("https",) if req.type == "https" else ("http", "https")):
            raise SidaError(f"{req.full_url} leads to {newurl}, which is not followed", "Give another address.")
        announced = (headers.get("X-Linked-ETag") or "").strip('"')
        if _SHA256.fullmatch(announced):
            self.sha256 = announced
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


@contextmanager
def _disk(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "Free some space" if is_full else "Check its permissions"
        raise SidaError(
            f"{destination.parent} cannot be written: {error.strerror or error}",
            f"{remedy}, then repeat the same command: what has come is kept.",
            exit_code=EXIT_FAILED,
        ) from error


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
