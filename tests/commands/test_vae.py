"""Latents are decoded by the VAE that they were made with, and what is said where they are not."""

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sidactl
from sidactl.commands import vae
from sidactl.errors import SidaError
from sidactl.store import Store
from sidactl.training import state
from tests.commands.conftest import planned
from tests.playback import save_vae

FEW: dict[str, Any] = {
    "duration_nimg": 16,
    "batch_size": 8,
    "num_accumulation_rounds": 1,
    "generator_from_nimg": 0,
    "evaluate_every_nimg": 16,
    "evaluate_num": 4,
    "checkpoint_every_nimg": 16,
    "device": "cpu",
    "teacher_score": "none",
}


@dataclass(frozen=True)
class Latent:
    """A run directory with `dataset/lat`, latents of 8x8 by the VAE in the folder x, and `teacher/t` trained on them.

    The folder y holds another VAE, the mirror the usual one.
    """

    root: Path
    x: Path
    y: Path
    mirror: Path


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Latent:
    folder = tmp_path_factory.mktemp("latent")
    random = np.random.default_rng(0)
    for index in range(6):
        (folder / f"in/{index % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
            folder / f"in/{index % 2}/{index}.png"
        )
    vaes = [save_vae(folder / name, seed) for seed, name in enumerate(("x", "y", "mirror/sd-vae-ft-mse"))]
    root = folder / "run"
    pixels = sidactl.prepare_data(str(folder / "in"), run=root)
    sidactl.prepare_data(pixels, latents=True, vae=vaes[0], name="lat", run=root, device="cpu")
    sidactl.train_teacher("lat", name="t", run=root, device="cpu", duration_nimg=16, batch_size=16)
    return Latent(root, vaes[0], vaes[1], folder / "mirror")


@pytest.fixture
def latent_run(latent: Latent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Latent:
    """The same, in a run directory of the test's own, offline, with the mirror."""
    monkeypatch.setenv("SIDACTL_OFFLINE", "1")
    monkeypatch.setenv("SIDACTL_MIRROR", str(latent.mirror))
    return replace(latent, root=Path(shutil.copytree(latent.root, tmp_path / "run")))


def label_of(folder: Path, root: Path) -> str:
    return vae.vae_label(vae.fetch_vae(Store.open(root), str(folder)))


def test_a_generator_remembers_the_vae_that_decodes_its_latents(latent_run: Latent, tmp_path: Path) -> None:
    root, x, y = latent_run.root, latent_run.x, latent_run.y
    told: list[str] = []
    made = sidactl.distill(teacher="t", mode="sid", run=root, say=told.append, **FEW)  # the teacher's own
    x_label, y_label = label_of(x, root), label_of(y, root)
    assert made.params["vae"] == Store.open(root).resolve("teacher/t").params["vae"] == x_label
    assert made.inputs["vae"] == vae.fetch_vae(Store.open(root), str(x)).oid
    assert sidactl.distill(teacher="t", mode="sid", vae=x, run=root, say=None, **FEW) == made

    def drawn(say: Any = None, **options: Any) -> Any:
        return sidactl.sample(made, num=2, run=root, device="cpu", say=say, **options).artifact

    own = drawn(told.append)
    assert not [line for line in told if "warning" in line]
    assert (own.params["vae"], own.inputs["vae"]) == (x_label, made.inputs["vae"])
    assert drawn(vae=x) == own
    other = drawn(told.append, vae=str(y))
    assert other.files["images.zip"] != own.files["images.zip"]
    assert told[-1] == f"warning: t-sid was made with the VAE {x_label}, latents are decoded by {y_label} here (--vae)"
    usual = drawn(told.append, vae="stabilityai/sd-vae-ft-mse")
    assert "vae" not in usual.params
    assert usual.files["images.zip"] not in (own.files["images.zip"], other.files["images.zip"])

    scored: dict[str, Any] = {"num": 4, "run": root, "device": "cpu", "say": None}
    score, by_x, by_y = (sidactl.fid(made, **scored, **more) for more in ({}, {"vae": x}, {"vae": y}))
    assert by_x.oid == score.oid
    assert score.settings["vae"] == x_label.partition("@")[2]
    assert f"t-sid was made with the VAE {x_label}, latents are decoded by {y_label} here (--vae)" in by_y.warnings
    assert float(by_y) != float(score)
    assert not [line for line in sidactl.fid(own, **scored | {"num": 2}).warnings if "VAE" in line]
    with pytest.raises(SidaError) as caught:
        sidactl.fid(own, vae=x, **scored)
    assert str(caught.value) == "a VAE is of a net that draws latents, got fixed images. Leave out --vae."


def test_a_generator_whose_vae_is_not_there_says_which_one(latent_run: Latent, tmp_path: Path) -> None:
    made = sidactl.distill(teacher="t", mode="sid", run=latent_run.root, score=False, say=None, **FEW)
    sidactl.export(made, tmp_path / "g.safetensors", run=latent_run.root)
    elsewhere = tmp_path / "elsewhere"
    sidactl.fetch_teacher(tmp_path / "g.safetensors", run=elsewhere)
    label = label_of(latent_run.x, latent_run.root)
    with pytest.raises(SidaError) as caught:
        sidactl.sample("g", num=2, run=elsewhere, device="cpu")
    assert str(caught.value) == (
        f"g was made with the VAE {label}, which is not in {elsewhere}. Pass it as --vae PATH or OWNER/NAME, or --vae "
        "stabilityai/sd-vae-ft-mse for the usual one."
    )
    told: list[str] = []
    by_x = sidactl.sample("g", num=2, vae=latent_run.x, run=elsewhere, device="cpu", say=told.append)
    assert not told
    assert sidactl.sample("g", num=2, run=elsewhere, device="cpu").artifact == by_x.artifact
    card = (sidactl.export(made, tmp_path / "out", run=latent_run.root) / "README.md").read_text()
    assert f"- its latents are decoded by the VAE {label}" in card


def test_a_run_that_decodes_by_another_vae_than_its_inputs_were_made_with_is_told(latent_run: Latent) -> None:
    root, x, y = latent_run.root, latent_run.x, latent_run.y
    x_label, y_label = label_of(x, root), label_of(y, root)
    events: list[state.Event] = []
    made = sidactl.distill(teacher="t", mode="sid", vae=y, run=root, watch=events.append, say=None, **FEW)
    told = f"was made with the VAE {x_label}, latents are decoded by {y_label} here (--vae)"
    warned = [event.values["message"] for event in events if event.kind == "warning"]
    assert warned == [f"t {told}", f"lat {told}"]
    assert made.params["vae"] == y_label
    plan = planned(root, teacher="t", mode="sid2a", generator=made.oid)
    told = f"t-sid was made with the VAE {y_label}, latents are decoded by {x_label} here (--vae)"
    assert told in plan.warnings
    pixels = Store.open(root).resolve("dataset/lat").inputs["dataset"]
    sidactl.prepare_data(pixels, latents=True, name="usual", run=root, device="cpu")
    plan = planned(root, teacher="t", mode="sid", dataset="usual")
    told = f"usual was made with the VAE stabilityai/sd-vae-ft-mse, latents are decoded by {x_label} here (--vae)"
    assert told in plan.warnings


def test_a_vae_is_checked_before_a_run_begins(
    latent_run: Latent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = latent_run.root
    (latent_run.root.parent / "v").mkdir()
    for options, message in (
        (
            {"teacher": "t", "mode": "sid", "vae": str(root.parent / "v")},
            f"{root.parent}/v must hold config.json and diffusion_pytorch_model.safetensors, config.json is missing. "
            "Give a folder that diffusers saved, or a name such as stabilityai/sd-vae-ft-mse.",
        ),
        (
            {"vae": "stabilityai/sd-vae-ft-ema"},
            "--vae is for networks of latents, tiny-digits draws pixels. Leave out --vae.",
        ),
    ):
        with pytest.raises(SidaError) as caught:
            planned(root, **options)
        assert (str(caught.value), caught.value.exit_code) == (message, 2)
    with pytest.raises(
        SidaError, match=r"^the mirror has neither file://.*\. Put the file there, or unset SIDACTL_MIRROR"
    ):
        planned(root, teacher="t", mode="sid", vae="stabilityai/sd-vae-ft-ema")
    shutil.copytree(latent_run.x, tmp_path / "mirror/sd-vae-ft-ema")
    monkeypatch.setenv("SIDACTL_MIRROR", str(tmp_path / "mirror"))
    (need,) = planned(root, teacher="t", mode="sid", vae="stabilityai/sd-vae-ft-ema").needs
    assert (need.what, need.how, need.size_bytes) == ("the VAE stabilityai/sd-vae-ft-ema", "downloaded", None)
    monkeypatch.delenv("SIDACTL_MIRROR")
    with pytest.raises(SidaError) as caught:
        planned(root, teacher="t", mode="sid", vae="stabilityai/sd-vae-ft-ema")
    assert str(caught.value) == (
        "the VAE stabilityai/sd-vae-ft-ema must be downloaded from https://huggingface.co/stabilityai/sd-vae-ft-ema/"
        "resolve/main/diffusion_pytorch_model.safetensors, which offline forbids. Allow it, or set SIDACTL_MIRROR to a "
        "folder that holds the file."
    )
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SidaError) as caught:
        planned(root, teacher="t", mode="sid")
    assert str(caught.value) == (
        "decoding latents needs the VAE of diffusers, which is not installed. Install it with: pip install "
        "'sidactl[vae]', or pass --no-score."
    )
    told: list[str] = []
    made = sidactl.distill(teacher="t", mode="sid", score=False, run=root, say=told.append, **FEW)
    assert "grid.png" not in made.files
    assert told == [
        "warning: there is no picture of the generator: decoding latents needs the VAE of diffusers, which is not "
        "installed"
    ]
