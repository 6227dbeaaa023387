"""Downloads from a server on the loopback arrive whole, or are refused in one line that says what to do."""

import hashlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request

import pytest

from sidactl import download
from sidactl.errors import EXIT_FAILED, SidaError
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
    offline: bool = False,
    mirror: str | None = None,
    say: download.Say = lambda line: None,
) -> str:
    return download.fetch(
        url or f"{site.url}/a/net.pkl",
        target,
        what="net",
        licence="CC0",
        sha256=sha256,
        size_bytes=size_bytes,
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


# ---- redirects ----


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
        download._Redirects().redirect_request(Request("https://a/net.pkl"), None, 302, "", {}, "http://b/net.pkl")  # type: ignore[arg-type]


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
