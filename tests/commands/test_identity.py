"""A source is known by its content, which is hashed once for as long as it is left alone."""

import os
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest

import sidactl
from sidactl import fetch_teacher, prepare_data
from sidactl.commands import identity, reference, scorers
from sidactl.commands.resolve import load_dataset
from sidactl.errors import SidaError
from sidactl.store import Store
from tests.commands.conftest import flat, picture
from tests.conftest import instead_of
from tests.worlds import stopping_at


def test_changed_source_is_another_question(run: Path, tmp_path: Path) -> None:
    picture(tmp_path / "in/own/a.png")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "in/loop").symlink_to(tmp_path / "in", target_is_directory=True)
    first = prepare_data("in", run=run)
    assert prepare_data("in", run=run, tick=stopping_at(1, [])) == first
    picture(tmp_path / "elsewhere/b.png")
    assert prepare_data("in", run=run).results["num_images"] == 2

    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    images.write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", 1, 8, 8) + bytes(64))
    for number in (0, 1):
        labels.write_bytes(bytes((0, 0, 8, 1)) + struct.pack(">I", 1) + bytes([number]))
        assert prepare_data(str(images), run=run).results["label_dim"] == number + 1
        os.utime(labels, ns=(number, number))


def rewrite(path: Path, data: bytes) -> None:
    """Other bytes with the size and the times that the file had."""
    stat = path.stat()
    assert len(data) == stat.st_size
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_source_is_known_by_its_content_wherever_it_lies(run: Path, tmp_path: Path) -> None:
    flat(tmp_path / "in/a.bmp", 10)
    flat(tmp_path / "in/b.bmp", 20)
    first, said = prepare_data("in", run=run), list[str]()
    flat(tmp_path / "in/a.bmp", 30)
    second = prepare_data("in", run=run, say=said.append)
    assert said == []
    pixels = [load_dataset(Store(run), made).images([0])[0, 0, 0, 0].item() for made in (first, second)]
    assert pixels == [10, 30]
    assert prepare_data("in", run=run, force=True) == second
    shutil.move(tmp_path / "in", tmp_path / "elsewhere")
    assert prepare_data("elsewhere", run=run, tick=stopping_at(1, []), say=said.append) == second
    assert len(said) == 1
    named = prepare_data("elsewhere", run=run, name="mine", tick=stopping_at(1, []))
    assert (named.params["name"], named.files) == ("mine", second.files)
    assert named == prepare_data("elsewhere", run=tmp_path / "other", name="mine")


def test_networks_statistics_and_detectors_are_known_by_their_content(run: Path, tmp_path: Path) -> None:
    store, subject = Store(run), Store(run).put("dataset", {}, params={"name": "x"})
    np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=np.eye(2))
    first = reference.find(store, "s.npz", subject, "moments")
    same = tmp_path / "t.npz"
    np.savez(same, mu=np.ones(2), sigma=np.eye(2))
    rewrite(tmp_path / "s.npz", same.read_bytes())
    assert reference.find(store, "s.npz", subject, "moments").files != first.files
    data = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "d.pth").write_bytes(data)
    weights = scorers._weights_digest(store, "d.pth")
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "d.pth", tmp_path / "moved/e.pth")
    assert scorers._weights_digest(store, "moved/e.pth") == weights
    rewrite(tmp_path / "moved/e.pth", data[:-1] + b"?")
    assert scorers._weights_digest(store, "moved/e.pth") != weights
    exported = sidactl.export(fetch_teacher("tiny-digits", run=run).oid, tmp_path / "net", run=run)
    known = identity.source_identity(store, str(exported / "model.safetensors"))
    manifest = exported / "manifest.json"
    rewrite(manifest, manifest.read_bytes().replace(b"tiny-digits", b"other-names"))
    assert identity.source_identity(store, str(exported / "model.safetensors")) != known


def test_a_source_that_was_left_alone_is_hashed_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat(tmp_path / "in/a.bmp", 10)
    first, read = prepare_data("in", run=run), list[Path]()
    digest = identity.file_digest
    instead_of(identity.file_digest, lambda path: read.append(path) or digest(path), monkeypatch)
    assert prepare_data("in", run=run) == first
    assert len(read) == 1  # it was written a moment ago
    monkeypatch.setattr(identity, "SETTLED_NS", -(10**12))
    for expected in (2, 2, 2):
        assert prepare_data("in", run=run) == first
        assert len(read) == expected
    assert prepare_data("in", run=run, recheck=True) == first
    assert len(read) == 3
    monkeypatch.setattr(identity, "SETTLED_NS", 2 * 10**9)
    rewrite(tmp_path / "in/a.bmp", (tmp_path / "in/a.bmp").read_bytes()[:-3] + bytes(3))
    assert prepare_data("in", run=run) != first
    # What cannot be noted is no error.
    shutil.rmtree(run / "digests")
    (run / "digests").write_text("")
    assert prepare_data("in", run=run) != first


def test_a_rewrite_within_one_tick_of_the_clock_is_seen(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat(tmp_path / "in/a.bmp", 10)
    now = time.time_ns()
    instead_of(identity._look_at, lambda files: ("as before", now), monkeypatch)
    first = prepare_data("in", run=run)
    flat(tmp_path / "in/a.bmp", 30)
    assert prepare_data("in", run=run) != first


def test_a_source_that_changes_while_it_is_read_becomes_no_answer(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat(tmp_path / "in/a.bmp", 10)
    with pytest.raises(SidaError) as caught:
        prepare_data("in", run=run, tick=lambda done, total: flat(tmp_path / "in/a.bmp", 30))
    assert str(caught.value) == "in changed while it was read. Repeat the command once nothing writes to it."
    assert caught.value.exit_code == 1
    assert not any((run / "live").iterdir())
    assert not (run / "asked").exists() or not any((run / "asked").iterdir())
    assert load_dataset(Store(run), prepare_data("in", run=run)).images([0])[0, 0, 0, 0] == 30
