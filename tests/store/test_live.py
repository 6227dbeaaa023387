"""Live directories are one process's at a time, and the log takes one line for each question."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from sidactl.errors import SidaError
from sidactl.store import Store, collect_garbage, rehash
from tests.store.conftest import REPOSITORY


def test_live_directory_is_written_appended_and_cleared(store: Store) -> None:
    key = "cd" * 32
    with store.live(key) as live:
        assert live.path == store.root / "live" / key
        assert int((live.path / "lock").read_text()) == os.getpid()
        live.write("state.bin", b"one")
        live.write("state.bin", memoryview(b"two"))
        live.append("events.jsonl", b'{"k":1}')
        live.append("events.jsonl", b'{"k":2}\n')
        live.remove("never.there")
        assert (live.path / "state.bin").read_bytes() == b"two"
        assert (live.path / "events.jsonl").read_bytes() == b'{"k":1}\n{"k":2}\n'
        assert {path.name for path in live.path.iterdir()} == {"lock", "state.bin", "events.jsonl"}
    with store.live(key) as live:  # what an interrupted run left is still there
        assert (live.path / "state.bin").read_bytes() == b"two"
        live.remove("state.bin")
        (live.path / "previews").mkdir()
        (live.path / "previews" / "0.png").write_bytes(b"png")
        live.clear()
        assert [path.name for path in live.path.iterdir()] == ["lock"]
    assert list((store.root / "live").iterdir()) == []


def test_live_directory_of_another_process_is_refused(store: Store) -> None:
    key = Store.key("distill", {}, {})
    code = """
import sys
from pathlib import Path
from sidactl.store import Store
with Store(Path(sys.argv[1])).live(sys.argv[2]) as live:
    live.write("state.bin", b"x")
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(store.root), key]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SidaError) as caught, store.live(key):
            pytest.fail("the lock is held twice")
        assert caught.value.message == f"run {key[:12]} is already being worked on by process {holder.pid}"
        assert caught.value.hint == "Wait for it, or stop it first."
        assert caught.value.exit_code == 1
        with store.live("ef" * 32):
            pass  # other runs are free
        collect_garbage(store, grace_sec=0)
        assert (store.root / "live" / key / "state.bin").exists()
        holder.kill()
    with store.live(key) as live:
        assert (live.path / "state.bin").read_bytes() == b"x"


def test_live_lock_is_refused_within_one_process_and_freed_by_an_exception(store: Store) -> None:
    def hold_and_fail() -> None:
        with store.live("cd" * 32):
            with pytest.raises(SidaError, match=rf"by process {os.getpid()}\. Wait for it"):
                store.live("cd" * 32).__enter__()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hold_and_fail()
    with store.live("cd" * 32):
        pass


def test_live_lock_is_not_fooled_by_a_directory_removed_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.root / "live" / ("cd" * 32)
    flock, stolen = fcntl.flock, []

    def remove_first(file: int, how: int) -> None:
        flock(file, how)
        if how & fcntl.LOCK_NB and not stolen:
            stolen.append(path)
            (path / "lock").unlink()
            path.rmdir()

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with store.live("cd" * 32) as live:
        assert stolen
        assert (live.path / "lock").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize(
    "work",
    [
        lambda store: store.put("score", {}),
        lambda store: store.log({}),
        lambda store: store.live("cd" * 32).__enter__(),
        lambda store: store.check_writable(),
        lambda store: collect_garbage(store),
        lambda store: collect_garbage(store, dry_run=True),
        lambda store: list(rehash(store)),
    ],
)
def test_file_system_without_locks_is_one_line(
    store: Store, work: Callable[[Store], Any], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: Any, how: int) -> None:
        raise OSError(number, os.strerror(number))

    store.put("samples", {"a": b"a"})
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        with pytest.raises(SidaError) as caught:
            work(store)
    assert str(caught.value) == (
        f"the run directory {store.root} cannot be locked: {os.strerror(number)}. "
        "Locks do not work on its file system: mount it with them, or choose another with --run DIR."
    )


def test_live_os_errors_of_the_caller_pass_through(store: Store) -> None:
    with pytest.raises(FileNotFoundError), store.live("cd" * 32):
        raise FileNotFoundError("the caller's own")


@pytest.mark.parametrize("name", ["lock", "../x", "a/b", ".x", ""])
def test_live_names_are_plain(store: Store, name: str) -> None:
    with store.live("cd" * 32) as live, pytest.raises(AssertionError, match="a plain file name is needed"):
        live.write(name, b"")


def test_log_adds_one_line_and_changes_no_oid(store: Store) -> None:
    oid = store.put("run", {}).oid
    store.log({"time": 12.5, "host": "h", "version": "0.1"})
    store.log({"b": 1, "a": "x\ny"})
    lines = (store.root / "log.jsonl").read_text().splitlines()
    assert lines == ['{"host":"h","time":12.5,"version":"0.1"}', '{"a":"x\\ny","b":1}']
    assert store.put("run", {}).oid == oid
    assert list(rehash(store)) == []
