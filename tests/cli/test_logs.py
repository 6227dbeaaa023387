"""TensorBoard and Weights & Biases: what is written there is what the events say, offline, and only if asked for."""

import sys
from pathlib import Path

import pytest

from sidactl.cli import loggers
from sidactl.errors import SidaError
from sidactl.training.state import Event


def events(run: Path, first: Event) -> list[Event]:
    """Of a run that begins, or goes on, with `first`."""
    started = Event("started", 0, {"title": "distill tiny", "events": str(run / "live" / ("ab" * 32) / "events.jsonl")})
    return [started, first]


def progress(nimg: int, loss: float) -> Event:
    return Event("progress", nimg, {"stage": "SiDA", "skipped_steps": 0, "fake_score_loss": loss})


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="extra dev")
    reader = accumulator.EventAccumulator(str(folder))
    reader.Reload()
    return [(scalar.step, scalar.value) for scalar in reader.Scalars(name)]


def test_tensorboard_has_every_number_at_its_images_and_forgets_what_is_made_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="comes with the extra dev")
    handed_on: list[Event] = []
    first = [*events(tmp_path, progress(10, 4.0)), progress(20, 3.0), Event("evaluation", 20, {"score": float("nan")})]
    again = [*events(tmp_path, Event("resumed", 10)), progress(20, 2.0), Event("evaluation", 30, {"score": 7.0})]
    for run in (first, again):
        with loggers.watching(["tensorboard"], handed_on.append) as watch:
            for event in run:
                watch(event)
    assert handed_on == first + again
    folder = tmp_path / "logs" / ("ab" * 8) / "tensorboard"
    assert scalars(folder, "fake_score_loss") == [(10, 4.0), (20, 2.0)]
    assert scalars(folder, "score") == [(30, 7.0)]


def test_wandb_stays_offline_and_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    class Fake:
        @staticmethod
        def init(**settings: object) -> "Fake":
            told.append(settings)
            return Fake()

        @staticmethod
        def log(numbers: object, step: int) -> None:
            told.append((step, numbers))

        @staticmethod
        def finish() -> None:
            told.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", Fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with loggers.watching(["wandb"], lambda event: None) as watch:
        for event in events(tmp_path, progress(10, 4.0)):
            watch(event)
    assert told[0] == {
        "project": "sidactl",
        "name": "distill tiny abababababababab",
        "id": "abababababababab",
        "dir": str(tmp_path / "logs" / ("ab" * 8) / "wandb"),
        "mode": "offline",
        "resume": "allow",
    }
    assert told[1:] == [(10, {"skipped_steps": 0.0, "fake_score_loss": 4.0, "images": 10}), "finished"]


@pytest.mark.slow
def test_the_real_wandb_takes_a_run_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="comes with the extra dev")
    with loggers.watching(["wandb"], lambda event: None) as watch:
        for event in events(tmp_path, progress(10, 4.0)):
            watch(event)
    assert any(tmp_path.glob("logs/*/wandb/wandb/offline-run-*/run-abababababababab.wandb"))


def test_a_logger_that_is_unknown_or_not_installed_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(SidaError, match=r"^the logger must be one of tensorboard, wandb, got 'mlflow'\."),
        loggers.watching(["mlflow"], print),
    ):
        pass
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(SidaError, match=r"^--log wandb needs a package that is not installed \(wandb\)\. Install it"),
        loggers.watching(["wandb"], print),
    ):
        pass


def test_of_several_processes_the_first_one_alone_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    handed_on: list[Event] = []
    with loggers.watching(["tensorboard"], handed_on.append) as watch:
        for event in events(tmp_path, progress(10, 4.0)):
            watch(event)
    assert len(handed_on) == 2
    assert not (tmp_path / "logs").exists()
