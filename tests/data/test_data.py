"""Datasets: reading, the data order, and every source, transform and refusal of prepare-data."""

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sidactl.data import archive as data_archive
from sidactl.data import archive_writer
from sidactl.data import prepare as data_prepare
from sidactl.data.archive import ZipArchive
from sidactl.data.archive_writer import ZipWriter
from sidactl.data.codec import LatentCodec
from sidactl.data.dataset import Dataset, drawn_subset, tiny_digits_arrays
from sidactl.data.images import encode_png
from sidactl.data.order import DataOrder
from sidactl.data.prepare import PRESETS, contact_sheet, latent_encoder, prepare
from sidactl.data.unfinished import PreparedDataset
from sidactl.errors import SidaError
from tests.conftest import instead_of
from tests.golden import golden_metrics
from tests.playback import SmallVae
from tests.standins import sparse_latents

EXPECTED = "datasets/expected.json"
DECODED = "datasets/decoded.npz"
INPUTS = "datasets/inputs.zip"
CIFAR = "datasets/cifar-10-python.tar.gz"

WRITTEN = [
    *(f"{tool}_{case}" for tool in ("edm", "edm2") for case in
      ("plain_dirs", "flat", "with_json", "json_null", "max_images3", "scale16", "scale_up32", "crop16", "crop32_up",
       "wide32x18", "wide_gap", "gray", "gray_scale8", "gray_crop16", "palette", "zip_nolabels", "zip_labels")),
    "edm2_dhariwal16", "edm2_dhariwal32", "edm2_rgba", "edm2_mixed_gray_rgb", "edm_cifar", "edm_cifar_max7",
]  # fmt: skip


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(SidaError) as caught:
        prepare(*arguments, **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    with zipfile.ZipFile(golden_metrics(INPUTS)) as archive:
        archive.extractall(folder)
    return folder


def golden_case(name: str, inputs: Path) -> tuple[dict[str, Any], Path, dict[str, Any]]:
    """What the published tool did: its record, the source, and the same options for `prepare`."""
    case = json.loads(golden_metrics(EXPECTED).read_text())["cases"][name]
    source = golden_metrics(CIFAR) if case["source"].endswith(".tar.gz") else inputs / case["source"]
    options: dict[str, Any] = {"convention": name.partition("_")[0]}
    for option in case["options"]:
        key, _, value = option.removeprefix("--").partition("=")
        parsed = {"resolution": lambda v: tuple(map(int, v.split("x"))), "max-images": int, "transform": str}[key](
            value
        )
        options[key.replace("-", "_")] = parsed
    return case, source, options


def decoded_pixels(name: str) -> np.ndarray:
    stored = np.load(golden_metrics(DECODED))
    key = name if name in stored else name.replace("edm2_", "edm_")
    return stored[key]


@pytest.mark.parametrize("name", WRITTEN)
def test_prepare_equals_published_tool(name: str, inputs: Path, tmp_path: Path) -> None:
    case, source, options = golden_case(name, inputs)
    prepare(source, tmp_path / "out.zip", **options)
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.namelist() == [*case["names"], "dataset.json"]
        assert archive.read("dataset.json").decode() == case["dataset_json_text"]
        assert archive.testzip() is None
        pixels = np.stack([np.array(Image.open(archive.open(member))) for member in case["names"]])
    assert list(pixels.shape) == case["shape"]
    np.testing.assert_array_equal(pixels, decoded_pixels(name))


def test_prepare_refusals_where_published_tool_fails(inputs: Path, tmp_path: Path) -> None:
    pow2 = "images must be square with a side that is a power of two, got {0} for {1}. "
    scale = "Pass --resolution to prepare-data, e.g. 32x32, and a --transform if the aspect ratio shall be kept."
    rgba = "must have 8-bit grey or RGB, got Pillow's mode RGBA. Convert it, or go on without: prepare-data --skip-bad."
    refusals = {
        "edm_rgba": f"{inputs}/rgba/0.png {rgba}",
        "edm_mixed_gray_rgb": "images must all be grey or all RGB, got 3 channels for {0}/0.png and 1 for {0}/1.png. "
        "Pass --channels 3 to prepare-data, or 1 for grey.".format(inputs / "mixed_gray_rgb"),
        "edm_different_sizes": f"images must all have one size, got 16x16 for {inputs}/different_sizes/0.png "
        f"and 32x32 for {inputs}/different_sizes/1.png. {scale}",
        "edm_not_pow2": pow2.format("24x24", inputs / "not_pow2/0.png") + scale,
        "edm_not_square": pow2.format("32x16", inputs / "not_square/0.png") + scale,
    }
    for name in ("edm2_different_sizes", "edm2_not_pow2", "edm2_not_square"):
        refusals[name] = refusals[name.replace("edm2", "edm")]
    for name, text in refusals.items():
        case, source, options = golden_case(name, inputs)
        assert case["exit_code"] == 1
        assert refusal(source, tmp_path / "out.zip", **options) == text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["edm_json_incomplete", "edm2_json_incomplete"])
def test_prepare_refuses_missing_label_where_published_tool_drops_all(name: str, inputs: Path, tmp_path: Path) -> None:
    case, source, options = golden_case(name, inputs)
    assert case["dataset_json"] == {"labels": None}
    where = source / "dataset.json"
    labelled = {entry[0] for entry in json.loads(where.read_text())["labels"]}
    missing = next(n for n in ("c0/0.png", "c0/2.png", "c1/1.png", "c1/3.png") if n not in labelled)
    assert refusal(source, tmp_path / "out.zip", **options) == (
        f"{where} must label every image, got none for {missing}. "
        'Add its label, or set "labels" to null in dataset.json to go without.'
    )


@pytest.mark.parametrize("name", ["edm_max_images0", "edm2_max_images0"])
def test_prepare_refuses_no_images_where_published_tool_writes_one(name: str, inputs: Path, tmp_path: Path) -> None:
    case, source, options = golden_case(name, inputs)
    assert len(case["names"]) == 1
    assert refusal(source, tmp_path / "out.zip", **options) == (
        "--max-images must be >= 1, got 0. Pass --max-images 1 or more, or leave it out."
    )


def test_every_golden_case_is_tested() -> None:
    cases = set(json.loads(golden_metrics(EXPECTED).read_text())["cases"])
    refused = {f"edm_{name}" for name in ("rgba", "mixed_gray_rgb")} | {
        f"{tool}_{name}"
        for tool in ("edm", "edm2")
        for name in ("different_sizes", "not_pow2", "not_square", "json_incomplete", "max_images0")
    }
    assert cases == set(WRITTEN) | refused


# A source of each kind, small enough to reason about.


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray | Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def make_zip(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def layout(count: int, size: int = 4) -> list[tuple[str, bytes]]:
    return [(f"00000/img{i:08d}.png", encode_png(noise(size, size, 3, seed=i))) for i in range(count)]


def labelled(members: list[tuple[str, bytes]], *classes: object) -> list[tuple[str, bytes]]:
    labels = [[name, c] for (name, _), c in zip(members, classes, strict=True)]
    return [*members, ("dataset.json", json.dumps({"labels": labels}).encode())]


def idx_file(path: Path, array: np.ndarray) -> Path:
    data = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def cifar_archive(path: Path, batch: bytes) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for number in range(5, 0, -1):
            member = tarfile.TarInfo(f"cifar-10-batches-py/data_batch_{number}")
            member.size = len(batch)
            archive.addfile(member, io.BytesIO(batch))
    return path


def cifar_batch(labels: list[int], planes: bytes) -> bytes:
    """The opcodes of a Python-2 batch that matter: labels, then data."""
    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    data = b"T" + struct.pack("<I", len(planes)) + planes
    return b"\x80\x02}(U\x06labels](" + numbers + b"eU\x04data" + data + b"u."


def test_prepare_same_bytes_for_any_number_of_workers_and_dates(tmp_path: Path) -> None:
    for number in random.Random(0).sample(range(40), 40):
        save(tmp_path / f"in/{number % 3}/{number}.png", noise(9, 11, 3, seed=number))
    os.utime(tmp_path / "in/0/0.png", (0, 0))
    options: dict[str, Any] = {"resolution": (8, 8), "transform": "center-crop"}
    for workers in (1, 2, 5):
        prepare(tmp_path / "in", tmp_path / f"{workers}.zip", workers=workers, **options)
    first = (tmp_path / "1.zip").read_bytes()
    assert first == (tmp_path / "2.zip").read_bytes() == (tmp_path / "5.zip").read_bytes()


def test_prepare_tiny_digits_is_the_same_everywhere(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = prepare("tiny-digits", tmp_path / "d.zip", progress=lambda *counts: seen.append(counts))
    assert (done.num_images, done.resolution, done.num_channels, done.label_dim) == (1797, 8, 1, 10)
    assert done.class_counts == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (done.kind, done.skipped) == ("pixels", [])
    assert seen[0] == (1, 1797)
    assert seen[-1] == (1797, 1797)
    digest = hashlib.sha256((tmp_path / "d.zip").read_bytes()).hexdigest()
    assert digest == "5667279d4a7c72efcdd2ab58c0e7b0482be2592032f0332c89e9c659e7703235"
    images, labels = tiny_digits_arrays()
    dataset = Dataset(tmp_path / "d.zip")
    np.testing.assert_array_equal(dataset.images(range(1797)).numpy(), images)
    np.testing.assert_array_equal(dataset.labels, labels)


def test_tiny_digits_are_ink_counts_over_eight_minus_one() -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    digits = sklearn_datasets.load_digits()
    images, labels = tiny_digits_arrays()
    assert np.abs(images[:, 0] / 127.5 - 1 - (digits.images / 8 - 1)).max() <= 1 / 255
    np.testing.assert_array_equal(labels, digits.target)


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (8, 8, 3), (256, 256), (512, 256, 3)])
def test_encode_png_is_read_back_by_pillow(shape: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(encode_png(noise(*shape))))), noise(*shape))


def test_preset_fashion32_pads_idx_images_with_zeros(tmp_path: Path) -> None:
    images, labels = noise(5, 28, 28), np.array([9, 0, 3, 3, 1], dtype=np.uint8)
    for suffix in ("", ".gz"):
        folder = tmp_path / f"raw{suffix}"
        folder.mkdir()
        file = idx_file(folder / f"train-images-idx3-ubyte{suffix}", images)
        idx_file(folder / f"train-labels-idx1-ubyte{suffix}", labels)
        for source in (file, folder):
            done = prepare(source, tmp_path / "out.zip", preset="fashion32")
            assert (done.num_channels, done.resolution, done.class_counts[9]) == (1, 32, 1)
            dataset = Dataset(tmp_path / "out.zip")
            padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
            np.testing.assert_array_equal(dataset.images(range(5)).numpy()[:, 0], padded)
            np.testing.assert_array_equal(dataset.labels, labels)


def test_preset_imagenet64_follows_ilsvrc_root_to_its_training_folders(tmp_path: Path) -> None:
    train = tmp_path / "in/ILSVRC/Data/CLS-LOC/train"
    save(train / "n02/a.JPEG", noise(70, 90, 3), format="JPEG")
    save(train / "n01/b.JPEG", noise(90, 70, 3, seed=1).copy(), format="JPEG")
    save(tmp_path / "in/ILSVRC/Data/CLS-LOC/val/c.JPEG", noise(70, 70, 3), format="JPEG")
    prepare(tmp_path / "in", tmp_path / "preset.zip", preset="imagenet64")
    prepare(train, tmp_path / "options.zip", resolution=(64, 64), transform="center-crop")
    assert (tmp_path / "preset.zip").read_bytes() == (tmp_path / "options.zip").read_bytes()
    assert Dataset(tmp_path / "preset.zip").class_counts() == [1, 1]


@pytest.mark.parametrize("preset", ["ffhq64", "afhqv2-64"])
def test_presets_of_unconditional_teachers_drop_folder_labels(preset: str, tmp_path: Path) -> None:
    save(tmp_path / "in/00000/a.png", noise(64, 64, 3))
    save(tmp_path / "in/01000/b.png", noise(64, 64, 3))
    assert prepare(tmp_path / "in", tmp_path / "with.zip").label_dim == 2
    done = prepare(tmp_path / "in", tmp_path / "out.zip", preset=preset)
    assert (done.label_dim, done.class_counts) == (0, [])
    assert Dataset(tmp_path / "out.zip").labels is None


def test_presets_are_the_published_preparations() -> None:
    assert {name: (p.resolution[0], p.transform) for name, p in PRESETS.items()} == {
        "cifar10": (32, None),
        "imagenet64": (64, "center-crop"),
        "ffhq64": (64, None),
        "afhqv2-64": (64, None),
        "imagenet512": (512, "center-crop-dhariwal"),
        "fashion32": (32, "pad"),
    }


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_batch_keeps_pixels_and_labels(channels: int, tmp_path: Path) -> None:
    images, labels = noise(6, 8, 8, channels), np.array([4, 0, 2, 2, 1, 4])
    np.savez(tmp_path / "samples.npz", images, labels)
    done = prepare(tmp_path / "samples.npz", tmp_path / "out.zip", max_images=5)
    assert (done.num_images, done.num_channels, done.class_counts) == (5, channels, [1, 1, 2, 0, 1])
    read = Dataset(tmp_path / "out.zip").images(range(5))
    np.testing.assert_array_equal(read.permute(0, 2, 3, 1).numpy(), images[:5])


def test_npz_without_classes_is_unlabelled(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "samples.npz", noise(2, 4, 4, 3))
    assert prepare(tmp_path / "samples.npz", tmp_path / "out.zip").label_dim == 0


def test_zip_in_layout_is_taken_as_it_is(tmp_path: Path) -> None:
    grey = io.BytesIO()
    Image.fromarray(noise(4, 4)).save(grey, "PNG")
    members = [("00000/img00000000.png", grey.getvalue()), ("00000/img00000007.png", encode_png(noise(4, 4, seed=1)))]
    make_zip(tmp_path / "in.zip", labelled(members, 1, 0), zipfile.ZIP_DEFLATED)
    done = prepare(tmp_path / "in.zip", tmp_path / "out.zip")
    assert (done.num_channels, done.class_counts) == (1, [1, 1])
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert [(name, archive.read(name)) for name in archive.namelist()] == labelled(members, 1, 0)
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    prepare(tmp_path / "out.zip", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "out.zip").read_bytes()


def test_latents_are_read_and_taken_as_they_are(tmp_path: Path) -> None:
    source = golden_metrics("latents/img-latents-standin.zip")
    expected = json.loads(golden_metrics("latents/img-latents-standin_expected.json").read_text())
    done = prepare(source, tmp_path / "out.zip")
    assert (done.kind, done.num_channels, done.resolution, done.class_counts) == ("latents", 8, 4, [2, 2])
    for path in (source, tmp_path / "out.zip"):
        dataset = Dataset(path)
        assert dataset.is_latents
        assert dataset.names == expected["members"][:-1]
        latents = np.load(golden_metrics("latents/img-latents-standin_expected.npz"))["latents"]
        assert dataset.images([0]).dtype == torch.float32
        np.testing.assert_array_equal(dataset.images(range(4)).numpy(), latents)
        assert dataset.one_hot([1]).tolist() == [expected["loader"]["item1_label"]]
    with pytest.raises(SidaError) as caught:
        contact_sheet(dataset)
    assert str(caught.value) == (
        f"a contact sheet must be of pixels, got latents in {tmp_path}/out.zip. Prepare pixels to see them."
    )
    assert refusal(source, tmp_path / "no.zip", resolution=(4, 4)) == (
        f"latents in {source} can only be taken as they are, got other options or names of another layout. "
        "Leave out --resolution, --channels and the like, or prepare the pixels."
    )


def test_files_of_every_mode_become_rgb(tmp_path: Path) -> None:
    rgb = Image.fromarray(noise(4, 4, 3))
    alpha = rgb.copy()
    alpha.putalpha(7)
    frames = [Image.new("P", (4, 4), color) for color in (3, 200)]
    save(tmp_path / "in/a.png", rgb)
    save(tmp_path / "in/b.PNG", alpha)
    save(tmp_path / "in/c.JPEG", rgb.convert("CMYK"), format="JPEG", quality=100)
    save(tmp_path / "in/d.gif", frames[0], save_all=True, append_images=frames[1:])
    save(tmp_path / "in/e.png", rgb.convert("1"))
    save(tmp_path / "in/f.webp", rgb, lossless=True)
    (tmp_path / "in/notes.txt").write_text("not an image")
    assert prepare(tmp_path / "in", tmp_path / "out.zip").num_channels == 3
    images = Dataset(tmp_path / "out.zip").images(range(6)).permute(0, 2, 3, 1).numpy()
    for index, name in [(0, "a.png"), (2, "c.JPEG"), (3, "d.gif"), (4, "e.png")]:
        with Image.open(tmp_path / "in" / name) as image:
            np.testing.assert_array_equal(images[index], np.array(image.convert("RGB")))
    np.testing.assert_array_equal(images[1], images[0])
    np.testing.assert_array_equal(images[5], images[0])


def test_folder_with_a_link_to_itself_is_walked_once(tmp_path: Path) -> None:
    save(tmp_path / "in/a/x.png", noise(4, 4, 3))
    save(tmp_path / "elsewhere/y.png", noise(4, 4, 3))
    (tmp_path / "in/a/loop").symlink_to(tmp_path / "in", target_is_directory=True)
    (tmp_path / "in/b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert prepare(tmp_path / "in", tmp_path / "out.zip").class_counts == [1, 1]


# Interruption: what is done is kept, and goes on to the same bytes.


class Stop(Exception):
    """In place of Ctrl-C, which pytest would take for its own."""


def stopping_at(image: int, seen: list[int]) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        seen.append(done)
        if done == image:
            raise Stop

    return progress


def mixed_folder(folder: Path) -> Path:
    """Twelve usable images in two classes, one that is none at position 5."""
    for number in range(12):
        save(folder / str(number // 6) / f"{number:02}.png", noise(16, 16, 3, seed=number))
    (folder / "0/04a.png").write_bytes(b"hello")
    return folder


@pytest.mark.parametrize("workers", [1, 3])
def test_interrupted_preparation_goes_on_to_the_same_bytes(workers: int, tmp_path: Path) -> None:
    source, work = mixed_folder(tmp_path / "in"), tmp_path / "work"
    whole = prepare(source, tmp_path / "whole.zip", skip_bad=True)
    assert [name for name, _ in whole.skipped] == [f"{source}/0/04a.png"]
    seen: list[int] = []
    for image in (3, 6, 7, 12):
        with pytest.raises(Stop):
            prepare(
                source,
                tmp_path / "out.zip",
                skip_bad=True,
                workers=workers,
                work=work,
                progress=stopping_at(image, seen),
            )
        assert not (tmp_path / "out.zip").exists()
    done = prepare(source, tmp_path / "out.zip", skip_bad=True, work=work, progress=stopping_at(0, seen))
    assert seen == list(range(1, 14)), "each image is encoded once"
    assert done == whole
    assert (tmp_path / "out.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()
    assert list(work.iterdir()) == []


def test_killed_preparation_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib; from sidactl.data import prepare, unfinished\n"
        "unfinished.SAVE_EVERY_SEC = float(sys.argv[1])\n"
        "kill = lambda done, total: os.kill(os.getpid(), 9) if done == 30 else None\n"
        "folder = pathlib.Path(sys.argv[2])\n"
        "prepare.prepare('tiny-digits', folder / 'out.zip', work=folder / 'work', progress=kill)\n"
    )
    for every_sec, done in (("1e9", None), ("0", 30)):
        assert subprocess.run([sys.executable, "-c", script, every_sec, tmp_path], check=False).returncode == -9
        saved = tmp_path / "work/state.json"
        assert (json.loads(saved.read_text())["state"]["done"] if saved.exists() else None) == done
    seen: list[int] = []
    prepare("tiny-digits", tmp_path / "out.zip", work=tmp_path / "work", progress=stopping_at(0, seen))
    prepare("tiny-digits", tmp_path / "whole.zip")
    assert seen[0] == 31
    assert (tmp_path / "out.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()


def test_kill_between_the_last_image_and_the_end_is_gone_on_from(tmp_path: Path) -> None:
    seen: list[int] = []
    for image in (1797, 0):
        with pytest.raises(Stop) if image else nullcontext():
            prepare("tiny-digits", tmp_path / "o.zip", work=tmp_path / "work", progress=stopping_at(image, seen))
    assert seen == list(range(1, 1798))
    prepare("tiny-digits", tmp_path / "whole.zip")
    assert (tmp_path / "o.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()


@pytest.mark.parametrize("name", ["images.zip", "members"])
def test_work_of_which_part_is_gone_begins_anew(name: str, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        prepare("tiny-digits", tmp_path / "o.zip", work=tmp_path / "work", progress=stopping_at(100, []))
    (tmp_path / "work" / name).unlink()
    prepare("tiny-digits", tmp_path / "o.zip", work=tmp_path / "work")
    prepare("tiny-digits", tmp_path / "whole.zip")
    assert (tmp_path / "o.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()


def test_bad_image_leaves_nothing_to_go_on_from(tmp_path: Path) -> None:
    source, work = mixed_folder(tmp_path / "in"), tmp_path / "work"
    with pytest.raises(Stop):
        prepare(source, tmp_path / "out.zip", work=work, progress=stopping_at(2, []))
    assert (work / "state.json").exists()
    refusal(source, tmp_path / "out.zip", work=work)
    assert list(work.iterdir()) == []


# The zip itself: byte for byte that of Python's zipfile, of any size.


def zipfile_bytes(path: Path, members: list[tuple[str, bytes]]) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            member = zipfile.ZipInfo(name)
            member.create_system = 3
            member.external_attr = 0o644 << 16
            archive.writestr(member, data)
    return path.read_bytes()


@pytest.mark.parametrize("limit", [(1 << 31) - 1, 500])
def test_zip_is_that_of_zipfile_beyond_2_gb_too(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    monkeypatch.setattr(archive_writer, "_ZIP64_LIMIT", limit)
    with ZipWriter(tmp_path / "ours.zip") as writer:
        for index in range(7):
            writer.add(noise(4, 4, 3, seed=index), index % 3)
    expected = zipfile_bytes(tmp_path / "theirs.zip", labelled(layout(7), *(i % 3 for i in range(7))))
    assert (tmp_path / "ours.zip").read_bytes() == expected
    with zipfile.ZipFile(tmp_path / "ours.zip") as archive:
        assert archive.testzip() is None
    dataset = Dataset(tmp_path / "ours.zip")
    np.testing.assert_array_equal(dataset.images([6])[0].permute(1, 2, 0).numpy(), noise(4, 4, 3, seed=6))
    assert dataset.class_counts() == [3, 2, 2]


def test_zip_of_more_members_than_16_bits_count(tmp_path: Path) -> None:
    pixel = noise(1, 1, 1)
    with ZipWriter(tmp_path / "ours.zip") as writer:
        for _ in range(65_536):
            writer.add(pixel)
    with zipfile.ZipFile(tmp_path / "ours.zip") as archive:
        theirs = archive.namelist()
    assert len(theirs) == 65_537
    assert ZipArchive(tmp_path / "ours.zip").names == tuple(theirs)


def test_zips_that_others_wrote_are_read(tmp_path: Path) -> None:
    path = tmp_path / "d.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = b"PK" * 9
        archive.mkdir("folder")
        with archive.open("folder/b\xfc.bin", "w", force_zip64=True) as member:
            member.write(b"x" * 99)
        info = zipfile.ZipInfo("a")
        info.extra = struct.pack("<HH400s", 0x7075, 400, b"abcd")
        info.comment = b"of a member"
        archive.writestr(info, b"y" * 50, zipfile.ZIP_DEFLATED)
    (tmp_path / "behind.zip").write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    for file in (path, tmp_path / "behind.zip"):
        read = ZipArchive(file)
        assert {name: read.read(name) for name in read.names} == {"folder/b\xfc.bin": b"x" * 99, "a": b"y" * 50}


def read_all(path: Path) -> str:
    """What is wrong with a zip; nothing, if all of it can be read."""
    try:
        archive = ZipArchive(path)
        for name in archive.names:
            archive.read(name)
    except SidaError as error:
        return str(error)
    return ""


def test_zip_with_a_damaged_directory_is_refused_in_one_line(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "d.zip", layout(3))
    good = path.read_bytes()
    start = good.index(b"PK\x01\x02")
    rng = np.random.default_rng(0)
    told = []
    for _ in range(300):
        data = bytearray(good)
        for position in rng.integers(start, len(data), 3):
            data[position] = rng.choice([0, 255, rng.integers(256)])
        path.write_bytes(data[: len(data) - rng.integers(0, 3)])
        told.append(read_all(path))
    assert all(str(path) in text and "\n" not in text for text in told if text)
    assert len(set(told)) > 10


def members_of(path: Path) -> object:
    """What the directory of a zip says of all members, or how it is refused."""
    try:
        archive = ZipArchive(path)
        return [archive.member(row) for row in archive.by_name], archive.is_item.tolist(), archive.names
    except SidaError as error:
        return str(error)


@pytest.mark.parametrize("limit", [(1 << 31) - 1, 500])
def test_entries_that_are_read_at_once_are_as_if_read_one_by_one(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    path = make_zip(tmp_path / "d.zip", labelled(layout(40), *range(40)))
    good = path.read_bytes()
    start = good.index(b"PK\x01\x02")
    rng, kinds = np.random.default_rng(1), set()
    for trial in range(300):
        data = bytearray(good)
        for position in rng.integers(start, len(data), trial % 3):
            data[position] = rng.choice([0, 255, ord("0"), ord("9"), ord("/"), data[position] ^ 1])
        path.write_bytes(data)
        at_once = members_of(path)
        with monkeypatch.context() as patched:
            instead_of(data_archive._num_alike, lambda data, num_bytes: 1, patched)
            instead_of(data_archive._names_at_once, lambda data, entries: [], patched)
            assert members_of(path) == at_once
        kinds.add(re.sub(r"\d+|'[^']*'", "", at_once) if isinstance(at_once, str) else "read")
    assert len(kinds) > 5


def test_entries_out_of_order_are_not_compared_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"00000/img{index * 769 % 2000:08d}.png" for index in range(2000)]
    path = make_zip(tmp_path / "d.zip", [(name, b"") for name in names])
    looked: list[int] = []
    num_alike = data_archive._num_alike
    instead_of(data_archive._num_alike, lambda *a: looked.append(1) or num_alike(*a), monkeypatch)
    assert ZipArchive(path).names == tuple(names)
    assert len(looked) < 20


def test_names_in_any_order_are_sorted_and_found(tmp_path: Path) -> None:
    names = [f"{index % 7}/{index * 37 % 100:03d}.png" for index in range(100)]
    dataset = Dataset(make_zip(tmp_path / "d.zip", [(name, encode_png(noise(4, 4, 3))) for name in ("readme", *names)]))
    assert dataset.names == sorted(names)
    assert [dataset.name(index) for index in range(100)] == sorted(names)
    archive = ZipArchive(tmp_path / "d.zip")
    assert [archive.row_of(name) for name in ("readme", *names)] == list(range(101))
    assert "3/999.png" not in archive
    assert "" not in archive
    with pytest.raises(KeyError):
        archive.read("zzz")


# Size.


def test_dataset_keeps_a_few_bytes_of_a_member(tmp_path: Path) -> None:
    num = 20_000
    sparse_latents(tmp_path / "d.zip", num, size=8)
    Dataset(make_zip(tmp_path / "warm.zip", labelled(layout(2), 0, 1)), cache_bytes=0)
    tracemalloc.start()
    try:
        dataset = Dataset(tmp_path / "d.zip", cache_bytes=0)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Where its entry is, its place by name and its label are 8 bytes each, 1 is whether it is an image; lists grow by
    # an eighth ahead. The rest is for what does not depend on the number.
    assert kept < 27 * num + 100_000
    # What dataset.json says of it is 47 bytes, which stay for a moment as they were read, and the part of it alone.
    assert peak < 27 * num + 2.5 * 47 * num + 2_000_000
    assert dataset.class_counts() == [20] * 1000
    assert not dataset.images([0, 19_999]).any()


@pytest.mark.slow
def test_dataset_of_imagenet_512_in_latents_stays_small(tmp_path: Path) -> None:
    num = 1_281_167
    # Some disks take minutes to free a million blocks.
    memory, free = Path("/dev/shm"), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    has_room = memory.is_dir() and min(free, shutil.disk_usage(memory).free) > 10e9
    with tempfile.TemporaryDirectory(dir=memory if has_room else tmp_path) as folder:
        hole, path = Path(folder, "hole"), Path(folder, "d.zip")
        hole.touch()
        os.truncate(hole, 1 << 20)
        if hole.stat().st_blocks:
            pytest.skip(f"the file system of {folder} keeps no holes in files: 168 GB would be written")
        sparse_latents(path, num)
        size = path.stat()
        assert size.st_size > 168e9
        assert size.st_blocks * 512 < size.st_size / 20
        check_that_it_stays_small(path, num)


def check_that_it_stays_small(path: Path, num: int) -> None:
    script = (
        "import pathlib, sys, resource\n"
        "from sidactl.data.dataset import Dataset; from sidactl.data.order import DataOrder\n"
        "rss = lambda: int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()\n"
        "before = rss(); dataset = Dataset(pathlib.Path(sys.argv[1])); order = DataOrder(dataset.num_images, 0)\n"
        "for start in range(0, 4096, 32): assert not dataset.images(order.indices(start, 32)).any()\n"
        "print(dataset.num_images, int(dataset.one_hot([1281166]).argmax()), rss() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, path], check=True, capture_output=True)
    num_images, label, grown = map(int, done.stdout.split())
    assert (num_images, label) == (num, 999)
    assert grown < 100 << 20  # for eight processes less than a gigabyte on top of what torch takes


# Latents.


def pixels_zip(path: Path, count: int, *, size: int = 16, channels: int = 3, classes: int = 3) -> Dataset:
    with ZipWriter(path) as writer:
        for index in range(count):
            writer.add(noise(size, size, channels, seed=index), index % classes if classes else None)
    return Dataset(path)


def encoded(source: Path, out: Path, vae: Any = None, **options: Any) -> PreparedDataset:
    """Latents of a source, by the VAE."""
    vae = vae or SmallVae()
    return prepare(source, out, encode=latent_encoder(LatentCodec(lambda: vae), torch.device("cpu")), **options)


@pytest.mark.parametrize(("channels", "classes"), [(3, 3), (1, 0)])
def test_latents_are_mean_and_std_in_the_edm2_layout(channels: int, classes: int, tmp_path: Path) -> None:
    pixels = pixels_zip(tmp_path / "pixels.zip", 19, channels=channels, classes=classes)
    vae = SmallVae()
    done = encoded(pixels.path, tmp_path / "latents.zip", vae)
    assert vae.batches == [8, 8, 3]
    assert (done.kind, done.num_images, done.resolution, done.num_channels) == ("latents", 19, 2, 8)
    assert done.class_counts == ([7, 6, 6] if classes else [])
    assert done.contact_sheet == contact_sheet(pixels)
    with zipfile.ZipFile(tmp_path / "latents.zip") as archive:
        names = [f"00000/img-mean-std-{index:08d}.npy" for index in range(19)]
        assert archive.namelist() == [*names, "dataset.json"]
        labels = json.loads(archive.read("dataset.json"))["labels"]
        assert labels == ([[name, index % 3] for index, name in enumerate(names)] if classes else None)
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        first = np.load(archive.open(names[0]))
    posterior = vae.encode(pixels.images([0]).expand(-1, 3, -1, -1) / 255).latent_dist
    torch.testing.assert_close(torch.from_numpy(first), torch.cat([posterior.mean, posterior.std], dim=1)[0])
    latents = Dataset(tmp_path / "latents.zip")
    assert latents.is_latents
    np.testing.assert_array_equal(latents.images([0])[0].numpy(), first)
    prepare(tmp_path / "latents.zip", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "latents.zip").read_bytes()


FOR_LATENTS: list[dict[str, Any]] = [
    {},
    {"resolution": (8, 8), "transform": "center-crop-dhariwal"},
    {"channels": 1, "exif_rotate": True},
    {"max_images": 7},
    {"convention": "edm"},
    {"preset": "ffhq64"},
]


def folder_with_all_it_takes(folder: Path) -> Path:
    """20 usable images of two classes, named, turned and of several modes; two that are none, one of them the last."""
    for number in range(20):
        path = folder / "ab"[number // 11] / f"{number:02}.png"
        save(path, noise(16, 16, *([] if number % 4 == 1 else [3]), seed=number))
        if number % 5 == 0:
            exif = Image.Exif()
            exif[0x0112] = 6
            Image.open(path).save(path, exif=exif)
    (folder / "a/04x.png").write_bytes(b"hello")
    (folder / "b/99.png").write_bytes(b"hello")
    return folder


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("options", FOR_LATENTS, ids=lambda options: ",".join(options))
def test_latents_of_a_source_are_those_of_the_pixels_that_it_becomes(
    options: dict[str, Any], workers: int, tmp_path: Path
) -> None:
    source, told = folder_with_all_it_takes(tmp_path / "in"), list[str]()
    if options.get("convention") == "edm":  # which keeps grey images grey, and here they are not alone
        options = {**options, "channels": 3}
    pixels = prepare(source, tmp_path / "p.zip", skip_bad=True, say=told.append, **options)
    of_pixels = encoded(tmp_path / "p.zip", tmp_path / "of-pixels.zip")
    told_pixels, told[:] = [*told], []
    made = encoded(source, tmp_path / "made.zip", skip_bad=True, workers=workers, say=told.append, **options)
    assert (tmp_path / "made.zip").read_bytes() == (tmp_path / "of-pixels.zip").read_bytes()
    assert made.skipped == pixels.skipped
    assert (made.num_images, made.class_counts, made.class_names) == (
        *(pixels.num_images, pixels.class_counts, pixels.class_names),
    )
    assert made.contact_sheet == of_pixels.contact_sheet == contact_sheet(Dataset(tmp_path / "p.zip"))
    assert told == told_pixels


def test_interrupted_latents_go_on_in_the_same_batches(tmp_path: Path) -> None:
    source, vae, out, work = folder_with_all_it_takes(tmp_path / "in"), SmallVae(), tmp_path / "out.zip", tmp_path / "w"
    whole = encoded(source, tmp_path / "whole.zip", vae, skip_bad=True)
    assert vae.batches == [8, 8, 4]
    seen: list[int] = []
    for image in (9, 17, 22):
        with pytest.raises(Stop):
            encoded(source, out, vae, skip_bad=True, work=work, progress=stopping_at(image, seen))
    done = encoded(source, out, vae, skip_bad=True, work=work, progress=stopping_at(0, seen))
    assert seen == [9, 17, 22]
    assert vae.batches == [8, 8, 4] * 2
    assert done == whole
    assert out.read_bytes() == (tmp_path / "whole.zip").read_bytes()
    assert list(work.iterdir()) == []


def test_bad_input_for_latents_leaves_nothing_and_room_that_is_gone_what_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, work = mixed_folder(tmp_path / "in"), tmp_path / "work"
    told, seen = list[str](), list[int]()
    options: dict[str, Any] = {"work": work, "say": told.append}
    with pytest.raises(SidaError, match=r"04a\.png must be an image"):
        encoded(source, work / "images.zip", **options)
    assert list(work.iterdir()) == []
    # Of 13 images of 2x2 latents in float32: 4 * 8 * 4 bytes each, and 320 beside them.
    room = 13 * (4 * 8 * 4 + 320)
    needed = {"free": 2 * room - 1}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed["free"]))
    options["skip_bad"] = True
    with pytest.raises(SidaError) as caught:
        encoded(source, work / "images.zip", **options)
    assert str(caught.value) == (
        "the latents of 13 images take 0.0 GB of the disk, and as much again while they are stored, got 0.0 GB free in "
        f"{work}. Free some space or choose another disk with --run DIR."
    )
    assert caught.value.exit_code == 2
    assert list(work.iterdir()) == []
    needed["free"] += 1
    with pytest.raises(Stop):
        encoded(source, work / "images.zip", progress=stopping_at(9, seen), **options)
    needed["free"] = 0
    with pytest.raises(SidaError, match=r"got 0\.0 GB free"):
        encoded(source, work / "images.zip", **options)
    assert json.loads((work / "state.json").read_bytes())["state"]["done"] == 9
    assert told == []
    monkeypatch.setattr(data_prepare, "_TOLD_BYTES", room)
    needed["free"] = 1 << 40
    encoded(source, tmp_path / "latents.zip", progress=stopping_at(0, seen), **options)
    assert seen == [9, 13]
    assert told == ["the latents of 13 images take 0.0 GB of the disk"]


def test_zip_of_latents_is_refused_as_a_source_of_latents(tmp_path: Path) -> None:
    pixels = pixels_zip(tmp_path / "pixels.zip", 2)
    encoded(pixels.path, tmp_path / "latents.zip")
    with pytest.raises(SidaError) as caught:
        encoded(tmp_path / "latents.zip", tmp_path / "out.zip", skip_bad=True)
    assert str(caught.value) == (
        f"latents are made of pixels, got latents: 00000/img-mean-std-00000000.npy in {tmp_path}/latents.zip. "
        "Leave out --latents."
    )


def test_latents_by_diffusers_autoencoder(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="the extra `vae` is not installed")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4,
        latent_channels=4,
        norm_num_groups=4,
    ).requires_grad_(False)
    pixels = pixels_zip(tmp_path / "pixels.zip", 3, size=32)
    encoded(pixels.path, tmp_path / "latents.zip", vae.eval())
    posterior = vae.encode(pixels.images(range(3)) / 255).latent_dist
    expected = torch.cat([posterior.mean, posterior.std], dim=1)
    assert expected.shape == (3, 8, 4, 4)
    torch.testing.assert_close(Dataset(tmp_path / "latents.zip").images(range(3)), expected, rtol=0, atol=1e-5)


def test_images_too_small_or_of_another_shape_for_latents_are_refused(tmp_path: Path) -> None:
    pixels = pixels_zip(tmp_path / "pixels.zip", 2, size=4)
    with pytest.raises(SidaError) as caught:
        encoded(pixels.path, tmp_path / "latents.zip")
    assert str(caught.value) == "images must be at least 8x8 to have latents, got 4x4. Prepare larger images."
    with pytest.raises(SidaError, match=r"^images must be square with a side that is a power of two, got 24x16 for 00"):
        encoded(pixels.path, tmp_path / "latents.zip", resolution=(24, 16))
    assert [p.name for p in tmp_path.iterdir()] == ["pixels.zip"]


# Bad input: one line that names the file, and nothing left behind.

SKIP = "Mend or remove it, or go on without: prepare-data --skip-bad."
AGAIN = "Download it again."


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


def bomb_png() -> bytes:
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    png = encode_png(noise(1, 1, 3))
    return png[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + png[33:]


def bad_image(kind: str, folder: Path) -> tuple[Path, str]:
    """A folder entry that cannot be used, and why."""
    path = folder / f"b-{kind}.{'jpg' if kind == 'truncated-jpeg' else 'png'}"
    if kind == "truncated-png":
        return truncated(save(path, noise(16, 16, 3))), "cannot be read as an image ({cause})"
    if kind == "truncated-jpeg":
        return truncated(save(path, noise(64, 64, 3))), "cannot be read as an image ({cause})"
    if kind == "not-an-image":
        path.write_bytes(b"hello")
        return path, "must be an image, got bytes that Pillow does not know"
    if kind == "empty-file":
        path.write_bytes(b"")
        return path, "must be an image, got bytes that Pillow does not know"
    if kind == "bomb":
        path.write_bytes(bomb_png())
        return path, "must have at most 89478485 pixels, got more"
    assert kind == "16-bit"
    save(path, noise(16, 16).astype(np.uint16) * 257)
    return path, "must have 8 bits per channel, got Pillow's mode I;16"


KINDS = ["truncated-png", "truncated-jpeg", "not-an-image", "empty-file", "bomb", "16-bit"]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_image_stops_with_one_line_and_leaves_nothing(kind: str, workers: int, tmp_path: Path) -> None:
    save(tmp_path / "in/a.png", noise(16, 16, 3))
    path, reason = bad_image(kind, tmp_path / "in")
    (tmp_path / "out.zip").write_bytes(b"kept")
    with pytest.raises(SidaError) as caught:
        prepare(tmp_path / "in", tmp_path / "out.zip", workers=workers)
    convert = "Convert it, or go on without: prepare-data --skip-bad."
    assert str(caught.value) == (
        f"{path} {reason.format(cause=caught.value.__cause__)}. {convert if kind == '16-bit' else SKIP}"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out.zip"]
    assert (tmp_path / "out.zip").read_bytes() == b"kept"


def test_skip_bad_goes_on_and_lists_each(tmp_path: Path) -> None:
    for name in ("a", "c"):
        save(tmp_path / f"in/{name}.png", noise(16, 16, 3))
    bad = dict(sorted(bad_image(kind, tmp_path / "in") for kind in KINDS if not kind.startswith("truncated")))
    done = prepare(tmp_path / "in", tmp_path / "out.zip", skip_bad=True)
    assert done.num_images == 2
    assert done.skipped == [(str(path), reason) for path, reason in bad.items()]
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.namelist() == ["00000/img00000000.png", "00000/img00000005.png", "dataset.json"]


def test_wide_crop_lists_images_that_it_leaves_out(inputs: Path, tmp_path: Path) -> None:
    _, source, options = golden_case("edm_wide_gap", inputs)
    done = prepare(source, tmp_path / "out.zip", **options)
    assert done.skipped == [(f"{source}/{i}.png", "is too small for center-crop-wide to 32x18") for i in (1, 3)]


def test_nothing_readable_is_refused_even_with_skip_bad(tmp_path: Path) -> None:
    bad_image("not-an-image", save(tmp_path / "in/x.png", noise(1, 1)).parent)
    (tmp_path / "in/x.png").unlink()
    assert refusal(tmp_path / "in", tmp_path / "out.zip", skip_bad=True) == (
        f"{tmp_path}/in must hold an image that can be used, got none. Mend the images or choose another transform."
    )


def write_labels(folder: Path, document: object) -> Path:
    save(folder / "x.png", noise(4, 4, 3))
    (folder / "dataset.json").write_text(document if isinstance(document, str) else json.dumps(document))
    return folder


LABEL_HINT = 'Write {"labels": [["name.png", 0], ...]} with integer classes from 0.'
BAD_SOURCES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda p: p / "no", "source {} does not exist. Check the path."),
    "empty folder": (lambda p: p, "{} must hold images, got none. Check the path."),
    "unknown kind": (
        lambda p: save(p / "a.png", noise(4, 4, 3)),
        "source must be a folder, .zip, .npz, IDX images, or CIFAR-10's or ImageNet's .tar, got {}. "
        "Give the folder that it lies in.",
    ),
    "absolute name": (
        lambda p: make_zip(p / "s.zip", [("/etc/x.png", b"")]),
        "names in {} must be relative and without '..', got '/etc/x.png'. Make the zip again.",
    ),
    "climbing name": (
        lambda p: make_zip(p / "s.zip", [("a/../../x.png", b"")]),
        "names in {} must be relative and without '..', got 'a/../../x.png'. Make the zip again.",
    ),
    "backslash name": (
        lambda p: make_zip(p / "s.zip", [("..\\x.png", b"")]),
        "names in {} must be relative and without '..', got '..\\\\x.png'. Make the zip again.",
    ),
    "no zip": (
        lambda p: idx_file(p / "s.zip", noise(3)),
        "{} is not a readable zip (File is not a zip file). Copy or download it again.",
    ),
    "zip without images": (
        lambda p: make_zip(p / "s.zip", [("a.txt", b"")]),
        "{} must hold images, got none. Check the path.",
    ),
    "zip lacks label": (
        lambda p: make_zip(p / "s.zip", [*labelled(layout(2)[:1], 0), layout(2)[1]]),
        "dataset.json in {} must label every image, got none for 00000/img00000001.png. "
        'Add its label, or set "labels" to null in dataset.json to go without.',
    ),
    "negative label": (
        lambda p: make_zip(p / "s.zip", labelled(layout(1), -1)),
        "label of 00000/img00000000.png in dataset.json in {} must be an integer from 0 to 999999, got -1. Correct it.",
    ),
    "huge label": (
        lambda p: make_zip(p / "s.zip", labelled(layout(1), 10**6)),
        "label of 00000/img00000000.png in dataset.json in {} must be an integer from 0 to 999999, got 1000000. "
        "Correct it.",
    ),
    "vector label": (
        lambda p: make_zip(p / "s.zip", labelled(layout(1), [0.5, 0.5])),
        "label of 00000/img00000000.png in dataset.json in {} must be an integer from 0 to 999999, got [0.5, 0.5]. "
        "Correct it.",
    ),
    "labels no list": (
        lambda p: write_labels(p / "d", {"labels": "x"}),
        '{}/dataset.json must hold pairs of name and class, got "x". ' + LABEL_HINT,
    ),
    "labels no JSON": (
        lambda p: write_labels(p / "d", "labels"),
        "{}/dataset.json must be JSON, got Expecting value: line 1 column 1 (char 0). " + LABEL_HINT,
    ),
    "cifar no tar": (
        lambda p: idx_file(p / "c.tar.gz", noise(3)),
        "{} is not a readable tar archive (file could not be opened successfully). "
        "Download cifar-10-python.tar.gz again.",
    ),
    "cifar truncated": (
        lambda p: truncated(cifar_archive(p / "c.tar.gz", cifar_batch([0, 1], noise(6144).tobytes()))),
        "{} is not a readable tar archive (<cause>). Download cifar-10-python.tar.gz again.",
    ),
    "cifar label": (
        lambda p: cifar_archive(p / "c.tar.gz", cifar_batch([3, 10], noise(6144).tobytes())),
        "data_batch_1 in {} must hold 3072 bytes per label and labels 0 to 9, got 6144 bytes, 2 labels, highest 10. "
        "Download cifar-10-python.tar.gz again.",
    ),
    "cifar pickle": (
        lambda p: cifar_archive(p / "c.tar.gz", cifar_batch([3], noise(3072).tobytes())[:-1]),
        "data_batch_1 in {} is not a batch of CIFAR-10 (pickle exhausted before seeing STOP). "
        "Download cifar-10-python.tar.gz again.",
    ),
    "npz without arr_0": (
        lambda p: np.savez(p / "s.npz", mu=noise(3)) or p / "s.npz",
        "{} must hold images in arr_0, got none. "
        "Make it with arr_0 (images, uint8 NHWC) and, where there are classes, arr_1 (integers).",
    ),
    "npz of floats": (
        lambda p: np.savez(p / "s.npz", np.zeros((2, 4, 4, 3))) or p / "s.npz",
        "{} cannot be read (arr_0 must be uint8 in C order, got float64). "
        "Make it with arr_0 (images, uint8 NHWC) and, where there are classes, arr_1 (integers).",
    ),
    "npz shape": (
        lambda p: np.savez(p / "s.npz", noise(2, 3, 4, 4)) or p / "s.npz",
        "arr_0 in {} must be [N, H, W, 1 or 3], got [2, 3, 4, 4]. "
        "Make it with arr_0 (images, uint8 NHWC) and, where there are classes, arr_1 (integers).",
    ),
    "npz classes": (
        lambda p: np.savez(p / "s.npz", noise(2, 4, 4, 3), np.zeros(3, dtype=np.int64)) or p / "s.npz",
        "arr_1 in {} must be 2 integers, got int64 [3]. "
        "Make it with arr_0 (images, uint8 NHWC) and, where there are classes, arr_1 (integers).",
    ),
    "npz label": (
        lambda p: np.savez(p / "s.npz", noise(1, 4, 4, 3), np.array([-2])) or p / "s.npz",
        "label of image 0 of {} must be an integer from 0 to 999999, got -2. Correct it.",
    ),
}


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_bad_source_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    make, text = BAD_SOURCES[kind]
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    with pytest.raises(SidaError) as caught:
        prepare(source, tmp_path / "out.zip")
    expected = text.replace("{}", str(source)).replace("<cause>", str(caught.value.__cause__))
    assert str(caught.value) == expected
    assert "\n" not in expected
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_with_a_name_twice_is_refused(tmp_path: Path) -> None:
    make_zip(tmp_path / "s.zip", [*layout(1), *layout(1)])
    assert refusal(tmp_path / "s.zip", tmp_path / "out.zip") == (
        f"names in {tmp_path}/s.zip must be unique, got '00000/img00000000.png' twice. Make the zip again."
    )


def test_idx_refusals(tmp_path: Path) -> None:
    images = idx_file(tmp_path / "train-images-idx3-ubyte", noise(3, 32, 32))
    labels = tmp_path / "train-labels-idx1-ubyte"
    out = tmp_path / "out.zip"
    assert refusal(images, out) == f"labels of {images} must lie beside it, got no {labels.name}. Put them there."
    idx_file(labels, noise(2))
    assert refusal(images, out) == f"{labels} must hold 3 labels, got 2. Download both again."
    idx_file(labels, noise(3, 1))
    assert refusal(images, out) == f"{labels} must be an IDX file of bytes in 1 dimensions, got another. {AGAIN}"
    idx_file(labels, noise(3))
    images.write_bytes(images.read_bytes()[:-1])
    assert refusal(images, out) == f"{images} is damaged (it ends too early). {AGAIN}"
    assert not out.exists()


def test_cifar_pickle_is_never_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    cifar_archive(tmp_path / "c.tar.gz", pickle.dumps(Evil(), protocol=2))
    assert refusal(tmp_path / "c.tar.gz", tmp_path / "out.zip") == (
        f"data_batch_1 in {tmp_path}/c.tar.gz must hold 3072 bytes per label and labels 0 to 9, "
        "got 0 bytes, 0 labels, highest None. Download cifar-10-python.tar.gz again."
    )
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"preset": "imagenet"},
            "preset must be one of cifar10, imagenet64, ffhq64, afhqv2-64, imagenet512, fashion32, got 'imagenet'. "
            "Choose one of these.",
        ),
        (
            {"preset": "ffhq64", "resolution": (32, 32)},
            "preset ffhq64 fixes transform and resolution, got one of them too. Leave out one or the other.",
        ),
        (
            {"transform": "crop", "resolution": (8, 8)},
            "transform must be one of center-crop, center-crop-wide, center-crop-dhariwal, pad, got 'crop'. "
            "Choose one of these.",
        ),
        (
            {"transform": "center-crop"},
            "transform center-crop must have a resolution, got none. Pass --resolution, e.g. 64x64.",
        ),
        ({"resolution": (0, 8)}, "resolution must be >= 1x1, got 0x8. Pass e.g. 64x64."),
        ({"workers": 0}, "--workers must be >= 1, got 0. Pass --workers 1 or more, or leave it out."),
        (
            {"transform": "pad", "resolution": (4, 4)},
            "image 0 of tiny-digits must be at most 4x4 to be padded, got 8x8. Choose another transform or resolution.",
        ),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    assert refusal("tiny-digits", tmp_path / "out.zip", **options) == text
    assert list(tmp_path.iterdir()) == []


def test_unwritable_destination_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SidaError) as caught:
        prepare("tiny-digits", tmp_path / "no/out.zip")
    out = tmp_path / "no/out.zip"
    assert str(caught.value) == (
        f"cannot prepare {out} (No such file or directory: {out}.tmp). Mend that, then repeat."
    )
    assert caught.value.exit_code == 1


# Reading.


def test_dataset_reads_published_zip() -> None:
    stored = np.load(golden_metrics("datasets/cifar_expected.npz"))
    loader = json.loads(golden_metrics(EXPECTED).read_text())["loader"]["edm2_default"]
    dataset = Dataset(golden_metrics("datasets/edm_cifar.zip"))
    assert [dataset.num_channels, dataset.resolution, dataset.resolution] == loader["image_shape"]
    assert (dataset.num_images, [dataset.label_dim]) == (loader["len"], loader["label_shape"])
    order = DataOrder(60, seed=1).indices(17, 100)
    np.testing.assert_array_equal(dataset.images(order).permute(0, 2, 3, 1).numpy(), stored["images_nhwc"][order])
    one_hot = dataset.one_hot(torch.from_numpy(order))
    assert one_hot.dtype == torch.float32
    np.testing.assert_array_equal(one_hot.numpy(), np.eye(10)[stored["labels"][order]])
    assert dataset.class_counts() == np.bincount(stored["labels"]).tolist()


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_dataset_is_the_same_with_and_without_memory(cache_bytes: int, method: int, tmp_path: Path) -> None:
    make_zip(tmp_path / "d.zip", layout(5), method)
    dataset = Dataset(tmp_path / "d.zip", cache_bytes=cache_bytes)
    for indices in ([4, 0, 4], torch.tensor([1, 1]), np.array([], dtype=np.int64)):
        images = dataset.images(indices)
        assert images.dtype == torch.uint8
        assert images.shape == (len(indices), 3, 4, 4)
        for image, index in zip(images, indices, strict=True):
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), noise(4, 4, 3, seed=int(index)))
    images[:] = 0
    dataset.images([1])[:] = 0
    assert dataset.images([1]).any(), "a caller that writes to its batch must not reach the dataset's memory"
    with pytest.raises(IndexError, match=r"dataset positions must be in 0\.\.4"):
        dataset.images([5])
    with pytest.raises(IndexError):
        dataset.images([-1])


def test_dataset_without_labels_has_empty_vectors(tmp_path: Path) -> None:
    dataset = Dataset(make_zip(tmp_path / "d.zip", layout(2)))
    assert (dataset.labels, dataset.label_dim, dataset.class_counts()) == (None, 0, [])
    assert dataset.one_hot([0, 1, 1]).shape == (3, 0)


def test_dataset_works_in_other_processes(tmp_path: Path) -> None:
    dataset = Dataset(make_zip(tmp_path / "d.zip", labelled(layout(6), 0, 1, 2, 0, 1, 2)))
    expected = dataset.images(range(6))
    assert len(pickle.dumps(dataset)) < 5000, "what is in memory must not travel"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        read = pool.submit(read_bytes, dataset, [5, 0]).result()
    assert read == expected[[5, 0]].numpy().tobytes() + dataset.one_hot([5, 0]).numpy().tobytes()


def read_bytes(dataset: Dataset, indices: list[int]) -> bytes:
    return dataset.images(indices).numpy().tobytes() + dataset.one_hot(indices).numpy().tobytes()


def test_forked_processes_read_through_one_map(tmp_path: Path) -> None:
    make_zip(tmp_path / "d.zip", layout(64))
    script = (
        "import os, sys, pathlib; from sidactl.data.dataset import Dataset\n"
        "d = Dataset(pathlib.Path(sys.argv[1]), cache_bytes=0); alone = d.images(range(64))\n"
        "children = [os.fork() for _ in range(1)]\n"
        "good = all(bool((d.images(range(64)) == alone).all()) for _ in range(20))\n"
        "if children[0] == 0: os._exit(0 if good else 1)\n"
        "sys.exit(not good or os.waitpid(children[0], 0)[1])"
    )
    assert subprocess.run([sys.executable, "-c", script, tmp_path / "d.zip"], check=False).returncode == 0


def load(path: Path) -> str:
    with pytest.raises(SidaError) as caught:
        Dataset(path).images([0, 1])
    return str(caught.value)


def test_damaged_names_are_told_in_letters_that_are_seen(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "d.zip", [*layout(2), ("dataset.json", b'{"labels": []}')])
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"dataset.json")] + data[data.rindex(b"dataset.json") :].replace(b"s", b"\x7f"))
    assert load(path) == f"data\\x7fet.j\\x7fon in {path} is damaged. Copy or download the zip again."


def test_dataset_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "d.zip"
    assert load(path) == f"dataset {path} does not exist. Check the path."
    make_zip(path, layout(2))
    data = bytearray(path.read_bytes())
    data[data.index(encode_png(noise(4, 4, 3, seed=1))) + 60] ^= 1
    path.write_bytes(data)
    assert load(path) == f"00000/img00000001.png in {path} is damaged. Copy or download the zip again."
    path.write_bytes(data[:100])
    assert load(path) == f"{path} is not a readable zip (File is not a zip file). Copy or download it again."
    make_zip(path, [*layout(1), ("00000/img00000001.png", encode_png(noise(8, 8, 3)))])
    assert load(path) == (
        f"images in {path} must all be [3, 4, 4], got [3, 8, 8] for 00000/img00000001.png. "
        "Convert it with prepare-data."
    )
    make_zip(path, [("00000/img00000000.png", encode_png(noise(4, 8, 3)))])
    oblong = Dataset(path)
    assert (oblong.num_channels, oblong.resolution, oblong.width) == (3, 4, 8)
    make_zip(path, [("readme.txt", b"")])
    assert load(path) == f"{path} must hold images, got none. Make a dataset with prepare-data."
    rgba = io.BytesIO()
    Image.fromarray(noise(4, 4, 4)).save(rgba, "PNG")
    make_zip(path, [("a.png", rgba.getvalue())])
    assert load(path) == f"a.png in {path} must be 8-bit grey or RGB, got mode RGBA. Convert it with prepare-data."
    make_zip(path, labelled(layout(2), 0, True))
    assert load(path) == (
        f"label of 00000/img00000001.png in dataset.json in {path} must be an integer from 0 to 999999, got True. "
        "Correct it."
    )
    latent = io.BytesIO()
    np.save(latent, np.full((8, 4, 4), np.nan, dtype=np.float32))
    make_zip(path, [("00000/img-mean-std-00000000.npy", latent.getvalue())])
    assert load(path) == (
        f"00000/img-mean-std-00000000.npy in {path} must hold finite float32 latents [8, h, w], got float32 [8, 4, 4]. "
        "Encode the dataset again."
    )


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ('{"labels": [["a.png", 3], ["b.png", 0]]}', ([3, 0], None, 4)),
        (' {"labels":[["a.png",3],["b.png",0]], "other": 1}', ([3, 0], None, 4)),
        ('{"labels": [["a.png", 1], ["b.png", 0]], "class_names": ["x", "y", "z"]}', ([1, 0], ["x", "y", "z"], 3)),
        ('{"labels": [["b.png", 0], ["a.png", 3]]}', ([3, 0], None, 4)),
        ('{"labels": [["\\u0061.png", 3], ["b.png", 0]]}', ([3, 0], None, 4)),
        ('{"labels": [["a.png", 1], ["b.png", 0]], "labels": null}', 'D must be JSON, got the key "labels" twice'),
        ('{"labels": [["a.png", 1], ["b.png", 0]], "class_names": ["x"]}',
         "class_names in D must be a list with a name for each class"),
        ('{"labels": [["a.png", 1], ["b.png", 0]], }',
         "D must be JSON, got Expecting property name enclosed in double quotes: line 1 column 42 (char 41)"),
        ('{"labels": [["a.png", 1], ["b.png", 0]',
         "D must be JSON, got Expecting ',' delimiter: line 1 column 39 (char 38)"),
        ('{"labels": [["a.png", 1]]}', "D must label every image, got none for b.png"),
        ('{"labels": [["a.png", 1], ["b.png", 01]]}',
         "D must be JSON, got Expecting ',' delimiter: line 1 column 38 (char 37)"),
        ('{"labels": [["a.png", 1], ["b.png", 0], ["c.png", 0]]}',
         "D names 1 images that are not there, the first c.png"),
        ('{"labels": [["a.png", 1], ["b.png", 0], ["a.png", 2]]}',
         "D must give each image one class, got 1 and 2 for a.png"),
        ('{"labels": [["a.png", 1], ["b.png", 1000000]]}',
         "label of b.png in D must be an integer from 0 to 999999, got 1000000"),
    ],
)  # fmt: skip
def test_labels_in_any_spelling(text: str, outcome: Any, tmp_path: Path) -> None:
    images = [(name, encode_png(noise(4, 4, 3))) for name in ("a.png", "b.png")]
    path = make_zip(tmp_path / "d.zip", [*images, ("dataset.json", text.encode())])
    if isinstance(outcome, str):
        assert load(path).startswith(outcome.replace("D", f"dataset.json in {path}", 1) + ". ")
        return
    dataset = Dataset(path)
    assert dataset.labels is not None
    assert (dataset.labels.tolist(), dataset.class_names, dataset.label_dim) == outcome


def test_latents_with_pickled_objects_are_refused_unopened(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, np.array([{}], dtype=object))
    make_zip(tmp_path / "d.zip", [("00000/img-mean-std-00000000.npy", array.getvalue())])
    assert load(tmp_path / "d.zip").startswith(
        f"00000/img-mean-std-00000000.npy in {tmp_path}/d.zip must be an .npy array, got Object arrays cannot be loaded"
    )


def test_archive_refuses_a_member_larger_than_it_says(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "d.zip", [("a", b"x" * 1000)], zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", 1000), struct.pack("<I", 10)))
    with pytest.raises(SidaError, match=r"^a in .* is damaged"):
        ZipArchive(path).read("a")


def test_contact_sheet_shows_images_spread_over_the_dataset(tmp_path: Path) -> None:
    members = [(f"00000/img{i:08d}.png", encode_png(np.full((32, 32), 10 * i, np.uint8))) for i in range(8)]
    dataset = Dataset(make_zip(tmp_path / "d.zip", members))
    sheet = np.array(Image.open(io.BytesIO(contact_sheet(dataset, columns=2, rows=2))))
    assert set(np.unique(sheet)) == {0, 20, 40, 60, 255}


# The order of training.


@pytest.mark.parametrize("num_items", [1, 7, 64])
def test_order_visits_every_item_once_per_epoch(num_items: int) -> None:
    order = DataOrder(num_items, seed=3)
    for epoch in range(3):
        assert sorted(order.indices(epoch * num_items, num_items)) == list(range(num_items))


def test_order_depends_on_position_alone() -> None:
    whole = DataOrder(50, seed=9).indices(0, 400)
    for batch in (1, 7, 50, 130):
        order = DataOrder(50, seed=9)
        parts = [order.indices(start, min(batch, 400 - start)) for start in range(0, 400, batch)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    order = DataOrder(50, seed=9)
    for start in (390, 3, 250, 0, 390):
        np.testing.assert_array_equal(order.indices(start, 10), whole[start : start + 10])
    assert order.indices(5, 0).shape == (0,)


def test_order_is_fixed_for_ever_and_differs_by_seed_and_epoch() -> None:
    order = DataOrder(10, seed=5)
    assert order.indices(0, 10).tolist() == [3, 2, 4, 9, 6, 7, 0, 8, 5, 1]
    assert order.indices(10, 10).tolist() == [1, 9, 0, 6, 8, 7, 4, 3, 2, 5]
    assert DataOrder(10, seed=6).indices(0, 10).tolist() != [3, 2, 4, 9, 6, 7, 0, 8, 5, 1]


def test_order_is_uniform() -> None:
    order = DataOrder(4, seed=0)
    counts = np.zeros((4, 4))
    for epoch in range(2000):
        counts[np.arange(4), order.indices(4 * epoch, 4)] += 1
    assert np.abs(counts / 2000 - 0.25).max() < 0.04  # four standard deviations


def test_a_subset_is_drawn_as_the_published_tools_draw_it() -> None:
    loader = json.loads(golden_metrics(EXPECTED).read_text())["loader"]
    for size in (10, 25, 1000):
        for seed in (0, 1, 12345):
            expected = loader[f"edm_max{size}_seed{seed}"]
            assert drawn_subset(60, size, seed).tolist() == expected
            assert drawn_subset(60, size, seed + (1 << 31)).tolist() == expected
