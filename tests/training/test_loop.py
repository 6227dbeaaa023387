"""The loop around training steps, with a toy in the place of a trainer: what it keeps, and how it goes on."""

import dataclasses
import hashlib
import itertools
import json
import math
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from sidactl.errors import SidaError
from sidactl.methods.base import Optimisation
from sidactl.store import LiveDir, Store
from sidactl.training import checkpoints as training_checkpoints
from sidactl.training import loop, updates
from sidactl.training import state as training_state

BATCH = 10
SCHEDULE = training_state.Schedule(
    duration_nimg=120, evaluate_every_nimg=30, checkpoint_every_nimg=40, report_every_steps=3, stop_if_nan_steps=3
)


class Toy:
    """Implements `Training`: a weight matrix, drawn to and fro by gradients that are functions of the step alone."""

    def __init__(self, *, bad_gradients: range = range(0), poisoned: int | None = None) -> None:
        torch.manual_seed(0)
        self.net, self.average = nn.Linear(3, 3), nn.Linear(3, 3)
        self.optimizer = updates.adam({"generator": (self.net, Optimisation(lr=0.1, beta1=0.9))})
        self.nimg = self.step_index = 0
        self.so_far = training_state.StepSoFar()
        self.skipped = updates.SkippedSteps()
        self.bad_gradients, self.poisoned = bad_gradients, poisoned

    @property
    def ema(self) -> Any:
        return self.average

    def stage(self) -> str:
        return "toy"

    def modules(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {"generator": self.net, "ema": self.average, "optimizer": self.optimizer}

    def step(self, should_stop: Callable[[], bool] = lambda: False) -> dict[str, Tensor]:
        noise = torch.randn(3, 3, generator=torch.Generator().manual_seed(self.step_index))
        loss = (self.net.weight * noise).sum() + self.net.bias.square().sum()
        (loss * (math.nan if self.step_index in self.bad_gradients else 1)).backward()
        self.skipped.count("generator", updates.apply_gradients(self.optimizer, None))
        with torch.no_grad():
            for mean, parameter in zip(self.average.parameters(), self.net.parameters(), strict=True):
                mean.lerp_(parameter, 0.3)
            if self.step_index == self.poisoned:
                self.net.bias[0] = math.inf
        self.nimg += BATCH
        self.step_index += 1
        return {"loss": loss.detach()[None]}


class Runner:
    """Runs of one command in one live directory; every call is a process of its own, as it were."""

    def __init__(self, live: LiveDir, scores: Mapping[int, float] | None = None) -> None:
        self.live, self.scores = live, scores
        self.toy, self.history = Toy(), training_state.History()
        self.evaluated: list[int] = []

    def evaluate(self, net: Any, should_stop: Callable[[], bool]) -> training_state.Evaluation | None:
        if should_stop():
            return None
        nimg = self.toy.nimg
        self.evaluated.append(nimg)
        score = float(net.weight.detach().norm()) if self.scores is None else self.scores[nimg]
        return training_state.Evaluation(score, b"picture %d" % nimg)

    def start(
        self,
        *,
        schedule: training_state.Schedule = SCHEDULE,
        should_stop: Callable[[], bool] = lambda: False,
        toy: Toy | None = None,
    ) -> Iterator[training_state.Event]:
        self.toy, self.history = toy or Toy(), training_state.History()
        return loop.run(
            cast(Any, self.toy),
            schedule,
            self.live,
            evaluate=self.evaluate,
            should_stop=should_stop,
            history=self.history,
        )

    def run(self, **options: Any) -> list[training_state.Event]:
        return list(self.start(**options))

    def state(self) -> dict[str, Any]:
        """All that must be the same after an interruption as without one, bit for bit."""
        lines = [json.loads(line) for line in (self.live.path / "events.jsonl").read_bytes().splitlines()]
        return {
            "net": loop.weights(self.toy.net),
            "ema": loop.weights(self.toy.average),
            "moments": self.toy.optimizer.state_dict()["state"][0]["exp_avg_sq"].numpy().tobytes(),
            "skipped": (self.toy.skipped.total, self.toy.skipped.in_a_row),
            "history": self.history.scores,
            "best": loop.best_weights(self.history, self.live),
            "previews": {p.name: p.read_bytes() for p in self.live.path.glob("preview-*")},
            "evaluations": [(line["nimg"], line["score"]) for line in lines if line["event"] == "evaluation"],
        }


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveDir]:
    with Store.open(tmp_path / "run").live("key") as directory:
        yield directory


@pytest.fixture
def straight(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What a run that nothing disturbs ends in."""
    with Store.open(tmp_path / "straight").live("key") as directory:
        runner = Runner(directory)
        runner.run()
        yield runner.state()


def test_an_evaluation_without_a_number_is_warned_of_and_leaves_no_picture(live: LiveDir) -> None:
    runner = Runner(live)
    runner.evaluate = lambda net, stop: (  # type: ignore[method-assign]
        training_state.Evaluation(math.nan, None, "no score")
        if runner.toy.nimg == 60
        else training_state.Evaluation(1.0, b"picture")
    )
    events = runner.run()
    assert [(e.nimg, e.values["message"]) for e in events if e.kind == "warning"] == [(60, "no score")]
    assert runner.history.best == (30, 1.0)
    assert math.isnan(runner.history.scores[1][1])
    assert sorted(p.name for p in live.path.glob("preview-*")) == [f"preview-{n:010d}.png" for n in (30, 90, 120)]


def kinds(events: list[training_state.Event], kind: str) -> list[int]:
    return [event.nimg for event in events if event.kind == kind]


def lines_of(live: LiveDir) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (live.path / "events.jsonl").read_bytes()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_evaluations_checkpoints_and_reports_come_when_their_images_are_passed_and_at_the_end(live: LiveDir) -> None:
    events = Runner(live).run(
        schedule=training_state.Schedule(duration_nimg=105, evaluate_every_nimg=25, checkpoint_every_nimg=40)
    )
    assert kinds(events, "evaluation") == [30, 50, 80, 100, 110]
    assert kinds(events, "checkpoint") == [40, 80, 110]
    assert kinds(events, "progress") == [100, 110]
    assert [(line["event"], line["nimg"]) for line in lines_of(live)] == [(e.kind, e.nimg) for e in events]


def test_early_evaluations_and_one_of_the_start_come_beside_the_usual_ones(live: LiveDir, tmp_path: Path) -> None:
    schedule = dataclasses.replace(SCHEDULE, evaluate_early_nimg=(15, 60, 500), evaluates_start=True)
    scores = {0: 0.5, 20: 3.0, 30: 2.0, 60: 1.0, 90: 4.0, 120: 5.0}
    runner = Runner(live, scores)
    events = runner.run(schedule=schedule)
    assert runner.evaluated == [0, 20, 30, 60, 90, 120]
    assert (runner.history.best, runner.history.num_since_best()) == ((0, 0.5), 5)
    assert runner.history.num_since_best(runner.history.scores[-2][0]) == 1
    assert loop.best_weights(runner.history, live) == loop.weights(Toy().average)
    assert kinds(events, "checkpoint") == [40, 80, 120]
    with Store.open(tmp_path / "other").live("key") as directory:
        for end in (0, 20, 50):
            other = Runner(directory, scores)
            stopped = other.run(schedule=schedule, should_stop=lambda end=end, other=other: other.toy.nimg >= end)
            assert kinds(stopped, "interrupted") == [end]
        other = Runner(directory, scores)
        other.run(schedule=schedule)
        assert other.state() | {"evaluations": None} == runner.state() | {"evaluations": None}


@pytest.mark.parametrize(("patience", "end"), [(1, 90), (2, 120), (None, 120)])
def test_patience_ends_a_run_whose_score_gets_no_better(live: LiveDir, patience: int | None, end: int) -> None:
    schedule = dataclasses.replace(SCHEDULE, patience=patience)
    scores = {30: 2.0, 60: 1.0, 90: 3.0, 120: 4.0}
    runner = Runner(live, scores)
    events = runner.run(schedule=schedule)
    assert (runner.toy.nimg, events[-1].nimg) == (end, end)
    told = [event.values["message"] for event in events if event.kind == "note"]
    assert told == (["no better score in the last evaluation (--patience): the run ends here"] if end == 90 else [])
    assert runner.history.best == (60, 1.0)
    again = Runner(live, scores)
    assert kinds(again.run(schedule=schedule), "evaluation") == []
    assert again.history.scores == runner.history.scores


def test_a_report_comes_after_some_seconds_however_few_the_steps(
    live: LiveDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps of a large network take minutes, in which a display would stand at 0%."""
    seconds = itertools.count(0.0, 3.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    schedule = training_state.Schedule(duration_nimg=100, evaluate_every_nimg=100, checkpoint_every_nimg=100)
    assert kinds(Runner(live).run(schedule=schedule), "progress") == [20, 40, 60, 80, 100]


def test_every_evaluation_leaves_a_preview_and_a_line_with_its_score(live: LiveDir) -> None:
    scores = {30: 4.0, 60: 2.0, 90: 3.0, 120: 2.0}
    Runner(live, scores).run()
    assert [(e["nimg"], e["score"]) for e in lines_of(live) if e["event"] == "evaluation"] == [*scores.items()]
    assert {p.name: p.read_bytes() for p in live.path.glob("preview-*")} == {
        f"preview-0000000{nimg:03}.png": b"picture %d" % nimg for nimg in scores
    }


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_best_generator_that_is_damaged_is_told_and_never_taken(live: LiveDir, damage: str) -> None:
    Runner(live).run(should_stop=lambda: False)
    resumed = Runner(live)
    resumed.run()
    (path,) = live.path.glob("best-*.safetensors")
    assert loop.best_weights(resumed.history, live) == path.read_bytes()
    if damage == "flip":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    else:
        path.unlink()
    with pytest.raises(SidaError) as caught:
        loop.best_weights(resumed.history, live)
    told = f"{path} with the best generator is damaged or gone. Put it back, or remove {live.path} to train anew."
    assert (str(caught.value), caught.value.exit_code) == (told, 1)


def test_a_report_holds_mean_losses_since_the_last_one(live: LiveDir) -> None:
    events = Runner(live).run()
    toy, losses = Toy(), []
    for _ in range(12):
        losses.append(float(toy.step()["loss"]))
    told = [event.values["loss"] for event in events if event.kind == "progress"]
    assert told == pytest.approx([sum(losses[i : i + 3]) / 3 for i in range(0, 12, 3)])
    assert {event.values["stage"] for event in events if event.kind == "progress"} == {"toy"}


def test_a_loss_that_only_some_steps_have_is_reported_as_their_mean() -> None:
    steps = [{"fake": [1.0, 1.0]}, {"generator": [4.0, 2.0], "fake": [3.0, 1.0]}, {"fake": [5.0, 1.0]}]
    window = [{name: torch.tensor(values) for name, values in step.items()} for step in steps]
    assert loop._mean(window) == {"fake": 4.0, "generator": 6.0}


def test_the_lowest_score_is_kept_the_first_of_equals_and_never_one_that_is_not_finite(live: LiveDir) -> None:
    runner = Runner(live, {30: math.nan, 60: 2.0, 90: -math.inf, 120: 2.0})
    runner.run()
    assert runner.history.best == (60, 2.0)
    toy = Toy()
    for _ in range(6):
        toy.step()
    assert loop.best_weights(runner.history, live) == loop.weights(toy.average)
    assert safetensors.torch.load(loop.best_weights(runner.history, live)).keys() == toy.average.state_dict().keys()
    assert [e["score"] for e in lines_of(live) if e["event"] == "evaluation"] == [None, 2.0, None, 2.0]


def test_two_checkpoints_with_digests_are_left_and_nothing_half_written(live: LiveDir) -> None:
    Runner(live, {30: 2.0, 60: 1.0, 90: 3.0, 120: 4.0}).run()
    assert sorted(path.name for path in live.path.iterdir()) == [
        "best-0000000060.safetensors",
        "checkpoint-0000000090-2",
        "checkpoint-0000000120-4",
        "events.jsonl",
        "lock",
        *(f"preview-0000000{nimg:03}.png" for nimg in (30, 60, 90, 120)),
    ]


def test_a_checkpoint_is_written_file_by_file_and_read_again_to_the_same_bits(
    live: LiveDir, straight: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the writer holds twice, as tensors and as bytes, is one file, whatever the size of the nets."""
    monkeypatch.setattr(training_checkpoints, "_FILE_BYTES", 64)
    held: list[int] = []

    def watched(tensors: dict[str, Tensor], *rest: Any, **named: Any) -> bytes:
        held.append(sum(tensor.nbytes for tensor in tensors.values()))
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        return save(tensors, *rest, **named)

    save = safetensors.torch.save
    monkeypatch.setattr(safetensors.torch, "save", watched)
    runner = Runner(live)
    stop_at = runner.start(should_stop=lambda: runner.toy.nimg >= 40)
    assert [event.kind for event in stop_at][-1] == "interrupted"
    (newest,) = sorted(live.path.glob("checkpoint-*"))[-1:]
    assert len(list(newest.glob("*.safetensors"))) > 2
    assert max(held) <= 64
    runner.run()
    assert runner.state() == straight


def test_no_finite_score_means_no_best() -> None:
    assert training_state.History([(30, math.nan), (60, math.inf)]).best is None


def test_the_previous_best_is_removed_only_once_no_checkpoint_can_need_it(live: LiveDir) -> None:
    runner, seen = Runner(live, {30: 3.0, 60: 2.0, 90: 1.0, 120: 5.0}), {}
    for event in runner.start():
        if event.kind in ("evaluation", "checkpoint"):
            seen[event.kind, event.nimg] = sorted(int(p.stem[-10:]) for p in live.path.glob("best-*"))
    assert seen == {
        ("evaluation", 30): [30],
        ("checkpoint", 40): [30],
        ("evaluation", 60): [30, 60],
        ("checkpoint", 80): [30, 60],
        ("evaluation", 90): [60, 90],
        ("evaluation", 120): [60, 90],
        ("checkpoint", 120): [60, 90],
    }


def test_best_weights_are_those_of_the_best_score_even_where_a_repeated_evaluation_differs(live: LiveDir) -> None:
    first = Runner(live, {30: 2.0, 60: 1.0})
    for event in first.start():
        if event.kind == "evaluation" and event.nimg == 60:
            break  # killed before the checkpoint at 80
    weights_at_30 = (live.path / "best-0000000030.safetensors").read_bytes()
    again = Runner(live, {60: 9.0, 90: 8.0, 120: 7.0})
    again.run()
    assert again.history.best == (30, 2.0)
    assert loop.best_weights(again.history, live) == weights_at_30


def test_how_often_is_evaluated_does_not_alter_training(live: LiveDir, straight: dict[str, Any]) -> None:
    runner = Runner(live)
    runner.run(schedule=training_state.Schedule(duration_nimg=120, evaluate_every_nimg=10, checkpoint_every_nimg=120))
    assert loop.weights(runner.toy.net) == straight["net"]
    assert loop.weights(runner.toy.average) == straight["ema"]


@pytest.mark.parametrize("nimg", [10, 30, 40, 70, 80, 120])
def test_an_interrupted_run_goes_on_to_the_same_bits(live: LiveDir, straight: dict[str, Any], nimg: int) -> None:
    runner = Runner(live)
    events = runner.run(should_stop=lambda: runner.toy.nimg == nimg)
    assert [(e.kind, e.nimg) for e in events[-2:]] == [("checkpoint", nimg), ("interrupted", nimg)]
    events = runner.run()
    assert (events[0].kind, events[0].nimg) == ("resumed", nimg)
    assert runner.state() == straight


class KilledError(Exception):
    """Stands for the end of the process."""


@dataclass(frozen=True)
class Mortal(LiveDir):
    """A live directory whose process dies when no operation is left to it."""

    left: list[None] = field(default_factory=list)

    def _count(self) -> None:
        if not self.left:
            raise KilledError
        self.left.pop()

    def write(self, name: str, data: Any) -> None:
        self._count()
        super().write(name, data)

    def append(self, name: str, line: bytes) -> None:
        self._count()
        super().append(name, line)

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        self._count()
        with super().folder(name) as folder:
            yield folder
            self._count()

    def remove(self, name: str) -> None:
        self._count()
        super().remove(name)


def test_killed_before_any_of_its_writes_a_run_goes_on_to_the_same_bits(
    tmp_path: Path, straight: dict[str, Any]
) -> None:
    for num_operations in range(100):
        with Store.open(tmp_path / "run").live(f"key{num_operations}") as live:
            mortal = Runner(Mortal(live.path, left=[None] * num_operations))
            with suppress(KilledError):
                mortal.run()
                break
            checkpoints = {path.name for path in live.path.glob("checkpoint-*")}
            runner = Runner(live)
            resumed_at = runner.run()[0].nimg if checkpoints else 0
            runner.run()
            assert resumed_at >= mortal.toy.nimg - SCHEDULE.checkpoint_every_nimg
            assert runner.state() == straight
            told = [(line["event"], line["nimg"]) for line in lines_of(live)]
            assert len(told) == len(set(told))
    assert num_operations > 20


def test_half_a_line_that_a_killed_process_left_is_dropped(live: LiveDir, straight: dict[str, Any]) -> None:
    runner = Runner(live)
    runner.run(should_stop=lambda: runner.toy.nimg == 70)
    with (live.path / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "progress", "nim')
    runner.run()
    assert runner.state() == straight


def test_killed_over_and_over_it_still_arrives(live: LiveDir, straight: dict[str, Any]) -> None:
    runner = Runner(live)
    for length in (7, 3, 5, 4, 6):
        events = runner.start()
        for _ in range(length):
            if next(events, None) is None:
                break
    runner.run()
    assert runner.state() == straight


def test_a_finished_run_asked_again_does_nothing(live: LiveDir, straight: dict[str, Any]) -> None:
    runner = Runner(live)
    runner.run()
    assert [(e.kind, e.nimg) for e in runner.run()] == [("resumed", 120)]
    assert runner.evaluated == [30, 60, 90, 120]
    assert runner.state() == straight


@pytest.mark.parametrize("nimg", [60, 120])
def test_an_evaluation_that_was_given_up_is_made_first_when_the_run_goes_on(
    live: LiveDir, straight: dict[str, Any], nimg: int
) -> None:
    runner = Runner(live)
    calls: list[int] = []

    def stops_during_evaluation() -> bool:
        calls.append(runner.toy.nimg)
        return runner.toy.nimg == nimg

    events = runner.run(should_stop=stops_during_evaluation)
    assert kinds(events, "evaluation") == [n for n in (30, 60, 90) if n < nimg]
    assert events[-1].kind == "interrupted"
    events = runner.run()
    assert [e.kind for e in events[:2]] == ["resumed", "evaluation"]
    assert runner.state() == straight


def test_an_evaluation_that_fails_costs_no_training(live: LiveDir, straight: dict[str, Any]) -> None:
    failing, runner = Runner(live, {}), Runner(live)
    for nimg in (30, 60):
        with pytest.raises(KeyError):
            failing.run()
        assert failing.toy.nimg == nimg
        assert runner.run(should_stop=lambda nimg=nimg: runner.toy.nimg == nimg + 10)[0].nimg == nimg  # type: ignore[misc]
    runner.run()
    assert runner.state() == straight


def test_an_evaluation_that_is_repeated_and_differs_leaves_the_best_of_its_checkpoint(live: LiveDir) -> None:
    first = Runner(live, {30: 3.0, 60: 2.0})
    for event in first.start():
        if event.kind == "evaluation" and event.nimg == 60:
            break
    assert sorted(p.name for p in live.path.glob("checkpoint-*"))[-1] == "checkpoint-0000000060-1"
    again = Runner(live, {60: 9.0, 90: 8.0, 120: 7.0})
    assert [e.values["score"] for e in again.run() if e.kind == "evaluation"] == [9.0, 8.0, 7.0]
    assert again.history.best == (30, 3.0)
    assert loop.best_weights(again.history, live)
    assert [(e["nimg"], e["score"]) for e in lines_of(live) if e["event"] == "evaluation"] == again.history.scores


def flip_a_byte(path: Path, digest: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path, digest: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path, digest: Path) -> None:
    path.write_bytes(b"")


def lose_the_digest(path: Path, digest: Path) -> None:
    digest.unlink()


def damage_the_digest(path: Path, digest: Path) -> None:
    digest.write_bytes(b"\xff" * 64)


def lose_a_file(path: Path, digest: Path) -> None:
    path.unlink()


DAMAGES = [
    (flip_a_byte, "is damaged"),
    (truncate, "is damaged"),
    (empty, "is damaged"),
    (lose_a_file, "is not complete"),
    (lose_the_digest, "has lost its digests"),
    (damage_the_digest, "is not complete"),
]


@pytest.mark.parametrize(("damage", "told"), DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(
    live: LiveDir, straight: dict[str, Any], damage: Callable[[Path, Path], None], told: str
) -> None:
    runner = Runner(live)
    for event in runner.start():
        if event.kind == "checkpoint" and event.nimg == 80:
            break
    newest = live.path / "checkpoint-0000000080-2"
    damage(next(newest.glob("*.safetensors")), newest / "SHA256SUMS")
    events = runner.run()
    assert events[:2] == [
        training_state.Event("resumed", 60),
        training_state.Event(
            "warning", 60, {"message": f"checkpoint-0000000080-2 {told}; going on from the checkpoint at 60 images"}
        ),
    ]
    assert runner.state() == straight


def test_with_both_checkpoints_damaged_it_begins_again_and_says_so(live: LiveDir, straight: dict[str, Any]) -> None:
    runner = Runner(live)
    for event in runner.start():
        if event.kind == "checkpoint" and event.nimg == 80:
            break
    for path in live.path.glob("checkpoint-*"):
        truncate(path / "state.json", path)
    events = runner.run()
    assert [event.values["message"] for event in events if event.kind == "warning"] == [
        "checkpoint-0000000080-2 is damaged; going on from the beginning",
        "checkpoint-0000000060-1 is damaged; going on from the beginning",
    ]
    assert kinds(events, "resumed") == []
    assert runner.state() == straight


# Checkpoints of other versions, and files of others


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a checkpoint's state as another version would have written it, with digests that fit."""
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    digests = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(checkpoint.iterdir())]
    (checkpoint / "SHA256SUMS").write_text("".join(line for line in digests if not line.endswith("  SHA256SUMS\n")))


def as_schema_1(state: dict[str, Any]) -> None:
    for name in ("schema", "updates", "updates_evaluated", "loss_scales"):
        del state[name]


def as_before_digests(state: dict[str, Any]) -> None:
    as_schema_1(state)
    del state["best_sha256"]


def stopped_at_70(live: LiveDir) -> Path:
    runner = Runner(live)
    runner.run(should_stop=lambda: runner.toy.nimg == 70)
    return live.path / "checkpoint-0000000070-2"


def test_a_checkpoint_from_before_schemas_goes_on_to_the_same_bits(live: LiveDir, straight: dict[str, Any]) -> None:
    rewrite(stopped_at_70(live), as_schema_1)
    runner = Runner(live)
    events = runner.run()
    assert events[0] == training_state.Event("resumed", 70)
    assert [event for event in events if event.kind == "warning"] == []
    assert runner.state() == straight


def test_a_checkpoint_from_before_digests_of_the_best_goes_on_to_the_same_bits_with_a_warning(
    live: LiveDir, straight: dict[str, Any]
) -> None:
    rewrite(stopped_at_70(live), as_before_digests)
    runner = Runner(live)
    events = runner.run()
    (best,) = [
        nimg
        for nimg, score in runner.history.scores[:2]
        if (nimg, score) == min(runner.history.scores[:2], key=lambda p: p[1])
    ]
    assert events[:2] == [
        training_state.Event("resumed", 70),
        training_state.Event(
            "warning",
            70,
            {
                "message": "checkpoint-0000000070-2 has no digest of the best generator: "
                f"best-{best:010d}.safetensors is taken as it is"
            },
        ),
    ]
    assert runner.state() == straight


def newer(state: dict[str, Any]) -> None:
    state["schema"] = training_checkpoints.CHECKPOINT_SCHEMA + 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (newer, "its schema is 4, this sidactl reads 3 and older ones"),
        (lambda state: state.pop("nimg"), "it does not say 'nimg'"),
        (lambda state: state.pop("loss_scales"), "it does not say 'loss_scales'"),
        (lambda state: state.update(scores=5), "'int' object is not iterable"),
        (lambda state: state.update(nimg=None), "int() argument must be"),
    ],
)
def test_a_sound_checkpoint_that_cannot_be_read_is_refused_in_a_line_and_stays(
    live: LiveDir, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    checkpoint = stopped_at_70(live)
    rewrite(checkpoint, change)
    with pytest.raises(SidaError) as caught:
        Runner(live).run()
    assert caught.value.message.startswith(f"{checkpoint} cannot be read: {told}")
    assert caught.value.hint == "Go on with the sidactl that wrote it, or begin anew after: sidactl gc --live key"
    assert caught.value.exit_code == 1
    assert checkpoint.exists()


def test_a_checkpoint_with_other_tensors_is_refused_and_names_one(live: LiveDir) -> None:
    """As in the oldest versions, which knew the optimiser's moments by number."""
    checkpoint = stopped_at_70(live)
    (file,) = checkpoint.glob("*.safetensors")
    tensors = safetensors.torch.load(file.read_bytes())
    names = {name: name.replace("optimizer.weight", "optimizer.0") for name in tensors}
    training_checkpoints._save_tensors({names[name]: tensor for name, tensor in tensors.items()}, checkpoint)
    rewrite(checkpoint, as_before_digests)
    with pytest.raises(SidaError) as caught:
        Runner(live).run()
    assert caught.value.message == (
        f"{checkpoint} cannot be read: it holds other tensors than this run (optimizer.0.exp_avg)"
    )


def test_foreign_files_in_a_live_directory_change_nothing(live: LiveDir, straight: dict[str, Any]) -> None:
    checkpoint = stopped_at_70(live)
    shutil.copytree(checkpoint, checkpoint.with_name(f"{checkpoint.name}.bak"))
    shutil.copytree(checkpoint, live.path / "checkpoint-copy-of-mine")
    (live.path / "checkpoint-0000000999-9").write_text("a file")
    with (live.path / "events.jsonl").open("ab") as file:
        for line in ("{}", "[]", "5", "null", '"text"', '{"nimg": null}', '{"nimg": 1e999}', "[" * 5000, "\u00ff"):
            file.write(line.encode("latin-1") + b"\n")
    runner = Runner(live)
    assert runner.run()[0] == training_state.Event("resumed", 70)
    assert runner.state() == straight


def test_a_folder_in_the_place_of_the_events_is_refused_in_a_line(live: LiveDir) -> None:
    stopped_at_70(live)
    events = live.path / "events.jsonl"
    events.unlink()
    events.mkdir()
    with pytest.raises(SidaError) as caught:
        Runner(live).run()
    assert str(caught.value) == f"{events} must be a file, got a folder. Move it away, then repeat the same command."


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_sound_one(live: LiveDir) -> None:
    runner = Runner(live)
    for event in runner.start():
        if event.kind == "checkpoint" and event.nimg == 80:
            break
    truncate(live.path / "checkpoint-0000000080-2" / "state.json", live.path)
    runner.run(should_stop=lambda: runner.toy.nimg == 70)
    assert sorted(p.name for p in live.path.glob("checkpoint-*")) == [
        "checkpoint-0000000060-1",
        "checkpoint-0000000070-2",
    ]


def test_updates_with_a_gradient_that_is_not_finite_are_skipped_counted_and_reported(live: LiveDir) -> None:
    runner = Runner(live)
    events = runner.run(toy=Toy(bad_gradients=range(4, 6)))
    assert [e.values["skipped_steps"] for e in events if e.kind == "progress"] == [0, 2, 2, 2]
    assert runner.toy.skipped.in_a_row == {"generator": 0}
    (report,) = [e for e in lines_of(live) if e["event"] == "progress" and e["nimg"] == 60]
    assert report["skipped_steps"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in runner.toy.net.state_dict().values())


def test_too_many_skipped_updates_in_a_row_stop_the_run_and_keep_the_last_checkpoint(live: LiveDir) -> None:
    runner = Runner(live)
    with pytest.raises(SidaError) as caught:
        runner.run(toy=Toy(bad_gradients=range(6, 100)))
    assert str(caught.value) == (
        "3 updates in a row of the generator had a gradient that is not finite, the last at step 9 (90 images). "
        "The last checkpoint is kept; lower the learning rate or choose another precision."
    )
    assert caught.value.exit_code == 1
    assert runner.run()[0] == training_state.Event("resumed", 80)


@pytest.mark.parametrize(("bad", "stops_at"), [(range(3), 3), (range(9, 12), 12), (range(2, 100), 6)])
def test_a_run_all_of_whose_updates_between_evaluations_were_skipped_stops_with_the_step(
    live: LiveDir, bad: range, stops_at: int
) -> None:
    runner = Runner(live)
    patient = dataclasses.replace(SCHEDULE, stop_if_nan_steps=100)
    with pytest.raises(SidaError) as caught:
        runner.run(toy=Toy(bad_gradients=bad), schedule=patient)
    assert str(caught.value) == (
        f"the last {stops_at - bad.start} updates of the generator, all since the last evaluation, had a gradient that "
        f"is not finite, the last at step {stops_at} ({stops_at * BATCH} images). "
        "The last checkpoint is kept; lower the learning rate or choose another precision."
    )
    assert caught.value.exit_code == 1
    kept = [int(path.name.split("-")[1]) for path in live.path.glob("checkpoint-*")]
    assert all(nimg < stops_at * BATCH for nimg in kept)
    assert bool(kept) == (stops_at > 3)


def test_updates_that_were_made_before_an_interruption_count_for_their_interval(live: LiveDir) -> None:
    """Step 3 was made, 4 and 5 are skipped, and the evaluation comes at 60 images."""
    for old in (False, True):
        runner = Runner(live)
        runner.run(toy=Toy(bad_gradients=range(4, 6)), should_stop=lambda runner=runner: runner.toy.nimg == 50)
        if old:
            rewrite(live.path / "checkpoint-0000000050-1", as_schema_1)
        assert runner.run(toy=Toy(bad_gradients=range(4, 6)))[-1].nimg == 120
        for path in live.path.glob("checkpoint-*"):
            shutil.rmtree(path)


def test_a_run_without_evaluations_all_of_whose_updates_were_skipped_stops_at_its_end(live: LiveDir) -> None:
    toy = Toy(bad_gradients=range(100))
    patient = dataclasses.replace(SCHEDULE, stop_if_nan_steps=100, evaluate_every_nimg=120)
    with pytest.raises(SidaError, match=r"^the last 12 updates of the generator, all since the last evaluation, had"):
        list(
            loop.run(
                cast(Any, toy),
                patient,
                live,
                evaluate=None,
                should_stop=lambda: False,
                history=training_state.History(),
            )
        )


def test_skipped_updates_in_a_row_are_counted_across_an_interruption(live: LiveDir) -> None:
    runner = Runner(live)
    runner.run(toy=Toy(bad_gradients=range(6, 100)), should_stop=lambda: runner.toy.nimg == 80)
    with pytest.raises(SidaError, match=r"^3 updates in a row of the generator .* the last at step 9 \(90 images\)"):
        runner.run(toy=Toy(bad_gradients=range(6, 100)))


@pytest.mark.parametrize(("poisoned", "found_at", "resumed_at"), [(4, 60, 40), (6, 80, 60)])
def test_a_weight_that_is_not_finite_stops_the_run_before_anything_is_kept_of_it(
    live: LiveDir, poisoned: int, found_at: int, resumed_at: int
) -> None:
    runner = Runner(live)
    with pytest.raises(SidaError) as caught:
        runner.run(toy=Toy(poisoned=poisoned))
    assert str(caught.value) == (
        f"weight bias of the generator is not finite at step {found_at // 10} ({found_at} images). "
        "The last checkpoint is kept; lower the learning rate or choose another precision."
    )
    assert caught.value.exit_code == 1
    assert runner.evaluated == [n for n in (30, 60) if n < found_at]
    assert runner.run()[0] == training_state.Event("resumed", resumed_at)


@pytest.mark.parametrize("kind", ["progress", "evaluation", "checkpoint"])
def test_on_a_full_disk_the_run_ends_in_one_line_and_goes_on_once_there_is_space(
    live: LiveDir, straight: dict[str, Any], kind: str
) -> None:
    runner = Runner(live)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    events = runner.start()
    while next(events).nimg < 60:
        pass
    try:
        # 1 kB holds what is told, not a checkpoint; 0 bytes not even a line.
        resource.setrlimit(resource.RLIMIT_FSIZE, (0 if kind == "progress" else 1000, limits[1]))
        if kind == "evaluation":
            (live.path / "best-0000000060.safetensors").unlink(missing_ok=True)
        with pytest.raises(SidaError) as caught:
            list(events)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == (
        f"the run directory {live.path.parents[1]} cannot be written: File too large. "
        "Free some space or choose another with --run DIR."
    )
    assert runner.run()[0] == training_state.Event("resumed", 40)
    assert runner.state() == straight


@pytest.mark.parametrize("written", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("read", [torch.contiguous_format, torch.channels_last])
def test_a_checkpoint_does_not_depend_on_how_tensors_lie_in_memory(
    tmp_path: Path, written: torch.memory_format, read: torch.memory_format
) -> None:
    values = torch.randn(4, 6, 3, 3)
    training_checkpoints._save_tensors({"weight": values.contiguous(memory_format=written)}, tmp_path)
    loaded = torch.zeros(4, 6, 3, 3).contiguous(memory_format=read)
    training_checkpoints._load_tensors({"weight": loaded}, tmp_path)
    assert torch.equal(loaded, values)
