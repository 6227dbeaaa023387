"""Downloads from a server on the loopback arrive whole, or are refused in one line that says what to do."""

import errno
import fcntl
import hashlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request

import pytest

import sidactl
from sidactl.commands import files
from sidactl.errors import EXIT_FAILED, EXIT_USAGE, SidaError
from sidactl.foreign import download, http
from sidactl.store import Store
from tests.web import Site, serving

BODY = random.Random(0).randbytes(5000)
DIGEST = hashlib.sha256(BODY).hexdigest()
RECORDED = f"net has SHA-256 {DIGEST}: none is known to compare it with, so this one is recorded"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "*")
    for name in ("SIDACTL_MIRROR", "SIDACTL_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with serving({"/a/net.pkl": BODY}) as site:
        yield site


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "tmp" / "net.pkl"


def fetch(
    site: Site,
    target: Path,
    *,
    url: str | None = None,
    sha256: str | None = None,
    size_bytes: int | None = None,
    max_bytes: int | None = None,
    offline: bool = False,
    mirror: str | None = None,
    say: download.OnLine = lambda line: None,
) -> str:
    return download.fetch(
        url or f"{site.url}/a/net.pkl",
        target,
        what="net",
        licence="CC0",
        sha256=sha256,
        size_bytes=size_bytes,
        max_bytes=max_bytes,
        offline=offline,
        mirror=mirror,
        say=say,
    )


def refused(site: Site, target: Path, **options: object) -> str:
    """The one line that a failing download is told in; its exit code says that work failed."""
    with pytest.raises(SidaError) as caught:
        fetch(site, target, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == EXIT_FAILED
    return str(caught.value)


def test_file_arrives_with_its_digest_and_says_what_from_where_how_large_and_the_licence(
    site: Site, target: Path
) -> None:
    said: list[str] = []
    done: list[tuple[int, int]] = []
    digest = download.fetch(
        f"{site.url}/a/net.pkl",
        target,
        what="net",
        licence="CC0",
        progress=lambda *now: done.append(now),
        say=said.append,
    )
    assert digest == DIGEST
    assert target.read_bytes() == BODY
    assert said == [f"downloading net: 0.0 MB from {site.url}/a/net.pkl, licence: CC0", RECORDED]
    assert done[-1] == (5000, 5000)
    assert [path.name for path in target.parent.iterdir()] == ["net.pkl"]


def test_known_digest_and_size_are_checked_in_silence(site: Site, target: Path) -> None:
    said: list[str] = []
    assert fetch(site, target, sha256=DIGEST, size_bytes=5000, say=said.append) == DIGEST
    assert len(said) == 1


# ---- interruptions ----


def test_cut_download_is_resumed_where_it_stopped(site: Site, target: Path) -> None:
    site.cuts = [1000]
    assert refused(site, target) == (
        f"net ended after 1,000 of 5,000 bytes from {site.url}/a/net.pkl. Repeat the same command to go on."
    )
    said: list[str] = []
    assert fetch(site, target, say=said.append) == DIGEST
    assert site.requests[1] == ("/a/net.pkl", "bytes=1000-", '"v1"')
    assert said[0] == f"resuming net at 0.0 MB: 0.0 MB from {site.url}/a/net.pkl, licence: CC0"
    assert target.read_bytes() == BODY
    assert [path.name for path in target.parent.iterdir()] == ["net.pkl"]


def test_partial_file_has_a_name_that_gc_leaves_alone(site: Site, target: Path) -> None:
    site.cuts = [1000]
    refused(site, target)
    names = sorted(path.name for path in target.parent.iterdir())
    assert [name[:9] for name in names] == ["download-", "download-"]
    assert not [name for name in names if len(name) == 64]


def test_server_without_ranges_starts_again_cleanly(site: Site, target: Path) -> None:
    site.has_ranges, site.cuts = False, [1000]
    refused(site, target)
    assert fetch(site, target) == DIGEST
    assert target.read_bytes() == BODY


def test_file_that_changed_meanwhile_is_not_mixed_with_the_old_one(site: Site, target: Path) -> None:
    site.cuts = [1000]
    refused(site, target)
    site.files["/a/net.pkl"], site.tag = BODY[::-1], '"v2"'
    assert fetch(site, target) == hashlib.sha256(BODY[::-1]).hexdigest()
    assert target.read_bytes() == BODY[::-1]


@pytest.mark.parametrize(("sha256", "asked"), [(None, ""), (DIGEST, "bytes=1000-")])
def test_without_a_tag_only_a_known_digest_lets_a_download_resume(
    site: Site, target: Path, sha256: str | None, asked: str
) -> None:
    site.tag, site.cuts = "", [1000]
    refused(site, target)
    assert fetch(site, target, sha256=sha256) == DIGEST
    assert site.requests[1] == ("/a/net.pkl", asked, "")


def test_weak_tag_is_not_resumed_by(site: Site, target: Path) -> None:
    site.tag, site.cuts = 'W/"v1"', [1000]
    refused(site, target)
    assert fetch(site, target) == DIGEST
    assert site.requests[1][1] == ""


def test_partial_file_that_is_longer_than_the_file_starts_again(site: Site, target: Path) -> None:
    site.cuts = [4000]
    refused(site, target)
    site.files["/a/net.pkl"] = BODY[:3000]
    assert fetch(site, target) == hashlib.sha256(BODY[:3000]).hexdigest()
    assert target.read_bytes() == BODY[:3000]


def test_connection_that_breaks_again_and_again_is_made_anew_while_it_gains(
    site: Site, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "CHUNK_BYTES", 1000)
    site.cuts = [1500, 1500, 1500]
    assert fetch(site, target) == DIGEST
    assert [asked for _, asked, _ in site.requests] == ["", "bytes=1500-", "bytes=3000-", "bytes=4500-"]
    target.unlink()
    site.requests.clear()
    site.has_ranges, site.cuts = False, [1500, 1500, 1500]
    assert "ended after 1,500 of 5,000 bytes" in refused(site, target)
    assert len(site.requests) == 2


def test_truncated_body_of_unknown_length_is_no_file(site: Site, target: Path) -> None:
    site.is_chunked, site.cuts = True, [1000]
    assert refused(site, target) == (
        f"net ended after 1,000 of unknown bytes from {site.url}/a/net.pkl. Repeat the same command to go on."
    )
    assert not target.exists()
    assert fetch(site, target) == DIGEST


# ---- files that are not what they should be ----


def test_wrong_digest_is_refused_and_nothing_is_kept(site: Site, target: Path) -> None:
    assert refused(site, target, sha256="0" * 64) == (
        f"net must have SHA-256 {'0' * 64}, got {DIGEST}. "
        "The file was removed: download it again, and ask its publisher if that does not help."
    )
    assert list(target.parent.iterdir()) == []


def test_wrong_size_is_refused_before_the_body_is_read(site: Site, target: Path) -> None:
    assert refused(site, target, size_bytes=6000) == (
        f"net must have 6,000 bytes, {site.url}/a/net.pkl offers 5,000. Check the address or the mirror."
    )
    assert not target.exists()


def test_missing_file(site: Site, target: Path) -> None:
    url = f"{site.url}/b.pkl"
    assert refused(site, target, url=url) == f"{url} is not there. Check the address."
    assert list(target.parent.iterdir()) == []


def test_server_error(site: Site, target: Path) -> None:
    site.status = 503
    assert refused(site, target) == f"{site.url}/a/net.pkl answered 503 Service Unavailable. Try again later."
    for status, reason in ((401, "Unauthorized"), (403, "Forbidden")):
        assert str(http.answered("https://host/net.pkl", status, reason)) == (
            f"https://host/net.pkl answered {status} {reason}. Check the address: what needs a login must be "
            "downloaded otherwise."
        )


def test_server_that_is_not_there(site: Site, target: Path) -> None:
    assert refused(site, target, url="http://127.0.0.1:1/net.pkl") == (
        "http://127.0.0.1:1/net.pkl cannot be reached: Connection refused. "
        "Check the connection, or set SIDACTL_MIRROR to a folder or base URL that has the file."
    )


@pytest.mark.parametrize("url", ["ftp://host/net.pkl", "s3://bucket/net.pkl", "net.pkl"])
def test_other_schemes_are_refused(site: Site, target: Path, url: str) -> None:
    with pytest.raises(SidaError) as caught:
        fetch(site, target, url=url)
    assert str(caught.value) == f"a URL must begin with https://, http:// or file://, got {url}. Give another."


def test_full_disk_keeps_what_has_come(site: Site, target: Path) -> None:
    name = f"download-{hashlib.sha256(f'{site.url}/a/net.pkl'.encode()).hexdigest()[:32]}"
    target.parent.mkdir()
    (target.parent / name).symlink_to("/dev/full")
    assert refused(site, target) == (
        f"{target.parent} cannot be written: No space left on device. "
        "Free some space, then repeat the same command: what has come is kept."
    )
    (target.parent / name).unlink()
    assert fetch(site, target) == DIGEST


def test_folder_that_cannot_be_made(site: Site, tmp_path: Path) -> None:
    (tmp_path / "tmp").write_text("a file")
    assert refused(site, tmp_path / "tmp" / "net.pkl") == (
        f"{tmp_path / 'tmp'} cannot be written: File exists. "
        "Check its permissions, then repeat the same command: what has come is kept."
    )


# ---- answers without an end, or of no sense ----


def answer(head: str, status: str = "200 OK", body: bytes = b"") -> bytes:
    return f"HTTP/1.1 {status}\r\n{head}Connection: close\r\n\r\n".encode() + body


def partial_bytes(target: Path) -> int:
    (partial,) = [path for path in target.parent.iterdir() if not path.suffix]
    return partial.stat().st_size


@pytest.mark.parametrize("head", ["", "Transfer-Encoding: chunked\r\n"])
def test_body_that_goes_on_past_the_known_size_is_left(site: Site, target: Path, head: str) -> None:
    site.raw = {"/a/net.pkl": answer(head)}
    site.endless = b"400\r\n" + b"x" * 1024 + b"\r\n" if head else b"x" * 1024
    assert refused(site, target, size_bytes=5000) == (
        f"net must have 5,000 bytes, {site.url}/a/net.pkl sends more. Try again."
    )
    assert partial_bytes(target) == 5000


def test_endless_body_of_unknown_size_is_left_at_the_limit_and_kept(site: Site, target: Path) -> None:
    site.raw, site.endless = {"/a/net.pkl": answer("")}, b"x" * 1024
    assert refused(site, target, max_bytes=3000) == (
        f"net must have at most 3,000 bytes, {site.url}/a/net.pkl offers more than 3,000 bytes. "
        "If that is right, pass a larger --max-bytes to fetch-teacher."
    )
    assert partial_bytes(target) == 3000


def test_limit_holds_where_none_is_given(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 4000)
    assert "must have at most 4,000 bytes" in refused(site, target)
    assert fetch(site, target, size_bytes=5000) == DIGEST  # the catalog knows better
    target.unlink()
    assert "must have at most 4,999 bytes" in refused(site, target, size_bytes=5000, max_bytes=4999)
    assert fetch(site, target, max_bytes=5000) == DIGEST


def test_announced_size_above_the_limit_is_refused_before_a_byte_is_taken(site: Site, target: Path) -> None:
    said: list[str] = []
    text = f"net must have at most 4,999 bytes, {site.url}/a/net.pkl offers 5,000 bytes. "
    site.cuts = [1000]
    refused(site, target)
    assert refused(site, target, max_bytes=4999, say=said.append).startswith(text)
    assert site.requests[-1][1] == "bytes=1000-"
    assert partial_bytes(target) == 1000
    other = target.parent / "other" / "net.pkl"
    assert refused(site, other, max_bytes=4999, say=said.append).startswith(text)
    assert (said, list(other.parent.iterdir())) == ([], [])


@pytest.mark.parametrize("size", ["9" * 5000, "-5", "many", "5, 5", "1_0", ""])
def test_content_length_that_is_no_size(site: Site, target: Path, size: str) -> None:
    site.raw = {"/a/net.pkl": answer(f"Content-Length: {size}\r\n", body=BODY)}
    assert refused(site, target) == (
        f"{site.url}/a/net.pkl answered with a Content-Length of {size[:20]!r}, which is no size of a file. "
        "Try again later."
    )


@pytest.mark.parametrize("is_chunked", [False, True])
def test_body_that_trickles_is_left_and_continued(
    site: Site, target: Path, is_chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "SLOW_SEC", 0.2)
    site.piece_bytes, site.pause_sec, site.is_chunked = 10, 0.02, is_chunked
    text = refused(site, target)
    assert text.startswith("net ended after ")
    assert f" bytes from {site.url}/a/net.pkl: only " in text
    assert text.endswith(" bytes came in 0 s. Repeat the same command to go on.")
    kept = partial_bytes(target)
    assert kept > 0
    site.piece_bytes, site.pause_sec = 1 << 30, 0.0
    assert fetch(site, target) == DIGEST
    assert site.requests[-1][1] == f"bytes={kept}-"


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nX-Long: ", answer("Transfer-Encoding: chunked\r\n")])
def test_head_and_chunk_sizes_that_trickle_are_left(
    site: Site, target: Path, head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "SLOW_SEC", 0.2)
    site.raw, site.endless, site.pause_sec = {"/a/net.pkl": head}, b"1", 0.02
    assert ": only " in refused(site, target)


@pytest.mark.parametrize(
    ("begin", "endless", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"X-Flood: 1\r\n", "cannot be reached: got more than 100 headers"),
        (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x" * 1024, "cannot be reached: got more than 65536 bytes"),
        (b"", b"HTTP/1.1 100 Continue\r\nX-More: 1\r\n\r\n" * 1000, "cannot be reached: its header has no end"),
        (b"x" * 65000 + b"\r\n", b"", "cannot be reached: xxxxx"),
        (b"", b"", "cannot be reached: Remote end closed"),
        (answer("Transfer-Encoding: chunked\r\n") + b"0\r\n", b"X-More: 1\r\n" * 1000, "net ended after 0 of"),
        (answer("Transfer-Encoding: chunked\r\n") + b"many\r\n", b"", "net ended after 0 of unknown bytes"),
        (answer("", "204 No Content"), b"", "answered 204 No Content"),
        (answer("", "503 " + "x" * 60000), b"", "answered 503 xxxxx"),
    ],
)
def test_flood_is_one_short_line(site: Site, target: Path, begin: bytes, endless: bytes, reason: str) -> None:
    site.raw, site.endless = {"/a/net.pkl": begin}, endless
    text = refused(site, target)
    assert reason in text
    assert len(text) < 500


def test_part_that_was_not_asked_for_is_no_file(site: Site, target: Path) -> None:
    head = "Content-Range: bytes 1000-4999/5000\r\nContent-Length: 4000\r\n"
    site.raw = {"/a/net.pkl": answer(head, "206 Partial Content", BODY[1000:])}
    assert refused(site, target) == (
        f"{site.url}/a/net.pkl answered with a part of the file that was not asked for. "
        "Try again later, or set SIDACTL_MIRROR to a folder or base URL that has the file."
    )
    assert len(site.requests) == 1


@pytest.mark.parametrize(
    ("content_range", "status"),
    [
        ("bytes 999-4999/5000", 206),
        ("bytes 1000-4999", 206),
        ("bytes */5000", 206),
        (f"bytes 1000-{'9' * 5000}/*", 206),
        ("", 206),
        ("bytes */5000", 416),
    ],
)
def test_part_that_does_not_fit_is_asked_for_once_and_then_the_whole(
    site: Site, target: Path, content_range: str, status: int
) -> None:
    site.cuts = [1000]
    refused(site, target)
    site.requests.clear()
    head = f"Content-Range: {content_range}\r\nContent-Length: 4\r\n"
    site.raw = {"/a/net.pkl": answer(head, f"{status} No", b"part")}
    assert "answered" in refused(site, target)
    assert [asked for _, asked, _ in site.requests] == ["bytes=1000-", ""]
    site.raw = {}
    assert fetch(site, target) == DIGEST


def test_tag_that_cannot_be_sent_back_is_none(site: Site, target: Path) -> None:
    head = 'ETag: "a\r\n b"\r\nContent-Length: 5000\r\n'
    site.raw = {"/a/net.pkl": answer(head, body=BODY[:1000])}
    refused(site, target)
    site.raw = {}
    assert fetch(site, target) == DIGEST
    assert site.requests[-1][1:] == ("", "")


# ---- addresses ----


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://[::1/net.pkl", "http://[::1/net.pkl is no URL: Invalid IPv6 URL. Check the address."),
        ("http://a..b/net.pkl", "http://a..b/net.pkl is no URL: label empty or too long. Check the address."),
        (f"http://{'a' * 64}.de/n", f"http://{'a' * 64}.de/n is no URL: label empty or too long. Check the address."),
        ("http://a:99999/n", "http://a:99999/n is no URL: Port out of range 0-65535. Check the address."),
        ("http://a:x/n", "http://a:x/n is no URL: Port could not be cast to integer value as 'x'. Check the address."),
        ("http:///net.pkl", "a URL must name a host, got http:///net.pkl. Check the address."),
        ("http://a b/net.pkl", "a URL must name a host, got http://a b/net.pkl. Check the address."),
        ("http://a\tb/n", "a URL must hold no control characters and be text, got http://a\tb/n. Give another."),
        ("http://a/\udcff", "a URL must hold no control characters and be text, got http://a/\udcff. Give another."),
        (
            "http://me:secret@[::1/net.pkl",
            "http://...@[::1/net.pkl is no URL: Invalid IPv6 URL. Check the address.",
        ),
        (
            "https://me:secret@host/net.pkl",
            "a URL must hold no user name and no password, got https://...@host/net.pkl. "
            "They would be kept with what comes from it: download it otherwise and give the file.",
        ),
        (
            "file://host/net.pkl",
            "a file:// URL must name no other machine, got file://host/net.pkl. Write it as file:///path.",
        ),
        ("file:///a%00b", "a file:// URL must not hold %00, got file:///a%00b. Give another."),
    ],
)
@pytest.mark.parametrize("how", ["url", "mirror", "variable", "command"])
def test_address_that_is_none(
    site: Site, target: Path, url: str, text: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIDACTL_MIRROR", os.fsencode(url).decode(errors="surrogateescape") if how == "variable" else "")
    ways = {"url": {"url": url}, "mirror": {"mirror": url}, "variable": {}}
    with pytest.raises(SidaError) as caught:
        sidactl.fetch_teacher(url, run=target) if how == "command" else fetch(site, target, **ways[how])
    assert (str(caught.value), caught.value.exit_code) == (text, EXIT_USAGE)
    assert site.requests == []


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("HTTPS://B\u00fccher.example/Net.pkl", "https://xn--bcher-kva.example/Net.pkl"),
        ("http://[::1]:80/a b\u00fc%00?c d#e", "http://[::1]:80/a%20b%C3%BC%00?c%20d"),
        ("http://127.0.0.1", "http://127.0.0.1"),
        ("FILE://localhost/a b%20\u00fc?c", "file:///a%20b%20%C3%BC"),
    ],
)
def test_address_is_asked_for_in_the_letters_of_one(url: str, asked: str) -> None:
    assert http.check_url(url) == asked
    assert http.check_url(asked) == asked


def test_blanks_and_other_letters_of_a_path_arrive(site: Site, target: Path) -> None:
    site.files = {"/a%20b/%C3%BC%00.pkl?x=%20": BODY}
    assert fetch(site, target, url=f"{site.url}/a b/\u00fc%00.pkl?x= ".replace("http:", "HTTP:")) == DIGEST


@pytest.mark.parametrize(("name", "got"), [("folder", "a folder"), ("pipe", "a pipe or device"), ("/dev/zero", "")])
@pytest.mark.parametrize("is_mirror", [False, True])
def test_what_is_no_file_is_not_read(
    site: Site, target: Path, tmp_path: Path, name: str, got: str, is_mirror: bool
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / name
    url, mirror = path.as_uri(), str(path.parent) if is_mirror else None
    with pytest.raises(SidaError) as caught:
        fetch(site, target, url=f"{site.url}/{path.name}" if is_mirror else url, mirror=mirror)
    assert str(caught.value) == f"{url} must be a file, got {got or 'a pipe or device'}. Name a file."
    assert caught.value.exit_code == EXIT_USAGE


def test_file_that_cannot_be_read(site: Site, target: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    url = (tmp_path / "loop").as_uri()
    text = f"{url} cannot be read: Too many levels of symbolic links. Check the path, and that you may read it."
    assert refused(site, target, url=url) == text


def test_long_name_needs_no_long_file_name(site: Site, target: Path) -> None:
    url = f"{site.url}/{'x' * 300}.pkl"
    site.files = {f"/{'x' * 300}.pkl": BODY}
    with files.fetched_file(Store(target), url, "net") as (path, digest):
        assert (digest, path.suffix) == (DIGEST, ".pkl")
    site.files = {}
    with pytest.raises(SidaError, match=r"\.pkl is not there\. Check the address\.$"):
        sidactl.fetch_teacher(url, run=target)


# ---- redirects ----


def test_redirects_without_an_end_are_one_line(site: Site, target: Path) -> None:
    site.redirects = {"/a/net.pkl": f"{site.url}/a/net.pkl"}
    assert refused(site, target) == (
        f"{site.url}/a/net.pkl answered 302 with one redirect after another, the last one Found. Try again later."
    )
    assert len(site.requests) < 20


@pytest.mark.parametrize("head", ["", f"Content-Length: {10**15}\r\n"])
def test_body_of_a_redirect_is_not_read(site: Site, target: Path, head: str) -> None:
    site.raw = {"/b": answer(f"{head}Location: {site.url}/a/net.pkl\r\n", "302 Found")}
    site.endless = b"x" * 1024
    assert fetch(site, target, url=f"{site.url}/b") == DIGEST


@pytest.mark.parametrize(
    "place", ["http://[::1", "http://a..b/n", "http://a:99999/n", "http://a:x/n", "http://u:p@a/n"]
)
def test_redirect_to_no_address_is_one_line(site: Site, target: Path, place: str) -> None:
    site.redirects = {"/a/net.pkl": place}
    assert refused(site, target).startswith(f"{site.url}/a/net.pkl cannot be reached: ")


def test_redirect_is_followed_and_the_digest_that_the_hub_announces_is_checked(site: Site, target: Path) -> None:
    site.redirects, site.linked = {"/resolve/net.pkl": f"{site.url}/a/net.pkl"}, f'"{DIGEST}"'
    said: list[str] = []
    assert fetch(site, target, url=f"{site.url}/resolve/net.pkl", say=said.append) == DIGEST
    assert len(said) == 1  # nothing had to be recorded
    target.unlink()
    site.linked = f'"{"1" * 64}"'
    assert refused(site, target, url=f"{site.url}/resolve/net.pkl").startswith(
        f"net must have SHA-256 {'1' * 64}, got {DIGEST}."
    )


def test_resuming_through_a_redirect_asks_for_the_rest(site: Site, target: Path) -> None:
    site.redirects, site.cuts = {"/resolve/net.pkl": f"{site.url}/a/net.pkl"}, [1000]
    refused(site, target, url=f"{site.url}/resolve/net.pkl")
    assert fetch(site, target, url=f"{site.url}/resolve/net.pkl") == DIGEST
    assert site.requests[-1] == ("/a/net.pkl", "bytes=1000-", '"v1"')


def test_redirect_to_a_local_file_is_not_followed(site: Site, target: Path) -> None:
    site.redirects = {"/a/net.pkl": "file:///etc/hostname"}
    with pytest.raises(SidaError) as caught:
        fetch(site, target)
    assert str(caught.value) == (
        f"{site.url}/a/net.pkl answered 302 Found - Redirection to url 'file:///etc/hostname' is not allowed. "
        "Try again later."
    )


def test_redirect_from_https_to_http_is_not_followed() -> None:
    with pytest.raises(SidaError, match=r"https://a/net\.pkl leads to http://b/net\.pkl, which is not followed"):
        http._Redirects().redirect_request(Request("https://a/net.pkl"), None, 302, "", {}, "http://b/net.pkl")  # type: ignore[arg-type]


# ---- mirrors, offline ----


@pytest.mark.parametrize("place", ["a/net.pkl", "net.pkl"])
@pytest.mark.parametrize("offline", [False, True])
def test_mirror_folder_serves_by_whole_path_or_last_part_without_network(
    site: Site, target: Path, tmp_path: Path, place: str, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = tmp_path / "a mirror"
    (mirror / place).parent.mkdir(parents=True)
    (mirror / place).write_bytes(BODY)
    monkeypatch.setenv("SIDACTL_MIRROR", str(mirror))
    said: list[str] = []
    assert fetch(site, target, offline=offline, say=said.append) == DIGEST
    assert said[0] == f"downloading net: 0.0 MB from {(mirror / place).as_uri()}, licence: CC0"
    assert site.requests == []
    assert (mirror / place).exists()


@pytest.mark.parametrize("place", ["/mirror/a/net.pkl", "/mirror/net.pkl"])
def test_mirror_url_serves_by_whole_path_or_last_part(site: Site, target: Path, place: str) -> None:
    site.files = {place: BODY}
    url = "https://publisher.invalid/a/net.pkl?download=true"
    assert fetch(site, target, url=url, mirror=f"{site.url}/mirror/") == DIGEST


@pytest.mark.parametrize("place", ["owner/vae/resolve/main/config.json", "vae/config.json"])
def test_mirror_has_files_that_are_called_as_many_others_in_a_folder(target: Path, tmp_path: Path, place: str) -> None:
    for other in ("config.json", place):
        (tmp_path / "mirror" / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mirror" / other).write_bytes(other.encode())
    url = "https://huggingface.co/owner/vae/resolve/main/config.json"
    download.fetch(url, target, what="config", offline=True, mirror=str(tmp_path / "mirror"))
    assert target.read_text() == place


def test_mirror_that_does_not_have_the_file(site: Site, target: Path, tmp_path: Path) -> None:
    base = tmp_path.as_uri()
    assert refused(site, target, mirror=str(tmp_path)) == (
        f"the mirror has neither {base}/a/net.pkl nor {base}/net.pkl. Put the file there, or unset SIDACTL_MIRROR."
    )
    assert site.requests == []


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_offline_forbids_the_network(site: Site, target: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "variable":
        monkeypatch.setenv("SIDACTL_OFFLINE", "1")
    with pytest.raises(SidaError) as caught:
        fetch(site, target, offline=how == "flag")
    assert str(caught.value) == (
        f"net must be downloaded from {site.url}/a/net.pkl, which offline forbids. "
        "Allow it, or set SIDACTL_MIRROR to a folder that holds the file."
    )
    assert site.requests == []


@pytest.mark.parametrize("value", ["", "0"])
def test_empty_or_zero_variable_is_not_offline(
    site: Site, target: Path, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIDACTL_OFFLINE", value)
    assert fetch(site, target) == DIGEST


def test_file_url_is_copied_and_needs_no_network(site: Site, target: Path, tmp_path: Path) -> None:
    (tmp_path / "my net.pkl").write_bytes(BODY)
    assert fetch(site, target, url=(tmp_path / "my net.pkl").as_uri(), offline=True) == DIGEST
    missing = (tmp_path / "other.pkl").as_uri()
    assert refused(site, target.with_name("b"), url=missing) == f"{missing} is not there. Check the address."


# ---- several at once ----


def test_two_at_once_download_once_and_both_get_it(site: Site, target: Path) -> None:
    site.hold = threading.Event()
    said: list[str] = []
    digests: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line == "waiting for another process to download net" and site.hold:
            site.hold.set()  # the first goes on only once the second waits for it

    threads = [threading.Thread(target=lambda: digests.append(fetch(site, target, say=say))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digests == [DIGEST, DIGEST]
    assert len(site.requests) == 1
    assert said.count("waiting for another process to download net") == 1
    assert [path.name for path in target.parent.iterdir()] == ["net.pkl"]


def test_many_holders_of_one_lock_never_meet(tmp_path: Path) -> None:
    inside, most = 0, 0
    count = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with download.exclusive(tmp_path / "lock", lambda: None):
                with count:
                    inside += 1
                    most = max(most, inside)
                with count:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_without_locks(site: Site, target: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    text = f"{target.parent} cannot be locked: {os.strerror(number)}. "
    text += "Locks do not work on its file system: choose another run directory with --run DIR."
    assert refused(site, target) == text
    with pytest.raises(SidaError) as caught, download.exclusive(target.with_name("lock"), lambda: None):
        pass
    assert str(caught.value) == text
    assert site.requests == []
