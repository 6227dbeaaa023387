"""The loop around training steps: progress, evaluation, checkpoints and resuming; it never loses work.

What a step does is the trainer's; how a net is scored and who watches come in as arguments.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime

import safetensors.torch
import torch
from torch import Tensor, nn

from sidactl.engine import devices, ranks, sharding, threads
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.store import LiveDir
from sidactl.training.checkpoints import best_name, resume, save_checkpoint
from sidactl.training.state import (
    Evaluate,
    Evaluation,
    Event,
    History,
    Schedule,
    StoppedError,
    Training,
    passed,
    tensors_of,
)

_GO_BACK = "The last checkpoint is kept; lower the learning rate or choose another precision."


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
    score (`best_weights`), `preview-<images>.png`, and `events.jsonl`. A checkpoint is written before every evaluation,
    too, so that one that fails costs no training. On a CPU, with as many threads, a continued run ends in the same bits
    as an uninterrupted one. Of several processes all take the same way through it: one that is told to stop stops all.
    Raises SidaError (exit code 1) when too many updates in a row had to be skipped, or all from one evaluation to the
    next, when a weight is not finite, or where there is a checkpoint that this version cannot read.
    """

    def note(event: Event) -> Event:
        # JSON has no word for NaN and infinity.
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.values.items()}
        line = {"event": event.kind, "nimg": event.nimg, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        live.append("events.jsonl", json.dumps(line | values).encode())
        return event

    def awaits_evaluation() -> bool:
        # Told from the history alone, so that an evaluation that was given up is made first after resuming.
        if evaluate is None or (training.nimg == 0 and not (schedule.evaluates_start and not history.scores)):
            return False
        seen = history.scores[-1][0] if history.scores else 0
        is_last = seen < training.nimg >= schedule.duration_nimg
        return training.nimg == 0 or is_last or schedule.is_evaluation_due(seen, training.nimg)

    def is_over() -> bool:
        gave_up = (
            schedule.patience is not None and history.num_since_best(schedule.patience_from_nimg) >= schedule.patience
        )
        return training.nimg >= schedule.duration_nimg or gave_up

    warnings = resume(training, history, live)
    saved = training.nimg, len(history.scores)

    def save() -> None:
        nonlocal saved
        _refuse_non_finite_weights(training)
        if training.nimg and saved != (position := (training.nimg, len(history.scores))):
            save_checkpoint(training, history, live)
            saved = position

    if training.nimg:
        yield Event("resumed", training.nimg)
    for warning in warnings:
        yield note(warning)
    scales = _scales(training)

    def scale_warnings() -> list[Event]:
        nonlocal scales
        before, scales = scales, _scales(training)
        return [
            note(Event("warning", training.nimg, {"message": _fallen(name, before[name], value)}))
            for name, value in scales.items()
            if value < before[name]
        ]

    window: list[dict[str, Tensor]] = []
    reported_sec = time.monotonic()
    devices.keep_memory()
    while not is_over() or awaits_evaluation():
        before = training.nimg
        if not awaits_evaluation():
            stage = training.stage()
            with threads.one_thread_if(threads.is_small(training.ema)), suppress(StoppedError):
                window.append(training.step(should_stop))
            is_due = ranks.any_rank(time.monotonic() - reported_sec >= schedule.report_every_sec)
            reports = training.nimg >= schedule.duration_nimg or training.step_index % schedule.report_every_steps == 0
            reports = reports or is_due
            if reports or training.skipped.is_readable_without_sync:
                _refuse_divergence(training, schedule.stop_if_nan_steps)
            if reports and window:  # a step that was stopped at once has nothing to report
                values = {"stage": stage, "skipped_steps": sum(training.skipped.total.values()), **_mean(window)}
                window.clear()
                reported_sec = time.monotonic()
                yield note(Event("progress", training.nimg, values))
                yield from scale_warnings()
        if evaluate and awaits_evaluation():
            _refuse_standstill(training, history, is_last=training.nimg >= schedule.duration_nimg)
            save()
            if evaluation := evaluate(training.ema, should_stop):
                yield note(_keep(evaluation, training, history, live))
                if evaluation.warning:
                    yield note(Event("warning", training.nimg, {"message": evaluation.warning}))
        stopping = ranks.any_rank(should_stop())
        is_last = is_over() and not awaits_evaluation()
        if evaluate is None and (is_last or schedule.is_evaluation_due(before, training.nimg)):
            _refuse_standstill(training, history, is_last=is_last)
            history.made = training.skipped.made
        if is_last or stopping or passed(before, training.nimg, schedule.checkpoint_every_nimg):
            save()
            if training.nimg:
                yield note(Event("checkpoint", training.nimg))
        if is_last and training.nimg < schedule.duration_nimg:
            count = "the last evaluation" if schedule.patience == 1 else f"{schedule.patience} evaluations"
            message = f"no better score in {count} (--patience): the run ends here"
            yield note(Event("note", training.nimg, {"message": message}))
        if stopping:
            yield from scale_warnings()
            yield note(Event("interrupted", training.nimg))
            return


def _keep(evaluation: Evaluation, training: Training, history: History, live: LiveDir) -> Event:
    """Enters an evaluation into the history; a new best is written beside the old one, which goes with a checkpoint."""
    nimg, score = training.nimg, evaluation.score
    history.scores.append((nimg, score))
    for name, value in evaluation.also.items():
        history.also.setdefault(name, []).append((nimg, value))
    history.made = training.skipped.made
    if evaluation.preview:
        live.write(f"preview-{nimg:010d}.png", evaluation.preview)
    if history.best == (nimg, score):
        best = weights(training.ema, is_writer=live.is_writer)
        history.best_sha256 = ranks.broadcast_from_rank0(lambda: hashlib.sha256(best).hexdigest())
        live.write(best_name(nimg), best)
    return Event("evaluation", nimg, {"score": score, **evaluation.also})


def best_weights(history: History, live: LiveDir) -> bytes:
    """The state dict of the best EMA net, as safetensors bytes. Raises SidaError where its file is damaged or gone."""
    assert history.best is not None
    path = live.path / best_name(history.best[0])
    best = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(best).hexdigest() != history.best_sha256:
        hint = f"Put it back, or remove {live.path} to train anew."
        raise SidaError(f"{path} with the best generator is damaged or gone", hint, exit_code=EXIT_FAILED)
    return best


def weights(net: nn.Module, *, is_writer: bool = True) -> bytes:
    """The net's state dict as safetensors bytes, the same bytes for the same weights; all must ask for a sharded one's.

    is_writer: of several processes one alone needs the bytes; the others get none, and hold one tensor at a time.
    """
    held: dict[str, Tensor] = {}
    for name, tensor in net.state_dict().items():
        whole = sharding.whole(tensor.detach())
        if is_writer:
            held[name] = whole.cpu().contiguous()
    return safetensors.torch.save(held) if is_writer else b""


def _mean(window: list[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of what all processes' losses add up to, of each over the steps that have it."""
    names = dict.fromkeys(name for losses in window for name in losses)
    means = torch.stack([torch.stack([s[name].sum() for s in window if name in s]).mean() for name in names])
    return dict(zip(names, ranks.all_reduce_sum(means).tolist(), strict=True))


def _refuse_divergence(training: Training, stop_if_nan_steps: int) -> None:
    for name, count in training.skipped.in_a_row.items():
        if count >= stop_if_nan_steps:
            raise SidaError(
                f"{count} updates in a row of the {name.replace('_', ' ')} had a gradient that is not finite, "
                f"the last at step {training.step_index} ({training.nimg:,} images)",
                _GO_BACK,
                exit_code=EXIT_FAILED,
            )


def _refuse_standstill(training: Training, history: History, *, is_last: bool) -> None:
    """Refuses to go on where all updates of a net since the last evaluation were skipped.

    While a loss scale can still fall that is no sign of divergence, unless the run ends with it.
    """
    in_a_row = training.skipped.in_a_row
    for name, made in training.skipped.made.items():
        falls = _scales(training).get(name, 1.0) > 1.0 and not is_last
        if history.made is not None and made == history.made.get(name, 0) and in_a_row[name] and not falls:
            raise SidaError(
                f"the last {in_a_row[name]} updates of the {name.replace('_', ' ')}, all since the last evaluation, "
                f"had a gradient that is not finite, the last at step {training.step_index} ({training.nimg:,} images)",
                _GO_BACK,
                exit_code=EXIT_FAILED,
            )


def _scales(training: Training) -> dict[str, float]:
    return {name: scale.to_json()["value"] for name, scale in training.skipped.loss_scales.items()}


def _fallen(name: str, before: float, now: float) -> str:
    return (
        f"the {name.replace('_', ' ')} had gradients that are not finite: their updates were skipped, and its loss "
        f"scale fell from {before:g} to {now:g}"
    )


def _refuse_non_finite_weights(training: Training) -> None:
    wrong = next(
        (name for name, tensor in tensors_of(training).items() if not bool(torch.isfinite(tensor).all())), None
    )
    if name := ranks.any_message(wrong):
        net, _, key = name.partition(".")
        raise SidaError(
            f"weight {key} of the {net.replace('_', ' ')} is not finite at step {training.step_index} "
            f"({training.nimg:,} images)",
            _GO_BACK,
            exit_code=EXIT_FAILED,
        )
