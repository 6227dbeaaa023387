"""Datasets are read image by image, in any process, in little memory."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sidactl.data.dataset import Dataset
from sidactl.data.images import encode_png
from sidactl.data.order import DataOrder
from tests.golden import golden_metrics
from tests.standins import sparse_latents
from tests.worlds import EXPECTED, labelled, layout, load, make_zip, noise


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
