"""The loop around training steps: progress, evaluation, checkpoints and resuming; it never loses work.

What a step does is the trainer's; how a net is scored and who watches come in as arguments.
"""

import hashlib
import io
import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn

from sidactl.diffusion import Preconditioned
from sidactl.engine import fitting_threads
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.store import LiveDir

CHECKPOINTS_KEPT = 2
_GO_BACK = "The last checkpoint is kept; lower the learning rate or choose another precision."


class Skipped(Protocol):
    """Counts of updates that were skipped, by net."""

    total: dict[str, int]
    in_a_row: dict[str, int]


class Training(Protocol):
    """What the loop needs: a step, the net that is kept, and everything that a checkpoint must hold."""

    nimg: int
    step_index: int
    ema: Preconditioned

    @property
    def skipped(self) -> Skipped: ...

    def step(self) -> dict[str, Tensor]: ...

    def stage(self) -> str: ...

    def modules(self) -> dict[str, nn.Module | torch.optim.Optimizer]: ...


@dataclass(frozen=True)
class Event:
    """Something worth showing.

    kind is started, resumed, progress, evaluation, checkpoint, warning, interrupted or note.
    """

    kind: str
    nimg: int
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """How good the EMA net is (lower is better), and a picture of what it draws (PNG)."""

    score: float
    preview: bytes


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When the loop does what, in images seen."""

    duration_nimg: int
    evaluate_every_nimg: int
    checkpoint_every_nimg: int
    report_every_steps: int = 10
    max_skipped_steps: int = 20


@dataclass
class History:
    """Every evaluation so far as (images, score), and the best of them, which is never one that is not finite."""

    scores: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[int, float] | None:
        return self.best_up_to(math.inf)

    def best_up_to(self, nimg: float) -> tuple[int, float] | None:
        """The best of the evaluations up to this many images, the first of equals."""
        fitting = [point for point in self.scores if point[0] <= nimg and math.isfinite(point[1])]
        return min(fitting, key=lambda point: point[1], default=None)


Evaluate = Callable[[Preconditioned, Callable[[], bool]], Evaluation | None]
"""scores a net; told by its second argument that it should stop, it may give up and return None"""


def run(
    training: Training,
    schedule: Schedule,
    live: LiveDir,
    *,
    evaluate: Evaluate | None,
    should_stop: Callable[[], bool],
    history: History,
) -> Iterator[Event]:
    """Trains to the end of the schedule, or until should_stop() is true after a step; yields what happened.

    Continues from the newest sound checkpoint in `live`. Leaves there: two checkpoints, the EMA net with the lowest
    score (`best_weights`), `preview-<images>.png`, and `events.jsonl`. On a CPU, with as many threads, a continued run
    ends in the same bits as an uninterrupted one.
    Raises SidaError (exit code 1) when too many updates in a row had to be skipped or a weight is not finite.
    """

    def note(event: Event) -> Event:
        # JSON has no word for NaN and infinity.
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.values.items()}
        live.append("events.jsonl", json.dumps({"event": event.kind, "nimg": event.nimg} | values).encode())
        return event

    def awaits_evaluation() -> bool:
        # Told from the history alone, so that an evaluation that was given up is made first after resuming.
        seen = history.scores[-1][0] if history.scores else 0
        is_last = seen < training.nimg >= schedule.duration_nimg
        return evaluate is not None and (is_last or _passes(seen, training.nimg, schedule.evaluate_every_nimg))

    warnings = _resume(training, history, live)
    if training.nimg:
        yield Event("resumed", training.nimg)
    for warning in warnings:
        yield note(warning)
    window: list[dict[str, Tensor]] = []
    while training.nimg < schedule.duration_nimg or awaits_evaluation():
        before = training.nimg
        if not awaits_evaluation():
            stage = training.stage()
            with fitting_threads(training.ema):
                window.append(training.step())
            _refuse_divergence(training, schedule.max_skipped_steps)
            if training.nimg >= schedule.duration_nimg or training.step_index % schedule.report_every_steps == 0:
                values = {"stage": stage, "skipped_steps": sum(training.skipped.total.values()), **_mean(window)}
                window.clear()
                yield note(Event("progress", training.nimg, values))
        if evaluate and awaits_evaluation():
            _refuse_non_finite_weights(training)
            if evaluation := evaluate(training.ema, should_stop):
                yield note(_keep(evaluation, training, history, live))
        stopping = should_stop()
        is_last = training.nimg >= schedule.duration_nimg and not awaits_evaluation()
        if is_last or stopping or _passes(before, training.nimg, schedule.checkpoint_every_nimg):
            _refuse_non_finite_weights(training)
            save_checkpoint(training, history, live)
            yield note(Event("checkpoint", training.nimg))
        if stopping:
            yield note(Event("interrupted", training.nimg))
            return


def _keep(evaluation: Evaluation, training: Training, history: History, live: LiveDir) -> Event:
    """Enters an evaluation into the history; a new best is written beside the old one, which goes with a checkpoint."""
    nimg, score = training.nimg, evaluation.score
    history.scores.append((nimg, score))
    live.write(f"preview-{nimg:010d}.png", evaluation.preview)
    if history.best == (nimg, score):
        live.write(_best_name(nimg), weights(training.ema))
    return Event("evaluation", nimg, {"score": score})


def best_weights(history: History, live: LiveDir) -> bytes:
    """The state dict of the best EMA net, as safetensors bytes."""
    assert history.best is not None
    return (live.path / _best_name(history.best[0])).read_bytes()


def weights(net: nn.Module) -> bytes:
    """The net's state dict as safetensors bytes, the same bytes for the same weights."""
    return safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()})


def _mean(window: list[dict[str, Tensor]]) -> dict[str, float]:
    names = window[-1].keys()
    return {name: float(torch.stack([s[name].sum() for s in window if name in s]).mean()) for name in names}


def _passes(before: int, after: int, every: int) -> bool:
    return before // every != after // every


def _refuse_divergence(training: Training, max_skipped_steps: int) -> None:
    for name, count in training.skipped.in_a_row.items():
        if count >= max_skipped_steps:
            raise SidaError(
                f"{count} updates in a row of the {name.replace('_', ' ')} had a gradient that is not finite, "
                f"the last at step {training.step_index} ({training.nimg:,} images)",
                _GO_BACK,
                exit_code=EXIT_FAILED,
            )


def _refuse_non_finite_weights(training: Training) -> None:
    for name, module in training.modules().items():
        if isinstance(module, nn.Module):
            for key, tensor in module.state_dict().items():
                if not bool(torch.isfinite(tensor).all()):
                    raise SidaError(
                        f"weight {key} of the {name.replace('_', ' ')} is not finite at step {training.step_index} "
                        f"({training.nimg:,} images)",
                        _GO_BACK,
                        exit_code=EXIT_FAILED,
                    )


def save_checkpoint(training: Training, history: History, live: LiveDir) -> None:
    """Writes the full state beside the older checkpoints, its digest first, then drops all but the newest two."""
    state = {
        "nimg": training.nimg,
        "step_index": training.step_index,
        "skipped": training.skipped.total,
        "skipped_in_a_row": training.skipped.in_a_row,
        "scores": history.scores,
        "modules": {name: module.state_dict() for name, module in training.modules().items()},
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    name, data = f"checkpoint-{training.nimg:010d}.pt", buffer.getbuffer()
    live.write(name + ".sha256", hashlib.sha256(data).hexdigest().encode())
    live.write(name, data)
    # What is newer is a damaged one that was passed over; it must not take the place of a sound one.
    kept = [path for path in _checkpoints(live) if path.name <= name][-CHECKPOINTS_KEPT:]
    for path in _checkpoints(live):
        if path not in kept:
            live.remove(path.name)
            live.remove(path.name + ".sha256")
    bests = {_best_name(best[0]) for path in kept if (best := history.best_up_to(int(path.stem[-10:])))}
    for path in live.path.glob("best-*.safetensors"):
        if path.name not in bests:
            live.remove(path.name)


def _checkpoints(live: LiveDir) -> list[Path]:
    return sorted(live.path.glob("checkpoint-*.pt"))


def _best_name(nimg: int) -> str:
    return f"best-{nimg:010d}.safetensors"


def _resume(training: Training, history: History, live: LiveDir) -> list[Event]:
    """Loads the newest sound checkpoint, if any; returns warnings about the ones passed over."""
    problems: list[str] = []
    for path in reversed(_checkpoints(live)):
        try:
            state = _read_checkpoint(path)
        except _DamagedError as error:
            problems.append(f"{path.name} {error}")
            continue
        for name, module in training.modules().items():
            module.load_state_dict(state["modules"][name])
        training.nimg, training.step_index = state["nimg"], state["step_index"]
        training.skipped.total, training.skipped.in_a_row = state["skipped"], state["skipped_in_a_row"]
        history.scores[:] = [(int(nimg), float(score)) for nimg, score in state["scores"]]
        break
    _forget_events_after(training.nimg, live)
    what = f"the checkpoint at {training.nimg:,} images" if training.nimg else "the beginning"
    return [Event("warning", training.nimg, {"message": f"{told}; going on from {what}"}) for told in problems]


class _DamagedError(Exception):
    """What is wrong with a checkpoint, to be read after its name."""


def _read_checkpoint(path: Path) -> dict[str, Any]:
    digest = path.with_name(path.name + ".sha256")
    if not digest.exists():
        raise _DamagedError("has lost its digest")
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest().encode() != digest.read_bytes():
                raise _DamagedError("is damaged")
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise _DamagedError(f"cannot be read ({type(error).__name__})") from error
    return state


def _forget_events_after(nimg: int, live: LiveDir) -> None:
    events = live.path / "events.jsonl"
    if events.exists():
        kept = [line for line in events.read_bytes().splitlines(keepends=True) if _nimg_of(line) <= nimg]
        live.write("events.jsonl", b"".join(kept))


def _nimg_of(line: bytes) -> float:
    try:
        return int(json.loads(line)["nimg"])
    except ValueError:  # the half line that a killed process left
        return math.inf
