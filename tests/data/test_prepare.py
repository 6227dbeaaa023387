"""Every source, transform and refusal of prepare-data, held against the published tool."""

import hashlib
import io
import json
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sidactl.data.dataset import Dataset, tiny_digits_arrays
from sidactl.data.images import encode_png
from sidactl.data.prepare import PRESETS, prepare
from sidactl.errors import SidaError
from tests.golden import golden_metrics
from tests.worlds import (
    EXPECTED,
    cifar_archive,
    cifar_batch,
    idx_file,
    labelled,
    layout,
    make_zip,
    noise,
    refusal,
    save,
)

DECODED = "datasets/decoded.npz"


INPUTS = "datasets/inputs.zip"


CIFAR = "datasets/cifar-10-python.tar.gz"


WRITTEN = [
    *(f"{tool}_{case}" for tool in ("edm", "edm2") for case in
      ("plain_dirs", "flat", "with_json", "json_null", "max_images3", "scale16", "scale_up32", "crop16", "crop32_up",
       "wide32x18", "wide_gap", "gray", "gray_scale8", "gray_crop16", "palette", "zip_nolabels", "zip_labels")),
    "edm2_dhariwal16", "edm2_dhariwal32", "edm2_rgba", "edm2_mixed_gray_rgb", "edm_cifar", "edm_cifar_max7",
]  # fmt: skip


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
