"""The run directory: names are hashes, errors are one line, and neither a kill nor a full disk leaves it invalid."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidactl.errors import SidaError
from sidactl.store import (
    KINDS,
    Artifact,
    FileEntry,
    GcReport,
    Store,
    canonical_json,
    collect_garbage,
    digest,
    objects,
    rehash,
)
from sidactl.store import artifact as store_artifact
from sidactl.store import files as store_files
from tests.conftest import instead_of

SEE_LS = "See what there is with: sidactl ls"
ASK_AGAIN = "Run sidactl verify, then ask again with --force."
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "run")


def object_path(store: Store, sha256: str) -> Path:
    return store.root / "objects" / sha256[:2] / sha256[2:]


def overwrite(store: Store, sha256: str, data: bytes) -> None:
    path = object_path(store, sha256)
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def age(store: Store) -> None:
    for path in [p for p in store.root.rglob("*") if p.is_file()]:
        os.utime(path, (time.time() - 7200, time.time() - 7200))


def run_python(code: str, *args: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)


# canonical JSON and keys


def test_canonical_json_bytes_are_exact() -> None:
    value = {"b": [1, 2.5, 1e-07, -0.0, 1e22], "a": {"é": None, "Z": True}, "c": "x\n"}
    expected = '{"a":{"Z":true,"é":null},"b":[1,2.5,1e-07,-0.0,1e+22],"c":"x\\n"}'
    assert canonical_json(value) == expected.encode()


def test_canonical_json_does_not_depend_on_insertion_order() -> None:
    assert canonical_json({"x": 1, "y": {"p": 2, "q": 3}}) == canonical_json({"y": {"q": 3, "p": 2}, "x": 1})


def test_canonical_json_writes_tuples_as_lists_and_reads_back() -> None:
    assert canonical_json({"a": (1, (2, "b"))}) == b'{"a":[1,[2,"b"]]}'
    data = canonical_json({"lr": 0.1 + 0.2, "n": 10**20})
    assert canonical_json(json.loads(data)) == data
    assert data == b'{"lr":0.30000000000000004,"n":100000000000000000000}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "\ud800"])
def test_canonical_json_refuses_what_utf8_json_cannot_say(value: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        canonical_json({"a": [value]})


@pytest.mark.parametrize("value", [{1: "a"}, {None: 1}, {True: 1}, {"a": {2: 3}}, {"a": b"bytes"}, {"a": {1, 2}}])
def test_canonical_json_refuses_other_keys_and_types(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)


def test_digest_is_the_sha256_of_the_canonical_text() -> None:
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert digest({"b": 1, "a": 2}) == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()


def test_key_depends_on_command_parameters_inputs_and_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Store.key("fid", {"num": 50000}, {"samples": "ab" * 32})
    text = '{"command":"fid","inputs":{"samples":"%s"},"params":{"num":50000},"schema":1}' % ("ab" * 32)
    assert key == hashlib.sha256(text.encode()).hexdigest()
    others = [
        Store.key("is", {"num": 50000}, {"samples": "ab" * 32}),
        Store.key("fid", {"num": 50001}, {"samples": "ab" * 32}),
        Store.key("fid", {"num": 50000}, {"samples": "ac" * 32}),
        Store.key("fid", {"num": 50000}, {"reference": "ab" * 32}),
    ]
    monkeypatch.setattr(objects, "SCHEMA_VERSION", 2)
    others.append(Store.key("fid", {"num": 50000}, {"samples": "ab" * 32}))
    assert len({key, *others}) == 6


# opening


def test_open_takes_the_argument_then_the_environment_then_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIDACTL_RUN", str(tmp_path / "env"))
    assert Store.open(tmp_path / "arg").root == tmp_path / "arg"
    assert Store.open().root == tmp_path / "env"
    monkeypatch.delenv("SIDACTL_RUN")
    assert Store.open().root == Path("sida-run")


def test_reading_never_creates_the_directory(store: Store) -> None:
    assert list(store.artifacts()) == []
    assert store.refs() == {}
    assert store.names_of("ab" * 32) == []
    assert store.asked("cd" * 32) is None
    assert list(rehash(store)) == []
    assert collect_garbage(store) == GcReport(num_objects=0, num_bytes=0, removed=())
    with pytest.raises(SidaError):
        store.resolve("abcd")
    with pytest.raises(SidaError):
        store.delete_ref("generator", "best")
    assert not store.root.exists()


def test_first_write_creates_the_directory_and_states_the_format(store: Store) -> None:
    store.put("run", {})
    assert (store.root / "format").read_text() == "1\n"
    assert {path.name for path in store.root.iterdir()} == {"format", "objects", "refs", "asked", "live", "tmp"}


def test_newer_format_is_refused_by_readers_and_writers(store: Store) -> None:
    store.put("run", {})
    (store.root / "format").write_text("2\n")
    expected = (
        f"the run directory {store.root} has format 2, this sidactl reads format 1. "
        "Upgrade sidactl, or choose another directory with --run DIR."
    )
    for use in (lambda: Store.open(store.root), lambda: store.put("run", {}), lambda: collect_garbage(store)):
        with pytest.raises(SidaError) as caught:
            use()
        assert str(caught.value) == expected


def test_a_file_in_place_of_the_directory_is_told_on_opening(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a directory")
    with pytest.raises(SidaError) as caught:
        Store.open(tmp_path / "run")
    assert str(caught.value) == (
        f"the run directory {tmp_path / 'run'} cannot be read: Not a directory. "
        "Check what it is and its permissions, or choose another with --run DIR."
    )
    assert caught.value.exit_code == 2


# put, get, path, read


def test_put_stores_manifest_and_files_under_their_hashes(store: Store) -> None:
    artifact = store.put(
        "score", {"a.txt": b"hello"}, inputs={"samples": "ab" * 32}, params={"n": 1}, results={"fid": 2.5}
    )
    sha256 = hashlib.sha256(b"hello").hexdigest()
    manifest = (
        f'{{"files":{{"a.txt":{{"sha256":"{sha256}","size_bytes":5}}}},"inputs":{{"samples":"{"ab" * 32}"}},'
        '"kind":"score","params":{"n":1},"results":{"fid":2.5},"schema":1}'
    )
    assert artifact == Artifact(
        oid=hashlib.sha256(manifest.encode()).hexdigest(),
        kind="score",
        files={"a.txt": FileEntry(sha256=sha256, size_bytes=5)},
        inputs={"samples": "ab" * 32},
        params={"n": 1},
        results={"fid": 2.5},
    )
    assert object_path(store, artifact.oid).read_text() == manifest
    assert object_path(store, sha256).read_bytes() == b"hello"
    assert store.get(artifact.oid) == artifact


def test_objects_are_read_only_and_nothing_stays_in_tmp(store: Store) -> None:
    artifact = store.put("run", {"a": b"x", "b": b"y"})
    for sha256 in (artifact.oid, *(entry.sha256 for entry in artifact.files.values())):
        assert stat.S_IMODE(object_path(store, sha256).stat().st_mode) & 0o333 == 0
    assert list((store.root / "tmp").iterdir()) == []


def test_put_copies_paths_and_leaves_them_alone(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "weights.bin"
    data = os.urandom(2 * (1 << 20) + 17)  # several chunks, the last one short
    source.write_bytes(data)
    artifact = store.put("teacher", {"nested/weights.bin": source, "view": memoryview(b"abc")})
    assert source.read_bytes() == data
    assert not source.samefile(store.path(artifact, "nested/weights.bin"))
    assert store.read(artifact, "nested/weights.bin") == data
    assert store.read(artifact, "view") == b"abc"
    assert artifact.files["nested/weights.bin"].size_bytes == len(data)


def test_put_is_idempotent_and_shares_equal_files(store: Store) -> None:
    first = store.put("samples", {"a": b"same", "b": b"same", "empty": b""}, params={"seeds": (0, 1)})
    before = tree(store.root)
    assert store.put("samples", {"b": b"same", "empty": b"", "a": b"same"}, params={"seeds": [0, 1]}) == first
    assert tree(store.root) == before
    assert len([name for name in before if name.startswith("objects/")]) == 3
    assert first.params == {"seeds": [0, 1]}


def test_every_field_enters_the_oid(store: Store) -> None:
    artifacts = [
        store.put("run", {"a": b"x"}),
        store.put("stats", {"a": b"x"}),
        store.put("run", {"b": b"x"}),
        store.put("run", {"a": b"y"}),
        store.put("run", {"a": b"x"}, inputs={"teacher": "ab" * 32}),
        store.put("run", {"a": b"x"}, params={"n": 1}),
        store.put("run", {"a": b"x"}, params={"n": 1.0}),
        store.put("run", {"a": b"x"}, results={"n": 1}),
    ]
    assert len({artifact.oid for artifact in artifacts}) == len(artifacts)
    assert {artifact.oid for artifact in store.artifacts()} == {artifact.oid for artifact in artifacts}


@pytest.mark.parametrize(
    ("kind", "name", "inputs"),
    [
        ("picture", "a", {}),
        ("run", "../a", {}),
        ("run", "/a", {}),
        ("run", "", {}),
        ("run", "a\n", {}),
        ("run", "a", {"teacher": "abcd"}),
    ],
)
def test_put_asserts_kind_names_and_oids_before_it_stores(
    store: Store, kind: str, name: str, inputs: dict[str, str]
) -> None:
    with pytest.raises(AssertionError, match="a manifest needs a known kind, plain file names and full oids"):
        store.put(kind, {name: b"x"}, inputs=inputs)
    assert tree(store.root) == {"format"}


def test_put_of_a_missing_file_names_it_and_stores_nothing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(SidaError) as caught:
        store.put("run", {"a": b"x", "b": tmp_path / "gone.bin"})
    assert str(caught.value) == (
        f"{tmp_path / 'gone.bin'} cannot be read: No such file or directory. Check the path, and that you may read it."
    )
    assert tree(store.root) == {"format"}


def test_put_mends_a_damaged_object(store: Store) -> None:
    artifact = store.put("run", {"a": b"hello"})
    overwrite(store, artifact.files["a"].sha256, b"jello")
    overwrite(store, artifact.oid, b"")
    store.put("run", {"a": b"hello"})
    assert list(rehash(store)) == []
    assert store.read(artifact, "a") == b"hello"


def test_get_missing_says_so(store: Store) -> None:
    plain = store.put("run", {"a": b"hello"}).files["a"].sha256
    for oid in ("ab" * 32, plain):
        with pytest.raises(SidaError) as caught:
            store.get(oid)
        assert str(caught.value) == f"no artifact starts with '{oid}'. {SEE_LS}"


@pytest.mark.parametrize("how", ["another kind", "another number", "emptied", "first byte"])
def test_get_damaged_manifest_says_so(store: Store, how: str) -> None:
    oid = store.put("run", {"a": b"hello"}, results={"fid": 2.5}).oid
    manifest = object_path(store, oid).read_bytes()
    broken = {
        "another kind": manifest.replace(b"run", b"rum"),
        "another number": manifest.replace(b"2.5", b"1.5"),
        "emptied": b"",
        "first byte": b"[" + manifest[1:],
    }
    overwrite(store, oid, broken[how])
    with pytest.raises(SidaError) as caught:
        store.get(oid)
    assert str(caught.value) == (
        f"object {oid[:12]} of artifact {oid[:12]} (manifest) is damaged: "
        f"its content no longer matches its name. {ASK_AGAIN}"
    )


@pytest.mark.parametrize("data", [b"jello", b"hell", b""])
def test_reading_a_damaged_file_says_so(store: Store, data: bytes) -> None:
    artifact = store.put("run", {"a.txt": b"hello"})
    sha256 = artifact.files["a.txt"].sha256
    overwrite(store, sha256, data)
    for use in (store.path, store.read):
        with pytest.raises(SidaError) as caught:
            use(artifact, "a.txt")
        assert str(caught.value) == (
            f"object {sha256[:12]} of run {artifact.oid[:12]} (a.txt) is damaged: "
            f"its content no longer matches its name. {ASK_AGAIN}"
        )


def test_reading_a_missing_object_or_name_says_so(store: Store) -> None:
    artifact = store.put("run", {"a.txt": b"hello", "b.txt": b"you"})
    sha256 = artifact.files["a.txt"].sha256
    object_path(store, sha256).unlink()
    with pytest.raises(SidaError) as caught:
        store.read(artifact, "a.txt")
    assert str(caught.value) == (
        f"object {sha256[:12]} of run {artifact.oid[:12]} (a.txt) is missing from {store.root}. {ASK_AGAIN}"
    )
    with pytest.raises(SidaError) as caught:
        store.path(artifact, "c.txt")
    assert str(caught.value) == f"artifact {artifact.oid[:12]} (run) has no file 'c.txt'. It has: a.txt, b.txt."


def test_path_hashes_a_file_once_until_it_changes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = store.put("run", {"a": b"hello"})
    hashed: list[Path] = []
    hash_file = store_files.hash_file
    instead_of(store_files.hash_file, lambda path: hashed.append(path) or hash_file(path), monkeypatch)
    assert store.path(artifact, "a") == store.path(artifact, "a") == object_path(store, artifact.files["a"].sha256)
    assert len(hashed) == 1
    Store(store.root).path(artifact, "a")
    assert len(hashed) == 2
    overwrite(store, artifact.files["a"].sha256, b"jello")
    os.utime(object_path(store, artifact.files["a"].sha256), ns=(1, 1))
    with pytest.raises(SidaError, match="is damaged"):
        store.path(artifact, "a")


def test_a_large_file_is_hashed_once_for_all_processes_until_it_is_touched(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_LARGE_BYTES", 4)
    artifact = store.put("run", {"a": b"hello"})
    path = object_path(store, artifact.files["a"].sha256)
    hashed: list[Path] = []
    hash_file = store_files.hash_file
    instead_of(store_files.hash_file, lambda path: hashed.append(path) or hash_file(path), monkeypatch)
    for expected in (1, 2):  # it was written a moment ago
        assert Store(store.root).path(artifact, "a") == path
        assert hashed == [path] * expected
    monkeypatch.setattr(objects, "SETTLED_NS", -(10**12))
    for expected in (3, 3, 3):
        assert Store(store.root).path(artifact, "a") == path
        assert len(hashed) == expected
    assert Store(store.root).is_whole(artifact)
    assert len(hashed) == 4
    path.chmod(0o644)
    path.chmod(0o444)
    Store(store.root).path(artifact, "a")
    assert len(hashed) == 5
    overwrite(store, artifact.files["a"].sha256, b"jello")
    for _ in range(2):
        with pytest.raises(SidaError, match="is damaged"):
            Store(store.root).path(artifact, "a")
    assert not Store(store.root).is_whole(artifact)
    assert [what for what, _ in rehash(store)] == [artifact.files["a"].sha256]


def test_a_file_that_looks_like_a_manifest_is_none(store: Store) -> None:
    lookalikes = [b'{"files":{}}', b'{"files":{"a":1},"kind":"run"}', b'{"files":{', b'{"files":{"a":{"sha256":1}}}']
    artifact = store.put("run", {f"file{index}": data for index, data in enumerate(lookalikes)})
    assert list(store.artifacts()) == [artifact]
    assert list(rehash(store)) == []


def test_artifacts_reads_only_the_head_of_large_objects(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = store.put("run", {"a": b"x" * (1 << 22)})
    instead_of(store_files.hash_file, lambda path: pytest.fail(f"{path} was hashed whole"), monkeypatch)
    assert list(store.artifacts()) == [artifact]


def test_ten_thousand_objects_are_listed_in_seconds(store: Store) -> None:
    store.put("run", {})
    for index in range(10_000):
        data = canonical_json(
            {"schema": 1, "kind": "score", "files": {}, "inputs": {}, "params": {"n": index}, "results": {}}
        )
        path = object_path(store, hashlib.sha256(data).hexdigest())
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    oid = path.parent.name + path.name
    store.answer("cd" * 32, oid)
    start = time.process_time()
    assert sum(1 for _ in store.artifacts()) == 10_001
    listed = time.process_time()
    assert store.asked("cd" * 32) == store.resolve(oid[:16]) == store.get(oid)
    assert listed - start < 5
    assert time.process_time() - listed < 1


# resolve


def oid_of(kind: str, n: int) -> str:
    """The oid of an artifact with the parameter n and nothing else."""
    text = f'{{"files":{{}},"inputs":{{}},"kind":"{kind}","params":{{"n":{n}}},"results":{{}},"schema":1}}'
    return hashlib.sha256(text.encode()).hexdigest()


def same_prefix(num: int) -> tuple[str, list[int]]:
    """A 4-digit prefix that `num` oids share, and the parameter n of each."""
    buckets: defaultdict[str, list[int]] = defaultdict(list)
    for n in range(500_000):
        prefix = oid_of("score", n)[:4]
        buckets[prefix].append(n)
        if len(buckets[prefix]) == num:
            return prefix, buckets[prefix]
    raise AssertionError


def test_resolve_takes_oid_prefix_and_ref(store: Store) -> None:
    artifact = store.put("generator", {"weights": b"w"})
    store.set_ref("generator", "sid2a/cifar10", artifact.oid)
    oid = artifact.oid
    for text in (oid, oid.upper(), oid[:4], oid[:9], oid[:63], "generator/sid2a/cifar10", "sid2a/cifar10"):
        assert store.resolve(text) == artifact
        assert store.resolve(text, kinds=("teacher", "generator")) == artifact


def test_resolve_prefix_of_nothing(store: Store) -> None:
    plain = store.put("run", {"a": b"hello"}).files["a"].sha256
    for text in ("abcd", plain[:10], "ab" * 32, "ab" * 33):
        with pytest.raises(SidaError) as caught:
            store.resolve(text)
        assert str(caught.value) == f"no artifact starts with '{text}'. {SEE_LS}"


def test_resolve_prefix_too_short(store: Store) -> None:
    with pytest.raises(SidaError) as caught:
        store.resolve("3f")
    assert str(caught.value) == f"a prefix must have 4 or more hex digits, got '3f'. {SEE_LS}"


def test_resolve_prefix_ambiguous_lists_the_first_five_candidates(store: Store) -> None:
    prefix, numbers = same_prefix(6)
    oids = sorted(store.put("score", {}, params={"n": n}).oid for n in numbers)
    with pytest.raises(SidaError) as caught:
        store.resolve(prefix)
    candidates = ", ".join(f"{oid[:12]} (score)" for oid in oids[:5])
    assert str(caught.value) == f"'{prefix}' fits 6 artifacts: {candidates} and 1 more. Give more digits."
    assert store.resolve(oids[3][:12]).oid == oids[3]


def test_resolve_prefix_is_unique_within_the_kinds_asked_for(store: Store) -> None:
    score = store.put("score", {}, params={"n": 0})
    n = next(n for n in range(1_000_000) if oid_of("stats", n)[:4] == score.oid[:4])
    stats = store.put("stats", {}, params={"n": n})
    assert stats.oid[:4] == score.oid[:4]
    assert store.resolve(score.oid[:4], ["stats"]) == stats
    assert store.resolve(score.oid[:4], ["score"]) == score
    with pytest.raises(SidaError, match="fits 2 artifacts"):
        store.resolve(score.oid[:4])


def test_resolve_wrong_kind_names_what_is_needed_and_what_it_is(store: Store) -> None:
    score = store.put("score", {})
    store.set_ref("score", "best", score.oid)
    for text in (score.oid[:8], score.oid, "score/best", "best"):
        with pytest.raises(SidaError) as caught:
            store.resolve(text, {"generator", "teacher"})
        assert str(caught.value) == f"'{text}' must be of kind teacher or generator, got score. {SEE_LS}"


def test_resolve_bare_ref_is_unique_over_kinds_or_within_them(store: Store) -> None:
    teacher, generator = store.put("teacher", {}), store.put("generator", {})
    store.set_ref("teacher", "tiny", teacher.oid)
    store.set_ref("generator", "tiny", generator.oid)
    assert store.resolve("tiny", ["generator", "run"]) == generator
    assert store.resolve("teacher/tiny") == teacher
    with pytest.raises(SidaError) as caught:
        store.resolve("tiny")
    assert str(caught.value) == "'tiny' fits 2 artifacts: teacher/tiny, generator/tiny. Write the kind too."


def test_resolve_missing_ref_offers_near_names(store: Store) -> None:
    with pytest.raises(SidaError) as caught:
        store.resolve("generator/best")
    assert str(caught.value) == f"no ref 'generator/best' in {store.root}. {SEE_LS}"
    store.set_ref("generator", "bets", store.put("generator", {}).oid)
    for text in ("generator/best", "best"):
        with pytest.raises(SidaError) as caught:
            store.resolve(text)
        assert str(caught.value) == f"no ref '{text}' in {store.root}. Did you mean 'generator/bets'?"
    with pytest.raises(SidaError, match="See what there is"):  # what is near is of another kind
        store.resolve("teacher/bets", KINDS)
    with pytest.raises(SidaError, match=r"Did you mean 'generator/bets'\?$"):
        store.resolve("genrator/bets")
    for text in ("imagenet", "generator/imagenet"):
        with pytest.raises(SidaError) as caught:
            store.resolve(text)
        assert str(caught.value) == f"no ref '{text}' in {store.root}. {SEE_LS}"


def test_resolve_ref_whose_artifact_is_gone(store: Store) -> None:
    artifact = store.put("generator", {})
    store.set_ref("generator", "best", artifact.oid)
    object_path(store, artifact.oid).unlink()
    with pytest.raises(SidaError) as caught:
        store.resolve("best")
    assert str(caught.value) == f"ref 'generator/best' names artifact {artifact.oid[:12]}, which is gone. {ASK_AGAIN}"


def test_resolve_short_hex_word_may_be_a_ref(store: Store) -> None:
    artifact = store.put("dataset", {})
    store.set_ref("dataset", "b2", artifact.oid)
    assert store.resolve("b2") == artifact


# refs


def test_refs_are_listed_moved_and_deleted(store: Store) -> None:
    first, second = store.put("generator", {}, params={"n": 1}), store.put("generator", {}, params={"n": 2})
    store.set_ref("generator", "best", first.oid)
    store.set_ref("generator", "sid2a", first.oid)
    store.set_ref("generator", "sid2a/cifar10", first.oid)  # a name may begin with another name
    assert store.names_of(first.oid) == ["generator/best", "generator/sid2a", "generator/sid2a/cifar10"]
    store.set_ref("generator", "best", second.oid)
    assert store.refs() == {
        "generator/best": second.oid,
        "generator/sid2a": first.oid,
        "generator/sid2a/cifar10": first.oid,
    }
    store.delete_ref("generator", "sid2a")
    assert store.names_of(first.oid) == ["generator/sid2a/cifar10"]
    with pytest.raises(SidaError) as caught:
        store.delete_ref("generator", "best2")
    assert str(caught.value) == f"no ref 'generator/best2' in {store.root}. Did you mean 'generator/best'?"


@pytest.mark.parametrize(
    "name", ["", ".hidden", "a/../b", "a..b", "..", "/a", "a/", "a//b", "-", "a b", "é", "a\n", "a/.b"]
)
def test_ref_names_are_checked(store: Store, name: str) -> None:
    artifact = store.put("run", {})
    with pytest.raises(SidaError) as caught:
        store.set_ref("run", name, artifact.oid)
    assert str(caught.value) == (
        "a ref name must be made of letters, digits and . _ + - /, each part beginning with one of the first two "
        f"or _ +, without .., got '{name}'. Choose a plainer name."
    )
    assert store.refs() == {}


@pytest.mark.parametrize("name", ["beef", "2024", "DEADBEEF0"])
def test_ref_name_that_reads_as_an_oid_is_refused(store: Store, name: str) -> None:
    artifact = store.put("run", {})
    with pytest.raises(SidaError) as caught:
        store.set_ref("run", name, artifact.oid)
    assert str(caught.value) == (
        f"a ref name must not be 4 or more hex digits, which would read as an oid, got '{name}'. Add another letter."
    )


def test_ref_must_name_an_artifact_of_its_kind(store: Store) -> None:
    score = store.put("score", {})
    with pytest.raises(SidaError) as caught:
        store.set_ref("generator", "best", score.oid)
    expected = "ref 'generator/best' must name an artifact of kind generator, got score. Call it score/best."
    assert str(caught.value) == expected
    with pytest.raises(SidaError, match="no artifact starts with"):
        store.set_ref("generator", "best", "ab" * 32)
    with pytest.raises(SidaError) as caught:
        store.set_ref("picture", "best", score.oid)
    assert str(caught.value) == f"the kind of a ref must be one of {', '.join(KINDS)}, got 'picture'. {SEE_LS}"
    assert store.refs() == {}


# questions and answers


def test_answer_is_remembered_by_key(store: Store) -> None:
    key = Store.key("fid", {"num": 2}, {})
    assert store.asked(key) is None
    first, second = store.put("score", {}, results={"fid": 1.0}), store.put("score", {}, results={"fid": 2.0})
    store.answer(key, first.oid)
    assert store.asked(key) == first
    store.answer(key, second.oid)
    assert Store(store.root).asked(key) == second
    assert store.asked(Store.key("fid", {"num": 3}, {})) is None


@pytest.mark.parametrize("harm", ["manifest gone", "manifest damaged", "file gone", "file cut", "answer garbled"])
def test_an_answer_that_is_not_all_there_is_none(store: Store, harm: str) -> None:
    artifact = store.put("score", {"a": b"hello"})
    store.answer("cd" * 32, artifact.oid)
    if harm == "manifest gone":
        object_path(store, artifact.oid).unlink()
    elif harm == "manifest damaged":
        overwrite(store, artifact.oid, b'{"files":{}')
    elif harm == "file gone":
        object_path(store, artifact.files["a"].sha256).unlink()
    elif harm == "file cut":
        overwrite(store, artifact.files["a"].sha256, b"hel")
    else:
        (store.root / "asked" / ("cd" * 32)).write_bytes(b"\0\xff/../..")
    assert store.asked("cd" * 32) is None


# live directories and the log


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


# verify


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


# gc


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


def test_a_ref_is_read_without_the_others(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = store.put("generator", {})
    for n in range(30):
        store.set_ref("generator", f"a/{n}", artifact.oid)
    read: list[Path] = []
    read_oid = objects._read_oid
    instead_of(objects._read_oid, lambda path: read.append(path) or read_oid(path), monkeypatch)
    for text in ("generator/a/7", "a/7"):
        assert store.resolve(text) == artifact
    assert len(read) <= 2 * len(KINDS)


def test_what_no_ref_can_be_called_is_not_looked_for(store: Store) -> None:
    store.set_ref("generator", "g", store.put("generator", {}).oid)
    for text in ("generator/..", "generator/.", "../format", "generator/" + "x" * 300, "a\0b", "\ud800", "generator/"):
        with pytest.raises(SidaError, match=r"^no ref "):
            store.resolve(text)


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


# several processes, kills, full and unwritable disks


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
