"""Files from the network or from a mirror: streamed, resumed after an interruption, hashed. Not what is in them."""

import errno
import fcntl
import hashlib
import io
import ipaddress
import os
import re
import stat
import string
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener, url2pathname

from sidactl.errors import EXIT_FAILED, NO_LOCKS, MissingError, SidaError
from sidactl.text import visible

Progress = Callable[[int, int], None]
"""called with (bytes done, bytes in all); the latter is 0 where the server does not tell"""
Say = Callable[[str], None]
"""takes one line for people"""

MAX_BYTES = 16 * 10**9
"""of a file whose size the catalog does not tell: twice the largest network's, EDM2-XXL in float32, and a margin"""
TIMEOUT_SEC = 60.0
SLOW_SEC, SLOW_BYTES = 60.0, 6_000
"""waiting so long for fewer bytes, a tenth of what a modem of 1990 brings, is waiting for nothing"""
_MAX_HEAD_BYTES = 1 << 23
"""taken between two pieces of the file: 100 header lines of 64 KiB, as many as http.client allows, and a piece"""
CHUNK_BYTES = 1 << 20
_MAX_TOLD = 200
"""characters of what a server says that are shown: it may say 64 KiB in a line"""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OF_MANY = re.compile(r"/[^/]+/([^/]+)/resolve/[^/]+/(config\.json|diffusion_pytorch_model\.safetensors)")
"""path of a file of the hub that is called as many others are: a mirror has it in a folder named as its repository"""
_SIZE = re.compile(r"[0-9]{1,18}")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_VALIDATOR = re.compile(r"[\x20-\x7e\x80-\xff]*")
"""what may be sent back in a header"""


def to_stderr(line: str) -> None:
    """Prints one line on stderr; of the processes that torchrun starts the first one alone does."""
    if os.environ.get("RANK", "0") == "0":
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
    progress: Progress | None = None,
    say: Say = to_stderr,
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
    max_bytes: int | None,
    progress: Progress | None,
    say: Say,
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


def _append(partial: Path, body: _Body, limit: int, progress: Progress | None) -> tuple[int, str | None]:
    """Adds what comes, up to `limit` bytes in all; returns how many came, at most one more, and why it broke, if so."""
    size = body.start
    with partial.open("ab") as file:
        while True:
            try:
                chunk = body.stream.read1(max(1, min(CHUNK_BYTES, limit + 1 - size)))
            except TimeoutError as error:
                return size, _reason(error)
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


def check_url(url: str) -> str:
    """The URL as it is asked for: without blanks and letters that have to be escaped. SidaError where it is none."""
    scheme, separator, _ = url.partition("://")
    if not separator or scheme.lower() not in ("https", "http", "file"):
        raise SidaError(f"a URL must begin with https://, http:// or file://, got {url}", "Give another.")
    if not url.isprintable():  # controls and bytes that are no text, of which some would be dropped in silence
        raise SidaError(f"a URL must hold no control characters and be text, got {url}", "Give another.")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        if ":" in host:
            host = f"[{ipaddress.IPv6Address(host)}]"
        else:
            host = host.encode("idna").decode()
    except ValueError as error:
        raise SidaError(f"{_without_password(url)} is no URL: {_reason(error)}", "Check the address.") from None
    if parts.username is not None or parts.password is not None:
        raise SidaError(
            f"a URL must hold no user name and no password, got {_without_password(url)}",
            "They would be kept with what comes from it: download it otherwise and give the file.",
        )
    path = quote(parts.path, safe=string.punctuation)
    if parts.scheme == "file":
        if host not in ("", "localhost"):
            raise SidaError(f"a file:// URL must name no other machine, got {url}", "Write it as file:///path.")
        if "%00" in path:
            raise SidaError(f"a file:// URL must not hold %00, got {url}", "Give another.")
        return f"file://{path}"
    if not re.fullmatch(r"[A-Za-z0-9._-]+|\[.+\]", host):
        raise SidaError(f"a URL must name a host, got {url}", "Check the address.")
    netloc = host if port is None else f"{host}:{port}"
    return urlunsplit((parts.scheme, netloc, path, quote(parts.query, safe=string.punctuation), ""))


def _without_password(url: str) -> str:
    return re.sub(r"//[^/]*@", "//...@", url)


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


def _open(places: Sequence[str], size: int, validator: str) -> _Body:
    """The first place that has the file, asked to go on after `size` bytes. SidaError where none has."""
    for place in places:
        is_file = place.startswith("file:")
        try:
            body = _open_file(place) if is_file else _request(place, size, validator)
        except HTTPError as error:
            error.close()
            if error.code in (404, 410):
                continue
            raise _answered(place, error.code, str(error.reason)) from None
        except FileNotFoundError:
            continue
        except (OSError, HTTPException, ValueError) as error:
            if is_file:
                hint = "Check the path, and that you may read it."
            else:
                hint = "Check the connection, or set SIDACTL_MIRROR to a folder or base URL that has the file."
            raise SidaError(
                f"{place} cannot be {'read' if is_file else 'reached'}: {_reason(error)}", hint, exit_code=EXIT_FAILED
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


def _answered(place: str, status: int, reason: str) -> SidaError:
    needs_login = status in (401, 403)  # which the hub also says of what is not there
    hint = "Check the address: what needs a login must be downloaded otherwise." if needs_login else "Try again later."
    return SidaError(f"{place} answered {status} {reason[:_MAX_TOLD]}", hint, exit_code=EXIT_FAILED)


def _reason(error: Exception) -> str:
    """What went wrong, in few words."""
    cause = getattr(error, "reason", error)
    cause = cause.__cause__ if isinstance(cause, UnicodeError) and cause.__cause__ else cause  # "label too long" alone
    return str(getattr(cause, "strerror", None) or cause or type(cause).__name__)[:_MAX_TOLD]


def _path_of(place: str) -> Path:
    return Path(url2pathname(urlsplit(place).path))


def _open_file(place: str) -> _Body:
    path = _path_of(place)
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):  # a pipe would wait for ever, a device might have no end
        got = "a folder" if stat.S_ISDIR(about.st_mode) else "a pipe or device"
        raise SidaError(f"{place} must be a file, got {got}", "Name a file.")
    return _Body(path.open("rb"), place, 0, about.st_size)


def _request(place: str, size: int, validator: str) -> _Body:
    for asked in dict.fromkeys((size, 0)):  # a part that does not fit is asked for once; then the whole
        redirects = _Redirects()
        headers = {"User-Agent": "sidactl", "Accept-Encoding": "identity"}
        if asked:
            headers |= {"Range": f"bytes={asked}-"} | ({"If-Range": validator} if validator else {})
        try:
            opener = build_opener(redirects, _Http, _Https)
            response = opener.open(Request(place, headers=headers), timeout=TIMEOUT_SEC)
        except HTTPError as error:
            if error.code != 416 or not asked:
                raise
            error.close()  # the partial file is not of this one
            continue
        if response.status == 200:
            return _Body(response, place, 0, _size_of(response, place), _validator(response), redirects.sha256)
        part = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status == 206 and asked and part and int(part[1]) == asked:
            total = None if part[3] == "*" else int(part[3])
            return _Body(response, place, asked, total, _validator(response), redirects.sha256)
        response.close()
        if response.status != 206:
            raise _answered(place, response.status, response.reason)
    raise SidaError(
        f"{place} answered with a part of the file that was not asked for",
        "Try again later, or set SIDACTL_MIRROR to a folder or base URL that has the file.",
        exit_code=EXIT_FAILED,
    )


def _size_of(response: HTTPResponse, place: str) -> int | None:
    text = response.headers.get("Content-Length")
    if text is None or _SIZE.fullmatch(text.strip()):
        return None if text is None else int(text)
    response.close()
    raise SidaError(
        f"{place} answered with a Content-Length of {text[:20]!r}, which is no size of a file",
        "Try again later.",
        exit_code=EXIT_FAILED,
    )


def _validator(response: HTTPResponse) -> str:
    tag = response.headers.get("ETag", "W/")
    validator = response.headers.get("Last-Modified", "") if tag.startswith("W/") else tag
    return validator if _VALIDATOR.fullmatch(validator) else ""


class _Steady(io.RawIOBase):
    """The bytes of a connection; it fails where they come too slowly, or too many come that are none of the file's."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self.num_bytes = 0
        """since the last piece of the file"""
        self._waited_sec, self._came = 0.0, 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        if self._waited_sec >= SLOW_SEC:
            if self._came < SLOW_BYTES:
                raise TimeoutError(f"only {self._came:,} bytes came in {self._waited_sec:.0f} s")
            self._waited_sec, self._came = 0.0, 0
        if self.num_bytes > _MAX_HEAD_BYTES:
            raise HTTPException("its header has no end")
        begun_sec = time.monotonic()
        count = self._raw.readinto(buffer) or 0
        self._waited_sec += time.monotonic() - begun_sec
        self._came += count
        self.num_bytes += count
        return count


class _Response(HTTPResponse):
    """An answer whose every byte, in headers, chunks and trailers alike, comes through a `_Steady`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._steady = _Steady(self.fp.detach())
        self.fp = io.BufferedReader(self._steady)

    def read1(self, n: int = -1) -> bytes:
        self._steady.num_bytes = 0
        return super().read1(n)


class _Connection(HTTPConnection):
    response_class = _Response


class _SecureConnection(HTTPSConnection):
    response_class = _Response


class _Http(HTTPHandler):
    def http_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_Connection, req)


class _Https(HTTPSHandler):
    def https_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_SecureConnection, req)


class _Redirects(HTTPRedirectHandler):
    """Follows redirects to http and https, never from https to http; keeps the digest that the hub sends with one."""

    sha256: str | None = None
    inf_msg = "with one redirect after another, the last one "

    def http_error_302(self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage) -> Any:
        fp.close()  # else its body is read to the end, which it may not have
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> Request | None:
        if urlsplit(newurl).scheme not in (("https",) if req.type == "https" else ("http", "https")):
            raise SidaError(
                f"{req.full_url} leads to {newurl[:_MAX_TOLD]}, which is not followed", "Give another address."
            )
        announced = (headers.get("X-Linked-ETag") or "").strip('"')
        if _SHA256.fullmatch(announced):
            self.sha256 = announced
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


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
