"""The seam between methods and trainer: what a method may ask for, shown by one that asks for all of it at once."""

import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from sidactl import methods
from sidactl.engine import ranks, sharding
from sidactl.errors import SidaError
from sidactl.methods.base import Batch, Losses, Method, Nets, Optimisation, Schedule, Turn, Update
from sidactl.methods.sid import Sid
from sidactl.nets import Denoiser
from sidactl.recipes import Execution
from sidactl.training import state as training_state
from sidactl.training.distillation import Distillation
from sidactl.training.updates import LossScale, Side, adam, apply_gradients
from tests.conftest import instead_of, short_distill
from tests.processes import told
from tests.toy import Toy
from tests.worlds import compute_gradients, distillation, gradients_of, roomy, stopped_clock, weights


@pytest.fixture
def toy_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mode sida is the toy."""
    monkeypatch.setitem(methods.METHODS, "sida", Toy)


def toy(**changed: Any) -> Distillation:
    """A distillation by the toy from its first step on, four passes to a step unless it is said otherwise."""
    return distillation(**{"generator_from_nimg": None, "num_accumulation_rounds": 4, **changed})


# A whole run


@pytest.mark.usefixtures("toy_mode")
def test_a_method_of_ones_own_trains_its_generator_head_and_buffer_and_goes_on_to_the_same_bits(
    fresh_run: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(fresh_run, tmp_path / "other"))
    counts = {"duration_nimg": 480, "evaluate_every_nimg": 240, "checkpoint_every_nimg": 480}
    options = {**counts, "num_accumulation_rounds": 2, "generator_lr": 1e-4, "ema_halflife_nimg": 0}
    events: list[training_state.Event] = []
    straight = short_distill(fresh_run, events.append, **options)
    reported = [event.values for event in events if event.kind == "progress"]
    assert {values["stage"] for values in reported} == {"toy"}
    assert reported[-1]["pull"] < reported[0]["pull"]
    assert reported[-1]["head"] < reported[0]["head"]

    def interrupt(event: training_state.Event) -> None:
        if (event.kind, event.nimg) == ("evaluation", 240):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SidaError):
        short_distill(other, interrupt, **options)
    (checkpoint,) = other.glob("live/*/checkpoint-0000000240-1")
    saved = {
        name: tensor
        for file in checkpoint.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(file).items()
    }
    assert {name for name in saved if name.startswith("method.")} == {
        *("method.bias", "method.distance"),
        *(f"method.head.{layer}.{kind}" for layer in (1, 3) for kind in ("weight", "bias")),
    }
    assert float(saved["method.distance"]) != 1
    assert bool(saved["fake_score_optimizer.method.head.1.weight.exp_avg"].any())
    assert short_distill(other, **options).oid == straight.oid


def test_a_method_of_ones_own_gives_the_same_bits_in_two_processes_sharded_or_not(tmp_path: Path) -> None:
    words = ["distill", "--teacher=tiny-digits", "--mode=sida", "--device=cpu", "--generator-from=none"]
    words += ["--duration=128", "--batch-size=32", "--num-accumulation-rounds=4", "--adversarial-from=0"]
    words += ["--evaluate-every=128", "--evaluate-num=64", "--teacher-score=none"]
    made = [
        told(num_processes, tmp_path / str(index), *words, *options, module="tests.toy")
        for index, (num_processes, options) in enumerate([(1, []), (2, []), (2, ["--shard"])])
    ]
    assert len(set(made)) == 1


@pytest.mark.usefixtures("toy_mode")
def test_a_sharded_method_has_its_parts_sharded_and_what_is_its_own_whole() -> None:
    runs = [toy(execution=Execution(shard=shard)) for shard in (False, True)]
    sharded = {name for name, p in runs[1].method.named_parameters() if sharding.is_sharded(p)}
    assert sharded == {"head.1.weight", "head.1.bias", "head.3.weight"}
    for run in runs:
        for _ in range(4):
            run.step()
    for name, parameter in runs[0].method.named_parameters():
        assert torch.equal(sharding.whole(runs[1].method.get_parameter(name)), parameter)
        assert not torch.equal(parameter, toy().method.get_parameter(name)), "it has been trained"


# Who steps when


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(), ["fg", "fg", "fg", "fg"]),
        (Schedule(generator_first=True, generator_every=2), ["gf", "f", "gf", "f"]),
        (Schedule(generator_every=3), ["fg", "f", "f", "fg"]),
        (Schedule(generator_every=2, alternates=True), ["g", "f", "g", "f"]),
    ],
)
def test_turns_follow_the_schedule_once_the_generator_trains(schedule: Schedule, expected: list[str]) -> None:
    assert ["".join(turn[0] for turn in schedule.turns(index, True)) for index in range(4)] == expected
    assert {schedule.turns(index, False) for index in range(4)} == {("fake_score",)}


@pytest.mark.usefixtures("toy_mode")
@pytest.mark.parametrize("num_rounds", [1, 4])
def test_a_generator_that_steps_first_and_every_second_time_hands_its_images_on(
    num_rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy(num_accumulation_rounds=num_rounds, dropout=0.1)
    seen: list[tuple[str, Tensor]] = []
    gradient, losses, generate = Toy.image_gradient, Toy.score_losses, Toy.generate
    drawn: list[int] = []

    def of_generator(method: Toy, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> tuple[Losses, Tensor]:
        seen.append(("generator", x.detach().clone()))
        return gradient(method, nets, batch, x, nimg)

    def of_score(method: Toy, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> Losses:
        assert not x.requires_grad
        seen.append(("fake_score", x.clone()))
        return losses(method, nets, batch, x, nimg)

    def counted(method: Toy, *arguments: Any) -> Tensor:
        drawn.append(run.step_index)
        return generate(method, *arguments)

    monkeypatch.setattr(Toy, "image_gradient", of_generator)
    monkeypatch.setattr(Toy, "score_losses", of_score)
    monkeypatch.setattr(Toy, "generate", counted)
    before = weights(run.generator)
    run.step()  # at a learning rate of 0, by the warm-up
    assert torch.equal(weights(run.generator), before)
    run.step()
    run.step()
    assert not torch.equal(weights(run.generator), before)
    assert [name for name, _ in seen[:num_rounds]] == ["generator"] * num_rounds
    steps = [seen[: 2 * num_rounds], seen[2 * num_rounds : 3 * num_rounds], seen[3 * num_rounds :]]
    assert [name for name, _ in steps[1]] == ["fake_score"] * num_rounds
    for step in (steps[0], steps[2]):
        of_each = [[x for name, x in step if name == turn] for turn in ("generator", "fake_score")]
        assert all(torch.equal(*pair) for pair in zip(*of_each, strict=True)), "drawn before the generator changed"
    # For the statistics, and for the update.
    assert [drawn.count(step) for step in range(3)] == [2 * num_rounds, num_rounds, 2 * num_rounds]
    assert run.skipped.made == {"generator": 2, "fake_score": 3}


class SharesLabels(Sid):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.schedule = Schedule(shares="labels")


def test_both_updates_may_share_labels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = {}
    for name, method in (("nothing", Sid), ("labels", SharesLabels)):
        monkeypatch.setitem(methods.METHODS, "sida", method)
        run = toy()
        batches[name] = [run._batch(turn, [0, 2]) for turn in Schedule().order]
    for name, (of_score, of_generator) in batches.items():
        assert torch.equal(of_score.labels, of_generator.labels) == (name == "labels")
        assert torch.equal(of_score.reals(), of_generator.reals()) == (name == "labels")
        draws = [batch.latent.normal((4, 2)) for batch in (of_score, of_generator)]
        assert not torch.equal(*draws)


def test_a_half_life_of_zero_keeps_the_generator_itself() -> None:
    run = toy(ema_halflife_nimg=0)
    run.step()
    assert torch.equal(weights(run.ema), weights(run.generator))


class TwoSteps(Sid):
    """A generator of two steps, of which the second is trained."""

    def generate(self, generator: Denoiser, batch: Batch) -> Tensor:
        with torch.no_grad():
            first = super().generate(generator, batch)
        return generator(first + batch.latent.normal(first.shape), 1.0, batch.labels)


def test_a_generator_may_take_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.METHODS, "sida", TwoSteps)
    run, calls = toy(), list[bool]()
    run.generator.register_forward_hook(lambda net, inputs, images: calls.append(images.requires_grad))
    run.step()
    assert calls == [False, False] * 4 + [False, True] * 4
    assert run.skipped.made == {"fake_score": 1, "generator": 1}


class Guided:
    """Two denoisers as one. Implements as much of `Denoiser` as a teacher needs."""

    def __init__(self, net: Denoiser, guide: Denoiser, scale: float) -> None:
        self.net, self.guide, self.scale, self.spec = net, guide, scale, net.spec

    def __call__(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        guide = self.guide(x, sigma, labels)
        return guide + self.scale * (self.net(x, sigma, labels) - guide)


def test_a_teacher_may_be_a_guided_one() -> None:
    run = toy()
    found = []
    for teacher, guide in ((run.teacher, run.teacher), (run.teacher, run.fake_score)):
        with torch.no_grad():
            for parameter in run.fake_score.parameters():
                parameter.mul_(1.1)
        nets, batch = run._nets("generator", None), run._batch("generator", [0])
        images = run.method.generate(run.generator, batch).detach().requires_grad_()
        guided = replace(nets, teacher=Guided(teacher, guide, 2.0))  # type: ignore[arg-type]
        for looked_through in (nets, guided):
            found.append(run.method.image_gradient(looked_through, run._batch("generator", [0]), images, 0)[1])
    torch.testing.assert_close(found[0], found[1])  # a net that guides itself stays as it is
    assert float((found[2] - found[3]).norm() / found[2].norm()) > 0.1


# What is trained


class WithoutScore(Toy):
    """No fake score: a head alone tells reals."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        how = self.updates["fake_score"].trained["method"]
        self.updates["fake_score"] = Update(trained={"method": how})

    def score_losses(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> Losses:
        assert nets.fake_score is nets.teacher
        losses = super().score_losses(nets, batch, x, nimg)
        return {"head": losses["head"]}


class GeneratorAlone(WithoutScore):
    """Nothing but the generator learns."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        del self.updates["fake_score"]
        self.requires_grad_(False)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Sid, ["fake_score", "generator", "ema", "fake_score_optimizer", "generator_optimizer"]),
        (Toy, ["fake_score", "method", "generator", "ema", "fake_score_optimizer", "generator_optimizer"]),
        (WithoutScore, ["method", "generator", "ema", "method_optimizer", "generator_optimizer"]),
        (GeneratorAlone, ["generator", "ema", "method", "generator_optimizer"]),
    ],
)
def test_checkpoints_hold_what_the_method_trains_and_its_state(
    method: type[Method], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(methods.METHODS, "sida", method)
    run = toy()
    assert list(run.modules()) == expected
    assert (run.fake_score is run.teacher) == ("fake_score" not in expected)
    before = {name: weights(m) for name, m in run.modules().items() if isinstance(m, nn.Module)}
    for _ in range(4):
        run.step()
    changed = [name for name, values in before.items() if not torch.equal(weights(run.modules()[name]), values)]  # type: ignore[arg-type]
    assert changed == [name for name in before if method is not GeneratorAlone or name != "method"]
    assert not run.teacher.training


def test_heads_without_an_optimiser_are_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgotten(Toy):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.updates = Sid(self.recipe, self.spec).updates

    monkeypatch.setitem(methods.METHODS, "sida", Forgotten)
    with pytest.raises(AssertionError, match="optimiser"):
        toy()


@pytest.mark.usefixtures("toy_mode")
def test_heads_start_from_the_seed_and_leave_the_global_state_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (methods.of(toy(seed=seed).recipe, toy().teacher.spec) for seed in (5, 5, 6))
    torch.random.set_rng_state(state)
    methods.of(first.recipe, first.spec)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


@pytest.mark.usefixtures("toy_mode")
def test_the_images_at_a_time_are_found_by_trying_where_the_generator_steps_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, untouched = toy(), toy()
    losses, tried = Toy.score_losses, list[int]()

    def limited(method: Toy, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> Losses:
        tried.append(batch.num_micro_batches)
        if batch.num_micro_batches > 2:
            raise torch.OutOfMemoryError
        return losses(method, nets, batch, x, nimg)

    with monkeypatch.context() as patch:
        patch.setattr(Toy, "score_losses", limited)
        assert run.fit_batch_per_device(roomy, stopped_clock).size == run.recipe.batch_size // 2
    assert list(dict.fromkeys(tried)) == [4, 2, 1]
    untouched.passes = run.passes
    for training in (run, untouched):
        training.step()
        training.step()
    assert torch.equal(weights(run.generator), weights(untouched.generator))
    assert torch.equal(weights(run.method), weights(untouched.method))


# Sums over the batch, and loss scales


@pytest.mark.usefixtures("toy_mode")
def test_statistics_are_sums_over_the_whole_batch_however_it_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    observed: list[Mapping[str, Tensor]] = []
    monkeypatch.setattr(Toy, "observe", lambda method, sums: observed.append(sums))
    expected = 0.0
    for at_once in (1, 2, 4):
        run = toy()
        run.passes = [range(start, start + at_once) for start in range(0, 4, at_once)]
        if at_once == 4:
            nets, batch = run._nets("generator", None), run._batch("generator", range(4))
            images = run.method.generate(run.generator, run._batch("generator", range(4)))
            expected = float(run.method.measure(nets, batch, images, 0)["distance"])
        run.step()
        run.step()  # in which the generator has no turn
    assert len(observed) == 3
    for sums in observed:
        assert sorted(sums) == ["distance", "num_images"]
        assert float(sums["num_images"]) == 8
        assert sums["distance"].dtype == torch.float64
        assert float(sums["distance"]) == pytest.approx(expected, rel=1e-5)


def test_statistics_of_all_processes_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.METHODS, "sida", Toy)
    run = toy()
    alone = run._statistics(None)
    instead_of(ranks.all_reduce_sum, lambda values: values.mul_(2), monkeypatch)
    assert {name: float(2 * value) for name, value in alone.items()} == {
        name: float(value) for name, value in run._statistics(None).items()
    }


@pytest.mark.parametrize("method", [Sid, Toy])
@pytest.mark.parametrize("turn", ["fake_score", "generator"])
def test_a_loss_scale_changes_no_bit_of_float32_gradients(
    method: type[Method], turn: Turn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of losses with a graph, and of directions without one."""
    monkeypatch.setitem(methods.METHODS, "sida", method)
    found = []
    for scale in (None, LossScale(1 << 14, torch.device("cpu"))):
        run = toy()
        run.nimg = 10**6
        with torch.no_grad():
            for parameter in run.fake_score.parameters():
                parameter.mul_(1.1)
        run.sides[turn].loss_scale = scale
        compute_gradients(run, turn)
        found.append(torch.cat([gradients_of(module) for module in run.sides[turn].modules.values()]))
    assert bool(found[0].any())
    assert torch.equal(*found)


# Clipping and optimisers


def with_gradients(*gradients: list[float]) -> tuple[dict[str, nn.Module], dict[str, Optimisation]]:
    """Modules of one weight with these gradients, and an Adam for each."""
    modules: dict[str, nn.Module] = {}
    for index, gradient in enumerate(gradients):
        modules[str(index)] = nn.Linear(len(gradient), 1, bias=False)
        modules[str(index)].get_parameter("weight").grad = torch.tensor([gradient])
    return modules, {name: Optimisation(lr=0.1) for name in modules}


def stepped_by(optimizer: torch.optim.Optimizer) -> list[float]:
    """Magnitudes of the gradients that a first step took, from Adam's second moments."""
    moments = torch.cat([state["exp_avg_sq"].flatten() for state in optimizer.state.values()])
    return [round(value, 4) for value in (moments / 0.001).sqrt().tolist()]


@pytest.mark.parametrize(("clip_norm", "expected"), [(None, [3, 4, 12]), (20.0, [3, 4, 12]), (6.5, [1.5, 2, 6])])
def test_the_norm_of_all_modules_of_an_update_is_clipped_together(
    clip_norm: float | None, expected: list[float]
) -> None:
    modules, trained = with_gradients([3.0, -4.0], [12.0])
    side = Side(Update(trained=trained, clip_norm=clip_norm), modules, normalizes=False, loss_scale=None)
    assert bool(side.step(0))
    assert stepped_by(side.optimizer) == expected


def test_an_update_of_which_one_module_has_a_bad_gradient_is_skipped_in_all() -> None:
    modules, trained = with_gradients([1.0], [float("nan")])
    before = weights(modules["0"])
    side = Side(Update(trained=trained, clip_norm=1.0), modules, normalizes=False, loss_scale=None)
    assert not bool(side.step(0))
    assert torch.equal(weights(modules["0"]), before)


def test_weights_that_decay_are_stepped_by_adamw_others_by_adam() -> None:
    values = torch.tensor([[1.0, -2.0, 0.5]])
    for decay, reference in ((0.0, torch.optim.Adam), (0.1, torch.optim.AdamW)):
        nets = [nn.Linear(3, 1, bias=False) for _ in range(2)]
        for net in nets:
            nn.init.ones_(net.weight)
        how = Optimisation(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-7, weight_decay=decay)
        expected = reference(nets[1].parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-7, weight_decay=decay)
        ours = adam({"net": (nets[0], how)})
        for step in range(3):
            for net in nets:
                net.weight.grad = values * (step + 1)
            apply_gradients(ours, None)
            expected.step()
        torch.testing.assert_close(nets[0].weight, nets[1].weight, rtol=1e-6, atol=0)


def test_the_learning_rate_of_each_module_grows_from_zero_over_its_own_warm_up() -> None:
    modules, trained = with_gradients([1.0], [1.0])
    trained["1"] = replace(trained["1"], lr=0.4, warm_up_nimg=100)
    side = Side(Update(trained=trained), modules, normalizes=False, loss_scale=None)
    seen = []
    for nimg in (0, 25, 100, 150):
        before = weights(nn.ModuleList(modules.values()))
        for module in modules.values():
            module.get_parameter("weight").grad = torch.ones(1, 1)
        side.step(nimg)
        seen.append((before - weights(nn.ModuleList(modules.values()))).tolist())
    assert seen == [pytest.approx(each, abs=1e-5) for each in ([0.1, 0], [0.1, 0.1], [0.1, 0.4], [0.1, 0.4])]
