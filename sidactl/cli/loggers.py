"""Other places to watch a training run from: TensorBoard, Weights & Biases. Our own record is events.jsonl."""

import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidactl import launch
from sidactl.errors import SidaError

if TYPE_CHECKING:
    from sidactl.training.state import Event


Log = Callable[[int, Mapping[str, float]], None]
"""takes the images seen and numbers by name"""

OnEvent = Callable[["Event"], None]


@contextmanager
def watching(names: Sequence[str], then: OnEvent) -> Iterator[OnEvent]:
    """A watcher that writes the numbers of every event to these loggers, and hands it on to `then`.

    Each has a folder of its own, logs/<run>/<name> in the run directory, which a run that goes on writes on in. Of
    several processes only the first one writes. Raises SidaError for a logger that is not known or not installed.
    """
    check(names)
    for name in names:
        _import(name)
    with ExitStack() as stack:
        facts: Mapping[str, Any] = {}
        logs: list[Log] = []

        def watch(event: "Event") -> None:
            nonlocal facts
            then(event)
            if not launch.is_rank0():
                return
            if event.kind == "started":
                facts = event.values
            elif not logs:  # the first event after it says where a run goes on
                resumed_at = event.nimg if event.kind == "resumed" else 0
                live = Path(facts["events"]).parent
                for name in names:
                    folder = live.parents[1] / "logs" / live.name[:16] / name
                    folder.mkdir(parents=True, exist_ok=True)
                    logs.append(stack.enter_context(LOGGERS[name](folder, str(facts["title"]), resumed_at)))
            numbers = {
                name: float(value)
                for name, value in event.values.items()
                if isinstance(value, (int, float)) and math.isfinite(value)
            }
            for log in logs if event.kind in ("progress", "evaluation") else ():
                log(event.nimg, numbers)

        yield watch


def check(names: Sequence[str]) -> None:
    """Raises SidaError for a logger that is not known or not installed, importing none."""
    for name in names:
        if name not in LOGGERS:
            raise SidaError(f"the logger must be one of {', '.join(LOGGERS)}, got {name!r}", "Pass another --log.")
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise _missing(name, name)


def _missing(name: str, package: str) -> SidaError:
    return SidaError(
        f"--log {name} needs a package that is not installed ({package})",
        f"Install it with: pip install 'sidactl[{name}]'",
    )


def _import(name: str) -> Any:
    try:
        if name == "tensorboard":
            from torch.utils import tensorboard

            return tensorboard
        import wandb

        return wandb
    except ImportError as error:
        raise _missing(name, str(error.name or error)) from error


@contextmanager
def _tensorboard(folder: Path, title: str, resumed_at: int) -> Iterator[Log]:
    with _import("tensorboard").SummaryWriter(str(folder), purge_step=resumed_at + 1) as writer:

        def log(nimg: int, numbers: Mapping[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, nimg)
            writer.flush()

        yield log


@contextmanager
def _wandb(folder: Path, title: str, resumed_at: int) -> Iterator[Log]:
    """Offline, unless WANDB_MODE says otherwise: nothing goes online, and nobody is asked for a key, unasked."""
    mode = os.environ.get("WANDB_MODE", "offline")
    name = folder.parent.name
    run = _import("wandb").init(
        project="sidactl", name=f"{title} {name}", id=name, dir=str(folder), mode=mode, resume="allow"
    )
    try:
        yield lambda nimg, numbers: run.log(dict(numbers) | {"images": nimg}, step=nimg)
    finally:
        run.finish()


LOGGERS = {"tensorboard": _tensorboard, "wandb": _wandb}
