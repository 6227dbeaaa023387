"""What of a sharded run stays whole, and that its numbers stay the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sidactl import catalog
from sidactl.engine import sharding
from sidactl.engine.sharding import ShardedForm, form_of
from sidactl.recipes import Execution, Memory, NetSpec
from tests.conftest import instead_of
from tests.engine.test_distributed import SHORT
from tests.processes import run as processes
from tests.worlds import TINY, TINY_EDM2, compute_gradients, distillation

GB = 10**9
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # the uncertainty head returns a view


def test_memory_decides_what_is_whole_and_when_gradients_are_added_up() -> None:
    recipe, net = catalog.recipe_for("edm2-xxl", "sida"), catalog.teacher("edm2-xxl").net
    estimate = Memory.of(recipe, net, 1_500_000_000, Execution(shard=True), num_devices=8)
    needed = estimate.total_bytes
    for device_bytes, expected in (
        (None, (False, False)),
        (round(needed / 0.9) + 4 * GB, (True, False)),
        (round(needed / 0.9) + 1 * GB, (False, False)),
        (needed, (False, True)),
    ):
        assert form_of(estimate, 3 * GB, device_bytes) == expected


def test_each_decision_is_told_in_a_line() -> None:
    assert ShardedForm().told() == []
    assert [len(line.splitlines()) for line in ShardedForm(True, True).told()] == [1, 1]


def gradients(spec: NetSpec, form: ShardedForm | None, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> list[Tensor]:
    """Of both updates, in a group of this process alone where `form` is given."""
    with monkeypatch.context() as patch:
        if form is not None:
            instead_of(form_of, lambda *_: form, patch)
        options = {"generator_from_nimg": None, "num_accumulation_rounds": 4, **changed}
        run = distillation(spec, execution=Execution(shard=form is not None), **options)
        run.nimg = 10**6
        teacher = [p for p in run.teacher.parameters() if p.ndim > 1]
        if form and form.has_whole_teacher:
            assert not any(map(sharding.is_sharded, teacher))
            assert sum(p.dtype == run.teacher.compute_dtype for p in teacher) > len(teacher) / 2
        assert run.notes == (form.told() if form else [])
        found = []
        for turn in ("fake_score", "generator"):
            compute_gradients(run, turn)  # type: ignore[arg-type]
            side = run.sides[turn]  # type: ignore[index]
            parameters = [p for module in side.modules.values() for p in module.parameters()]
            found += [sharding.whole(p.grad).clone() for p in parameters if p.grad is not None]
            side.optimizer.zero_grad()
        return found


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("spec", [TINY, TINY_EDM2], ids=["edm", "edm2"])
def test_a_whole_teacher_in_the_type_of_its_convolutions_gives_the_same_bits(
    spec: NetSpec, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = gradients(spec, ShardedForm(), monkeypatch, precision=precision)
    whole = gradients(spec, ShardedForm(has_whole_teacher=True), monkeypatch, precision=precision)
    assert len(split) == len(whole)
    assert all(torch.equal(a, b) for a, b in zip(split, whole, strict=True))


def test_gradients_added_up_after_each_pass_are_the_same_but_for_their_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split = gradients(TINY, ShardedForm(), monkeypatch)
    reduced = gradients(TINY, ShardedForm(reduces_each_pass=True), monkeypatch)
    assert len(split) == len(reduced)
    for one, other in zip(split, reduced, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6 * float(one.abs().max() + 1e-9))


@pytest.mark.parametrize("spec", [TINY, TINY_EDM2], ids=["edm", "edm2"])
def test_a_loss_scale_is_exact_where_gradients_are_sharded(spec: NetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 a power of two changes no bit of what does not underflow; sharded sums are those of one process."""
    whole = gradients(spec, None, monkeypatch, precision="fp16", forced_normalization="off")
    split = gradients(spec, ShardedForm(), monkeypatch, precision="fp16", forced_normalization="off")
    assert len(whole) == len(split)
    for one, other in zip(whole, split, strict=True):
        torch.testing.assert_close(other, one, rtol=2e-3, atol=2e-3 * float(one.abs().max() + 1e-12))


@pytest.mark.parametrize("form", ["whole", "reduced"])
def test_two_processes_train_with_either_form_and_say_so(form: str, tmp_path: Path) -> None:
    settings = {"SIDACTL_RUN": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "FORM": form}
    words = ["distill", *SHORT, "--shard", "--num-accumulation-rounds", "4"]
    first, *others = processes(2, words, settings, "tests.sharded")
    assert {done.code for done in (first, *others)} == {0}, first.err
    assert ("the teacher lies whole" in first.err) == (form == "whole")
    assert ("after every pass" in first.err) == (form == "reduced")
    if form == "whole":
        plain = processes(2, words, {**settings, "SIDACTL_RUN": str(tmp_path / "plain")})
        assert first.out == plain[0].out


@pytest.mark.slow
def test_two_sharded_processes_in_float16_train_what_one_whole_does(tmp_path: Path) -> None:
    words = ["distill", *SHORT, "--precision", "fp16"]
    found = []
    for num_processes, options in ((1, []), (2, ["--shard"])):
        settings = {"SIDACTL_RUN": str(tmp_path / str(num_processes)), "CUDA_VISIBLE_DEVICES": ""}
        done = processes(num_processes, [*words, *options], settings)
        assert {each.code for each in done} == {0}, done[0].err
        found.append(done[0].out)
    assert found[0] == found[1]
