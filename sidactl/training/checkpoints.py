"""Checkpoints: written whole, verified, gone on from."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sidactl.digests import file_sha256
from sidactl.engine import ranks
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.store import LiveDir
from sidactl.store.events import nimg_of
from sidactl.training.state import Event, History, StepSoFar, Training, tensors_of

CHECKPOINTS_KEPT = 2

CHECKPOINT_SCHEMA = 3
"""of a checkpoint's state.json; 1 says no number, lacks loss scales and counts of updates, or the best's digest, too; 2
is of whole steps, as most are"""

_FILE_BYTES = 1 << 28
"""of tensors in one file of a checkpoint, unless a single one is larger"""

_STATE, _DIGESTS = "state.json", "SHA256SUMS"


def save_checkpoint(training: Training, history: History, live: LiveDir) -> None:
    """Writes the full state beside the older checkpoints, complete or not at all, then drops all but the newest two.

    A checkpoint is a folder of safetensors files, a part by each process, which any number of processes can read.
    """
    # The same images with more evaluations are another checkpoint: one never takes the place of another.
    name = f"checkpoint-{training.nimg:010d}-{len(history.scores)}"
    with live.folder(name) as folder:
        ranks.barrier()  # the folder is there
        _save_tensors(tensors_of(training, parts=False), folder)
        if ranks.rank_and_size()[0] == 0:
            state = {
                "schema": 2 if training.so_far == StepSoFar() else CHECKPOINT_SCHEMA,
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
                **({"step_so_far": asdict(training.so_far)} if training.so_far != StepSoFar() else {}),
            }
            (folder / _STATE).write_text(json.dumps(state))
            (folder / _DIGESTS).write_text("".join(f"{file_sha256(p)}  {p.name}\n" for p in sorted(folder.iterdir())))
    ranks.barrier()  # it is in its place
    if not live.is_writer:
        return
    # What is newer is a damaged one that was passed over; it must not take the place of a sound one.
    there = _checkpoints(live)
    newest_of = {_position_of(path)[0]: path for path in there[: there.index(live.path / name) + 1]}
    kept = list(newest_of.values())[-CHECKPOINTS_KEPT:]
    for path in there:
        if path not in kept:
            live.remove(path.name)
    bests = {best_name(best[0]) for path in kept if (best := history.best_of_first(_position_of(path)[1]))}
    for path in live.path.glob("best-*.safetensors"):
        if path.name not in bests:
            live.remove(path.name)


def _save_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    class Contiguous(DefaultSavePlanner):
        """Lays a tensor out as safetensors has it, the one alone that is written next."""

        def transform_object(self, write_item: Any, object: Any) -> Any:
            found = super().transform_object(write_item, object)
            return found.contiguous() if isinstance(found, Tensor) else found

    with _carrying_os_errors():
        writer = HuggingFaceStorageWriter(str(folder), _files_of(tensors), save_distributed=True)
        save(
            tensors,
            storage_writer=writer,
            planner=Contiguous(),
            process_group=ranks.patient_group(),
            no_dist=ranks.rank_and_size()[1] == 1,
        )


def _files_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file, from 1 on, that each tensor goes to: each file is held twice in memory when written."""
    files, file, size_bytes = dict[str, int](), 1, 0
    for name, tensor in tensors.items():
        if size_bytes and size_bytes + tensor.nbytes > _FILE_BYTES:
            file, size_bytes = file + 1, 0
        files[name] = file
        size_bytes += tensor.nbytes
    return files


def _load_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Reads into the tensors, in their places."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _carrying_os_errors():
        reader = HuggingFaceStorageReader(str(folder))
        group = ranks.patient_group()
        load(tensors, storage_reader=reader, process_group=group, no_dist=ranks.rank_and_size()[1] == 1)


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


_CHECKPOINT = re.compile(r"checkpoint-[0-9]{10,15}-[0-9]{1,9}")


def _checkpoints(live: LiveDir) -> list[Path]:
    """From the oldest to the newest; what has another name, such as a copy with .bak, is none of ours."""
    found = [path for path in live.path.iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_position_of)


def _position_of(checkpoint: Path) -> tuple[int, int]:
    """The images seen, and the evaluations made."""
    nimg, num_scores = checkpoint.name.split("-")[1:]
    return int(nimg), int(num_scores)


def best_name(nimg: int) -> str:
    return f"best-{nimg:010d}.safetensors"


def resume(training: Training, history: History, live: LiveDir) -> list[Event]:
    """Loads the newest sound checkpoint, if any; returns warnings about the ones passed over, and what it lacks.

    Damaged ones are passed over. Raises SidaError for one that is sound and cannot be read: it holds somebody's work.
    """
    problems: list[str] = []
    warnings: list[str] = []
    for path in reversed(_checkpoints(live)):
        if problem := ranks.broadcast_from_rank0(lambda path=path: _problem_of(path)):  # type: ignore[misc]
            problems.append(f"{path.name} {problem}")
            continue
        tensors = tensors_of(training, parts=False)
        if reason := ranks.broadcast_from_rank0(lambda path=path, tensors=tensors: _reason_to_refuse(path, tensors)):  # type: ignore[misc]
            hint = f"Go on with the sidactl that wrote it, or begin anew after: sidactl gc --live {live.path.name[:12]}"
            raise SidaError(f"{path} {reason}", hint, exit_code=EXIT_FAILED)
        _load_tensors(tensors, path)
        saved = _Saved.of(path)
        training.nimg, training.step_index = saved.nimg, saved.step_index
        training.so_far = saved.step_so_far
        training.skipped.restore(saved.skipped, saved.in_a_row, saved.made)
        history.scores[:], history.best_sha256 = saved.scores, saved.best_sha256
        history.made, history.also = saved.made_at_evaluation, saved.also
        for name, scale in training.skipped.loss_scales.items():
            if name in saved.loss_scales:
                scale.restore(saved.loss_scales[name])
            else:
                warnings.append(f"{path.name} was written before losses were scaled in float16; from here on they are")
        if history.best and history.best_sha256 is None:
            best = live.path / best_name(history.best[0])
            history.best_sha256 = file_sha256(best) if best.is_file() else None
            warnings.append(f"{path.name} has no digest of the best generator: {best.name} is taken as it is")
        break
    _forget_events_after(training.nimg, history, live)
    what = f"the checkpoint at {training.nimg:,} images" if training.nimg else "the beginning"
    messages = [*(f"{problem}; going on from {what}" for problem in problems), *dict.fromkeys(warnings)]
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
    step_so_far: StepSoFar

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
            step_so_far=StepSoFar(**state.get("step_so_far", {})),
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
        return "" if all(file_sha256(checkpoint / name) == digest for name, digest in digests.items()) else "is damaged"
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
