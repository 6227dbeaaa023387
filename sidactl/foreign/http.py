"""Requests over http and https: steady or given up, redirected with care, resumed where the server can."""

import io
import ipaddress
import re
import string
import time
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPResponse, HTTPSConnection
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from sidactl.errors import EXIT_FAILED, SidaError

TIMEOUT_SEC = 60.0

SLOW_SEC, SLOW_BYTES = 60.0, 6_000
"""waiting so long for fewer bytes, a tenth of what a modem of 1990 brings, is waiting for nothing"""

_MAX_HEAD_BYTES = 1 << 23
"""taken between two pieces of the file: 100 header lines of 64 KiB, as many as http.client allows, and a piece"""

MAX_TOLD = 200
"""characters of what a server says that are shown: it may say 64 KiB in a line"""

SHA256 = re.compile(r"[0-9a-f]{64}")

_SIZE = re.compile(r"[0-9]{1,18}")

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")

_VALIDATOR = re.compile(r"[\x20-\x7e\x80-\xff]*")
"""what may be sent back in a header"""


@dataclass(frozen=True)
class Body:
    """What a place answered: bytes from `start` on of a file of `total` bytes."""

    stream: io.BufferedIOBase
    place: str
    start: int
    total: int | None
    validator: str = ""
    """a strong entity tag or a date, for If-Range"""
    sha256: str | None = None


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
        raise SidaError(f"{_without_password(url)} is no URL: {reason_of(error)}", "Check the address.") from None
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


def answered(place: str, status: int, reason: str) -> SidaError:
    needs_login = status in (401, 403)  # which the hub also says of what is not there
    hint = "Check the address: what needs a login must be downloaded otherwise." if needs_login else "Try again later."
    return SidaError(f"{place} answered {status} {reason[:MAX_TOLD]}", hint, exit_code=EXIT_FAILED)


def reason_of(error: Exception) -> str:
    """What went wrong, in few words."""
    cause = getattr(error, "reason", error)
    cause = cause.__cause__ if isinstance(cause, UnicodeError) and cause.__cause__ else cause  # "label too long" alone
    return str(getattr(cause, "strerror", None) or cause or type(cause).__name__)[:MAX_TOLD]


def request(place: str, size: int, validator: str) -> Body:
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
            return Body(response, place, 0, _size_of(response, place), _validator(response), redirects.sha256)
        part = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status == 206 and asked and part and int(part[1]) == asked:
            total = None if part[3] == "*" else int(part[3])
            return Body(response, place, asked, total, _validator(response), redirects.sha256)
        response.close()
        if response.status != 206:
            raise answered(place, response.status, response.reason)
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
                f"{req.full_url} leads to {newurl[:MAX_TOLD]}, which is not followed", "Give another address."
            )
        announced = (headers.get("X-Linked-ETag") or "").strip('"')
        if SHA256.fullmatch(announced):
            self.sha256 = announced
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]
