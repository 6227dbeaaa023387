"""Folders, zips and archives become datasets: found, downloaded, gone on with, or refused in one line."""

import dataclasses
import io
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sidactl
from sidactl import catalog, prepare_data
from sidactl.commands import reference
from sidactl.commands.resolve import load_dataset, resolve
from sidactl.data.order import DataOrder
from sidactl.errors import SidaError
from sidactl.store import KINDS, Artifact, LiveDir, Store
from sidactl.training.state import Event
from tests.commands.conftest import CIFAR_FILE, flat, picture, refused_data
from tests.web import Site
from tests.worlds import Stop, cifar_archive, cifar_batch, stopping_at


def pictures(folder: Path) -> None:
    for index in range(3):
        (folder / str(index % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / str(index % 2) / f"{index}.png")


def test_folder_and_zip_in_place_of_a_dataset_are_prepared(run: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "images")
    store = Store(run)
    prepared = resolve(store, "images", ["dataset"])
    assert prepared.results["num_images"] == 3
    zipped = store.path(prepared, "images.zip")
    (tmp_path / "copy.zip").write_bytes(zipped.read_bytes())
    assert resolve(store, "copy.zip", KINDS).files["images.zip"] == prepared.files["images.zip"]


def refused_as_ambiguous(run: Path, text: str, kinds: Sequence[str]) -> str:
    with pytest.raises(SidaError) as caught:
        resolve(Store(run), text, kinds)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_word_that_names_a_folder_and_an_artifact_is_refused_with_both_ways_to_say_it(
    run: Path, tmp_path: Path
) -> None:
    pictures(tmp_path / "images")
    (tmp_path / "images.zip").write_bytes(b"")
    store, digits = Store(run), prepare_data("tiny-digits", run=run)
    store.set_ref("dataset", "images", digits.oid)
    store.set_ref("dataset", "images.zip", digits.oid)
    assert refused_as_ambiguous(run, "images", ["dataset"]) == (
        "'images' is the name of a folder and of dataset/images. Write ./images for the folder, or dataset/images."
    )
    assert refused_as_ambiguous(run, "images.zip", KINDS) == (
        "'images.zip' is the name of a file and of dataset/images.zip. "
        "Write ./images.zip for the file, or dataset/images.zip."
    )
    assert resolve(store, "dataset/images", ["dataset"]) == digits
    assert resolve(store, "./images", ["dataset"]).results["num_images"] == 3
    assert resolve(store, str(tmp_path / "images"), ["dataset"]).results["num_images"] == 3
    with pytest.raises(SidaError, match=r"^'images' is the name of a folder and of dataset/images"):
        reference.find(store, "images", digits, "images")
    with pytest.raises(SidaError, match=r"^'images' is the name of a folder and of dataset/images"):
        prepare_data("images", latents=True, run=run)
    # A ref of a kind that is not asked for hides nothing.
    store.delete_ref("dataset", "images")
    store.set_ref("stats", "images", store.put("stats", {}).oid)
    assert resolve(store, "images", ["dataset"]).results["num_images"] == 3


def test_a_folder_called_as_an_entry_of_the_catalog_is_refused_where_it_could_be_meant(
    run: Path, tmp_path: Path
) -> None:
    for name in ("tiny-digits", "cifar10"):
        pictures(tmp_path / name)
    store = Store(run)
    kinds = ("teacher", "generator", "samples", "dataset")
    told = "Write ./tiny-digits for the folder, or teacher/tiny-digits or dataset/tiny-digits."
    assert refused_as_ambiguous(run, "tiny-digits", kinds) == (
        f"'tiny-digits' is the name of a folder and of teacher/tiny-digits and dataset/tiny-digits. {told}"
    )
    with pytest.raises(SidaError, match=r"Write \./tiny-digits for the folder, or dataset/tiny-digits"):
        prepare_data("tiny-digits", run=run)
    assert resolve(store, "tiny-digits", ["teacher"]).kind == "teacher"  # no folder can be a teacher
    assert resolve(store, "dataset/tiny-digits", kinds).results["num_images"] == 1797
    assert prepare_data("dataset/tiny-digits", run=run).results["num_images"] == 1797
    assert prepare_data("./tiny-digits", run=run).results["num_images"] == 3
    with pytest.raises(SidaError, match=r"Write \./cifar10 for the folder, or dataset/cifar10"):
        prepare_data("cifar10", run=run)
    own = store.put("generator", {}, params={"net": {}, "dataset": "tiny-digits"})
    assert reference.dataset_of(store, own).results["num_images"] == 1797
    with pytest.raises(SidaError) as caught:
        reference.find(store, "cifar10", own, "moments")
    assert str(caught.value) == (
        "'cifar10' is the name of a folder and of dataset/cifar10 and stats/cifar10. "
        "Write ./cifar10 for the folder, or dataset/cifar10 or stats/cifar10."
    )


def test_a_folder_whose_name_reads_as_an_oid_is_refused_only_where_there_is_such_an_artifact(
    run: Path, tmp_path: Path
) -> None:
    store, digits = Store(run), prepare_data("tiny-digits", run=run)
    free = "0000" if not digits.oid.startswith("0000") else "1111"
    for name in (digits.oid[:6], free):
        pictures(tmp_path / name)
    assert resolve(store, free, ["dataset"]).results["num_images"] == 3
    assert refused_as_ambiguous(run, digits.oid[:6], ["dataset"]) == (
        f"'{digits.oid[:6]}' is the name of a folder and of {digits.oid[:12]}. "
        f"Write ./{digits.oid[:6]} for the folder, or {digits.oid[:12]}."
    )
    assert resolve(store, digits.oid[:12], ["dataset"]) == digits


def test_dataset_of_the_catalog_tells_where_to_get_it_until_it_is_prepared(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SidaError) as caught:
        resolve(Store(run), "ffhq64", ["dataset"])
    assert str(caught.value) == (
        "dataset ffhq64 must be prepared from its files. Get them from https://github.com/NVlabs/ffhq-dataset, "
        "then run sidactl prepare-data PATH --preset ffhq64 --name ffhq64."
    )
    pictures(tmp_path / "images")
    made = prepare_data("images", preset="ffhq64", name="ffhq64", run=run)
    assert made.params["licence"] == catalog.DATASETS["ffhq64"].licence
    assert resolve(Store(run), "ffhq64", ["dataset"]) == made


def test_cifar10_is_downloaded_and_prepared_as_its_archive_would_be(
    site: Site, cifar: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = prepare_data("cifar10", run=run)
    size = f"{cifar.stat().st_size / 1e6:,.1f} MB"
    assert capsys.readouterr().err.splitlines()[0] == (
        f"downloading cifar10: {size} from {site.url}/{CIFAR_FILE}, licence: {catalog.DATASETS['cifar10'].licence}"
    )
    assert (made.results["num_images"], made.results["label_dim"]) == (15, 10)
    local = prepare_data(str(cifar), preset="cifar10", name="cifar10", run=run.parent / "other")
    assert made == local
    assert Store(run).refs() == {"dataset/cifar10": made.oid}
    assert not [*run.glob("live/*"), *run.glob("tmp/*")]
    assert prepare_data("cifar10", run=run, offline=True) == made
    assert prepare_data("dataset/cifar10", preset="cifar10", run=run, offline=True) == made
    assert prepare_data(str(cifar), preset="cifar10", name="cifar10", run=run, offline=True) == made
    assert prepare_data("cifar10", run=run.parent / "other", offline=True) == made
    assert len(site.requests) == 1
    assert prepare_data("cifar10", run=run, force=True) == made
    assert len(site.requests) == 2


def test_cifar10_with_options_of_its_own_is_not_called_cifar10(cifar: Path, run: Path) -> None:
    few = prepare_data("cifar10", max_images=4, run=run)
    assert (few.results["num_images"], few.params["preset"], few.params["name"]) == (4, "cifar10", CIFAR_FILE)
    assert few == prepare_data(str(cifar), preset="cifar10", max_images=4, run=run.parent / "other")
    small = prepare_data("cifar10", resolution="16x16", name="small", run=run)
    assert (small.results["resolution"], small.params["preset"]) == (16, None)
    assert Store(run).refs() == {"dataset/small": small.oid}


@pytest.mark.usefixtures("cifar")
def test_a_download_of_a_dataset_goes_on_and_an_interrupted_preparation_keeps_it(site: Site, run: Path) -> None:
    whole = len(site.files[f"/{CIFAR_FILE}"])
    site.cuts.append(whole // 2)
    with pytest.raises(SidaError, match=r"^cifar10 ended after .* Repeat the same command to go on\.$"):
        prepare_data("cifar10", run=run)
    with pytest.raises(Stop):
        prepare_data("cifar10", run=run, tick=stopping_at(7, []))
    assert [request[1] for request in site.requests] == ["", f"bytes={whole // 2}-"]
    seen: list[int] = []
    prepare_data("cifar10", run=run, offline=True, tick=stopping_at(0, seen), mirror=str(run))
    assert (seen[0], seen[-1], len(site.requests)) == (8, 15, 2)
    assert not [*run.glob("live/*"), *run.glob("tmp/*")]


@pytest.mark.usefixtures("cifar")
def test_a_dataset_that_is_downloaded_keeps_to_digest_offline_and_mirror(
    site: Site, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for offline in ({"offline": True}, {}):
        with pytest.raises(SidaError) as caught:
            prepare_data("cifar10", run=run, **offline)
        assert str(caught.value) == (
            f"cifar10 must be downloaded from {site.url}/{CIFAR_FILE}, which offline forbids. "
            "Allow it, or set SIDACTL_MIRROR to a folder that holds the file."
        )
        monkeypatch.setenv("SIDACTL_OFFLINE", "1")
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / CIFAR_FILE).write_bytes(bytes(len(site.files[f"/{CIFAR_FILE}"])))
    with pytest.raises(SidaError, match=r"^cifar10 must have SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}\. The file was re"):
        prepare_data("cifar10", mirror=str(tmp_path / "mirror"), run=run)
    (tmp_path / "mirror" / CIFAR_FILE).write_bytes(site.files[f"/{CIFAR_FILE}"])
    monkeypatch.setenv("SIDACTL_MIRROR", str(tmp_path / "mirror"))
    assert resolve(Store(run), "cifar10", ["dataset"]).results["num_images"] == 15
    assert site.requests == []


def test_another_archive_of_the_same_name_is_told_and_taken(
    cifar: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_data(str(cifar), run=run)
    assert "warning" not in capsys.readouterr().err
    cifar_archive(cifar, cifar_batch([5], bytes(3072)))
    assert prepare_data(str(cifar), run=run).results["num_images"] == 5
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {cifar} is not the {CIFAR_FILE} that was published, by its SHA-256; "
        "sidactl prepare-data cifar10 downloads that one"
    ]


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("cifar10", "50,000"),
        ("imagenet64", "1,281,167"),
        ("imagenet512", "1,281,167"),
        ("ffhq64", "70,000"),
        ("afhqv2-64", "15,803"),
        ("fashion32", "60,000"),
    ],
)
def test_a_preset_that_gives_another_number_of_images_than_published_is_told(
    preset: str, published: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.new("RGB", (520, 520) if preset == "imagenet512" else (28, 28)).save(tmp_path / f"images/{index}.png")
    told = f"warning: {preset} has {published} images, this source gave 3"
    for option in ({"preset": preset}, {"preset": preset}, {"preset": preset, "force": True}):
        prepare_data("images", run=run, **option)
        assert capsys.readouterr().err.splitlines()[-1] == told
    for options in ({"preset": preset, "max_images": 2}, {"resolution": "32x32"}):
        prepare_data("images", run=run, **options)
        assert "warning" not in capsys.readouterr().err


def test_a_preset_that_gives_the_published_number_of_images_is_not_told_of(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = dataclasses.replace(catalog.DATASETS["ffhq64"], num_images=3)
    monkeypatch.setitem(catalog.DATASETS, "ffhq64", entry)
    pictures(tmp_path / "images")
    prepare_data("images", preset="ffhq64", run=run)
    assert "warning" not in capsys.readouterr().err


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


def zipped(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return path


SKIP = "Mend or remove it, or go on without: prepare-data --skip-bad."


def test_bad_sources_are_refused_by_the_command_in_one_line(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    png = cut(picture(folder / "a.png", size=(64, 64)))
    assert refused_data(run, folder) == f"{png} cannot be read as an image (the PNG ends too early). {SKIP}"
    png.unlink()
    jpeg = cut(picture(folder / "a.JPEG", size=(64, 64)))
    text = refused_data(run, folder)
    assert text.startswith(f"{jpeg} cannot be read as an image (image file is truncated")
    assert text.endswith(f"). {SKIP}")
    jpeg.unlink()
    assert refused_data(run, folder) == f"{folder} must hold images, got none. Check the path."
    picture(folder / "a.png", "I;16")
    assert refused_data(run, folder) == (
        f"{folder}/a.png must have 8 bits per channel, got Pillow's mode I;16. "
        "Convert it, or go on without: prepare-data --skip-bad."
    )
    picture(folder / "a.png")
    picture(folder / "b.png", size=(16, 16))
    assert refused_data(run, folder) == (
        f"images must all have one size, got 8x8 for {folder}/a.png and 16x16 for {folder}/b.png. "
        "Pass --resolution to prepare-data, e.g. 32x32, and a --transform if the aspect ratio shall be kept."
    )
    (folder / "dataset.json").write_text('{"labels": [["a.png", 0]]}')
    assert refused_data(run, folder, resolution=(8, 8)) == (
        f"{folder}/dataset.json must label every image, got none for b.png. "
        'Add its label, or set "labels" to null in dataset.json to go without.'
    )
    (folder / "dataset.json").write_text('{"labels": [["a.png", 0], ["b.png", 1000000]]}')
    assert refused_data(run, folder, resolution=(8, 8)) == (
        f"label of b.png in {folder}/dataset.json must be an integer from 0 to 999999, got 1000000. Correct it."
    )


def test_bad_archives_are_refused_by_the_command_in_one_line(run: Path, tmp_path: Path) -> None:
    names = {"/etc/x.png": "relative and without '..'", "a/../../x.png": "relative and without '..'"}
    for name, rule in names.items():
        path = zipped(tmp_path / "s.zip", name)
        assert refused_data(run, path) == f"names in {path} must be {rule}, got {name!r}. Make the zip again."
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = zipped(tmp_path / "s.zip", "a.png", "a.png")
    assert refused_data(run, path) == f"names in {path} must be unique, got 'a.png' twice. Make the zip again."
    (tmp_path / "c.tar.gz").write_bytes(b"not a tar")
    assert refused_data(run, tmp_path / "c.tar.gz", preset="cifar10") == (
        f"{tmp_path}/c.tar.gz is not a readable tar archive (file could not be opened successfully). "
        "Download cifar-10-python.tar.gz again."
    )


def test_decompression_bomb_is_refused_by_the_command(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    path = picture(run.parent / "in/a.png")
    assert refused_data(run, "in") == f"in/a.png must have at most 50 pixels, got more. {SKIP}"
    assert path.exists()


def test_any_number_of_workers_gives_the_same_artifact(run: Path, tmp_path: Path) -> None:
    for index in range(20):
        picture(tmp_path / f"in/{index % 2}/{index}.png")
    oids = {prepare_data("in", run=run / str(workers), workers=workers).oid for workers in (1, 2, 5)}
    assert len(oids) == 1


@pytest.mark.parametrize("force", [False, True])
def test_interrupted_preparation_goes_on_to_the_same_artifact(run: Path, force: bool) -> None:
    whole = prepare_data("tiny-digits", run=run if force else run.parent / "other")
    seen: list[int] = []
    for image in (700, 1000):
        with pytest.raises(Stop):
            prepare_data("tiny-digits", run=run, force=force, tick=stopping_at(image, seen))
        assert len(list(run.glob("live/*/state.json"))) == 1
    assert prepare_data("tiny-digits", run=run, force=force, tick=stopping_at(0, seen)) == whole
    assert seen == list(range(1, 1798))
    assert not [*run.glob("live/*"), *run.glob("tmp/*")]


@pytest.mark.parametrize("name", ["put", "answer"])
def test_preparation_that_could_not_be_stored_is_stored_without_doing_it_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise SidaError("no space left")

    seen: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Store, name, fail)
        with pytest.raises(SidaError, match="no space left"):
            prepare_data("tiny-digits", run=run, tick=stopping_at(0, seen))
    done = prepare_data("tiny-digits", run=run, tick=stopping_at(0, seen))
    assert seen == list(range(1, 1798))
    assert done == prepare_data("tiny-digits", run=run.parent / "other")
    assert not [*run.glob("live/*"), *run.glob("tmp/*")]


def test_after_a_kill_before_clearing_up_the_next_preparation_is_answered_and_clears_up(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(LiveDir, "clear", lambda live: stopping_at(0, [])(0, 0))
        with pytest.raises(Stop):
            prepare_data("tiny-digits", run=run)
    assert len(list(run.glob("live/*/images.zip"))) == 1
    seen: list[int] = []
    prepare_data("tiny-digits", run=run, tick=stopping_at(0, seen))
    assert seen == []
    assert not list(run.glob("live/*"))


def test_two_at_once_prepare_once(run: Path) -> None:
    seen: list[int] = []
    done: list[Artifact] = []
    threads = [
        threading.Thread(target=lambda: done.append(prepare_data("tiny-digits", run=run, tick=stopping_at(0, seen))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done[0] == done[1]
    assert seen == list(range(1, 1798))


def test_a_name_that_another_artifact_had_is_told(run: Path, tmp_path: Path) -> None:
    flat(tmp_path / "one/a.bmp", 10)
    flat(tmp_path / "two/a.bmp", 20)
    said = list[str]()
    first = prepare_data("one", run=run, name="mine", say=said.append)
    assert said == []
    second = prepare_data("two", run=run, name="mine", say=said.append)
    assert said == [f"dataset/mine named {first.oid[:12]} before, and names {second.oid[:12]} now"]
    prepare_data("two", run=run, name="mine", say=said.append)
    prepare_data("one", run=run, name="mine", say=said.append)
    assert [line.partition(" ")[0] for line in said[1:]] == ["answered", "answered", "dataset/mine"]


def test_network_in_place_of_a_dataset_is_refused(run: Path) -> None:
    with pytest.raises(SidaError) as caught:
        resolve(Store(run), "net.pkl", ["dataset"])
    assert str(caught.value) == "net.pkl cannot be read as a dataset. Give an artifact or another file."


def prepared_apart(source: Path, run: Path, *options: str) -> tuple[Artifact, float]:
    """The dataset that a process of its own made of the source, and the most memory it held, in GB."""
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'sidactl', 'prepare-data', *sys.argv[1:]], check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6)\n"
    )
    command = [sys.executable, "-c", code, str(source), "--run", str(run), *options]
    oid, peak = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return Store(run).get(oid), float(peak)


def npz_of(count: int, path: Path) -> Path:
    """A batch of `count` labelled images of 64x64 pixels, written as a stream."""
    block = np.random.default_rng(0).integers(0, 256, (1000, 64, 64, 3), dtype=np.uint8)
    block[:, 8:] = 0
    classes = io.BytesIO()
    np.save(classes, np.arange(count) % 1000)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, 64, 64, 3)}
            np.lib.format.write_array_header_1_0(member, header)
            for _ in range(count // 1000):
                member.write(block.tobytes())
        archive.writestr("arr_1.npy", classes.getvalue())
    return path


@pytest.mark.slow
def test_memory_does_not_grow_with_the_source(run: Path, tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 8e9:
        pytest.skip("8 GB of free disk are needed")
    made, peak = prepared_apart(npz_of(200_000, tmp_path / "s.npz"), run)
    assert made.results["num_images"] == 200_000
    assert made.results["class_counts"] == [200] * 1000
    assert made.files["images.zip"].size_bytes > 2.4e9
    assert peak < 1.5
    (tmp_path / "s.zip").symlink_to(Store(run).path(made, "images.zip"))
    smaller, peak_of_zip = prepared_apart(tmp_path / "s.zip", run, "--resolution", "16x16")
    assert smaller.results["class_counts"] == made.results["class_counts"]
    assert peak_of_zip < 1.5
    print(f"peak memory: {peak:.2f} GB from npz, {peak_of_zip:.2f} GB from zip")


FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.slow
def test_a_small_teacher_learns_from_real_fashion_mnist(run: Path) -> None:
    if not (FASHION / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("Fashion-MNIST is not there: apt-get install dataset-fashion-mnist")
    start_sec = time.monotonic()
    made, _ = prepared_apart(FASHION, run, "--preset", "fashion32", "--name", "fashion32")
    prepared_sec = time.monotonic() - start_sec
    assert (made.results["num_images"], made.results["class_counts"]) == (60_000, [6000] * 10)
    losses: list[float] = []

    def watch(event: Event) -> None:
        if event.kind == "progress":
            losses.append(event.values["denoising_loss"])

    size = {"model_channels": 4, "num_blocks": 1, "channel_mult": (1, 2), "attn_resolutions": (), "dropout": 0.0}
    rates = {"batch_size": 16, "duration_nimg": 4800, "lr": 3e-3, "lr_rampup_nimg": 500}
    start_sec = time.monotonic()
    sidactl.train_teacher("fashion32", name="small", run=run, device="cpu", watch=watch, **size, **rates)
    trained_sec = time.monotonic() - start_sec
    first, last = np.mean(losses[:3]), np.mean(losses[-3:])
    assert last < 0.6 * first

    dataset = load_dataset(Store(run), made)
    order = DataOrder(dataset.num_images, seed=0)
    rates_read = []
    for memory in ("from the zip", "from memory"):
        start_sec = time.monotonic()
        for position in range(0, 60_000, 250):
            dataset.images(order.indices(position, 250))
        rates_read.append(60_000 / (time.monotonic() - start_sec))
        print(f"read {memory}, shuffled: {rates_read[-1]:,.0f} images/s")
    trained = f"trained on {4800 / trained_sec:.0f} images/s, loss {first:.3f} -> {last:.3f}"
    print(f"prepared in {prepared_sec:.1f} s; {trained}")
