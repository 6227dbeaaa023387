"""What verify finds, and what gc removes: all that nothing needs, and nothing that something may."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sidactl.errors import SidaError
from sidactl.store import GcReport, Store, collect_garbage, rehash
from sidactl.store import artifact as store_artifact
from sidactl.store import files as store_files
from tests.conftest import instead_of
from tests.store.conftest import REPOSITORY, object_path, overwrite, tree


def age(store: Store) -> None:
    for path in [p for p in store.root.rglob("*") if p.is_file()]:
        os.utime(path, (time.time() - 7200, time.time() - 7200))


def told(store: Store) -> dict[str, str]:
    """What verify says, without the way out, by what is broken."""
    return {name: problem.partition(". ")[0] for name, problem in rehash(store)}


def follow(store: Store) -> list[str]:
    """Does what verify says until it says nothing; the commands that it took."""
    done: list[str] = []
    while problems := list(rehash(store)):
        for name, problem in problems:
            commands = re.findall(r"(?:: |\. )((?:rm|sed|chmod) -.*?)(?:, then .*)?$", problem)
            assert len(commands) == 1, (name, problem)
            done += commands
            assert len(done) < 50
            subprocess.run(["bash", "-c", commands[0]], check=True)
    return done


def test_verify_finds_each_kind_of_harm(store: Store) -> None:
    cut, lost, bad = (store.put("run", {"a": data}) for data in (b"hello", b"lost", b"bad"))
    child = store.put("generator", {}, inputs={"teacher": lost.oid, "dataset": "ab" * 32, "file": cut.oid})
    gone = store.put("score", {})
    store.set_ref("score", "best", gone.oid)
    store.set_ref("run", "cut", cut.oid)
    store.answer("cd" * 32, gone.oid)
    generator = f"generator {child.oid[:12]}"
    assert told(store) == {child.oid: f"{generator}: its input dataset (abababababab) is missing"}

    overwrite(store, cut.files["a"].sha256, b"hel")
    object_path(store, lost.files["a"].sha256).unlink()
    overwrite(store, bad.oid, b"{}")
    object_path(store, gone.oid).unlink()
    damaged = "damaged: its content no longer matches its name"
    missing = f"it names artifact {gone.oid[:12]}, which is missing"
    assert told(store) == {
        child.oid: f"{generator}: its input dataset (abababababab) is missing",
        cut.files["a"].sha256: f"file a of run {cut.oid[:12]} (run/cut): {damaged}",
        lost.oid: f"run {lost.oid[:12]}: its file a ({lost.files['a'].sha256[:12]}) is missing",
        bad.oid: damaged,
        "score/best": missing,
        f"asked/{'cd' * 32}": missing,
    }
    overwrite(store, cut.oid, b"{}")
    assert told(store)[cut.oid] == f"artifact of ref run/cut and 1 more: {damaged}"
    (store.root / "refs/run/cut").unlink()
    assert told(store)[cut.oid] == f"input file of {generator}: {damaged}"
    assert follow(store)
    assert store.refs() == {}


def test_verify_tells_of_refs_and_answers_of_another_kind_or_question(store: Store) -> None:
    teacher, fid, recall = store.put("teacher", {}), store.put("score", {}, params={"n": 1}), store.put("score", {})
    for name, artifact in (("ab", fid), ("cd", recall)):
        store.log({"command": "score", "key": name * 32, "oid": artifact.oid})
        store.answer(name * 32, artifact.oid)
    store.answer("ef" * 32, teacher.oid)  # not in the log: nothing is known against it
    store.set_ref("teacher", "t", teacher.oid)
    assert told(store) == {}
    (store.root / "refs/samples").mkdir()
    (store.root / "refs/samples/x").write_text(teacher.oid)
    (store.root / "asked" / ("ab" * 32)).write_text(recall.oid)
    (store.root / "asked" / ("cd" * 32)).write_text(teacher.oid)
    names = f"teacher {teacher.oid[:12]} (teacher/t, samples/x)"
    assert told(store) == {
        "samples/x": f"it names {names}, which is not of its kind",
        f"asked/{'ab' * 32}": f"it names score {recall.oid[:12]}, which never answered it (score)",
        f"asked/{'cd' * 32}": f"it names {names}, which never answered it (score)",
    }
    for text in ("x", "samples/x"):
        with pytest.raises(SidaError) as caught:
            store.resolve(text)
        assert str(caught.value) == (
            f"ref 'samples/x' must name an artifact of its kind, got teacher {teacher.oid[:12]}. "
            "See what helps with: sidactl verify"
        )
    assert len(follow(store)) == 3
    assert (store.asked("ab" * 32), store.asked("ef" * 32), store.refs()) == (None, teacher, {"teacher/t": teacher.oid})


GARBAGE: dict[str, Callable[[Path], object]] = {
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 100),
    "empty": lambda path: path.write_bytes(b""),
    "folder": lambda path: (path / "inner").mkdir(parents=True),
    "pipe": lambda path: os.mkfifo(path),
    "link": lambda path: path.symlink_to("/nowhere"),
    "link to a folder": lambda path: path.symlink_to("/"),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_anywhere_hides_nothing_and_the_way_out_works(store: Store, what: str) -> None:
    kept, lost = store.put("samples", {"a": b"kept"}), store.put("samples", {"a": b"lost"})
    store.set_ref("samples", "kept", kept.oid)
    object_path(store, lost.files["a"].sha256).unlink()
    odd = "a\n\x1b[31m'\u202e"
    names = [f"refs/{odd}", "refs/x", "refs/samples/..x", f"refs/samples/{odd}", "refs/samples/plain", "asked/x"]
    names += [f"asked/{'ab' * 32}", "objects/x", "objects/zz", f"objects/{kept.oid[:2]}/x", f"objects/00/{'0' * 62}"]
    names += [f"objects/{kept.oid[:2]}/{odd}", "live/x", f"live/{odd}", f"live/{'ab' * 32}"]
    (store.root / "objects/00").mkdir()
    for name in names:
        GARBAGE[what](store.root / name)
    (store.root / os.fsdecode(b"refs/samples/\xff")).write_text(kept.oid)
    found = told(store)
    missing = f"samples {lost.oid[:12]}: its file a ({lost.files['a'].sha256[:12]}) is missing"
    assert found[lost.oid] == missing
    assert found["refs/samples/..x"] == found["asked/x"] == found["live/x"] == "nothing that sidactl makes"
    assert set(store.refs()) <= {"samples/kept", "samples/plain"}
    assert store.resolve("kept") == kept
    assert [a.oid for a in store.artifacts()] == sorted([kept.oid, lost.oid])
    assert collect_garbage(store, dry_run=True).num_objects == 0 or what in ("binary", "empty")
    follow(store)
    assert (store.refs(), [a.oid for a in store.artifacts()]) == ({"samples/kept": kept.oid}, [kept.oid])
    assert store.read(kept, "a") == b"kept"


def test_what_cannot_be_read_is_told_and_the_rest_is_looked_at(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    shut, lost = store.put("samples", {"a": b"shut"}), store.put("samples", {"a": b"lost"})
    store.set_ref("samples", "shut", shut.oid)
    sha256 = shut.files["a"].sha256
    object_path(store, lost.files["a"].sha256).unlink()
    hash_file = store_files.hash_file

    def refuse(path: Path) -> str:
        if path == object_path(store, sha256):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return hash_file(path)

    instead_of(store_files.hash_file, refuse, monkeypatch)
    found = dict(rehash(store))
    assert found[sha256] == (
        f"file a of samples {shut.oid[:12]} (samples/shut): cannot be read: Permission denied. "
        f"Let it be read: chmod -R u+rX {object_path(store, sha256)}"
    )
    assert set(found) == {sha256, lost.oid}


def checkpoint(folder: Path, **files: bytes) -> None:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items()]
    (folder / "SHA256SUMS").write_text("".join(lines))


def test_verify_looks_into_unfinished_work_unless_a_process_is_at_it(store: Store) -> None:
    key = "ab" * 32
    with store.live(key) as live:
        live.append("events.jsonl", b'{"event": "progress", "nimg": 1}')
        live.write("state.json", b"{}")
        for name in ("checkpoint-0000000064-1", "checkpoint-0000000128-2", "checkpoint-0000000192-2"):
            checkpoint(live.path / name, state=b"state", weights=b"weights")
        with (live.path / "events.jsonl").open("ab") as file:
            file.write(b'{"event": "prog')  # the half line that a kill leaves
    assert told(store) == {}
    live.append("events.jsonl", b"\n[]")
    shutil.copytree(live.path / "checkpoint-0000000064-1", live.path / "checkpoint-0000000064-1.bak")
    (live.path / "checkpoint-0000000064-1/weights").write_bytes(b"weighty")
    (live.path / "checkpoint-0000000128-2/weights").unlink()
    with store.live(key):
        assert told(store) == {}
    at = f"live/{key[:12]}"
    assert told(store) == {
        f"{at}/events.jsonl": "line 2 is no event",
        f"{at}/checkpoint-0000000064-1.bak": "is no checkpoint",
        f"{at}/checkpoint-0000000064-1": "weights is damaged: its content no longer matches its name",
        f"{at}/checkpoint-0000000128-2": "weights is missing",
    }
    assert len(follow(store)) == 5
    assert sorted(os.listdir(live.path)) == ["checkpoint-0000000192-2", "events.jsonl", "lock", "state.json"]
    assert (live.path / "events.jsonl").read_text() == '{"event": "progress", "nimg": 1}\n'
    (live.path / "state.json").write_bytes(b"{")
    assert told(store) == {f"{at}/state.json": "must be a JSON object"}
    follow(store)
    assert os.listdir(store.root / "live") == []


def test_gc_waits_for_verify_and_verify_writes_nothing(store: Store) -> None:
    for n in range(3):
        store.put("run", {"a": b"%d" % n})
    overwrite(store, store.put("run", {}).oid, b"damaged")
    age(store)
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    looking = rehash(store)
    next(looking)
    with (store.root / "format").open("rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert list(looking) == []
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before
    assert collect_garbage(store).num_objects == 7


def test_gc_keeps_what_refs_reach_and_removes_the_rest(store: Store) -> None:
    teacher = store.put("teacher", {"w": b"teacher"})
    generator = store.put("generator", {"w": b"generator", "shared": b"both"}, inputs={"teacher": teacher.oid})
    orphan = store.put("generator", {"w": b"orphan", "shared": b"both"}, inputs={"teacher": teacher.oid})
    grandchild = store.put("samples", {"i": b"pixels"}, inputs={"generator": orphan.oid})
    store.set_ref("generator", "best", generator.oid)
    store.answer("aa" * 32, generator.oid)
    store.answer("bb" * 32, grandchild.oid)
    age(store)
    before = tree(store.root)

    plan = collect_garbage(store, dry_run=True)
    assert tree(store.root) == before
    report = collect_garbage(store)
    assert report == plan
    dead = [grandchild.oid, orphan.oid, *(a.files[n].sha256 for a, n in ((orphan, "w"), (grandchild, "i")))]
    assert set(report.removed) == {*dead, "asked/" + "bb" * 32}
    assert report.removed.index(grandchild.oid) < report.removed.index(orphan.oid)
    removed = before - tree(store.root)
    assert removed == {f"objects/{oid[:2]}/{oid[2:]}" for oid in dead} | {"asked/" + "bb" * 32}
    assert report.num_objects == 4
    manifests = (store_artifact._manifest_bytes(artifact) for artifact in (orphan, grandchild))
    assert report.num_bytes == len(b"orphan") + len(b"pixels") + sum(map(len, manifests))
    assert list(rehash(store)) == []
    assert store.asked("aa" * 32) == generator
    assert collect_garbage(store) == GcReport(num_objects=0, num_bytes=0, removed=())


def test_gc_keeps_scores_whose_every_input_is_reachable(store: Store) -> None:
    generator, stats, other = store.put("generator", {}), store.put("stats", {"s": b"1"}), store.put("stats", {})
    store.set_ref("generator", "best", generator.oid)
    store.set_ref("stats", "reference", stats.oid)
    kept = store.put("score", {"table": b"kept"}, inputs={"generator": generator.oid, "reference": stats.oid})
    chained = store.put("score", {}, inputs={"earlier": kept.oid})
    lost = store.put("score", {}, inputs={"generator": generator.oid, "reference": other.oid})
    features = store.put("features", {}, inputs={"generator": generator.oid})  # no score: goes
    report = collect_garbage(store, grace_sec=0)
    assert set(report.removed) == {other.oid, lost.oid, features.oid}
    assert {artifact.oid for artifact in store.artifacts()} == {generator.oid, stats.oid, kept.oid, chained.oid}
    assert list(rehash(store)) == []


def test_gc_keeps_the_young_with_all_that_they_need(store: Store) -> None:
    old = store.put("teacher", {"w": b"old"})
    unrelated = store.put("teacher", {"w": b"unrelated"})
    age(store)
    young = store.put("generator", {"w": b"young"}, inputs={"teacher": old.oid})
    assert set(collect_garbage(store).removed) == {unrelated.oid, unrelated.files["w"].sha256}
    assert {artifact.oid for artifact in store.artifacts()} == {old.oid, young.oid}
    assert list(rehash(store)) == []
    store.put("teacher", {"w": b"old"})  # put again, it is young again
    assert collect_garbage(store, grace_sec=3600).num_objects == 0
    assert collect_garbage(store, grace_sec=0).num_objects == 4


def test_gc_keeps_a_young_file_that_an_old_dead_manifest_names(store: Store) -> None:
    artifact = store.put("teacher", {"w": b"weights"})
    age(store)
    os.utime(object_path(store, artifact.files["w"].sha256))  # as if just replaced, its new manifest yet to come
    assert collect_garbage(store).removed == (artifact.oid,)
    assert object_path(store, artifact.files["w"].sha256).exists()


def test_gc_clears_tmp_of_our_names_only_and_keeps_live(store: Store) -> None:
    store.put("run", {})
    ours, other = store.root / "tmp" / ("ab" * 32), store.root / "tmp" / "notes.txt"
    ours.write_bytes(b"12345")
    other.write_bytes(b"mine")
    with store.live("cd" * 32) as live:
        live.write("state.bin", b"checkpoint")
    report = collect_garbage(store)
    assert report == GcReport(num_objects=0, num_bytes=5, removed=("tmp/" + "ab" * 32,), num_young=1)
    assert other.exists()
    assert (store.root / "live" / ("cd" * 32) / "state.bin").exists()


def test_scratch_is_spared_by_gc_for_as_long_as_its_process_lives(store: Store) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from sidactl.store import Store, collect_garbage
store = Store(Path(sys.argv[1]))
with store.scratch() as path:
    path.write_bytes(b"12345")
    print(store.put("samples", {"images.zip": path}).files["images.zip"].size_bytes)
with store.scratch() as path:
    path.write_bytes(b"123456789")
    print(collect_garbage(store).num_bytes, path.read_bytes())
    os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-u", "-c", code, str(store.root)]
    killed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (killed.returncode, killed.stdout, killed.stderr) == (-signal.SIGKILL, "5\n0 b'123456789'\n", "")
    assert collect_garbage(store).num_bytes == 9
    assert list(store.root.glob("tmp/*")) == []


def test_scratch_that_finds_no_room_is_told_in_one_line_and_goes(store: Store) -> None:
    def fill() -> None:
        with store.scratch() as path:
            path.write_bytes(b"1")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SidaError) as caught:
        fill()
    told = f"the run directory {store.root} cannot be written: No space left on device. Free some space "
    assert str(caught.value) == f"{told}or choose another with --run DIR."
    assert list(store.root.glob("tmp/*")) == []


def test_gc_touches_nothing_in_a_directory_that_is_no_store(tmp_path: Path) -> None:
    names = {"tmp/" + "ab" * 32, "objects/ab/" + "cd" * 31, "asked/x"}
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
    assert collect_garbage(Store(tmp_path), grace_sec=0).num_bytes == 0
    assert tree(tmp_path) == names


def test_gc_refuses_to_guess_what_a_damaged_manifest_needs(store: Store) -> None:
    artifact = store.put("generator", {"w": b"weights"})
    store.set_ref("generator", "best", artifact.oid)
    overwrite(store, artifact.oid, b'{"files":{}}')
    with pytest.raises(SidaError, match=r"\(manifest\) is damaged"):
        collect_garbage(store, grace_sec=0)
    assert object_path(store, artifact.files["w"].sha256).exists()


def test_gc_copes_with_a_dangling_ref_and_a_missing_input(store: Store) -> None:
    gone = store.put("generator", {})
    child = store.put("generator", {}, inputs={"teacher": "ab" * 32})
    store.set_ref("generator", "gone", gone.oid)
    store.set_ref("generator", "child", child.oid)
    object_path(store, gone.oid).unlink()
    assert collect_garbage(store, grace_sec=0).num_objects == 0


def test_gc_reads_a_score_once_however_many_there_are(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of scores: each is kept only once the one before is."""
    kept = store.put("samples", {})
    store.set_ref("samples", "kept", kept.oid)
    chain = [kept]
    for n in range(40):
        chain.append(store.put("score", {}, inputs={"subject": chain[-1].oid}, params={"n": n}))
        store.answer(f"{n:064x}", chain[-1].oid)
    dead = store.put("samples", {}, params={"n": 0})
    scored = store.put("score", {}, inputs={"subject": dead.oid, "reference": kept.oid})
    age(store)
    looks: list[str] = []
    size_bytes = Store._size_bytes
    monkeypatch.setattr(Store, "_size_bytes", lambda self, oid: looks.append(oid) or size_bytes(self, oid))
    assert set(collect_garbage(store, dry_run=True).removed) == {dead.oid, scored.oid}
    assert len(looks) <= 2 * len(chain)


def test_gc_looks_at_a_directory_that_cannot_be_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("run", {"a": b"a"})
    age(store)

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    open_file = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", *rest: open_file(path, mode, *rest) if "+" not in mode else refuse()
    )
    assert collect_garbage(store, dry_run=True).num_objects == 2
    with pytest.raises(SidaError, match=": Read-only file system"):
        collect_garbage(store)


def test_gc_waits_for_a_writer(store: Store, tmp_path: Path) -> None:
    store.put("run", {})
    pipe = tmp_path / "slow"
    os.mkfifo(pipe)
    code = """
import sys
from pathlib import Path
from sidactl.store import Store, collect_garbage
store = Store(Path(sys.argv[1]))
if sys.argv[2:]:
    store.put("teacher", {"w": Path(sys.argv[2])})
else:
    print(collect_garbage(store, grace_sec=0).removed)
"""
    command = [sys.executable, "-c", code, str(store.root)]
    with subprocess.Popen([*command, str(pipe)], cwd=REPOSITORY) as writer:
        with pipe.open("wb") as source:  # opens once the writer has
            source.write(b"first half, ")
            source.flush()
            with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as collector:
                with pytest.raises(subprocess.TimeoutExpired):
                    collector.wait(0.5)
                source.write(b"second half")
                source.close()
                output, _ = collector.communicate(timeout=300)
        assert writer.wait(30) == 0
    assert collector.returncode == 0
    assert "tmp/" not in output
    assert list(rehash(store)) == []
