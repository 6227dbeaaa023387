"""Runs that are forced, interrupted or killed go on with the same call, to the same bits."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sidactl import metrics, sampling
from sidactl.commands import running
from sidactl.errors import SidaError
from sidactl.store import Store, rehash
from sidactl.training import loop, state, updates
from tests.commands.conftest import AT_ITS_END, interrupting, never, nothing_is_wrong, refs
from tests.conftest import Finished, instead_of, short_distill
from tests.processes import FORKS


def test_a_run_that_another_process_was_told_to_stop_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    instead_of(loop.run, lambda *arguments, **options: iter([state.Event("interrupted", 64)]), monkeypatch)
    schedule = state.Schedule(duration_nimg=640, evaluate_every_nimg=64, checkpoint_every_nimg=64)
    with Store(tmp_path).live("key") as live, pytest.raises(SidaError) as caught:
        running.run_training(cast(Any, SimpleNamespace(nimg=64)), schedule, live, None, None, {})
    assert caught.value.message == "interrupted at 64 of 640 images; the checkpoint is kept"
    assert caught.value.exit_code == 130


def test_force_asks_again_and_gets_the_same(finished: Finished, fresh_run: Path) -> None:
    shutil.copytree(finished.root, fresh_run, dirs_exist_ok=True)
    events: list[state.Event] = []
    assert short_distill(fresh_run, events.append, force=True) == finished.best
    kinds = [[e.kind for e in told if e.kind != "progress"] for told in (events, finished.events)]  # by the clock
    assert kinds[0] == kinds[1]
    assert nothing_is_wrong(fresh_run)


@pytest.mark.parametrize(
    ("number", "kind", "nimg", "stops_at"),
    [
        (signal.SIGINT, "started", 0, 0),
        (signal.SIGTERM, "checkpoint", 32, 32),
        (signal.SIGINT, "evaluation", 64, 64),
        (signal.SIGTERM, "progress", 96, 96),
        (signal.SIGINT, "checkpoint", 96, 96),
    ],
)
def test_a_signal_ends_the_run_after_the_pass_and_the_same_call_goes_on(
    finished: Finished, fresh_run: Path, number: int, kind: str, nimg: int, stops_at: int
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    seen: list[state.Event] = []
    with pytest.raises(SidaError) as caught:
        short_distill(fresh_run, interrupting(number, kind, nimg, seen))
    assert caught.value.exit_code == 130
    assert str(caught.value) == (
        f"interrupted at {stops_at} of 96 images; {'the checkpoint is kept' if stops_at else 'no step was done yet'}. "
        "Repeat the same command to go on."
    )
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert list(rehash(Store.open(fresh_run))) == []
    again: list[state.Event] = []
    assert short_distill(fresh_run, again.append) == finished.best
    begun = [("started", 0), *([("resumed", stops_at)] if stops_at else [])]
    assert [(e.kind, e.nimg) for e in again[: len(begun)]] == begun
    assert nothing_is_wrong(fresh_run)


def test_a_second_signal_acts_as_usual(fresh_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(running.REPEATS_SEC, signal.SIGINT, 0.0)

    def watch(event: state.Event) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):  # the second one comes with the second event
        short_distill(fresh_run, watch, evaluate_every_nimg=16)


def test_sigterm_that_comes_twice_in_a_row_loses_no_checkpoint(finished: Finished, fresh_run: Path) -> None:
    """As where a cluster sends it to every process, and torchrun sends it on."""
    seen: list[state.Event] = []

    def watch(event: state.Event) -> None:
        seen.append(event)
        if event.kind == "checkpoint":
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SidaError, match=r"^interrupted at 32 of 96 images; the checkpoint is kept\. Repeat"):
        short_distill(fresh_run, watch)
    assert [(e.kind, e.nimg) for e in seen][-1] == ("interrupted", 32)
    assert short_distill(fresh_run) == finished.best


@pytest.mark.parametrize(("number", "repeats_sec"), [(signal.SIGTERM, 10.0), (signal.SIGINT, 1.0)])
def test_a_signal_acts_as_usual_once_it_is_no_repetition(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, repeats_sec: float
) -> None:
    now = iter([100.0, 100.0 + repeats_sec - 0.1, 100.0 + repeats_sec])
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: next(now)))
    usual = signal.signal(number, signal.default_int_handler)
    try:
        with running._stop_on_signals() as should_stop:
            for _ in range(2):
                os.kill(os.getpid(), number)
                assert should_stop()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    finally:
        signal.signal(number, usual)


@pytest.mark.slow  # a CPU takes its time over float16; training/test_trainer.py does the same with a smaller net
def test_a_float16_run_goes_on_to_the_same_bits_with_a_loss_scale_that_was_falling(
    fresh_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So large a scale at the start that the first updates overflow.
    monkeypatch.setattr(updates, "IMAGES_PER_LOSS_SCALE", 2.0**-8)
    options = {"precision": "fp16", "duration_nimg": 64, "evaluate_every_nimg": 64, "evaluate_num": 2, "batch_size": 8}
    other = Path(shutil.copytree(fresh_run, tmp_path / "other"))
    straight = short_distill(fresh_run, **options)
    with pytest.raises(SidaError):
        short_distill(other, interrupting(signal.SIGINT, "started", 0, []), **options)
    (checkpoint,) = other.glob("live/*/checkpoint-0000000008-0")
    scales = json.loads((checkpoint / "state.json").read_text())["loss_scales"]
    assert scales["generator"] == {"value": 1024.0, "good_updates": 0}
    assert short_distill(other, **options).oid == straight.oid


def test_a_signal_during_an_evaluation_acts_at_once_and_the_evaluation_is_made_later(
    finished: Finished, fresh_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, batches = sampling.Samples.shared, []

    def interrupted(samples: sampling.Samples, first: int = 0) -> Any:
        for batch in shared(samples, first):
            batches.append(batch)
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch
            raise AssertionError("the evaluation goes on")

    seen: list[state.Event] = []
    with monkeypatch.context() as patched:
        patched.setattr(sampling.Samples, "shared", interrupted)
        with pytest.raises(SidaError, match=r"^interrupted at 32 of 96 images; the checkpoint is kept\."):
            short_distill(fresh_run, seen.append)
    assert len(batches) == 1
    assert "evaluation" not in {event.kind for event in seen}
    assert short_distill(fresh_run) == finished.best


def test_an_interrupted_force_goes_on_too_and_the_old_answer_stays_meanwhile(
    finished: Finished, fresh_run: Path
) -> None:
    shutil.copytree(finished.root, fresh_run, dirs_exist_ok=True)
    with pytest.raises(SidaError):
        short_distill(fresh_run, interrupting(signal.SIGINT, "checkpoint", 64, []), force=True)
    assert short_distill(fresh_run, never) == finished.best
    seen: list[state.Event] = []
    assert short_distill(fresh_run, seen.append, force=True) == finished.best
    assert (seen[1].kind, seen[1].nimg) == ("resumed", 64)
    assert nothing_is_wrong(fresh_run)


def test_a_signal_while_the_teacher_is_scored_loses_nothing(fresh_run: Path) -> None:
    seen: list[state.Event] = []
    with pytest.raises(KeyboardInterrupt):
        short_distill(fresh_run, interrupting(signal.SIGINT, "note", 96, seen), evaluate_num=50)
    assert seen[-1].values == {"message": "scoring the teacher on 50 images (35 evaluations each) for comparison"}
    again: list[state.Event] = []
    short_distill(fresh_run, again.append, evaluate_num=50)
    assert [(e.kind, e.nimg) for e in again] == [("started", 0), ("note", 0), ("resumed", 96), ("note", 96)]
    assert again[1].values["message"] == (
        "at the end the teacher is scored, too, on 50 images of 35 evaluations each; --teacher-score none leaves that "
        "out"
    )
    assert nothing_is_wrong(fresh_run)


def test_other_recipe_values_are_another_question_and_leave_an_interrupted_run_alone(
    finished: Finished, fresh_run: Path
) -> None:
    with pytest.raises(SidaError):
        short_distill(fresh_run, interrupting(signal.SIGINT, "checkpoint", 32, []))
    (key,) = os.listdir(fresh_run / "live")
    before = sorted(path.name for path in (fresh_run / "live" / key).iterdir())
    seen: list[state.Event] = []
    other = short_distill(fresh_run, seen.append, generator_lr=1e-4, **AT_ITS_END)
    assert other.oid != finished.best.oid
    assert "resumed" not in {event.kind for event in seen}
    assert sorted(path.name for path in (fresh_run / "live" / key).iterdir()) == before
    assert short_distill(fresh_run) == finished.best


def test_the_same_distillation_twice_at_once_is_refused(fresh_run: Path) -> None:
    told: list[str] = []

    def watch(event: state.Event) -> None:
        with pytest.raises(SidaError) as caught:
            short_distill(fresh_run, never)
        key = Path(event.values["events"]).parent.name
        assert caught.value.exit_code == 1
        told.append(str(caught.value).replace(key[:12], "KEY"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        short_distill(fresh_run, watch)
    assert told == [f"run KEY is already being worked on by process {os.getpid()}. Wait for it, or stop it first."]


def test_a_run_whose_gradients_are_not_finite_stops_and_names_the_step(fresh_run: Path) -> None:
    with pytest.raises(SidaError) as caught:
        short_distill(fresh_run, fake_score_lr=1e30, stop_if_nan_steps=3, evaluate_every_nimg=96)
    assert str(caught.value) == (
        "3 updates in a row of the generator had a gradient that is not finite, the last at step 3 (48 images). "
        "The last checkpoint is kept; lower the learning rate or choose another precision."
    )
    assert caught.value.exit_code == 1


def test_a_score_that_is_not_finite_is_written_as_null_and_never_the_best(
    fresh_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([3.0, 2.0, float("nan")])
    instead_of(metrics.frechet_distance, lambda *statistics: next(scores), monkeypatch)
    best = short_distill(fresh_run, checkpoint_every_nimg=96)
    last = Store.open(fresh_run).resolve("generator/last")
    assert best.results["scores"] == last.results["scores"] == [[32, 3.0], [64, 2.0], [96, None]]
    assert (best.results["images_seen"], best.results["selection_score"]) == (64, 2.0)
    assert (last.results["images_seen"], last.results["selection_score"]) == (96, None)


def test_a_run_without_a_finite_score_is_told_in_one_line(fresh_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of(metrics.frechet_distance, lambda *statistics: float("inf"), monkeypatch)
    with pytest.raises(SidaError) as caught:
        short_distill(fresh_run, **AT_ITS_END)
    assert str(caught.value) == "no evaluation gave a finite score. Lower the learning rate."
    assert caught.value.exit_code == 1


def die_before(num_operations: int, root: Path) -> None:
    """Distills; dies by SIGKILL before it moves or removes its n-th file."""
    left = iter(range(num_operations))

    def mortal(operation: Callable[..., Any]) -> Callable[..., Any]:
        def operate(*arguments: Any, **options: Any) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **options)

        return operate

    for name in ("replace", "unlink", "rmdir"):
        setattr(os, name, mortal(getattr(os, name)))
    short_distill(root)


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a distillation that was trained to its end, but of which nothing is stored yet."""
    root = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("trained") / "run"))
    with pytest.raises(SidaError):
        short_distill(root, interrupting(signal.SIGINT, "checkpoint", 96, []))
    return root


def assert_finishes_although_killed(finished: Finished, trained: Path, root: Path, num_operations: int) -> bool:
    """Kills one process in the last part of its work and repeats it; False once there was nothing left to kill."""
    shutil.copytree(trained, root)
    process = FORKS.Process(target=die_before, args=(num_operations, root))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    assert list(rehash(Store.open(root))) == []
    assert short_distill(root) == finished.best
    named = {k: v for k, v in refs(finished.root).items() if not k.startswith("detector/")}  # others' detectors, too
    assert named.items() <= refs(root).items()
    assert nothing_is_wrong(root)
    return process.exitcode != 0


@pytest.mark.parametrize("first", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_anywhere_between_training_and_its_end_the_same_call_finishes(
    finished: Finished, trained: Path, tmp_path: Path, first: int
) -> None:
    step = 11 if first == 0 else 1
    n = first
    while assert_finishes_although_killed(finished, trained, tmp_path / str(n), n):
        n += step
    assert n > 30


def distill_quietly(root: Path) -> None:
    short_distill(root)


@pytest.mark.slow  # test_kill.py does the same to the command
@pytest.mark.parametrize("seed", range(15))
def test_killed_at_random_moments_the_same_call_goes_on_to_the_same_oid(
    finished: Finished, fresh_run: Path, seed: int
) -> None:
    moments = random.Random(seed)
    for _ in range(6):
        process = FORKS.Process(target=distill_quietly, args=(fresh_run,))
        process.start()
        process.join(moments.uniform(0.1, 2))
        process.kill()
        process.join()
        assert list(rehash(Store.open(fresh_run))) == []
    assert short_distill(fresh_run) == finished.best
    assert nothing_is_wrong(fresh_run)
