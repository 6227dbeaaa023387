"""The loop around training steps: progress, evaluation, checkpoints and resuming; it never loses work.

What a step does is the trainer's; how a net is scored and who watches come in as arguments.
"""

import hashlib
import json
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn

from sidactl.engine import devices, ranks, sharding, threads
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.nets import Preconditioned
from sidactl.store import LiveDir
from sidactl.store.events import nimg_of

CHECKPOINTS_KEPT = 2
CHECKPOINT_SCHEMA = 2
"""of a checkpoint's state.json; 1 says no number, lacks loss scales and counts of updates, or the best's digest, too"""
_GO_BACK = "The last checkpoint is kept; lower the learning rate or choose another precision."


class LossScale(Protocol):
    """What the losses of a float16 net are multiplied by; falls with updates that are skipped."""

    def to_json(self) -> dict[str, float]: ...

    def restore(self, state: Mapping[str, float]) -> None: ...


class Skipped(Protocol):
    """Counts of updates that were skipped, and of those made, by net; and the loss scales that follow them."""

    @property
    def loss_scales(self) -> Mapping[str, LossScale]: ...

    @property
    def made(self) -> dict[str, int]: ...

    @property
    def total(self) -> dict[str, int]: ...

    @property
    def in_a_row(self) -> dict[str, int]: ...

    def restore(self, total: dict[str, int], in_a_row: dict[str, int], made: dict[str, int]) -> None: ...

    @property
    def is_at_hand(self) -> bool:
        """Whether asking makes nobody wait for a GPU."""
        ...


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
    """How good the EMA net is (lower is better), and a picture of what it draws (PNG).

    A net that draws images which are not finite has the score NaN, no picture, and a warning that says so.
    """

    score: float
    preview: bytes | None
    warning: str | None = None
    also: Mapping[str, float] = field(default_factory=dict)
    """further scores of the same images, by name, for people to look at"""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When the loop does what, in images seen."""

    duration_nimg: int
    evaluate_every_nimg: int
    checkpoint_every_nimg: int
    report_every_steps: int = 10
    report_every_sec: float = 5.0
    """where so many steps take longer"""
    stop_if_nan_steps: int = 20
    evaluate_early_nimg: Sequence[int] = ()
    """further evaluations"""
    evaluates_start: bool = False
    """whether the net is scored before the first step, too"""
    patience: int | None = None
    """evaluations without a better score after which training ends"""
    patience_from_nimg: int = 0
    """those up to so many images do not count for it"""

    def is_evaluation_due(self, before: int, after: int) -> bool:
        """Whether one was due after more than `before` images, up to `after`."""
        is_early = any(before < nimg <= after for nimg in self.evaluate_early_nimg)
        return is_early or _passes(before, after, self.evaluate_every_nimg)


@dataclass
class History:
    """Every evaluation so far as (images, score), and the best of them, which is never one that is not finite."""

    scores: list[tuple[int, float]] = field(default_factory=list)
    best_sha256: str | None = None
    """of the file with the best net's weights"""
    made: Mapping[str, int] | None = field(default_factory=dict)
    """updates of each net up to the last evaluation, or when it was due; None where an older checkpoint does not say"""
    also: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """further scores by name, as `scores`"""

    @property
    def best(self) -> tuple[int, float] | None:
        return self.best_of_first(len(self.scores))

    def best_of_first(self, count: int) -> tuple[int, float] | None:
        """The best of the first so many evaluations, the first of equals."""
        fitting = [point for point in self.scores[:count] if math.isfinite(point[1])]
        return min(fitting, key=lambda point: point[1], default=None)

    def num_since_best(self, from_nimg: int = 0) -> int:
        """Evaluations that came after the best one, and after so many images."""
        later = self.scores[self.scores.index(self.best) + 1 :] if self.best else self.scores
        return sum(nimg > from_nimg for nimg, _ in later)


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

    warnings = _resume(training, history, live)
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
            with threads.fitting_threads(threads.is_small(training.ema)):
                window.append(training.step())
            is_due = ranks.any_process(time.monotonic() - reported_sec >= schedule.report_every_sec)
            reports = training.nimg >= schedule.duration_nimg or training.step_index % schedule.report_every_steps == 0
            reports = reports or is_due
            if reports or training.skipped.is_at_hand:
                _refuse_divergence(training, schedule.stop_if_nan_steps)
            if reports:
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
        stopping = ranks.any_process(should_stop())
        is_last = is_over() and not awaits_evaluation()
        if evaluate is None and (is_last or schedule.is_evaluation_due(before, training.nimg)):
            _refuse_standstill(training, history, is_last=is_last)
            history.made = training.skipped.made
        if is_last or stopping or _passes(before, training.nimg, schedule.checkpoint_every_nimg):
            save()
            yield note(Event("checkpoint", training.nimg))
        if is_last and training.nimg < schedule.duration_nimg:
            count = "the last evaluation" if schedule.patience == 1 else f"{schedule.patience} evaluations"
            told = f"no better score in {count} (--patience): the run ends here"
            yield note(Event("note", training.nimg, {"message": told}))
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
        best = weights(training.ema)
        history.best_sha256 = hashlib.sha256(best).hexdigest()
        live.write(_best_name(nimg), best)
    return Event("evaluation", nimg, {"score": score, **evaluation.also})


def best_weights(history: History, live: LiveDir) -> bytes:
    """The state dict of the best EMA net, as safetensors bytes. Raises SidaError where its file is damaged or gone."""
    assert history.best is not None
    path = live.path / _best_name(history.best[0])
    best = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(best).hexdigest() != history.best_sha256:
        hint = f"Put it back, or remove {live.path} to train anew."
        raise SidaError(f"{path} with the best generator is damaged or gone", hint, exit_code=EXIT_FAILED)
    return best


def weights(net: nn.Module) -> bytes:
    """The net's state dict as safetensors bytes, the same bytes for the same weights."""
    whole = {name: sharding.whole(tensor.detach()) for name, tensor in net.state_dict().items()}
    return safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in whole.items()})


def _mean(window: list[dict[str, Tensor]]) -> dict[str, float]:
    """The mean over steps of what all processes' losses add up to."""
    means = {name: torch.stack([s[name].sum() for s in window if name in s]).mean() for name in window[-1]}
    values = ranks.summed(torch.stack(list(means.values())))
    return dict(zip(means, values.tolist(), strict=True))


def _passes(before: int, after: int, every: int) -> bool:
    return before // every != after // every


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
    wrong = next((name for name, tensor in _tensors(training).items() if not bool(torch.isfinite(tensor).all())), None)
    if name := ranks.first_told(wrong):
        net, _, key = name.partition(".")
        raise SidaError(
            f"weight {key} of the {net.replace('_', ' ')} is not finite at step {training.step_index} "
            f"({training.nimg:,} images)",
            _GO_BACK,
            exit_code=EXIT_FAILED,
        )


def _tensors(training: Training, *, parts: bool = True) -> dict[str, Tensor]:
    """All that changes in training, by name: nets first, then the optimisers' moments by name of the parameter.

    parts: of what is sharded, the part in this process.
    """
    modules = training.modules()
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Module):
            tensors |= {f"{name}.{key}": value.detach() for key, value in module.state_dict().items()}
    for name, module in modules.items():
        if isinstance(module, torch.optim.Optimizer):
            for group in module.param_groups:
                for key, parameter in zip(group["param_names"], group["params"], strict=True):
                    tensors |= {f"{name}.{key}.{k}": value for k, value in module.state[parameter].items()}
    return {name: sharding.local(tensor) if parts else tensor for name, tensor in tensors.items()}


_STATE, _DIGESTS = "state.json", "SHA256SUMS"


def save_checkpoint(training: Training, history: History, live: LiveDir) -> None:
    """Writes the full state beside the older checkpoints, complete or not at all, then drops all but the newest two.

    A checkpoint is a folder of safetensors files, a part by each process, which any number of processes can read.
    """
    # The same images with more evaluations are another checkpoint: one never takes the place of another.
    name = f"checkpoint-{training.nimg:010d}-{len(history.scores)}"
    with live.folder(name) as folder:
        ranks.agreed(str)  # the folder is there
        _save_tensors(_tensors(training, parts=False), folder)
        if ranks.rank_and_size()[0] == 0:
            state = {
                "schema": CHECKPOINT_SCHEMA,
                "nimg": training.nimg,
                "step_index": training.step_index,
                "skipped": training.skipped.total,
                "skipped_in_a_row": training.skipped.in_a_row,
                "updates": training.skipped.made,
                "updates_evaluated": history.made,
                "loss_scales": {name: scale.to_json() for name, scale in training.skipped.loss_scales.items()},
                "scores": history.scores,
                "best_sha256": history.best_sha256,
                **({"also": history.also} if history.also else {}),
            }
            (folder / _STATE).write_text(json.dumps(state))
            (folder / _DIGESTS).write_text("".join(f"{_sha256(p)}  {p.name}\n" for p in sorted(folder.iterdir())))
    ranks.agreed(str)  # it is in its place
    if not live.is_writer:
        return
    # What is newer is a damaged one that was passed over; it must not take the place of a sound one.
    there = _checkpoints(live)
    newest_of = {_position_of(path)[0]: path for path in there[: there.index(live.path / name) + 1]}
    kept = list(newest_of.values())[-CHECKPOINTS_KEPT:]
    for path in there:
        if path not in kept:
            live.remove(path.name)
    bests = {_best_name(best[0]) for path in kept if (best := history.best_of_first(_position_of(path)[1]))}
    for path in live.path.glob("best-*.safetensors"):
        if path.name not in bests:
            live.remove(path.name)


def _save_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    # safetensors knows no other order in memory
    packed = {name: tensor if sharding.is_sharded(tensor) else tensor.contiguous() for name, tensor in tensors.items()}
    with _carrying_os_errors():
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(packed, storage_writer=writer, no_dist=ranks.rank_and_size()[1] == 1)


def _load_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Reads into the tensors, in their places."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _carrying_os_errors():
        reader = HuggingFaceStorageReader(str(folder))
        load(tensors, storage_reader=reader, no_dist=ranks.rank_and_size()[1] == 1)


@contextmanager
def _carrying_os_errors() -> Iterator[None]:
    """Raises what the disk told one of the processes, which torch wraps; and does not warn of a process alone."""
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            yield
        except CheckpointException as error:
            raise next((e for e, _ in error.failures.values() if isinstance(e, OSError)), error) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_CHECKPOINT = re.compile(r"checkpoint-[0-9]{10,15}-[0-9]{1,9}")


def _checkpoints(live: LiveDir) -> list[Path]:
    """From the oldest to the newest; what has another name, such as a copy with .bak, is none of ours."""
    found = [path for path in live.path.iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_position_of)


def _position_of(checkpoint: Path) -> tuple[int, int]:
    """The images seen, and the evaluations made."""
    nimg, num_scores = checkpoint.name.split("-")[1:]
    return int(nimg), int(num_scores)


def _best_name(nimg: int) -> str:
    return f"best-{nimg:010d}.safetensors"


def _resume(training: Training, history: History, live: LiveDir) -> list[Event]:
    """Loads the newest sound checkpoint, if any; returns warnings about the ones passed over, and what it lacks.

    Damaged ones are passed over. Raises SidaError for one that is sound and cannot be read: it holds somebody's work.
    """
    problems: list[str] = []
    warnings: list[str] = []
    for path in reversed(_checkpoints(live)):
        if problem := ranks.agreed(lambda path=path: _problem_of(path)):  # type: ignore[misc]
            problems.append(f"{path.name} {problem}")
            continue
        tensors = _tensors(training, parts=False)
        if reason := ranks.agreed(lambda path=path, tensors=tensors: _reason_to_refuse(path, tensors)):  # type: ignore[misc]
            hint = f"Go on with the sidactl that wrote it, or begin anew after: sidactl gc --live {live.path.name[:12]}"
            raise SidaError(f"{path} {reason}", hint, exit_code=EXIT_FAILED)
        _load_tensors(tensors, path)
        saved = _Saved.of(path)
        training.nimg, training.step_index = saved.nimg, saved.step_index
        training.skipped.restore(saved.skipped, saved.in_a_row, saved.made)
        history.scores[:], history.best_sha256 = saved.scores, saved.best_sha256
        history.made, history.also = saved.made_at_evaluation, saved.also
        for name, scale in training.skipped.loss_scales.items():
            if name in saved.loss_scales:
                scale.restore(saved.loss_scales[name])
            else:
                warnings.append(f"{path.name} was written before losses were scaled in float16; from here on they are")
        if history.best and history.best_sha256 is None:
            best = live.path / _best_name(history.best[0])
            history.best_sha256 = _sha256(best) if best.is_file() else None
            warnings.append(f"{path.name} has no digest of the best generator: {best.name} is taken as it is")
        break
    _forget_events_after(training.nimg, history, live)
    what = f"the checkpoint at {training.nimg:,} images" if training.nimg else "the beginning"
    messages = [*(f"{told}; going on from {what}" for told in problems), *dict.fromkeys(warnings)]
    return [Event("warning", training.nimg, {"message": message}) for message in messages]


@dataclass(frozen=True)
class _Saved:
    """What a checkpoint says beside its tensors."""

    nimg: int
    step_index: int
    skipped: dict[str, int]
    in_a_row: dict[str, int]
    made: dict[str, int]
    made_at_evaluation: dict[str, int] | None
    loss_scales: dict[str, dict[str, float]]
    scores: list[tuple[int, float]]
    best_sha256: str | None
    also: dict[str, list[tuple[int, float]]]

    @classmethod
    def of(cls, checkpoint: Path) -> "_Saved":
        """Raises ValueError for a newer schema, and what Python raises for other content than ours."""
        state = json.loads((checkpoint / _STATE).read_bytes())
        schema = int(state.get("schema", 1))
        if schema > CHECKPOINT_SCHEMA:
            raise ValueError(f"its schema is {schema}, this sidactl reads {CHECKPOINT_SCHEMA} and older ones")
        evaluated = state["updates_evaluated"] if schema > 1 else None
        return cls(
            nimg=int(state["nimg"]),
            step_index=int(state["step_index"]),
            skipped=_counts(state["skipped"]),
            in_a_row=_counts(state["skipped_in_a_row"]),
            made=_counts(state["updates"]) if schema > 1 else {},
            made_at_evaluation=None if evaluated is None else _counts(evaluated),
            loss_scales=dict(state["loss_scales"]) if schema > 1 else {},
            scores=_points(state["scores"]),
            best_sha256=state["best_sha256"] if schema > 1 else state.get("best_sha256"),
            also={str(name): _points(points) for name, points in state.get("also", {}).items()},
        )


def _points(value: Any) -> list[tuple[int, float]]:
    return [(int(nimg), float(score)) for nimg, score in value]


def _counts(value: Mapping[str, int]) -> dict[str, int]:
    return {str(name): int(count) for name, count in value.items()}


def _reason_to_refuse(checkpoint: Path, tensors: Mapping[str, Tensor]) -> str:
    """Why a sound checkpoint cannot be read into these tensors, to be read after its name; empty where it can."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        _Saved.of(checkpoint)
    except KeyError as error:
        return f"cannot be read: it does not say {error}"
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return f"cannot be read: {error}"
    metadata = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    there = {name: tuple(getattr(entry, "size", ())) for name, entry in metadata.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in there.keys() | ours.keys() if there.get(name) != ours.get(name))
    return f"cannot be read: it holds other tensors than this run ({wrong[0]})" if wrong else ""


def _problem_of(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, to be read after its name; empty where it is sound."""
    try:
        lines = (checkpoint / _DIGESTS).read_text(errors="replace").splitlines()
        digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        if set(digests) != {path.name for path in checkpoint.iterdir()} - {_DIGESTS}:
            return "is not complete"
        return "" if all(_sha256(checkpoint / name) == digest for name, digest in digests.items()) else "is damaged"
    except FileNotFoundError:
        return "has lost its digests"
    except (OSError, ValueError) as error:
        return f"cannot be read ({type(error).__name__})"


def _forget_events_after(nimg: int, history: History, live: LiveDir) -> None:
    events = live.path / "events.jsonl"
    if events.exists() and not events.is_file():
        got = "a folder" if events.is_dir() else "a FIFO or device"
        raise SidaError(f"{events} must be a file, got {got}", "Move it away, then repeat the same command.")
    evaluated = {point[0] for point in history.scores}

    def is_known(line: bytes) -> bool:
        seen = nimg_of(line)
        return seen <= nimg and (json.loads(line).get("event") != "evaluation" or seen in evaluated)

    if events.exists():
        kept = [line for line in events.read_bytes().splitlines(keepends=True) if is_known(line)]
        live.write("events.jsonl", b"".join(kept))
