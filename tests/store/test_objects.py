"""The run directory: names are hashes, refs and answers point at them, and errors are one line."""

import hashlib
import os
import stat
import time
from collections import defaultdict
from pathlib import Path

import pytest

from sidactl.errors import SidaError
from sidactl.store import KINDS, Artifact, FileEntry, GcReport, Store, canonical_json, collect_garbage, objects, rehash
from sidactl.store import files as store_files
from tests.conftest import instead_of
from tests.store.conftest import object_path, overwrite, tree

SEE_LS = "See what there is with: sidactl ls"


ASK_AGAIN = "Run sidactl verify, then ask again with --force."


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
