"""Teachers of one's own: trained, gone on with, sampled and distilled."""

import signal
from pathlib import Path

import pytest
import torch

import sidactl
from sidactl.errors import SidaError
from sidactl.store import Store
from tests.commands.conftest import TEACHER, interrupting, never, nothing_is_wrong, one_step, refs
from tests.conftest import SHORT


def test_a_trained_teacher_can_be_sampled_scored_and_distilled(fresh_run: Path) -> None:
    teacher = sidactl.train_teacher("tiny-digits", name="mine", run=fresh_run, device="cpu", **TEACHER)
    assert refs(fresh_run)["teacher/mine"] == teacher.oid
    assert teacher.params["net"]["label_dim"] == 10
    assert sidactl.sample("mine", seeds=range(2), steps=2, run=fresh_run).images.shape == (2, 8, 8, 1)
    generator = sidactl.distill(teacher="mine", mode="sid", run=fresh_run, device="cpu", **one_step(SHORT))
    assert (generator.params["name"], generator.inputs["teacher"]) == ("mine-sid", teacher.oid)
    assert refs(fresh_run)["generator/mine-sid"] == generator.oid


def test_an_interrupted_teacher_goes_on_to_the_same_oid(fresh_run: Path, tmp_path: Path) -> None:
    straight = sidactl.train_teacher("tiny-digits", name="mine", run=tmp_path / "other", device="cpu", **TEACHER)
    with pytest.raises(SidaError, match=r"^interrupted at 64 of 96 images"):
        sidactl.train_teacher(
            "tiny-digits",
            name="mine",
            run=fresh_run,
            device="cpu",
            watch=interrupting(signal.SIGINT, "checkpoint", 32, []),
            **TEACHER,
        )
    assert sidactl.train_teacher("tiny-digits", name="mine", run=fresh_run, device="cpu", **TEACHER) == straight
    again = sidactl.train_teacher("tiny-digits", name="mine", run=fresh_run, watch=never, **TEACHER)
    assert again == straight
    assert nothing_is_wrong(fresh_run)


def test_a_teacher_may_leave_classes_out_but_not_differ_in_size(fresh_run: Path) -> None:
    teacher = sidactl.train_teacher("tiny-digits", name="plain", run=fresh_run, device="cpu", label_dim=0, **TEACHER)
    assert teacher.params["net"]["label_dim"] == 0
    assert sidactl.sample("plain", seeds=range(2), steps=1, run=fresh_run).labels is None
    with pytest.raises(SidaError) as caught:
        sidactl.train_teacher("tiny-digits", name="mine", run=fresh_run, img_resolution=16)
    assert str(caught.value) == (
        "the dataset must fit the network (resolution, channels, classes = 16, 1, 10), got 8, 1, 10. "
        "Pass another --dataset, or prepare this one to fit."
    )
    with pytest.raises(SidaError, match=r"^unknown recipe field 'colour'\. Fields are P_mean, "):
        sidactl.train_teacher("tiny-digits", name="mine", run=fresh_run, colour=1)


def test_an_edm2_teacher_has_its_uncertainty_head_its_rate_and_its_sampler(edm2: tuple[Path, str]) -> None:
    root, oid = edm2
    teacher = Store.open(root).get(oid)
    assert teacher.params["net"]["logvar_channels"] == 16
    assert teacher.params["sampler"]["convention"] == "edm2"
    assert teacher.params["recipe"]["lr"] == 1e-2
    assert sidactl.load(oid, run=root).logvar(torch.tensor([0.01, 10.0])).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("form", ["ncsnpp", "adm"])
def test_a_teacher_of_every_form_can_be_trained(tmp_path: Path, form: str) -> None:
    made = sidactl.train_teacher(
        "tiny-digits", name="x", net=form, duration_nimg=64, batch_size=32, run=tmp_path / "run"
    )
    assert len(sidactl.sample(made.oid, seeds=[0], run=tmp_path / "run").images) == 1
    with pytest.raises(SidaError) as caught:
        sidactl.train_teacher("tiny-digits", name="y", net="unet", run=tmp_path / "run")
    assert str(caught.value) == "the net must be one of ddpmpp, ncsnpp, adm, edm2, got 'unet'. Pass --net ddpmpp."
