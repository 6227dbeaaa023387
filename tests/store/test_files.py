"""Neither several processes, nor a kill, nor a full disk leave the run directory invalid."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sidactl.errors import SidaError
from sidactl.store import Store, collect_garbage, rehash
from tests.store.conftest import REPOSITORY, tree


def run_python(code: str, *args: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)


def test_processes_that_write_the_same_all_succeed(store: Store) -> None:
    code = """
import sys
from pathlib import Path
from sidactl.store import Store, collect_garbage
store = Store.open(Path(sys.argv[1]))
for n in range(15):
    artifact = store.put("generator", {"w": b"%d" % n * 1000}, params={"n": n})
    store.set_ref("generator", "last", artifact.oid)
    store.answer(Store.key("distill", {"n": n}, {}), artifact.oid)
    store.log({"n": n})
    collect_garbage(store)
"""
    command = [sys.executable, "-c", code, str(store.root)]
    writers = [subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [writer.communicate(timeout=300)[1] for writer in writers] == ["", "", ""]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert list(rehash(store)) == []
    assert sorted(a.params["n"] for a in store.artifacts()) == list(range(15))
    assert store.resolve("generator/last").params == {"n": 14}
    assert len((store.root / "log.jsonl").read_text().splitlines()) == 45
    assert list((store.root / "tmp").iterdir()) == []


# A driver that forks one child per moment: the child dies by kill -9 just before its n-th change of the disk, and the
# driver goes on with n + 1 until a child lives to the end. Each child has a directory of its own.
KILL_DRIVER = """
import os, signal, sys
from pathlib import Path
from sidactl.store import Store, collect_garbage

def build(store):
    teacher = store.put("teacher", {"w": b"teacher"})
    store.set_ref("teacher", "t", teacher.oid)
    return teacher

def write(store):
    teacher = build(store)
    with store.live("cd" * 32) as live:
        live.write("state.bin", b"one")
        live.write("state.bin", b"two")
        live.append("events.jsonl", b'{"event": "progress", "nimg": 1}')
        key = Store.key("distill", {}, {"teacher": teacher.oid})
        for data in (b"first", b"second"):
            generator = store.put("generator", {"w": data, "v": b"v" * 3000000}, inputs={"teacher": teacher.oid})
            store.set_ref("generator", "best", generator.oid)
            store.answer(key, generator.oid)
        live.clear()
    store.log({"done": True})
    store.delete_ref("teacher", "t")

def collect(store):
    collect_garbage(store, grace_sec=0)

base, task = Path(sys.argv[1]), {"write": write, "collect": collect}[sys.argv[2]]
for fatal in range(1, 500):
    root = base / str(fatal)
    if task is collect:
        write(Store(root))
        parent = Store(root).put("dataset", {"d": b"orphan"})
        child = Store(root).put("samples", {"i": b"i"}, inputs={"dataset": parent.oid})
        Store(root).answer("ef" * 32, child.oid)
        Store(root).delete_ref("generator", "best")
        build(Store(root))
    pid = os.fork()
    if pid == 0:
        step = 0
        def count(event, args):
            global step
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
            if changes or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
                step += 1
                if step == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        task(Store.open(root))
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    print(fatal, os.waitstatus_to_exitcode(status), flush=True)
    if status == 0:
        break
"""


@pytest.mark.parametrize(("task", "min_moments"), [("write", 60), ("collect", 8)])
def test_kill_at_any_moment_leaves_a_valid_store(tmp_path: Path, task: str, min_moments: int) -> None:
    result = run_python(KILL_DRIVER, tmp_path, task)
    assert result.stderr == ""
    codes = [int(line.split()[1]) for line in result.stdout.splitlines()]
    assert codes[-1] == 0
    assert codes[:-1] == [-signal.SIGKILL] * (len(codes) - 1)
    assert len(codes) > min_moments
    for moment in range(1, len(codes) + 1):
        store = Store.open(tmp_path / str(moment))
        assert list(rehash(store)) == []
        for name in store.refs():
            artifact = store.resolve(name)
            assert all(store.read(artifact, file) for file in artifact.files)
        state = store.root / "live" / ("cd" * 32) / "state.bin"
        assert not state.exists() or state.read_bytes() in (b"one", b"two")
        store.put("teacher", {"w": b"teacher"})  # it can be written and cleaned again
        collect_garbage(store, grace_sec=0)
        assert list((store.root / "tmp").iterdir()) == []
        assert list(rehash(store)) == []


def test_kill_amid_large_writes_leaves_a_valid_store(store: Store) -> None:
    code = """
import sys
from pathlib import Path
from sidactl.store import Store
store = Store.open(Path(sys.argv[1]))
print("ready", flush=True)
for n in range(1000000):
    artifact = store.put("generator", {"w": b"%d" % n * 1000000}, params={"n": n})
    store.set_ref("generator", "best", artifact.oid)
"""
    for delay_sec in (0.003, 0.011, 0.027, 0.05, 0.09):
        command = [sys.executable, "-c", code, str(store.root)]
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            time.sleep(delay_sec)
            writer.kill()
        assert writer.returncode == -signal.SIGKILL
        assert list(rehash(store)) == []
        for name in store.refs():
            store.read(store.resolve(name), "w")
        collect_garbage(store, grace_sec=0)


@pytest.mark.parametrize(
    ("number", "text", "remedy"),
    [
        (errno.ENOSPC, "No space left on device", "Free some space or choose another with --run DIR."),
        (errno.EDQUOT, "Disk quota exceeded", "Free some space or choose another with --run DIR."),
        (
            errno.EROFS,
            "Read-only file system",
            "Check what it is and its permissions, or choose another with --run DIR.",
        ),
        (errno.EACCES, "Permission denied", "Check what it is and its permissions, or choose another with --run DIR."),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_refuses_is_one_line_and_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: str, number: int, text: str, remedy: str
) -> None:
    kept = store.put("run", {"a": b"kept"})
    store.set_ref("run", "kept", kept.oid)
    with store.live("cd" * 32) as live:
        live.write("state.bin", b"old")
        before = tree(store.root)

        def refuse(*args: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, call, refuse)
        for use in (
            lambda: store.put("run", {"a": b"new", "b": b"more"}),
            lambda: store.set_ref("run", "other", kept.oid),
            lambda: store.answer("ef" * 32, kept.oid),
            lambda: live.write("state.bin", b"new"),
        ):
            with pytest.raises(SidaError) as caught:
                use()
            assert str(caught.value) == f"the run directory {store.root} cannot be written: {text}. {remedy}"
            assert caught.value.exit_code == 2
        monkeypatch.undo()
        assert tree(store.root) == before
        assert (live.path / "state.bin").read_bytes() == b"old"
    assert list(rehash(store)) == []


def test_a_file_size_limit_is_told_and_leaves_nothing_half_written(store: Store) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
from sidactl.errors import SidaError
from sidactl.store import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))
store = Store.open(Path(sys.argv[1]))
with store.live("cd" * 32) as live:
    for use in (
        lambda: store.put("teacher", {"small": b"x", "w": bytes(150000)}),
        lambda: live.write("state.bin", bytes(150000)),
        lambda: store.log({"long": "x" * 150000}),
        lambda: live.append("events.jsonl", b"x" * 150000),
    ):
        try:
            use()
        except SidaError as error:
            print(error)
"""
    result = run_python(code, store.root)
    assert result.stderr == ""
    line = f"the run directory {store.root} cannot be written: {{}}. Free some space or choose another with --run DIR."
    large, full = line.format("File too large"), line.format("No space left on device")
    assert result.stdout.splitlines() == [large, large, full, full]
    files = {name: (store.root / name).stat().st_size for name in tree(store.root)}
    lock = f"live/{'cd' * 32}/lock"
    files.pop(lock)
    assert files == {"format": 2, "log.jsonl": 0, f"live/{'cd' * 32}/events.jsonl": 0}


def test_a_file_in_place_of_a_folder_is_told_on_writing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SidaError) as caught:
        Store(tmp_path / "file" / "run").put("run", {})
    remedy = "Check what it is and its permissions, or choose another with --run DIR."
    root = tmp_path / "file" / "run"
    assert str(caught.value) == f"the run directory {root} cannot be read: Not a directory. {remedy}"

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "objects").write_text("x")
    with pytest.raises(SidaError) as caught:
        Store(tmp_path / "run").put("run", {})
    assert str(caught.value) == f"the run directory {tmp_path / 'run'} cannot be written: File exists. {remedy}"


def test_import_is_light() -> None:
    code = """
import sys
import sidactl.store
heavy = {"torch", "numpy", "scipy", "rich", "typer", "click", "PIL", "safetensors"}
print(sorted(heavy & set(sys.modules)))
"""
    assert run_python(code).stdout == "[]\n"
