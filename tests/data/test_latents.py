"""Latents: as the published tool lays them out, in batches that go on after an interruption."""

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sidactl.data import prepare as data_prepare
from sidactl.data.archive_writer import ZipWriter
from sidactl.data.codec import LatentCodec
from sidactl.data.dataset import Dataset
from sidactl.data.prepare import contact_sheet, latent_encoder, prepare
from sidactl.data.unfinished import PreparedDataset
from sidactl.errors import SidaError
from tests.golden import golden_metrics
from tests.playback import SmallVae
from tests.worlds import Stop, load, make_zip, mixed_folder, noise, refusal, save, stopping_at


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


def test_latents_with_pickled_objects_are_refused_unopened(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, np.array([{}], dtype=object))
    make_zip(tmp_path / "d.zip", [("00000/img-mean-std-00000000.npy", array.getvalue())])
    assert load(tmp_path / "d.zip").startswith(
        f"00000/img-mean-std-00000000.npy in {tmp_path}/d.zip must be an .npy array, got Object arrays cannot be loaded"
    )
