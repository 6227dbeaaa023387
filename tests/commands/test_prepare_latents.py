"""Latents of images: the same however they are asked for, by a VAE that is known by its content."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sidactl
from sidactl import catalog, fetch_teacher, prepare_data
from sidactl.commands import dataset_stats, plan, reference
from sidactl.commands import vae as commands_vae
from sidactl.commands.resolve import image_source, load_dataset
from sidactl.commands.words import shape_for_nets
from sidactl.data.codec import LatentCodec
from sidactl.errors import SidaError
from sidactl.recipes import NetSpec
from sidactl.store import Store
from tests import processes
from tests.commands.conftest import picture, refused_data
from tests.playback import SmallVae, save_vae
from tests.web import Site
from tests.worlds import Stop, stopping_at


@pytest.mark.usefixtures("vae", "cifar")
def test_latents_of_a_dataset_that_is_downloaded(site: Site, run: Path) -> None:
    latents = prepare_data("cifar10", latents=True, mirror=site.url, run=run)
    assert latents.inputs["dataset"] == Store(run).refs()["dataset/cifar10"]
    assert prepare_data("cifar10", latents=True, offline=True, run=run) == latents
    assert len(site.requests) == 1


@pytest.fixture
def vae(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AutoencoderKL=SmallVae))


@pytest.mark.usefixtures("vae")
def test_latents_of_a_dataset_artifact_and_of_a_source_are_the_same(run: Path, tmp_path: Path) -> None:
    for index in range(11):
        picture(tmp_path / f"in/{index % 2}/{index}.png", size=(20, 20))
    options: dict[str, Any] = {"resolution": (16, 16), "skip_bad": True}
    (tmp_path / "in/0/bad.png").write_bytes(b"hello")
    pixels = prepare_data("in", name="mine", run=run, **options)
    latents = prepare_data("dataset/mine", latents=True, run=run, device="cpu")
    assert prepare_data("mine", latents=True, run=run, device="cpu", tick=stopping_at(8, [])) == latents
    assert latents.inputs == {"dataset": pixels.oid}
    assert latents.params == {"name": "mine", "licence": None, "vae": "stabilityai/sd-vae-ft-mse"}
    assert latents.results == {
        **pixels.results,
        "resolution": 2,
        "num_channels": 8,
        "kind": "latents",
    }
    assert latents.results["skipped"] == [["in/0/bad.png", "must be an image, got bytes that Pillow does not know"]]
    assert shape_for_nets(latents) == (2, 4, 2)
    stored = load_dataset(Store(run), latents)
    expected = LatentCodec(SmallVae).mean_and_std(load_dataset(Store(run), pixels).images(range(11)))
    torch.testing.assert_close(stored.images(range(11)), expected.detach())
    with pytest.raises(SidaError) as caught:
        prepare_data(latents.oid, latents=True, run=run, device="cpu")
    assert str(caught.value) == (
        f"latents are made of pixels, got dataset {latents.oid[:12]} of latents. Use it as it is."
    )


@pytest.mark.usefixtures("vae")
def test_latents_of_a_path_are_made_without_its_pixels(run: Path, tmp_path: Path) -> None:
    for index in range(11):
        picture(tmp_path / f"in/{index % 2}/{index}.png", size=(20, 20))
    (tmp_path / "in/0/bad.png").write_bytes(b"hello")
    options: dict[str, Any] = {"resolution": (16, 16), "skip_bad": True}
    latents = prepare_data("in", latents=True, name="mine", run=run, device="cpu", **options)
    assert [artifact.oid for artifact in Store(run).artifacts()] == [latents.oid]
    pixels = prepare_data("in", run=run, **options)
    of_pixels = prepare_data(pixels.oid, latents=True, run=run, device="cpu")
    assert latents.files == of_pixels.files
    assert latents.results == of_pixels.results
    assert latents.inputs == {}
    assert latents.params == {**pixels.params, "name": "mine", "vae": "stabilityai/sd-vae-ft-mse"}
    assert prepare_data("in", latents=True, run=run, device="cpu", tick=stopping_at(8, []), **options) == latents
    assert Store(run).refs() == {"dataset/mine": latents.oid}
    with pytest.raises(SidaError, match=r"^latents have no images to compare with, got mine\. Pass --ref with"):
        reference.find(Store(run), "mine", pixels, "moments")
    # A dataset is trained on as before.
    assert image_source(Store(run), latents).images([0]).shape == (1, 8, 2, 2)


@pytest.mark.usefixtures("vae")
def test_latents_of_the_published_images_are_called_licensed_and_counted_as_their_pixels_are(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "in/a.png", size=(600, 520))
    latents = prepare_data("in", preset="imagenet512", latents=True, name="imagenet512", run=run, device="cpu")
    assert capsys.readouterr().err.splitlines() == ["warning: imagenet512 has 1,281,167 images, this source gave 1"]
    assert (latents.results["resolution"], latents.params["preset"]) == (64, "imagenet512")
    assert latents.params["licence"] == catalog.DATASETS["imagenet512"].licence


@pytest.mark.usefixtures("vae")
def test_statistics_of_latents_without_images_and_sizes_without_latents_are_refused_before_any_work(
    run: Path, tmp_path: Path
) -> None:
    picture(tmp_path / "in/a.png", size=(16, 16))
    assert refused_data(run, "in", latents=True, with_stats=True) == (
        "feature statistics are of images, which latents of in are made without. Make a dataset of it first "
        "(prepare-data PATH --name NAME), then prepare-data dataset/NAME --latents."
    )
    (tmp_path / "in/a.png").unlink()  # nothing is read
    assert refused_data(run, "in", latents=True, resolution="500x500") == (
        "images must be square with a side that is a power of two, got 500x500 for --resolution 500x500. "
        "Pass --resolution to prepare-data, e.g. 32x32, and a --transform if the aspect ratio shall be kept."
    )
    wide: dict[str, Any] = {"transform": "center-crop-wide", "latents": True}
    assert refused_data(run, "in", resolution="4x2", **wide) == (
        "images must be at least 8x8 to have latents, got 4x4. Prepare larger images."
    )
    assert refused_data(run, "in", resolution="64x36", **wide) == "in must hold images, got none. Check the path."
    picture(tmp_path / "in/a.png", size=(16, 16))
    pixels = prepare_data("in", name="mine", run=run)
    assert prepare_data("mine", latents=True, with_stats=True, run=run).inputs == {"dataset": pixels.oid}


@pytest.mark.usefixtures("vae")
@pytest.mark.parametrize("source", ["mine", "./in"])
def test_interrupted_latents_go_on_to_the_same_artifact(source: str, run: Path, tmp_path: Path) -> None:
    for index in range(21):
        picture(tmp_path / f"in/{index:02}.png", size=(16, 16))
    prepare_data("in", name="mine", run=run)
    whole = prepare_data(source, latents=True, run=shutil.copytree(run, run.parent / "other"), device="cpu")
    seen: list[int] = []
    with pytest.raises(Stop):
        prepare_data(source, latents=True, run=run, device="cpu", tick=stopping_at(16, seen))
    assert prepare_data(source, latents=True, run=run, device="cpu", tick=stopping_at(0, seen)) == whole
    assert seen == [8, 16, 21]
    assert not list(run.glob("live/*"))


def test_latents_without_the_extra_or_the_weights_are_refused_before_any_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "in/a.png")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert refused_data(run, "in", latents=True) == (
        "encoding latents needs the VAE of diffusers, which is not installed. "
        "Install it with: pip install 'sidactl[vae]'."
    )

    class Empty:
        @staticmethod
        def from_pretrained(name: str, **options: bool) -> None:
            raise OSError("nothing cached")

    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AutoencoderKL=Empty))
    monkeypatch.setenv("SIDACTL_OFFLINE", "1")
    assert refused_data(run, "in", latents=True) == (
        "the VAE stabilityai/sd-vae-ft-mse must be downloaded from https://huggingface.co/stabilityai/sd-vae-ft-mse/"
        "resolve/main/diffusion_pytorch_model.safetensors, which offline forbids. Allow it, or set SIDACTL_MIRROR to a "
        "folder that holds the file."
    )


def test_vae_of_a_folder_is_known_by_its_content_wherever_it_lies(run: Path, tmp_path: Path) -> None:
    save_vae(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere/b")
    store = Store.open(run)
    one = commands_vae.fetch_vae(store, "a")
    assert commands_vae.fetch_vae(store, "elsewhere/b") == one
    assert commands_vae.fetch_vae(store, one.oid) == one
    assert one.params == {"name": "a", "licence": None, "source_url": None}
    assert store.refs() == {}  # so that the folder's name stays that of the folder
    digest = hashlib.sha256("".join(one.files[name].sha256 for name in catalog.VAE_FILES).encode()).hexdigest()[:16]
    assert commands_vae.vae_label(one) == f"a@{digest}"
    other = commands_vae.fetch_vae(store, str(save_vae(tmp_path / "c", seed=1)))
    assert commands_vae.vae_digest(other) != digest


VAE_CONFIG = {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [1, 1, 1, 1]}


SUCH_AS = "Give a VAE of Stable Diffusion's first kind, such as stabilityai/sd-vae-ft-mse."


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        (
            None,
            (),
            "v must hold config.json and diffusion_pytorch_model.safetensors, config.json is missing. Give a "
            "folder that diffusers saved, or a name such as stabilityai/sd-vae-ft-mse.",
        ),
        (
            None,
            ("vae/config.json",),
            "v must hold config.json and diffusion_pytorch_model.safetensors, config.json is "
            "missing. Did you mean v/vae?",
        ),
        (
            VAE_CONFIG,
            ("diffusion_pytorch_model.bin",),
            "v must hold config.json and "
            "diffusion_pytorch_model.safetensors, diffusion_pytorch_model.safetensors is missing. A .bin file is a "
            "pickle, which is never read: save the VAE by save_pretrained of diffusers.",
        ),
        ([], catalog.VAE_FILES[1:], f"v: config.json does not say what the VAE is. {SUCH_AS}"),
        (
            VAE_CONFIG | {"_class_name": "UNet2DConditionModel"},
            catalog.VAE_FILES[1:],
            f"v must be a VAE with class AutoencoderKL, got UNet2DConditionModel. {SUCH_AS}",
        ),
        (
            VAE_CONFIG | {"latent_channels": 16},
            catalog.VAE_FILES[1:],
            f"v must be a VAE with latent_channels 4, got 16. {SUCH_AS}",
        ),
        (
            VAE_CONFIG | {"block_out_channels": [1, 1, 1]},
            catalog.VAE_FILES[1:],
            f"v must be a VAE with reduction 8, got 4. {SUCH_AS}",
        ),
    ],
)
def test_folder_that_is_no_vae_of_latents_is_refused_before_any_work(
    config: Any, files: Sequence[str], message: str, run: Path, tmp_path: Path
) -> None:
    picture(tmp_path / "in/a.png")
    (tmp_path / "v/vae").mkdir(parents=True)
    for name in files:
        (tmp_path / "v" / name).touch()
    if config is not None:
        (tmp_path / "v/config.json").write_text(json.dumps(config))
    assert refused_data(run, "in", latents=True, vae="v") == message
    with pytest.raises(SidaError) as caught:
        commands_vae.check_vae_is_there(Store.open(run), "v")
    assert (str(caught.value), caught.value.exit_code) == (message, 2)


def test_word_that_is_no_vae_is_refused(run: Path, tmp_path: Path) -> None:
    picture(tmp_path / "in/a.png")
    assert refused_data(run, "in", latents=True, vae="gone") == (
        "a VAE must be a folder that diffusers saved, or OWNER/NAME in huggingface.co, got gone. Check the path, or "
        "pass a name such as stabilityai/sd-vae-ft-mse."
    )
    assert refused_data(run, "in", vae="gone") == (
        "--vae is for --latents, got gone without. Pass --latents, or leave it out."
    )
    (tmp_path / "stabilityai/sd-vae-ft-mse").mkdir(parents=True)
    assert refused_data(run, "in", latents=True, vae="stabilityai/sd-vae-ft-mse") == (
        "'stabilityai/sd-vae-ft-mse' is the name of a folder and of vae/stabilityai/sd-vae-ft-mse. Write "
        "./stabilityai/sd-vae-ft-mse for the folder, or vae/stabilityai/sd-vae-ft-mse."
    )


def test_mirror_serves_the_usual_vae_and_others_by_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "in/a.png", size=(16, 16))
    usual, other = (save_vae(tmp_path / f"mirror/sd-vae-ft-{name}", seed) for seed, name in enumerate(("mse", "ema")))
    monkeypatch.setenv("SIDACTL_OFFLINE", "1")
    monkeypatch.setenv("SIDACTL_MIRROR", str(tmp_path / "mirror"))
    pixels = prepare_data("in", name="mine", run=run)
    capfd.readouterr()
    latents = prepare_data("mine", latents=True, run=run, device="cpu")
    told = capfd.readouterr().err.splitlines()
    weights = usual / "diffusion_pytorch_model.safetensors"
    assert f"downloading the VAE stabilityai/sd-vae-ft-mse: 0.0 MB from {weights.as_uri()}, licence: MIT" in told
    assert (latents.inputs, latents.params["vae"]) == ({"dataset": pixels.oid}, "stabilityai/sd-vae-ft-mse")
    store = Store.open(run)
    assert store.asked(store.key("prepare-data", {"latents": True}, {"dataset": pixels.oid})) == latents
    options: dict[str, Any] = {"latents": True, "run": run, "device": "cpu"}
    assert prepare_data("mine", vae="stabilityai/sd-vae-ft-mse", **options) == latents
    by_other = prepare_data("mine", vae="stabilityai/sd-vae-ft-ema", **options)
    fetched = store.resolve("vae/stabilityai/sd-vae-ft-ema", ["vae"])
    assert fetched.params["source_url"] == (
        "https://huggingface.co/stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.safetensors"
    )
    assert by_other.inputs == {"dataset": pixels.oid, "vae": fetched.oid}
    assert by_other.params["vae"] == commands_vae.vae_label(fetched)
    assert by_other.files["images.zip"] != latents.files["images.zip"]
    monkeypatch.delenv("SIDACTL_MIRROR")  # and nothing is fetched twice
    capfd.readouterr()
    for vae, made in (("stabilityai/sd-vae-ft-ema", by_other), (str(other), by_other), (None, latents)):
        assert prepare_data("mine", vae=vae, force=vae is None, **options) == made
    assert "downloading" not in capfd.readouterr().err
    assert not list((run / "tmp").glob("file-*"))


def test_vae_that_diffusers_has_in_its_cache_is_not_downloaded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    cached = save_vae(tmp_path / "snapshots/0123")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(cached / file))
    monkeypatch.setenv("SIDACTL_OFFLINE", "1")
    store = Store.open(run)
    assert commands_vae.check_vae_is_there(store, "someone/vae") is None
    found = commands_vae.fetch_vae(store, "someone/vae")
    assert (found.params["name"], store.refs()) == ("someone/vae", {"vae/someone/vae": found.oid})
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux/config.json").write_text(json.dumps(VAE_CONFIG | {"latent_channels": 16}))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(tmp_path / "flux" / file))
    for ask in (commands_vae.check_vae_is_there, commands_vae.fetch_vae):
        with pytest.raises(SidaError) as caught:
            ask(store, "someone/flux")
        assert str(caught.value) == f"the VAE someone/flux must be a VAE with latent_channels 4, got 16. {SUCH_AS}"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(cached / file))
    assert fetch_teacher("stabilityai/sd-vae-ft-mse", run=run) == found  # the same files, under another name
    assert store.refs()["vae/stabilityai/sd-vae-ft-mse"] == found.oid


@pytest.mark.usefixtures("vae")
def test_latents_are_trained_on_as_four_channels_and_scored_by_pixels_alone(run: Path, tmp_path: Path) -> None:
    for index in range(4):
        picture(tmp_path / f"in/{index % 2}/{index}.png", size=(64, 64))
    latents = prepare_data("in", latents=True, name="mine", run=run, device="cpu")
    teacher = sidactl.train_teacher("mine", name="t", run=run, device="cpu", duration_nimg=32, batch_size=16)
    assert teacher.inputs == {"dataset": latents.oid}
    net = NetSpec.from_json(teacher.params["net"])
    assert (net.img_resolution, net.img_channels, net.label_dim) == (8, 4, 2)
    told = "latents have no images to compare with, got mine. Pass --ref with the dataset of pixels, or with published"
    asked: dict[str, Any] = {"teacher": "t", "mode": "sida", "generator": None, "dataset": None, "overrides": {}}
    for ask in (
        lambda: plan.plan(**asked, store=Store(run)),
        lambda: sidactl.distill(teacher="t", mode="sida", run=run, device="cpu"),
        lambda: dataset_stats.dataset_stats("mine", run=run, device="cpu"),
    ):
        with pytest.raises(SidaError, match=f"^{re.escape(told)}"):
            ask()
    pixels = prepare_data("in", name="pixels", run=run)
    assert prepare_data("pixels", latents=True, run=run, device="cpu").files == latents.files
    assert reference.find(Store(run), "pixels", teacher, "moments") == pixels
    digits = prepare_data("tiny-digits", latents=True, name="small", run=run, device="cpu")
    stats = dataset_stats.dataset_stats("small", run=run, device="cpu")
    assert stats.inputs == digits.inputs
    assert Store(run).refs()["stats/small-tiny-digits"] == stats.oid


@pytest.mark.parametrize(("source", "num_processes"), [("mine", 2), ("./in", 3)])
def test_latents_of_several_processes_are_those_of_one(
    source: str, num_processes: int, run: Path, tmp_path: Path
) -> None:
    for index in range(21):
        picture(tmp_path / f"in/{index % 2}/{index:02d}.png", size=(32, 32))
    (tmp_path / "in/0/00.png").write_bytes(b"hello")  # so that what is kept are 20, 8 + 8 + 4
    (tmp_path / "in/1/99.png").write_bytes(b"hello")
    prepare_data("in", name="mine", skip_bad=True, run=run)
    code = (
        "import sys\n"
        "import sidactl\n"
        "from sidactl.data import codec\n"
        "from tests.playback import SmallVae\n"
        "codec.stable_diffusion_vae = lambda **options: SmallVae()\n"
        "skip_bad = sys.argv[2] == './in'\n"
        "for _ in range(2):  # the second time it is answered\n"
        "    made = sidactl.prepare_data(sys.argv[2], latents=True, skip_bad=skip_bad, run=sys.argv[1], device='cpu')\n"
        "    print(f'oid={made.oid}')\n"
    )
    script = tmp_path / "encode.py"
    script.write_text(code)
    other = Path(shutil.copytree(run, tmp_path / "other"))

    def encoded(root: Path, num_processes: int) -> set[str]:
        done = processes.run(num_processes, [str(root), source], {}, str(script))
        assert {each.code for each in done} == {0}, "\n".join(each.err for each in done)
        assert all(each.out.count("oid=") == 2 for each in done)
        return {oid for each in done for oid in re.findall("oid=([0-9a-f]{64})", each.out)}

    (alone,), (shared,) = encoded(run, 1), encoded(other, num_processes)
    assert shared == alone
    assert Store(other).get(shared).results["kind"] == "latents"
    assert not list((other / "live").iterdir())
