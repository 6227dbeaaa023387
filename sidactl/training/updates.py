"""What becomes of gradients: Adam, clipping, skipped updates, loss scales, the EMA; the seed of dropout. No loss."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sidactl.engine import gradients as engine_gradients
from sidactl.engine import ranks, sharding
from sidactl.methods.base import Optimisation, Update
from sidactl.nets import Preconditioned
from sidactl.nets.dropout import masks_of
from sidactl.nets.edm2 import force_normalize_
from sidactl.scopes import scope
from sidactl.training.batches import MicroBatch


@scope("EMA")
def update_ema(
    ema: nn.Module, net: nn.Module, *, halflife_nimg: int, rampup_ratio: float | None, nimg: int, batch_size: int
) -> None:
    """Moves `ema` towards `net`: parameters only, buffers are never touched.

    The half-life is at most rampup_ratio times the images seen before this step, so at 0 images ema becomes net. The
    EMA may lie on another device. Source: EDM (2206.00364), appendix F.2.
    """
    halflife = float(halflife_nimg)
    if rampup_ratio is not None:
        halflife = min(halflife, nimg * rampup_ratio)
    average = get_ema_multi_avg_fn(0.5 ** (batch_size / max(halflife, 1e-8)))
    means = [sharding.local(p.detach()) for p in ema.parameters()]
    values = [sharding.local(p.detach()) for p in net.parameters()]
    with torch.no_grad():
        average(means, [p.to(mean.device) for p, mean in zip(values, means, strict=True)], torch.tensor(0))


def apply_gradients(
    optimizer: torch.optim.Optimizer,
    clip_value: float | None,
    clip_norm: float | None = None,
    *,
    are_finite: bool = False,
) -> Tensor:
    """Steps the optimiser and clears its gradients; False, and no step, if a gradient is not finite.

    clip_value: each element goes to +- this at most; clip_norm: all are scaled so that their norm is at most this.
    are_finite: they were made so, and are not looked at. The answer stays on the device, where the fused optimiser
    reads it: nothing waits for it.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [sharding.local(p.grad) for p in parameters]
    if are_finite:
        finite = torch.ones((), dtype=torch.bool, device=gradients[0].device if gradients else None)
    else:
        finite = torch.isfinite(torch.nn.utils.get_total_norm(gradients))
    if clip_value is not None:
        torch._foreach_clamp_min_(gradients, -clip_value)
        torch._foreach_clamp_max_(gradients, clip_value)
    if clip_norm is not None:
        factor = (clip_norm / (_norm(parameters) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor.to(torch.float32))
    if any(map(sharding.is_sharded, parameters)):  # of which each process sees a part
        finite = torch.tensor(not ranks.any_rank(not bool(finite)))
        if finite:
            optimizer.step()
    else:
        vars(optimizer)["found_inf"] = finite.logical_not().to(torch.float32)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return finite


LARGEST_GRADIENT = 1e5
"""what the published code puts for an infinite element"""


def finite_made_(optimizer: torch.optim.Optimizer) -> Tensor:
    """Puts 0 for NaN and +-1e5 for infinity into the gradients, as the published code does; whether none was there."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [sharding.local(cast(Tensor, p.grad)) for p in parameters]
    finite = torch.isfinite(torch.nn.utils.get_total_norm(gradients))
    for gradient in gradients:
        torch.nan_to_num_(gradient, nan=0.0, posinf=LARGEST_GRADIENT, neginf=-LARGEST_GRADIENT)
    return finite


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of all their gradients; in float64, so that in float32 it is the same however they are split."""

    def square(parts: Sequence[nn.Parameter]) -> Tensor:
        norms = [torch.linalg.vector_norm(sharding.local(cast(Tensor, p.grad)), dtype=torch.float64) for p in parts]
        return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)

    sharded = [p for p in parameters if sharding.is_sharded(p)]
    whole = square([p for p in parameters if not sharding.is_sharded(p)])
    return (whole + sharding.sum_of_parts(square(sharded), sharded[0]) if sharded else whole).sqrt()


def adam(trained: Mapping[str, tuple[nn.Module, Optimisation]]) -> torch.optim.Adam:
    """Adam, or AdamW, over all parameters of these modules; the fused kernel is the same arithmetic in one pass.

    Its state is there from the start, so that every checkpoint has the same shape and no memory is asked for later;
    it goes by the names of parameters, behind that of their module where it is not the first.
    """
    groups: list[dict[str, Any]] = []
    for module_name, (module, how) in trained.items():
        prefix = f"{module_name}." if groups else ""
        named = [(prefix + name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        settings = {
            "lr": how.lr,
            "betas": (how.beta1, how.beta2),
            "eps": how.eps,
            "weight_decay": how.weight_decay,
            "decoupled_weight_decay": how.weight_decay > 0,
            "how": how,
        }
        # The kernel takes either kind by itself.
        for sharded in (False, True):
            if part := [(name, parameter) for name, parameter in named if sharding.is_sharded(parameter) == sharded]:
                groups.append({"params": part, **settings})
    optimizer = torch.optim.Adam(groups, fused=True)
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


IMAGES_PER_LOSS_SCALE = 16
"""images of a batch that the loss scale of a float16 run has a factor of 1 for, at its start

Losses are sums divided by the batch over all processes. The published runs divided by the share of one of eight GPUs,
so batch / 1024 on ImageNet 64 (8,192 images) gives their gradients, of which the discriminator's still have an angle to
float32's (cosine 0.8). batch / 16 is 512 there: its smallest gradients, those at the encoder's features, are then about
as large as float16's smallest normal number, 6e-5, and the largest, those of weights, far below its largest, 65,504.
"""

LOSS_SCALE_GROWS_AFTER = 1000
"""updates without a skipped one after which a loss scale that fell doubles: a single outlier is no lasting loss"""


class LossScale:
    """The power of two by which the losses of a float16 net are multiplied before the backward pass; not in papers.

    It starts at the batch divided by IMAGES_PER_LOSS_SCALE, rounded up; halves with every skipped update, down to 1;
    doubles after LOSS_SCALE_GROWS_AFTER updates in a row, up to where it started. All of it happens on the device.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self._start = 2.0 ** max(0, math.ceil(math.log2(batch_size / IMAGES_PER_LOSS_SCALE)))
        self.value = torch.tensor(self._start, device=device)
        self._good = torch.tensor(0, device=device)

    def follow(self, stepped: Tensor) -> None:
        """Takes notice of an update that was made or skipped."""
        stepped = stepped.to(self.value.device)
        self._good = (self._good + 1) * stepped
        grows = self._good >= LOSS_SCALE_GROWS_AFTER
        grown = torch.where(grows, self.value * 2, self.value).clamp(max=self._start)
        self.value = torch.where(stepped, grown, (self.value / 2).clamp(min=1.0))
        self._good = self._good * grows.logical_not()

    def to_json(self) -> dict[str, float]:
        return {"value": float(self.value), "good_updates": int(self._good)}

    def restore(self, state: Mapping[str, float]) -> None:
        """Goes on from there, as an interrupted run left it."""
        self.value.fill_(state["value"])
        self._good.fill_(int(state["good_updates"]))


class SkippedSteps:
    """Updates that were skipped for a gradient that was not finite: in all, and in a row, by net; and those made.

    Counted where the answers of `apply_gradients` are, and fetched by whoever asks. Loss scales follow them.
    """

    def __init__(self, loss_scales: Mapping[str, LossScale] | None = None) -> None:
        self.loss_scales = loss_scales or {}
        self._made: dict[str, int | Tensor] = {}
        self._total: dict[str, int | Tensor] = {}
        self._in_a_row: dict[str, int | Tensor] = {}

    def count(self, name: str, stepped: Tensor | bool, finite: Tensor | None = None) -> None:
        """finite: whether the gradients were so, which a loss scale follows; else whether the update was made."""
        stepped = torch.as_tensor(stepped)
        skipped = stepped.logical_not()
        self._made[name] = self._made.get(name, 0) + stepped.to(torch.int64)
        self._total[name] = self._total.get(name, 0) + skipped.to(torch.int64)
        self._in_a_row[name] = (self._in_a_row.get(name, 0) + 1) * skipped
        if name in self.loss_scales:
            self.loss_scales[name].follow(stepped if finite is None else finite)

    @property
    def made(self) -> dict[str, int]:
        return {name: int(count) for name, count in self._made.items()}

    @property
    def total(self) -> dict[str, int]:
        return {name: int(count) for name, count in self._total.items()}

    @property
    def in_a_row(self) -> dict[str, int]:
        return {name: int(count) for name, count in self._in_a_row.items()}

    def restore(self, total: Mapping[str, int], in_a_row: Mapping[str, int], made: Mapping[str, int]) -> None:
        """Goes on from these counts, as an interrupted run left them."""
        self._total, self._in_a_row, self._made = dict(total), dict(in_a_row), dict(made)

    @property
    def is_readable_without_sync(self) -> bool:
        """Whether asking makes nobody wait for a GPU."""
        return all(isinstance(count, int) or count.device.type == "cpu" for count in self._in_a_row.values())


class Side:
    """What one update steps: its modules by name, one optimiser, clipping, forced normalisation, and a loss scale."""

    def __init__(
        self,
        update: Update,
        modules: Mapping[str, nn.Module],
        *,
        normalizes: bool,
        loss_scale: LossScale | None,
        zeroes: bool = False,
    ) -> None:
        """modules: those of the update by name, among others. zeroes: recipe.nonfinite."""
        self.name = next(iter(update.trained))
        self.modules = {name: modules[name] for name in update.trained}
        self.optimizer = adam({name: (modules[name], how) for name, how in update.trained.items()})
        self.loss_scale, self._update, self._normalizes, self._zeroes = loss_scale, update, normalizes, zeroes
        self.were_finite: Tensor | None = None
        """whether the last gradients were so before they were made so"""

    @property
    def scale(self) -> Tensor | None:
        """What losses are multiplied by now."""
        return None if self.loss_scale is None else self.loss_scale.value

    def train(self, mode: bool) -> None:
        for module in self.modules.values():
            module.train(mode)

    def normalize(self) -> None:
        """Forced normalisation: once per step, not per pass, since results must not depend on the number of passes."""
        for module in self.modules.values() if self._normalizes else ():
            force_normalize_(module)

    def sync_gradients(self, now: bool) -> None:
        """Whether the next backward pass adds up over the processes what is sharded."""
        for module in self.modules.values():
            engine_gradients.sync_gradients(module, now)

    def gradient_sum(self, num_passes: int) -> engine_gradients.GradientSum:
        return engine_gradients.GradientSum(nn.ModuleList(self.modules.values()), num_passes, self.scale)

    @scope("optimisers")
    def step(self, nimg: int) -> Tensor:
        """Steps with the gradients that the parameters hold, after so many images; see `apply_gradients`."""
        if self._zeroes:
            self.were_finite = finite_made_(self.optimizer)
        for group in self.optimizer.param_groups:
            if warm_up_nimg := group["how"].warm_up_nimg:
                group["lr"] = group["how"].lr * min(nimg / warm_up_nimg, 1.0)
        clips = self._update.clip_value, self._update.clip_norm
        return apply_gradients(self.optimizer, *clips, are_finite=self._zeroes)


@contextmanager
def dropout_seeded(batch: MicroBatch, net: Preconditioned) -> Iterator[None]:
    """Within the block, dropout masks are those of the micro-batches; the surrounding random state is put back."""
    if not net.spec.dropout:
        yield
        return
    device = next(net.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if batch.num_micro_batches == 1:
            torch.manual_seed(batch.dropout_seeds[0])
            yield
        else:
            with masks_of(batch.dropout_seeds, len(batch.labels) // batch.num_micro_batches, device):
                yield
