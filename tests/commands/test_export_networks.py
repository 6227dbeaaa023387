"""Exported networks draw the same images elsewhere, and come back as what they were."""

import dataclasses
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import safetensors.torch
import torch

import sidactl
from sidactl import fetch_teacher, nets, sampling
from sidactl.commands import export
from sidactl.commands.export import ExportForm
from sidactl.errors import SidaError
from sidactl.recipes import OneStepSpec
from sidactl.store import Store
from tests.commands.conftest import SMALL, SPEC, network, refused


@pytest.mark.parametrize(
    "source",
    [
        "sida_gen_edm",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("sid_gen_edm2_nogan", "onestep_uncond", "fresh_steps", "ddim_steps")
        ),
    ],
)
def test_a_generator_in_onnx_draws_the_same_images(run: Path, tmp_path: Path, source: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'sidactl[dev]'")
    if source in ("onestep_uncond", "fresh_steps", "ddim_steps"):
        torch.manual_seed(0)
        net = nets.build(SPEC if source == "fresh_steps" else dataclasses.replace(SPEC, label_dim=0))
        weights = {"model.safetensors": safetensors.torch.save(net.state_dict())}
        several = {} if source == "onestep_uncond" else {"num_steps": 3, "noise": source.partition("_")[0]}
        sampler = OneStepSpec(sigma_init=1.5, **several)  # type: ignore[arg-type]
        params = {"name": source, "net": net.spec.to_json(), "sampler": sampler.to_json()}
        oid = Store.open(run).put("generator", weights, params=params | {"dataset": None}).oid
    else:
        oid = sidactl.fetch_teacher(str(network(source)), kind="generator", run=run).oid
    path = sidactl.export(oid, tmp_path / "g.onnx", form="onnx", run=run)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    net = sidactl.load(oid, run=run)
    sampler = OneStepSpec.from_json(Store.open(run).get(oid).params["sampler"])
    for batch in (1, 3):
        latents = torch.randn(batch, net.spec.img_channels, net.spec.img_resolution, net.spec.img_resolution)
        given = {"latents": latents.numpy()}
        labels = torch.eye(net.spec.label_dim)[torch.arange(batch) % net.spec.label_dim] if net.spec.label_dim else None
        if labels is not None:
            given["labels"] = labels.numpy()
        fresh = torch.randn(batch, sampler.num_steps - 1, *latents.shape[1:])
        if sampler.num_steps > 1 and sampler.noise == "fresh":
            given["noise"] = fresh.numpy()
        left = list(fresh.unbind(1))
        noise: Any = SimpleNamespace(normal=lambda shape, left=left: left.pop(0))
        (images,) = session.run(["images"], given)
        with torch.no_grad():
            expected = sampling.few_steps(net, latents, labels, sampler, noise)
        torch.testing.assert_close(torch.from_numpy(images), expected, rtol=1e-4, atol=1e-5)
    card = (tmp_path / "g.onnx.md").read_text()
    assert f"ONNX, opset {opset_of(path)}: `latents`, unit normal float32 [N, " in card
    is_latent = net.spec.img_channels == 4
    drawn = executed(card, tmp_path)["images" if is_latent else "pixels"]
    assert (drawn.shape, drawn.dtype) == ((64, *latents.shape[1:]), np.float32 if is_latent else np.uint8)
    assert ("normalised latents" in card) == is_latent


def opset_of(path: Path) -> int:
    import onnx

    (opset,) = onnx.load(path).opset_import
    return int(opset.version)


def executed(card: str, folder: Path) -> dict[str, Any]:
    """What the Python in a model card leaves behind, run where the exported file is."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    before = os.getcwd()
    os.chdir(folder)
    try:
        exec(code, names)
    finally:
        os.chdir(before)
    return names


@pytest.mark.parametrize("kind", ["teacher", "generator"])
def test_the_card_of_a_state_dict_draws_the_same_images(run: Path, tmp_path: Path, kind: Literal["teacher"]) -> None:
    oid = fetch_teacher(str(network(SMALL)), kind=kind, run=run).oid
    sidactl.export(oid, tmp_path / "n.pt", form="state-dict", run=run)
    images = executed((tmp_path / "n.pt.md").read_text(), tmp_path)["images"]
    drawn = sidactl.sample(oid, seeds=range(64), run=run, device="cpu").images
    assert (images.permute(0, 2, 3, 1).numpy() == drawn).all()


@pytest.mark.parametrize("form", ["files", "safetensors"])
def test_the_card_says_how_an_exported_network_comes_back(run: Path, tmp_path: Path, form: ExportForm) -> None:
    original = fetch_teacher("tiny-digits", run=run)
    path = sidactl.export(original.oid, tmp_path / "my net.safetensors", form=form, run=run)
    card = path / "README.md" if form == "files" else tmp_path / f"{path.name}.md"
    (command,) = re.findall(r"sidactl fetch-teacher (.*) \| sidactl sample --num 64", card.read_text())
    assert [command] == (["model.safetensors"] if form == "files" else ["'my net.safetensors'"])
    file = card.parent / command.strip("'")
    back = fetch_teacher(str(file), run=tmp_path / "other")
    assert (back.kind, back.files) == ("teacher", original.files)
    for key in ("net", "sampler", "dataset", "licence"):
        assert back.params[key] == original.params[key]


def test_forms_of_one_network_go_side_by_side(run: Path, tmp_path: Path) -> None:
    oid = fetch_teacher("tiny-digits", run=run).oid
    (tmp_path / "to").mkdir()
    sidactl.export(oid, tmp_path / "to/v1.5.safetensors", form="safetensors", run=run)
    sidactl.export(oid, tmp_path / "to/v1.5.pt", form="state-dict", run=run)
    sidactl.export(oid, tmp_path / "to/v1.5", run=run)
    names = ["v1.5", "v1.5.pt", "v1.5.pt.md", "v1.5.safetensors", "v1.5.safetensors.md"]
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == names


def test_a_manifest_speaks_for_its_own_files_alone(run: Path, tmp_path: Path) -> None:
    folder = sidactl.export(fetch_teacher("tiny-digits", run=run).oid, tmp_path / "out", run=run)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({k: v + 1 for k, v in weights.items()}, folder / "model.safetensors")
    assert refused(str(folder / "model.safetensors"), run / "other") == (
        f"{folder}/model.safetensors does not say which network it holds. "
        "Give one that sidactl export --to safetensors wrote."
    )


def test_export_to_onnx_says_what_is_missing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oid = sidactl.fetch_teacher(str(network("sida_gen_edm")), kind="generator", run=run).oid
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SidaError, match=r"^export to ONNX needs the package onnx\. pip install 'sidactl\[onnx\]'"):
        sidactl.export(oid, tmp_path / "g.onnx", form="onnx", run=run)
    monkeypatch.delitem(sys.modules, "onnx")
    monkeypatch.setattr(export, "ONNX_MAX_BYTES", 1000)
    with pytest.raises(SidaError, match=r"^an ONNX file holds at most 2 GB, this network is larger\. "):
        sidactl.export(oid, tmp_path / "g.onnx", form="onnx", run=run)
    assert not list(tmp_path.glob("g*"))
