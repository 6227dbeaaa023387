"""What a loop knows of a training: its steps, events, schedule of evaluations, history."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sidactl.engine import sharding
from sidactl.nets import Preconditioned


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
    def is_readable_without_sync(self) -> bool:
        """Whether asking makes nobody wait for a GPU."""
        ...


class StoppedError(Exception):
    """A step that was told to stop between its passes: what it had added up is dropped, and nothing is lost.

    Every draw is a function of its position, so that the same step, in whatever process, comes to the same bits.
    """


@dataclass
class StepSoFar:
    """What a step had changed for good when it was told to stop; in checkpoints, of which most have none."""

    turns: int = 0
    """updates made"""
    done: list[str] = field(default_factory=list)
    """what is to be done once a step, such as to normalise weights"""

    def once(self, what: str) -> bool:
        """Whether this is the first time in the step, wherever it goes on."""
        is_first = what not in self.done
        self.done += [what] if is_first else []
        return is_first


class Training(Protocol):
    """What the loop needs: a step, the net that is kept, and everything that a checkpoint must hold."""

    nimg: int
    step_index: int
    ema: Preconditioned
    so_far: StepSoFar

    @property
    def skipped(self) -> Skipped: ...

    def step(self, should_stop: Callable[[], bool] = ...) -> dict[str, Tensor]:
        """One step; raises StoppedError, in all processes, where it is told to stop in one of them before its end."""
        ...

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
        return is_early or passed(before, after, self.evaluate_every_nimg)


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


def passed(before: int, after: int, every: int) -> bool:
    return before // every != after // every


def tensors_of(training: Training, *, parts: bool = True) -> dict[str, Tensor]:
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
