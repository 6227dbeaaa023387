"""What prepare-data makes of users' own files: classes, hidden files, ImageNet's archives, damage, options."""

import gzip
import io
import json
import os
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sidactl
from sidactl import fetch_teacher, prepare_data
from sidactl.cli import main
from sidactl.commands.resolve import resolve
from sidactl.data.dataset import Dataset
from sidactl.data.images import encode_png
from sidactl.data.prepare import prepare
from sidactl.data.unfinished import PreparedDataset
from sidactl.errors import SidaError
from sidactl.store import KINDS, Store
from tests.worlds import (
    Stop,
    cifar_archive,
    cifar_batch,
    idx_file,
    labelled,
    layout,
    make_zip,
    noise,
    refusal,
    save,
    stopping_at,
)

LABELS_NULL = 'put a dataset.json with {"labels": null} at the top to go without classes.'


def folders(root: Path, *names: str) -> Path:
    """A folder with these 4x4 images, each of another grey, in the order given."""
    for index, name in enumerate(names):
        save(root / name, np.full((4, 4, 3), index, dtype=np.uint8), format="PNG")
    return root


def zip_of(root: Path, path: Path, prefix: str = "") -> Path:
    """The folder as a zip, empty folders too."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, prefix + file.relative_to(root).as_posix())
    return path


class Made:
    """A prepared dataset: what is said of it, and the class, or name of the class, of each grey."""

    def __init__(self, source: Path, **options: Any) -> None:
        self.said: list[str] = []
        out = source.parent / "made.zip"
        self.result: PreparedDataset = prepare(source, out, say=self.said.append, **options)
        self.dataset = Dataset(out)
        greys = self.dataset.images(range(self.dataset.num_images))[:, 0, 0, 0].tolist()
        labels = self.dataset.labels
        self.labels = None if labels is None else dict(sorted(zip(greys, labels.tolist(), strict=True)))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of datasets are written here; what a power cut leaves is shown elsewhere."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


# Classes.


@pytest.mark.parametrize("is_zip", [False, True])
def test_class_folders_that_are_whole_numbers_sort_as_numbers(is_zip: bool, tmp_path: Path) -> None:
    source = folders(tmp_path / "in", *(f"{number}/x.png" for number in range(12)))
    if is_zip:
        source = zip_of(source, tmp_path / "in.zip")
    made = Made(source)
    assert made.labels == {number: number for number in range(12)}
    assert made.result.class_names == made.dataset.class_names == [str(number) for number in range(12)]
    assert made.said == []
    as_text = Made(source, class_order="text")
    assert as_text.labels == {int(name): index for index, name in enumerate(sorted(map(str, range(12))))}
    save(tmp_path / "in/all/x.png", noise(4, 4, 3))
    assert Made(tmp_path / "in").result.class_names == [*sorted(map(str, range(12))), "all"]


def test_numbers_with_gaps_are_counted_and_an_empty_folder_keeps_its_place(tmp_path: Path) -> None:
    source = folders(tmp_path / "in", "0/a.png", "1/a.png", "3/a.png")
    made = Made(source)
    assert made.labels == {0: 0, 1: 1, 2: 2}
    assert made.said == [
        "class folders are counted from 0 in their order, so 3 is class 2; "
        "an empty folder keeps the place of a class without images"
    ]
    for name in ("2", "10"):
        (source / name).mkdir()
    (source / "2/.DS_Store").write_bytes(b"")
    for path in (source, zip_of(source, tmp_path / "in.zip")):
        made = Made(path)
        assert made.labels == {0: 0, 1: 1, 2: 3}
        assert made.result.class_counts == made.dataset.class_counts() == [1, 1, 0, 1, 0]
        assert made.result.label_dim == made.dataset.label_dim == 5
        assert made.dataset.one_hot([2]).tolist() == [[0, 0, 0, 1, 0]]


def test_class_names_stay_with_the_zip_when_it_is_prepared_again(tmp_path: Path) -> None:
    source = folders(tmp_path / "in", "dog/a.png", "cat/a.png")
    (source / "cow").mkdir()
    first = Made(source)
    (tmp_path / "made.zip").rename(tmp_path / "copy.zip")
    again = Made(tmp_path / "copy.zip")
    assert again.result == first.result
    assert again.result.class_names == ["cat", "cow", "dog"]
    assert (tmp_path / "made.zip").read_bytes() == (tmp_path / "copy.zip").read_bytes()


@pytest.mark.parametrize("is_zip", [False, True])
def test_hidden_and_system_files_are_no_images_and_no_classes(is_zip: bool, tmp_path: Path) -> None:
    clean = folders(tmp_path / "clean", "a/x.png", "b/sub/y.png")
    expected = Made(clean)
    bytes_of_clean = (tmp_path / "made.zip").read_bytes()
    source = folders(tmp_path / "in", "a/x.png", "b/sub/y.png")
    hidden = [".ipynb_checkpoints/x-checkpoint.png", "__MACOSX/a/._x.png", "a/._x.png", ".z.png", "b/.c/d.png"]
    for name in hidden:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"no image")
    for name in (".DS_Store", "a/Thumbs.db", "b/desktop.ini", ".git/config"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"")
    if is_zip:
        source = zip_of(source, tmp_path / "in.zip")
    made = Made(source)
    assert made.labels == expected.labels == {0: 0, 1: 1}
    assert made.result == expected.result
    assert (tmp_path / "made.zip").read_bytes() == bytes_of_clean
    (line,) = made.said
    what = f"passed over in {source}: 5 hidden or system files with the suffix of an image, the first "
    assert line.startswith(what)
    assert line.removeprefix(what) in hidden


def test_loose_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    source = folders(tmp_path / "in", "a/x.png", "b/y.png", "m.png", "n.png")
    text = (
        "images must all lie in class folders, or none of them, got {} beside the folder a. Move it into a folder, or "
    )
    assert refusal(source, tmp_path / "out.zip") == text.format(f"{source}/m.png") + LABELS_NULL
    zipped = zip_of(source, tmp_path / "in.zip")
    assert refusal(zipped, tmp_path / "out.zip") == text.format(f"m.png in {zipped}") + LABELS_NULL
    (source / "dataset.json").write_text('{"labels": null}')
    assert Made(source).labels is None
    (source / "dataset.json").unlink()
    assert Made(source, preset="ffhq64").labels is None, "which has no classes at all"


def test_folder_without_images_beside_class_folders_is_refused(tmp_path: Path) -> None:
    source = folders(tmp_path / "in", "a/x.png", "b/y.png")
    (source / "docs").mkdir()
    (source / "docs/readme.txt").write_text("")
    assert refusal(source, tmp_path / "out.zip") == (
        f"a class folder must hold images or be empty, got docs with {source}/docs/readme.txt. Move it away, empty it, "
        f"or {LABELS_NULL}"
    )


def test_one_folder_around_everything_changes_nothing(tmp_path: Path) -> None:
    source = folders(tmp_path / "in/data/v1", "cat/x.png", "dog/y.png")
    zipped = zip_of(tmp_path / "in", tmp_path / "in.zip")
    with zipfile.ZipFile(zipped, "a") as archive:
        archive.writestr("__MACOSX/data/v1/cat/._x.png", b"")
    for path in (source, tmp_path / "in", zipped):
        made = Made(path)
        assert made.labels == {0: 0, 1: 1}
        assert made.result.class_names == ["cat", "dog"]


def test_layout_zip_in_a_folder_keeps_names_and_labels(tmp_path: Path) -> None:
    members = labelled(layout(3), 2, 0, 1)
    make_zip(tmp_path / "in.zip", [(f"data/{name}", data) for name, data in members])
    prepare(tmp_path / "in.zip", tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert [(name, archive.read(name)) for name in archive.namelist()] == members


def test_folders_of_a_thousand_images_each_are_no_classes(tmp_path: Path) -> None:
    names = ["00000/img00000000.png", "00000/img00000999.png", "00001/img00001000.png"]
    source = folders(tmp_path / "in", *names)
    for path in (source, zip_of(source, tmp_path / "in.zip")):
        assert Made(path).labels is None
    by_class = folders(tmp_path / "export", "00000/img00000000.png", "00001/img00000001.png")
    assert Made(by_class).labels == {0: 0, 1: 1}


def test_train_and_test_folders_are_warned_of(tmp_path: Path) -> None:
    made = Made(folders(tmp_path / "in", "train/a/x.png", "test/a/y.png"))
    assert made.said == ["warning: the classes are test and train; if these are parts of a dataset, prepare one"]


# Labels of dataset.json.


def with_labels(source: Path, document: object, name: str = "dataset.json") -> Path:
    (source / name).write_text(json.dumps(document))
    return source


TWO = [["cat/x.png", 4], ["dog/y.png", 2]]


def test_labels_of_a_file_win_over_folders_and_null_means_none(tmp_path: Path) -> None:
    source = folders(tmp_path / "in", "cat/x.png", "dog/y.png")
    for name in ("dataset.json", "Dataset.json", "DATASET.JSON"):
        with_labels(source, {"labels": TWO}, name)
        assert Made(source).labels == {0: 4, 1: 2}
        assert Made(zip_of(tmp_path / "in", tmp_path / "in.zip", "wrapped/")).labels == {0: 4, 1: 2}
        (source / name).unlink()
    with_labels(source, {"labels": None})
    assert Made(source).labels is None
    assert Made(zip_of(source, tmp_path / "in.zip")).labels is None
    with_labels(source, {"labels": [*TWO, TWO[0]]})
    assert Made(source).labels == {0: 4, 1: 2}


HINT = 'Write {"labels": [["name.png", 0], ...]} with integer classes from 0.'
NULL = 'or set "labels" to null in dataset.json to go without.'
REFUSED: dict[str, tuple[object, str]] = {
    "key label": ({"label": TWO}, f'{{}} must hold "labels", got "label". {HINT}'),
    "no key": ({}, f'{{}} must hold "labels", got nothing. {HINT}'),
    "empty list": (
        {"labels": []},
        '{} must label images, got an empty list. Label them, or write {"labels": null} for none.',
    ),
    "twice": (
        {"labels": [*TWO, ["cat/x.png", 0]]},
        "{} must give each image one class, got 4 and 0 for cat/x.png. Correct it.",
    ),
    "names nothing": (
        {"labels": [*TWO, ["z.png", 1], ["gone/z.png", 1]]},
        f"{{}} names 2 images that are not there, the first gone/z.png. Put them there, remove their labels, {NULL}",
    ),
    "too few": ({"labels": TWO[:1]}, f"{{}} must label every image, got none for dog/y.png. Add its label, {NULL}"),
    "names of classes": (
        {"labels": TWO, "class_names": ["a"]},
        "class_names in {} must be a list with a name for each class. Correct it, or drop it.",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_labels_that_would_be_lost_are_refused(kind: str, tmp_path: Path) -> None:
    document, text = REFUSED[kind]
    source = with_labels(folders(tmp_path / "in", "cat/x.png", "dog/y.png"), document)
    assert refusal(source, tmp_path / "out.zip") == text.replace("{}", f"{source}/dataset.json", 1)
    zipped = zip_of(source, tmp_path / "in.zip")
    assert refusal(zipped, tmp_path / "out.zip") == text.replace("{}", f"dataset.json in {zipped}", 1)
    assert not (tmp_path / "out.zip").exists()


def test_label_file_below_the_images_is_refused(tmp_path: Path) -> None:
    source = folders(tmp_path / "in", "cat/x.png", "dog/y.png")
    with_labels(source, {"labels": [["x.png", 1]]}, "cat/dataset.json")
    assert refusal(source, tmp_path / "out.zip") == (
        f"dataset.json must lie in a folder that holds all images, got {source}/cat/dataset.json. "
        'Move it to the top and name images from there; or put {"labels": null} there to go without.'
    )


# ImageNet.


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 20 * seed, dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


WNIDS = {"n01440764": (3, 1), "n01443537": (2,), "n02085620": (5, 4, 6)}


def imagenet(root: Path) -> Path:
    """What Kaggle's archive unpacks to."""
    for wnid, seeds in WNIDS.items():
        for seed in seeds:
            path = root / f"ILSVRC/Data/CLS-LOC/train/{wnid}/{wnid}_{seed}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(seed))
    for name in ("Data/CLS-LOC/val/v.JPEG", "Data/CLS-LOC/test/t.JPEG"):
        (root / "ILSVRC" / name).parent.mkdir(parents=True)
        (root / "ILSVRC" / name).write_bytes(jpeg(9))
    (root / "ILSVRC/Annotations/CLS-LOC/train").mkdir(parents=True)
    (root / "ILSVRC/Annotations/CLS-LOC/train/a.xml").write_text("")
    (root / "ILSVRC/ImageSets").mkdir()
    (root / "LOC_train_solution.csv").write_text("")
    return root


def tar_of(members: list[tuple[str, bytes]], path: Path | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    if path:
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def imagenet_tar(path: Path) -> Path:
    """ILSVRC2012_img_train.tar, its classes in another order than the alphabet's."""
    inner = [(f"{w}.tar", tar_of([(f"{w}_{s}.JPEG", jpeg(s)) for s in seeds])) for w, seeds in WNIDS.items()]
    tar_of(inner[::-1], path)
    return path


def test_imagenet_in_every_form_is_its_training_images(tmp_path: Path) -> None:
    root = imagenet(tmp_path / "in")
    train = root / "ILSVRC/Data/CLS-LOC/train"
    expected = Made(train).result
    assert expected.class_names == [*WNIDS]
    assert expected.class_counts == [2, 1, 3]
    made = (train.parent / "made.zip").read_bytes()
    for path in (root, root / "ILSVRC", root / "ILSVRC/Data", train.parent):
        found = Made(path)
        assert found.said == [f"{path} is ImageNet: its training images in {train} alone are taken"]
        assert found.result == expected
        assert (path.parent / "made.zip").read_bytes() == made
        (path.parent / "made.zip").unlink()
    kaggle = Made(zip_of(root, tmp_path / "kaggle.zip"))
    assert kaggle.result == expected
    assert kaggle.said == [
        f"{tmp_path}/kaggle.zip is ImageNet: its training images in ILSVRC/Data/CLS-LOC/train/ alone are taken"
    ]
    assert (tmp_path / "made.zip").read_bytes() == made
    assert Made(zip_of(train.parent, tmp_path / "cls-loc.zip")).result == expected
    assert Made(imagenet_tar(tmp_path / "ILSVRC2012_img_train.tar")).result == expected
    assert (tmp_path / "made.zip").read_bytes() == made


def test_interrupted_imagenet_tar_goes_on(tmp_path: Path) -> None:
    source, seen = imagenet_tar(tmp_path / "t.tar"), list[int]()
    prepare(source, tmp_path / "whole.zip")
    for image in (2, 0):
        try:
            prepare(source, tmp_path / "o.zip", work=tmp_path / "work", progress=stopping_at(image, seen))
        except Stop:
            continue
    assert seen == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "o.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()


def test_other_tars_are_refused_without_a_word_of_cifar(tmp_path: Path) -> None:
    path = tmp_path / "ILSVRC2012_img_val.tar"
    tar_of([("ILSVRC2012_val_00000001.JPEG", jpeg(1))], path)
    assert refusal(path, tmp_path / "out.zip") == (
        f"a .tar must be CIFAR-10's or ImageNet's training archive, got {path} with ILSVRC2012_val_00000001.JPEG. "
        "Unpack it and give the folder."
    )


def test_tar_with_a_damaged_header_is_refused(tmp_path: Path) -> None:
    path = imagenet_tar(tmp_path / "t.tar")
    good = path.read_bytes()
    for name in (b"n02085620_4.JPEG", b"n01440764.tar"):
        data = bytearray(good)
        data[good.index(name) + 3] ^= 1
        path.write_bytes(data)
        assert refusal(path, tmp_path / "out.zip") == (
            f"{path} is not a readable tar archive (bad checksum). Download it again."
        )
    path.write_bytes(good[: good.index(b"n02085620_6.JPEG")])
    assert refusal(path, tmp_path / "out.zip").endswith("(it ends too early). Download it again.")


# Damage: another dataset never comes of it.


def flips(path: Path, count: int, where: Callable[[int], range] = range, seed: int = 0) -> list[str]:
    """What preparing the file says with one bit flipped, for `count` bits; "" where the dataset is the same.

    `where`: the bytes to choose from, by the size of the file.
    """
    good = path.read_bytes()
    expected, outcomes = whole(path), []
    rng = np.random.default_rng(seed)
    for position in rng.choice(np.array(where(len(good))), count):
        data = bytearray(good)
        data[position] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            assert whole(path) == expected, f"another dataset by a flip in byte {position}"
            outcomes.append("")
        except SidaError as error:
            outcomes.append(str(error))
    assert not any("\n" in line for line in outcomes)
    path.write_bytes(good)
    return outcomes


def whole(path: Path) -> bytes:
    """The dataset that a file becomes, in bytes."""
    out = path.with_name("flipped.zip")
    prepare(path, out, workers=1)
    data = out.read_bytes()
    out.unlink()
    return data


@pytest.mark.parametrize("which", ["images", "labels"])
def test_no_flip_in_gzipped_idx_becomes_another_dataset(which: str, tmp_path: Path) -> None:
    images = idx_file(tmp_path / "train-images-idx3-ubyte.gz", noise(6, 8, 8))
    labels = idx_file(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(6, dtype=np.uint8))
    told = flips_of_idx(images, labels if which == "labels" else images, 150)
    assert sum(map(bool, told)) > 100


def flips_of_idx(images: Path, damaged: Path, count: int) -> list[str]:
    """As `flips`, for either of the two files."""
    good, rng, expected, told = damaged.read_bytes(), np.random.default_rng(0), whole(images), []
    for position in rng.integers(0, len(good), count):
        data = bytearray(good)
        data[position] ^= 1 << rng.integers(8)
        damaged.write_bytes(data)
        try:
            assert whole(images) == expected, f"another dataset by a flip in byte {position}"
            told.append("")
        except SidaError as error:
            told.append(str(error))
    return told


def test_no_flip_in_cifar_archive_becomes_another_dataset(tmp_path: Path) -> None:
    batch = cifar_batch([0, 9, 3], np.repeat(noise(3 * 96), 32).tobytes())
    told = flips(cifar_archive(tmp_path / "c.tar.gz", batch), 240)
    assert sum(map(bool, told)) > 200
    # All that comes after the last batch counts, too: whatever follows the stream, and its checksum.
    path = tmp_path / "c.tar.gz"
    good = path.read_bytes()
    for bad in (good[:-8] + bytes(4) + good[-4:], good[:-3], good + b"garbage"):
        path.write_bytes(bad)
        assert "is not a readable tar archive" in refusal(path, tmp_path / "out.zip", max_images=2)
    path.write_bytes(good + gzip.compress(b"") + bytes(512))
    whole(path)


def test_no_flip_in_npz_becomes_another_dataset(tmp_path: Path) -> None:
    for index, save_npz in enumerate((np.savez, np.savez_compressed)):
        path = tmp_path / f"{index}.npz"
        save_npz(path, np.repeat(noise(4, 4, 1, 3), 4, axis=2), np.array([3, 0, 1, 2]))
        assert sum(map(bool, flips(path, 75))) > 40
        last = path.read_bytes().index(b"PK\x01\x02")
        flips(path, 75, lambda size, last=last: range(last, size))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_no_flip_in_a_zip_becomes_another_dataset(method: int, tmp_path: Path) -> None:
    path = make_zip(tmp_path / "s.zip", labelled(layout(4), 0, 1, 2, 0), method)
    flips(path, 60)
    directory = path.read_bytes().index(b"PK\x01\x02")
    flips(path, 100, lambda size: range(directory, size))
    # Without labels a missing image would show nowhere else.
    path = make_zip(
        tmp_path / "s.zip", [(f"{i}/x{i}.png", encode_png(noise(4, 4, 3, seed=i))) for i in range(3)], method
    )
    directory = path.read_bytes().index(b"PK\x01\x02")
    assert sum(map(bool, flips(path, 150, lambda size: range(directory, size)))) > 60


def test_dataset_refuses_a_zip_that_lost_an_image(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "d.zip", labelled(layout(3), 0, 1, 0))
    good = path.read_bytes()
    position = good.rindex(b"img00000001.png")
    path.write_bytes(good[: position + 14] + b"f" + good[position + 15 :])
    with pytest.raises(SidaError) as caught:
        Dataset(path)
    assert str(caught.value) == f"00000/img00000001.pnf in {path} is damaged. Copy or download the zip again."
    make_zip(path, labelled(layout(3), 0, 1, 0)[1:])
    with pytest.raises(SidaError, match="names 1 images that are not there, the first 00000/img00000000"):
        Dataset(path)


@pytest.mark.parametrize("name", ["images.zip", "members", "state.json"])
def test_damaged_unfinished_preparation_begins_anew(name: str, tmp_path: Path) -> None:
    work, said, source = tmp_path / "work", list[str](), tmp_path / "s.npz"
    np.savez(source, noise(40, 8, 8, 1), np.arange(40) % 4)
    expected = whole(source)
    rng = np.random.default_rng(0)
    for _ in range(25):
        with pytest.raises(Stop):
            prepare(source, tmp_path / "o.zip", work=work, progress=stopping_at(30, []))
        data = bytearray((work / name).read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (work / name).write_bytes(data)
        seen: list[int] = []
        prepare(source, tmp_path / "o.zip", work=work, progress=stopping_at(0, seen), say=said.append)
        assert seen[0] == 1
        assert (tmp_path / "o.zip").read_bytes() == expected
    assert len(said) == 25
    assert all(line.startswith("what an interrupted preparation left is not as it was saved (") for line in said)
    assert all(line.endswith("): beginning anew") for line in said)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"state": {"done": 61}}', b"\xff"])
def test_unfinished_preparation_with_any_state_begins_anew(text: bytes, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "state.json").write_bytes(text)
    seen: list[int] = []
    prepare("tiny-digits", tmp_path / "o.zip", work=work, progress=stopping_at(0, seen))
    assert (seen[0], seen[-1]) == (1, 1797)


# Options.


def test_max_images_takes_classes_in_turn(tmp_path: Path) -> None:
    names = [f"{c}/{i}.png" for c, count in (("a", 5), ("b", 1), ("c", 3)) for i in range(count)]
    source = folders(tmp_path / "in", *names)
    assert Made(source, max_images=3).result.class_counts == [1, 1, 1]
    made = Made(source, max_images=6)
    assert made.result.class_counts == [3, 1, 2]
    assert [names[grey] for grey in made.labels or {}] == [
        "a/0.png",
        "a/1.png",
        "a/2.png",
        "b/0.png",
        "c/0.png",
        "c/1.png",
    ]
    assert Made(source, max_images=99).result.class_counts == [5, 1, 3]
    assert prepare("tiny-digits", tmp_path / "d.zip", max_images=20).class_counts == [2] * 10


def test_max_images_without_classes_is_edms_random_subset(tmp_path: Path) -> None:
    source = folders(tmp_path / "in", *(f"{number:02}.png" for number in range(30)))
    order = np.arange(30)
    np.random.RandomState(0).shuffle(order)
    made = Made(source, max_images=7)
    assert made.dataset.images(range(7))[:, 0, 0, 0].tolist() == sorted(order[:7].tolist())
    first = Made(source, max_images=7, convention="edm2")
    assert first.dataset.images(range(7))[:, 0, 0, 0].tolist() == list(range(7))


def test_channels_make_grey_or_rgb_of_every_kind_of_source(tmp_path: Path) -> None:
    rgb, grey = noise(8, 8, 3), noise(8, 8, seed=1)
    as_grey = np.array(Image.fromarray(rgb).convert("L"))
    save(tmp_path / "in/a.png", rgb)
    save(tmp_path / "in/b.png", grey)
    idx = idx_file(tmp_path / "train-images-idx3-ubyte", grey[None])
    idx_file(tmp_path / "train-labels-idx1-ubyte", np.zeros(1, dtype=np.uint8))
    np.savez(tmp_path / "s.npz", rgb[None])
    in_layout = make_zip(tmp_path / "l.zip", [("00000/img00000000.png", encode_png(rgb))])
    for source, first in ((tmp_path / "in", as_grey), (idx, grey), (tmp_path / "s.npz", as_grey), (in_layout, as_grey)):
        assert prepare(source, tmp_path / "out.zip", channels=1).num_channels == 1
        images = Dataset(tmp_path / "out.zip").images([0]).numpy()
        np.testing.assert_array_equal(images[0, 0], first)
        assert prepare(source, tmp_path / "out.zip", channels=3).num_channels == 3
    prepare(tmp_path / "in", tmp_path / "out.zip", channels=1, resolution=(4, 4), transform="center-crop")
    np.testing.assert_array_equal(
        Dataset(tmp_path / "out.zip").images([1])[0, 0].numpy(),
        np.array(Image.fromarray(grey).resize((4, 4), Image.Resampling.LANCZOS)),
    )
    assert refusal(tmp_path / "in", tmp_path / "out.zip", channels=2) == (
        "--channels must be 1 (grey) or 3 (RGB), got 2. Leave it out to keep files RGB."
    )


def test_exif_orientation_is_told_and_applied_on_request(tmp_path: Path) -> None:
    pixels = noise(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "in/a.png", pixels, exif=exif)
    made = Made(tmp_path / "in")
    told = f"orientation tags are not applied, such as that of {tmp_path}/in/a.png; --exif-rotate applies them"
    assert made.said == [told]
    np.testing.assert_array_equal(made.dataset.images([0])[0].permute(1, 2, 0), pixels)
    made = Made(tmp_path / "in", exif_rotate=True)
    assert made.said == []
    np.testing.assert_array_equal(made.dataset.images([0])[0].permute(1, 2, 0), np.rot90(pixels, -1))


def test_layout_zip_of_other_modes_names_the_option_that_converts(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(4, 4, 4)).save(buffer, "PNG")
    path = make_zip(tmp_path / "s.zip", [("00000/img00000000.png", buffer.getvalue())])
    assert refusal(path, tmp_path / "out.zip") == (
        f"00000/img00000000.png in {path} must be 8-bit grey or RGB, got mode RGBA. "
        "Pass --channels 3, which makes every image RGB, or 1 for grey."
    )
    assert prepare(path, tmp_path / "out.zip", channels=3).num_channels == 3


def test_files_that_pillow_does_not_decode_itself_are_passed_over(tmp_path: Path) -> None:
    source = folders(tmp_path / "in", "a.png")
    (source / "feat.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    made = Made(source)
    assert made.said == [f"passed over in {source}: 1 files of formats that are not read, the first feat.h5"]
    (source / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EOF\n")
    assert refusal(source, tmp_path / "out.zip") == (
        f"{source}/b.png must be an image, got bytes that Pillow does not know. "
        "Mend or remove it, or go on without: prepare-data --skip-bad."
    )


# The commands.


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    out, err = capsys.readouterr()
    assert "bug" not in err
    return int(caught.value.code or 0), out, err


def test_names_that_are_no_utf8_work(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = os.fsencode(run.parent / "in")
    for name in (b"caf\xe9/a\xff.png", b"tea/b.png"):
        path = os.path.join(source, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(encode_png(noise(4, 4, 3)))
    with open(os.path.join(source, b"tea/\xfe.png"), "wb") as file:
        file.write(b"no image")
    root = os.fsdecode(os.path.join(os.path.dirname(source), b"\xe9"))
    os.rename(source, root)
    assert command(capsys, "prepare-data", root, "--run", str(run))[0] == 2
    code, out, err = command(capsys, "prepare-data", root, "--skip-bad", "--run", str(run))
    assert code == 0, err
    assert "2 classes: 0 caf\\xe9, 1 tea" in err
    results = Store(run).get(out.strip()).results
    assert results["class_names"] == ["caf\\xe9", "tea"]
    assert results["skipped"][0][0].endswith("\\xfe.png")  # type: ignore[index,union-attr,call-overload]


def test_classes_are_printed_kept_and_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders(run.parent / "in", *(f"{name}/x.png" for name in ("ant", "bee", "cat", "dog", "eel", "fox")))
    (run.parent / "in/gnu").mkdir()
    for _ in range(2):  # from memory, too
        code, out, err = command(capsys, "prepare-data", "in", "--run", str(run))
        assert code == 0
        told = "7 classes: 0 ant, 1 bee, 2 cat, 3 dog, 4 eel, ..."
        assert f"{told}; 1 of them without images" in err
    artifact = Store(run).get(out.strip())
    assert artifact.results["class_names"] == ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
    assert (artifact.results["label_dim"], artifact.results["class_counts"]) == (7, [1, 1, 1, 1, 1, 1, 0])
    assert f"class_names: {told}" in command(capsys, "show", out.strip(), "--run", str(run))[1]
    exported = sidactl.export(artifact.oid, run.parent / "files", run=run)
    assert prepare_data(str(exported / "images.zip"), run=run).results == artifact.results


def test_datasets_without_class_folders_keep_their_oids(run: Path) -> None:
    made = prepare_data("tiny-digits", run=run)
    assert "class_names" not in made.results
    assert {*made.params} == {"name", "licence", "preset", "transform", "resolution", "max_images", "skip_bad"}
    assert prepare_data("tiny-digits", class_order="numeric", run=run) == made
    assert prepare_data("tiny-digits", max_images=10, run=run).params["subset"] == "by class in turn"


def test_sample_takes_a_class_by_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders(run.parent / "in", "cat/x.png", "dog/x.png", "10/x.png")
    pets, digits, store = prepare_data("in", run=run), sidactl.fetch_teacher("tiny-digits", run=run), Store(run)
    weights: dict[str, Path | bytes] = {"model.safetensors": store.path(digits, "model.safetensors")}
    teacher = store.put("teacher", weights, inputs={"dataset": pets.oid}, params=digits.params)
    store.set_ref("teacher", "mine", teacher.oid)
    by_name = sidactl.sample("mine", seeds=range(2), class_index="dog", steps=2, run=run, device="cpu")
    assert by_name.artifact.params["class_index"] == 2
    assert by_name.labels is not None
    assert by_name.labels.tolist() == [2, 2]
    words = ("sample", "mine", "--num", "2", "--steps", "2", "--device", "cpu", "--run", str(run), "--class")
    assert command(capsys, *words, "dog")[1].strip() == by_name.artifact.oid
    assert command(capsys, *words, "2")[1].strip() == by_name.artifact.oid
    code, _, err = command(capsys, *words, "dgo")
    assert code == 2
    assert "the class must be one of 3, got 'dgo'. Did you mean 'dog'?" in err
    code, _, err = command(capsys, "sample", "tiny-digits", "--num", "2", "--class", "one", "--run", str(run))
    assert code == 2
    assert "the classes of tiny-digits have no names, got --class one. Pass its index." in err


def test_paths_that_are_no_source_say_what_is_wrong(run: Path) -> None:
    folders(run.parent / "in", "a.png")
    np.save(run.parent / "x.npy", noise(4))
    (run.parent / "c.tar.gz").write_bytes(b"")
    needed = ".pkl or .safetensors or a folder, .zip or .npz of images is needed"
    told = {
        "./in/a.png": f"./in/a.png is a single PNG image, {needed}. Give the folder that it lies in.",
        "x.npy": f"x.npy is an .npy array, {needed}. Convert it to one of these.",
        "c.tar.gz": f"c.tar.gz is a compressed file, {needed}. Make a dataset of it with: sidactl prepare-data",
        "./gone": "./gone: no such file or folder. Check the path, or see sidactl ls for names.",
        "gone/deep": "gone/deep: no such file or folder. Check the path, or see sidactl ls for names.",
        "gone.jpg": "gone.jpg: no such file or folder. Check the path, or see sidactl ls for names.",
    }
    for text, line in told.items():
        with pytest.raises(SidaError) as caught:
            resolve(Store(run), text, KINDS)
        assert str(caught.value) == line


def test_suffixes_in_capitals_are_read(run: Path) -> None:
    np.savez(run.parent / "up.npz", noise(2, 4, 4, 3))
    (run.parent / "up.npz").rename(run.parent / "UP.NPZ")
    zip_of(folders(run.parent / "in", "a.png"), run.parent / "X.ZIP")
    assert resolve(Store(run), "UP.NPZ", ["dataset"]).results["num_images"] == 2
    assert resolve(Store(run), "X.ZIP", ["dataset"]).results["num_images"] == 1


def test_numbers_in_headers_of_idx_files_are_checked(tmp_path: Path) -> None:
    images = idx_file(tmp_path / "train-images-idx3-ubyte", noise(4, 8, 8))
    labels = idx_file(tmp_path / "train-labels-idx1-ubyte", noise(4))
    for file in (images, labels):
        good = file.read_bytes()
        file.write_bytes(good + b"\0")
        assert refusal(images, tmp_path / "out.zip") == (
            f"{file} is damaged (it goes on after its last item). Download it again."
        )
        file.write_bytes(good)
    images.write_bytes(images.read_bytes()[:12] + struct.pack(">I", 4) + images.read_bytes()[16:])
    assert "it goes on after its last item" in refusal(images, tmp_path / "out.zip")


def test_a_png_is_read_to_the_checksum_of_every_chunk(tmp_path: Path) -> None:
    """A flipped bit in compressed pixels may give another picture, and Pillow looks at no checksum there."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 4, (32, 32), dtype=np.uint8) * 60).save(buffer, "PNG")
    sound, folder = buffer.getvalue(), tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(sound)
    path, chance = folder / "b.png", random.Random(16)
    for number in range(60):
        at = chance.randrange(8, len(sound))
        path.write_bytes(sound[:at] + bytes([sound[at] ^ (1 << chance.randrange(8))]) + sound[at + 1 :])
        with pytest.raises(SidaError, match=r"b\.png cannot be read as an image|must be an image|must have at most"):
            sidactl.prepare_data(str(folder), run=tmp_path / f"run{number}")
    for length in (len(sound) - 1, len(sound) - 12, len(sound) - 20):
        path.write_bytes(sound[:length])
        with pytest.raises(SidaError, match=r"b\.png cannot be read as an image \(the PNG ends too early\)"):
            sidactl.prepare_data(str(folder), run=tmp_path / f"cut{length}")


def test_what_is_no_regular_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "a.png")
    for number, name in enumerate(("b.png", "dataset.json")):
        os.mkfifo(folder / name)
        with pytest.raises(SidaError) as caught:
            sidactl.prepare_data(str(folder), run=tmp_path / f"run{number}")
        told = f"{folder / name} is no regular file but a FIFO, device or socket. Remove it, or give another."
        assert str(caught.value) == told
        (folder / name).unlink()


def test_a_key_that_stands_twice_in_dataset_json_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "a.png")
    (folder / "dataset.json").write_text('{"labels": [["a.png", 0]], "labels": null}')
    with pytest.raises(SidaError, match=r'dataset\.json must be JSON, got the key "labels" twice\. '):
        sidactl.prepare_data(str(folder), run=tmp_path / "run")


@pytest.mark.parametrize("name", ["labels.json", "Labels.csv", "metadata.tsv", "annotations.txt"])
def test_files_that_may_hold_labels_are_told_to_be_passed_over(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "a.png")
    (folder / name).write_text("a.png,0")
    sidactl.prepare_data(str(folder), run=tmp_path / "run")
    told = "1 files that may hold labels, which dataset.json alone gives, the first"
    assert f"passed over in {folder}: {told} {name}" in capsys.readouterr().err.splitlines()


def test_an_exported_folder_is_read_as_its_images_and_not_as_the_pictures_of_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = prepare_data("tiny-digits", run=run, say=None)
    for form in ("files", "png"):
        folder = sidactl.export(made.oid, tmp_path / form, form=form, run=run)  # type: ignore[arg-type]
        again = prepare_data(str(folder), run=run, say=None)
        assert (again.results["num_images"], again.results["label_dim"]) == (1797, 10)
    assert f"{tmp_path / 'files'} is an export: its images.zip is taken" in capsys.readouterr().err
    folder = sidactl.export(fetch_teacher("tiny-digits", run=run).oid, tmp_path / "net", run=run)
    with pytest.raises(
        SidaError, match=r"must hold images, got the export of a teacher: .* Draw some with: sidactl fetch"
    ):
        prepare_data(str(folder), run=run, say=None)


def test_archives_beside_images_are_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folders(tmp_path / "loose", "a.png", "b.png")
    (folder / "more.zip").write_bytes(b"")
    prepare_data(str(folder), any_size=True, run=run, say=None)
    assert f"passed over in {folder}: 1 archives, the first more.zip" in capsys.readouterr().err
