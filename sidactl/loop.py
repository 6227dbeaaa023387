"""The loop around training steps: progress, evaluation, checkpoints and resuming; it never loses work.

What a step does is the trainer's; how a net is scored and who watches come in as arguments.
"""

import hashlib
import io
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn

from sidactl.diffusion import Preconditioned
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.store import LiveDir

CHECKPOINTS_KEPT = 2


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
    """Something worth showing or keeping: kind is resumed, progress, evaluation, checkpoint, warning or interrupted."""

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
    """Every evaluation so far as (images, score), and the best of them."""

    scores: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[int, float] | None:
        finite = [point for point in self.scores if math.isfinite(point[1])]
        return min(finite, key=lambda point: point[1], default=None)


def run(
    training: Training,
    schedule: Schedule,
    live: LiveDir,
    *,
    evaluate: Callable[[Preconditioned], Evaluation] | None,
    should_stop: Callable[[], bool],
    history: History,
) -> Iterator[Event]:
    """Trains to the end of the schedule, or until should_stop() is true after a step; yields what happened.

    Continues from the newest sound checkpoint in `live`. Leaves there: two checkpoints, `best.safetensors` (the EMA
    net with the lowest score, if there are evaluations), `preview-<images>.png`, and `events.jsonl`. On a CPU a
    continued run ends in the same bits as an uninterrupted one.
    Raises SidaError (exit code 1) when too many updates in a row had to be skipped or a weight is not finite.
    """

    def note(event: Event) -> Event:
        line = {"event": event.kind, "nimg": event.nimg, **event.values}
        live.append("events.jsonl", json.dumps(line).encode())
        return event

    damaged = yield from _resume(training, history, live)
    for problem in damaged:
        yield note(Event("warning", training.nimg, {"message": problem}))
    window: list[dict[str, Tensor]] = []
    while training.nimg < schedule.duration_nimg:
        before, stage = training.nimg, training.stage()
        window.append(training.step())
        _refuse_divergence(training, schedule.max_skipped_steps)
        done = training.nimg >= schedule.duration_nimg
        if done or training.step_index % schedule.report_every_steps == 0:
            values = {"stage": stage, "skipped_steps": sum(training.skipped.total.values()), **_mean(window)}
            window.clear()
            yield note(Event("progress", training.nimg, values))
        if evaluate and (done or _passes(before, training.nimg, schedule.evaluate_every_nimg)):
            yield note(_evaluate(training, evaluate, history, live))
        stopping = not done and should_stop()
        if done or stopping or _passes(before, training.nimg, schedule.checkpoint_every_nimg):
            _refuse_non_finite_weights(training)
            save_checkpoint(training, history, live)
            yield note(Event("checkpoint", training.nimg))
        if stopping:
            yield note(Event("interrupted", training.nimg))
            return


def _evaluate(
    training: Training, evaluate: Callable[[Preconditioned], Evaluation], history: History, live: LiveDir
) -> Event:
    _refuse_non_finite_weights(training)
    result = evaluate(training.ema)
    best_so_far = history.best
    history.scores.append((training.nimg, result.score))
    live.write(f"preview-{training.nimg:010d}.png", result.preview)
    if math.isfinite(result.score) and (best_so_far is None or result.score < best_so_far[1]):
        # One atomic replacement: the previous best goes only when the new one is safe.
        live.write("best.safetensors", weights(training.ema))
    return Event("evaluation", training.nimg, {"score": result.score})


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
                f"the last at step {training.step_index} ({training.nimg} images)",
                "The last checkpoint is kept; lower the learning rate or choose another precision.",
                exit_code=EXIT_FAILED,
            )


def _refuse_non_finite_weights(training: Training) -> None:
    for name, module in training.modules().items():
        if isinstance(module, nn.Module):
            for key, tensor in module.state_dict().items():
                if not bool(torch.isfinite(tensor).all()):
                    raise SidaError(
                        f"weight {key} of the {name.replace('_', ' ')} is not finite at step {training.step_index}",
                        "The last checkpoint is kept; lower the learning rate or choose another precision.",
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
    name, data = f"checkpoint-{training.step_index:09d}.pt", buffer.getvalue()
    live.write(name + ".sha256", hashlib.sha256(data).hexdigest().encode())
    live.write(name, data)
    for old in _checkpoints(live)[:-CHECKPOINTS_KEPT]:
        live.remove(old.name)
        live.remove(old.name + ".sha256")


def _checkpoints(live: LiveDir) -> list[Path]:
    return sorted(live.path.glob("checkpoint-*.pt"))


def _resume(training: Training, history: History, live: LiveDir) -> Generator[Event, None, list[str]]:
    """Loads the newest sound checkpoint, if any; returns what was wrong with the ones passed over."""
    problems: list[str] = []
    for path in reversed(_checkpoints(live)):
        digest = path.with_name(path.name + ".sha256")
        data = path.read_bytes()
        if not digest.exists() or hashlib.sha256(data).hexdigest() != digest.read_text():
            problems.append(f"{path.name} is damaged; going on from the one before")
            continue
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        for name, module in training.modules().items():
            module.load_state_dict(state["modules"][name])
        training.nimg, training.step_index = state["nimg"], state["step_index"]
        training.skipped.total, training.skipped.in_a_row = state["skipped"], state["skipped_in_a_row"]
        history.scores[:] = [(int(nimg), float(score)) for nimg, score in state["scores"]]
        _forget_events_after(training.nimg, live)
        yield Event("resumed", training.nimg)
        return problems
    _forget_events_after(-1, live)
    return problems


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
