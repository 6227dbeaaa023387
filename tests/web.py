"""A web server on the loopback for tests: serves what it is told, in the ways that servers misbehave."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What the server has and does; tests change it between requests."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    has_ranges: bool = True
    tag: str = '"v1"'
    """ETag of every file; empty: none is sent"""
    cuts: list[int] = field(default_factory=list)
    """how many bytes of the body the next answers send before they break off"""
    is_chunked: bool = False
    piece_bytes: int = 1 << 30
    pause_sec: float = 0.0
    """bodies go out in pieces of this size, with a pause after each"""
    status: int = 200
    redirects: dict[str, str] = field(default_factory=dict)
    linked: str = ""
    """X-Linked-ETag of redirects"""
    hold: threading.Event | None = None
    """answers wait for it"""
    raw: dict[str, bytes] = field(default_factory=dict)
    """whole answers, head and all"""
    endless: bytes = b""
    """what follows them again and again until the reader goes away"""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """path, Range and If-Range of every request"""


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Site]:
    site = Site(files=files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = self.headers.get("Range", "")
            site.requests.append((self.path, asked, self.headers.get("If-Range", "")))
            if site.hold:
                site.hold.wait(10)
            if self.path in site.raw:
                self.close_connection = True
                with suppress(OSError):  # a reader that had enough
                    self.wfile.write(site.raw[self.path])
                    while site.endless:
                        self.wfile.write(site.endless)
                        time.sleep(site.pause_sec)
                return
            if self.path in site.redirects:
                self._head(302, Location=site.redirects[self.path], X_Linked_ETag=site.linked, Content_Length="0")
                return
            data = site.files.get(self.path)
            if data is None or site.status != 200:
                self._head(404 if data is None else site.status, Content_Length="0")
                return
            whole, start = len(data), 0
            match = re.fullmatch(r"bytes=(\d+)-", asked)
            if match and site.has_ranges and self.headers.get("If-Range", site.tag) == site.tag:
                start = int(match[1])
                if start >= whole:
                    self._head(416, Content_Range=f"bytes */{whole}", Content_Length="0")
                    return
            data = data[start:]
            length = {"Transfer_Encoding": "chunked"} if site.is_chunked else {"Content_Length": str(len(data))}
            part = {"Content_Range": f"bytes {start}-{whole - 1}/{whole}"} if start else {}
            self._head(206 if start else 200, ETag=site.tag, **length, **part)
            sent = data[: site.cuts.pop(0)] if site.cuts else data
            self.close_connection = True
            with suppress(ConnectionError):  # a reader that was killed
                for begin in range(0, len(sent), site.piece_bytes):
                    piece = sent[begin : begin + site.piece_bytes]
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if site.is_chunked else piece)
                    time.sleep(site.pause_sec)
                if site.is_chunked and len(sent) == len(data):
                    self.wfile.write(b"0\r\n\r\n")

        def _head(self, status: int, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if value:
                    self.send_header(name.replace("_", "-"), value)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        site.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield site
        finally:
            server.shutdown()
            thread.join()
