"""What training a teacher and distilling share: batches, the loop, signals, checks of shapes."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from sidactl.commands.resolve import image_source
from sidactl.errors import EXIT_INTERRUPTED, SidaError
from sidactl.recipes import NetSpec
from sidactl.store import Artifact, LiveDir, Store

if TYPE_CHECKING:
    import torch

    from sidactl.training.batches import MicroBatches, PairSource
    from sidactl.training.state import Evaluate, Event, History, Schedule, Training


OnEvent = Callable[["Event"], None]


def check_trainable(data: Artifact) -> None:
    """Raises SidaError for images of a size that scores take but nets do not."""
    height: Any = data.results["resolution"]
    width: Any = data.results.get("width", height)
    if height is None or (width == height and height & (height - 1) == 0):
        return
    side = 1 << round(math.log2(min(width, height)))
    raise SidaError(
        f"images to train on must be square with a side that is a power of two, got {width}x{height}",
        f"Make a dataset of them with: sidactl prepare-data PATH --resolution {side}x{side}",
    )


def check_fit(got: tuple[int | None, int | None, int] | None, net: NetSpec, whose: str) -> None:
    """Refuses a dataset of this resolution, channels and classes for a network; None = they are not known yet."""
    wanted = (net.img_resolution, net.img_channels, net.label_dim)
    if got and (got[:2] not in (wanted[:2], (None, None)) or net.label_dim not in (0, got[2])):
        raise SidaError(
            f"the dataset must fit the {whose} (resolution, channels, classes = "
            f"{wanted[0]}, {wanted[1]}, {wanted[2]}), got {got[0]}, {got[1]}, {got[2]}",
            "Pass another --dataset, or prepare this one to fit.",
        )


def batches_for(
    store: Store,
    data: Artifact,
    batch_size: int,
    num_rounds: int,
    seed: int,
    device: "torch.device",
    pairs: "PairSource | None" = None,
) -> "MicroBatches":
    from sidactl.data.order import DataOrder
    from sidactl.training import batches

    dataset = image_source(store, data)
    order = DataOrder(dataset.num_images, seed)
    return batches.DatasetBatches(
        dataset, order, batch_size=batch_size, num_rounds=num_rounds, seed=seed, device=device, pairs=pairs
    )


def run_training(
    training: "Training",
    schedule: "Schedule",
    live: LiveDir,
    evaluate: "Evaluate | None",
    watch: OnEvent | None,
    facts: Mapping[str, Any],
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> "History":
    """Runs the loop to its end, passing events on; an interruption leaves a checkpoint and raises, exit code 130."""
    from sidactl.engine import ranks
    from sidactl.training import loop, state

    history, interrupted = state.History(), False
    tell = watch or (lambda event: None)
    with _stop_on_signals() as should_stop:
        began = {**facts, "events": str(live.path / "events.jsonl"), "duration_nimg": schedule.duration_nimg}
        tell(state.Event("started", 0, began))
        for kind, messages in (("warning", warnings), ("note", notes)):
            for message in messages:
                tell(state.Event(kind, 0, {"message": message}))
        events = loop.run(training, schedule, live, evaluate=evaluate, should_stop=should_stop, history=history)
        for event in events:
            tell(event)
            interrupted |= event.kind == "interrupted"
        # Whichever of several processes was asked to stop, all of them have.
        if ranks.any_rank(interrupted or should_stop()):
            kept = "the checkpoint is kept" if training.nimg else "no step was done yet"
            raise SidaError(
                f"interrupted at {training.nimg:,} of {schedule.duration_nimg:,} images; {kept}",
                "Repeat the same command to go on.",
                exit_code=EXIT_INTERRUPTED,
            )
    return history


REPEATS_SEC = {signal.SIGTERM: 10.0, signal.SIGINT: 1.0}
"""one request comes more than once: clusters send SIGTERM to every process of a job, and torchrun sends it on; a
terminal sends SIGINT to all of a pipeline, and `timeout` sends it on"""


@contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Within the block the first SIGINT or SIGTERM makes the yielded function true; the next one acts as usual.

    One within REPEATS_SEC of the first signal is a repetition and goes unheeded.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    first_sec = 0.0

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal first_sec
        if not stop.is_set():
            stop.set()
            first_sec = time.monotonic()
        elif time.monotonic() - first_sec >= REPEATS_SEC[signal.Signals(number)]:
            for each, handler in usual.items():
                signal.signal(each, handler)
            signal.raise_signal(number)

    for number in usual:
        signal.signal(number, ask)
    try:
        yield stop.is_set
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
