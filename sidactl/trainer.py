"""Training steps: the alternating updates of distillation, the EDM update for teachers, and the EMA.

Every draw is a function of the seed and a position. The loop around the steps, with its checkpoints, is in loop.py.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sidactl import losses
from sidactl.data.augment import AugmentPipe
from sidactl.data.codec import LatentCodec, PixelCodec
from sidactl.engine import configure, ranks, sharding, threads
from sidactl.engine import devices as engine_devices
from sidactl.engine import gradients as engine_gradients
from sidactl.errors import SidaError
from sidactl.nets import Preconditioned
from sidactl.nets.edm2 import drop_logvar_, force_normalize_
from sidactl.noise import Draws, sigma_of_time
from sidactl.recipes import Execution, NetSpec, Recipe, TeacherRecipe

STREAMS = {"latent": 0, "diffusion": 1, "augment": 2, "dropout": 3, "posterior": 4}


class SeededDraws:
    """Draws from one torch generator on the training device. Implements `Draws`."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._device = device

    def normal(self, shape: Iterable[int]) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self._device)

    def uniform(self, shape: Iterable[int]) -> Tensor:
        return torch.rand(*shape, generator=self._generator, device=self._device)

    def integers(self, high: int, shape: Iterable[int]) -> Tensor:
        return torch.randint(high, tuple(shape), generator=self._generator, device=self._device)


class JoinedDraws:
    """The draws of several micro-batches, one after the other along the first dimension. Implements `Draws`."""

    def __init__(self, parts: Sequence[Draws]) -> None:
        self._parts = parts

    def normal(self, shape: Iterable[int]) -> Tensor:
        return self._joined(shape, lambda draws, part: draws.normal(part))

    def uniform(self, shape: Iterable[int]) -> Tensor:
        return self._joined(shape, lambda draws, part: draws.uniform(part))

    def integers(self, high: int, shape: Iterable[int]) -> Tensor:
        return self._joined(shape, lambda draws, part: draws.integers(high, part))

    def _joined(self, shape: Iterable[int], draw: Callable[[Draws, Sequence[int]], Tensor]) -> Tensor:
        num_images, *rest = shape
        return torch.cat([draw(draws, (num_images // len(self._parts), *rest)) for draws in self._parts])


def stream_seed(seed: int, stream: str, index: int) -> int:
    """The 64-bit seed of one micro-batch in one stream of randomness."""
    return int(np.random.SeedSequence((seed, STREAMS[stream], index)).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class MicroBatch:
    """Labels, one-hot [b, K], and where their random numbers come from."""

    labels: Tensor
    latent: Draws
    diffusion: Draws
    augment: Draws
    dropout_seed: int

    @classmethod
    def joined(cls, parts: Sequence["MicroBatch"]) -> "MicroBatch":
        """Several as one; its dropout is that of the first, so nets with dropout take them one by one."""
        if len(parts) == 1:
            return parts[0]
        latent, diffusion, augment = (
            JoinedDraws([getattr(part, stream) for part in parts]) for stream in ("latent", "diffusion", "augment")
        )
        return cls(torch.cat([p.labels for p in parts]), latent, diffusion, augment, parts[0].dropout_seed)


class MicroBatches(Protocol):
    """Training batches by position: batch number `batch` in all, micro-batch `round` of it."""

    def get(self, batch: int, round: int) -> MicroBatch: ...

    def images(self, batch: int, round: int) -> Tensor:
        """The real images of the micro-batch as networks see them, [b, C, H, W]; only fetched where they are needed."""
        ...


class ImageSource(Protocol):
    """What training needs of a dataset; `data.Dataset` is one."""

    num_images: int
    is_latents: bool

    def images(self, indices: Any) -> Tensor: ...

    def one_hot(self, indices: Any) -> Tensor: ...


class IndexOrder(Protocol):
    """The order in which a dataset is read; `data.DataOrder` is one."""

    def indices(self, start: int, count: int) -> Any: ...


class ClassesAlone:
    """Classes without images: all that mode sid needs of a dataset. Implements `ImageSource`.

    labels: the class of each image that is not there, as many of each as the data have; every class once by default.
    """

    is_latents = False

    def __init__(self, label_dim: int, labels: Sequence[int] | None = None) -> None:
        self._one_hot = torch.eye(label_dim) if label_dim else torch.zeros(1, 0)
        self._labels = torch.arange(len(self._one_hot)) if labels is None else torch.tensor(labels)
        self.num_images = len(self._labels)

    def images(self, indices: Any) -> Tensor:
        raise SidaError("modes sida and sid2a need real images, got classes alone", "Pass --dataset REF.")

    def one_hot(self, indices: Any) -> Tensor:
        return self._one_hot[self._labels[torch.as_tensor(indices)]]


class DatasetBatches:
    """Micro-batches of a dataset in a position-addressed order. Implements `MicroBatches`."""

    def __init__(
        self,
        dataset: ImageSource,
        order: IndexOrder,
        *,
        batch_size: int,
        num_rounds: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._dataset, self._order, self._seed, self._device = dataset, order, seed, device
        self._num_rounds, self._size = num_rounds, batch_size // num_rounds
        self._codec = LatentCodec() if dataset.is_latents else PixelCodec()

    def get(self, batch: int, round: int) -> MicroBatch:
        return MicroBatch(
            engine_devices.sent(self._dataset.one_hot(self._chosen(batch, round)), self._device),
            self._draws("latent", batch, round),
            self._draws("diffusion", batch, round),
            self._draws("augment", batch, round),
            stream_seed(self._seed, "dropout", batch * self._num_rounds + round),
        )

    def images(self, batch: int, round: int) -> Tensor:
        """Real images in [-1, 1]; of a dataset of latents, samples of their posterior that every visit draws anew."""
        items = engine_devices.sent(self._dataset.images(self._chosen(batch, round)), self._device)
        return self._codec.encode(items, self._draws("posterior", batch, round))

    def _chosen(self, batch: int, round: int) -> Any:
        return self._order.indices((batch * self._num_rounds + round) * self._size, self._size)

    def _draws(self, stream: str, batch: int, round: int) -> Draws:
        return SeededDraws(stream_seed(self._seed, stream, batch * self._num_rounds + round), self._device)


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


def apply_gradients(optimizer: torch.optim.Optimizer, clip_value: float | None) -> Tensor:
    """Steps the optimiser and clears its gradients; False, and no step, if a gradient is not finite.

    The answer stays on the device, where the fused optimiser reads it: nothing waits for it.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [sharding.local(p.grad) for p in parameters]
    finite = torch.isfinite(torch.nn.utils.get_total_norm(gradients))
    if clip_value is not None:
        torch._foreach_clamp_min_(gradients, -clip_value)
        torch._foreach_clamp_max_(gradients, clip_value)
    if any(map(sharding.is_sharded, parameters)):  # of which each process sees a part
        finite = torch.tensor(not ranks.any_process(not bool(finite)))
        if finite:
            optimizer.step()
    else:
        vars(optimizer)["found_inf"] = finite.logical_not().to(torch.float32)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return finite


def adam(net: nn.Module, *, lr: float, beta1: float, beta2: float, eps: float) -> torch.optim.Adam:
    """Adam over all parameters; the fused kernel is the same arithmetic in one pass.

    Its state is there from the start, so that every checkpoint has the same shape and no memory is asked for later.
    """
    named = list(net.named_parameters())
    # The kernel takes either kind by itself.
    parts = [[(name, p) for name, p in named if sharding.is_sharded(p) == sharded] for sharded in (False, True)]
    groups = [{"params": part} for part in parts if part]
    optimizer = torch.optim.Adam(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)
    for parameter in net.parameters():
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

    def count(self, name: str, stepped: Tensor | bool) -> None:
        stepped = torch.as_tensor(stepped)
        skipped = stepped.logical_not()
        self._made[name] = self._made.get(name, 0) + stepped.to(torch.int64)
        self._total[name] = self._total.get(name, 0) + skipped.to(torch.int64)
        self._in_a_row[name] = (self._in_a_row.get(name, 0) + 1) * skipped
        if name in self.loss_scales:
            self.loss_scales[name].follow(stepped)

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
    def is_at_hand(self) -> bool:
        """Whether asking makes nobody wait for a GPU."""
        return all(isinstance(count, int) or count.device.type == "cpu" for count in self._in_a_row.values())


class DropoutSeed:
    """Within the block, dropout masks are those of `seed`; the surrounding random state is put back."""

    def __init__(self, seed: int, net: Preconditioned) -> None:
        self._seed, self._active = seed, net.spec.dropout > 0
        devices = {p.device for p in net.parameters() if p.device.type == "cuda"}
        self._fork = torch.random.fork_rng(devices=list(devices), enabled=self._active)

    def __enter__(self) -> None:
        self._fork.__enter__()
        if self._active:
            torch.manual_seed(self._seed)

    def __exit__(self, *exception: Any) -> None:
        self._fork.__exit__(*exception)


class Distillation:
    """SiD, SiDA and SiD2A: fake score and generator trained in turn. Source: SiDA (2410.14919), Algorithms 1 and 2.

    The fake score starts from the teacher; generator and EMA start from `generator`, or from the teacher, without an
    uncertainty head. Follows the published code where it departs from the algorithm as printed: fresh noise for either
    update (unless recipe.share_fakes), strict gates.

    EDM2's weights are normalised as recipe.forced_normalization says. In the published code a net does so in its own
    training passes in mode sid; with the adversarial part it is a hook that copies of a net inherit as it was when
    they were made: the fake score never does, the generator does, the EMA net does whenever it is evaluated.

    Several processes share the micro-batches of a step and add their gradients up, once.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: Preconditioned,
        generator: Preconditioned | None,
        batches: MicroBatches,
        execution: Execution | None = None,
    ) -> None:
        self.recipe = recipe
        self.teacher = teacher.eval().requires_grad_(False)
        self.fake_score = trainable_copy(teacher, recipe.dropout, keep_logvar=recipe.logvar)
        self.generator = trainable_copy(generator or teacher, recipe.dropout, keep_logvar=False)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        forced, is_adversarial = recipe.forced_normalization, recipe.adversarial is not None
        self._normalizes_fake_score = forced == "intended" or (forced == "published" and not is_adversarial)
        self._normalizes_generator = forced != "off"
        self._normalizes_ema = forced == "published" and is_adversarial
        if self._normalizes_ema:
            force_normalize_(self.ema)
        execution = execution or Execution()
        configure.arrange(recipe, execution, self.teacher, self.fake_score, self.generator, self.ema)
        self.passes = configure.passes_of(recipe, execution)
        # Passes of a small net take a core each. Dropout's masks come of one generator, and FSDP2 counts its passes.
        alone = not threads.is_small(self.teacher) or self.fake_score.spec.dropout > 0 or execution.shard
        self.num_threads = 1 if alone else torch.get_num_threads()
        self._batches = batches
        self._fakes: Tensor | None = None
        self._augmented = _augmentation(recipe.augment_p, teacher.spec)
        self._fake_score_optimizer = adam(
            self.fake_score,
            lr=recipe.fake_score_lr,
            beta1=recipe.fake_score_beta1,
            beta2=recipe.beta2,
            eps=recipe.adam_eps,
        )
        self._generator_optimizer = adam(
            self.generator,
            lr=recipe.generator_lr,
            beta1=recipe.generator_beta1,
            beta2=recipe.beta2,
            eps=recipe.adam_eps,
        )
        self.nimg = self.step_index = 0
        # The generator's gradient goes back through all three nets.
        through = {"fake_score": (self.fake_score,), "generator": (self.teacher, self.fake_score, self.generator)}
        device = next(self.generator.parameters()).device
        self._loss_scales = {
            name: LossScale(recipe.batch_size, device)
            for name, nets in through.items()
            if any(net.compute_dtype == torch.float16 for net in nets)
        }
        self.skipped = SkippedSteps(self._loss_scales)

    @property
    def trains_generator(self) -> bool:
        """Whether this step updates the generator; before that the fake score trains alone."""
        return self.recipe.trains_generator(self.nimg)

    @property
    def is_adversarial(self) -> bool:
        """Whether this step's generator loss has its adversarial term."""
        return self.recipe.is_adversarial(self.nimg)

    def stage(self) -> str:
        """For people: what this step trains."""
        return "fake score" if not self.trains_generator else "SiDA" if self.is_adversarial else "SiD"

    def modules(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {
            "fake_score": self.fake_score,
            "generator": self.generator,
            "ema": self.ema,
            "fake_score_optimizer": self._fake_score_optimizer,
            "generator_optimizer": self._generator_optimizer,
        }

    def fit_batch_per_device(self) -> int:
        """The images at a time with which a step fits into memory, by trying, the most first; sets the passes so.

        Nothing of it remains: every draw is a function of its position, and no weight is changed.
        """
        recipe, num_rounds = self.recipe, sum(map(len, self.passes))
        micro_batch = recipe.batch_size // recipe.num_accumulation_rounds
        sizes = [n for n in range(num_rounds, 0, -1) if num_rounds % n == 0 and (n == 1 or recipe.joins_micro_batches)]
        fitting = next((n for n in sizes if self._fits(n)), 1)
        images = ranks.smallest(fitting) * micro_batch
        self.passes = configure.passes_of(recipe, Execution(batch_per_device=images))
        return images

    def _fits(self, num_micro_batches: int) -> bool:
        usual = self.passes, self._normalizes_fake_score, self._normalizes_generator
        rounds = [index for rounds in self.passes for index in rounds]
        # The second pass has the sum of gradients beside it.
        self.passes = [rounds[:num_micro_batches]] * min(2, len(rounds) // num_micro_batches)
        self._normalizes_fake_score = self._normalizes_generator = False
        try:
            self._fake_score_gradients(is_trial=True)
            self.fake_score.zero_grad(set_to_none=True)
            self._generator_gradients(is_trial=True)
        except torch.OutOfMemoryError:
            return False
        finally:
            self.passes, self._normalizes_fake_score, self._normalizes_generator = usual
            self._fakes = None
            self.fake_score.zero_grad(set_to_none=True)
            self.generator.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return True

    def step(self) -> dict[str, Tensor]:
        """One iteration: the fake score, the generator (once its turn has come), the EMA.

        Returns the scaled losses as printed by the published code, one value per pass of this process, [passes].
        """
        part = self.recipe.adversarial
        stats = self._fake_score_gradients()
        clip_value = None if part is None else part.clip_gradient_value
        self.skipped.count("fake_score", apply_gradients(self._fake_score_optimizer, clip_value))
        if self.trains_generator:
            stats |= self._generator_gradients()
            self.skipped.count("generator", apply_gradients(self._generator_optimizer, None))
        update_ema(
            self.ema,
            self.generator,
            halflife_nimg=self.recipe.ema_halflife_nimg,
            rampup_ratio=self.recipe.ema_rampup_ratio,
            nimg=self.nimg,
            batch_size=self.recipe.batch_size,
        )
        evaluations = self.nimg // self.recipe.evaluate_every_nimg
        self.nimg += self.recipe.batch_size
        self.step_index += 1
        if self._normalizes_ema and self.nimg // self.recipe.evaluate_every_nimg > evaluations:
            force_normalize_(self.ema)
        return stats

    def _fake_score_gradients(self, *, is_trial: bool = False) -> dict[str, Tensor]:
        recipe, part, psi = self.recipe, self.recipe.adversarial, self.fake_score
        psi.train()
        shares = recipe.share_fakes and (self.trains_generator or is_trial)
        self.generator.train(shares)
        # Once a step, so that the number of passes leaves no trace.
        if self._normalizes_fake_score:
            force_normalize_(psi)
        if shares and self._normalizes_generator:
            force_normalize_(self.generator)
        gradients = self._gradient_sum("fake_score", psi)

        def gradients_of(rounds: Sequence[int]) -> tuple[dict[str, Tensor], Sequence[Tensor | None]]:
            engine_gradients.sync_gradients(psi, rounds is self.passes[-1])
            batch = self._batch(2 * self.step_index, rounds)
            fakes = self._shared_fakes(batch) if shares else self._generate_alone(batch)
            sigma = (recipe.P_std * batch.diffusion.normal((len(fakes), 1, 1, 1)) + recipe.P_mean).exp()
            fakes, fake_augment = self._augmented(fakes, batch.augment)
            noise = batch.diffusion.normal(fakes.shape)
            reals, real_augment = None, None
            if part is not None:
                images = torch.cat([self._batches.images(2 * self.step_index, index) for index in rounds])
                reals, real_augment = self._augmented(images, batch.augment)
            with DropoutSeed(batch.dropout_seed, psi):
                score = losses.fake_score_loss(
                    psi,
                    fakes,
                    noise,
                    sigma,
                    batch.labels,
                    fake_augment,
                    real_images=reals,
                    real_augment_labels=real_augment,
                )
                stats = {"fake_score_loss": score.per_pixel.sum() / recipe.batch_size}
                if part is not None:
                    per_image = losses.discriminator_loss(
                        score, sigma, sigma_data=psi.spec.sigma_data, num_micro_batches=len(rounds)
                    )
                    stats["discriminator_loss"] = per_image.sum() * (part.discriminator_scale / recipe.batch_size)
                return stats, gradients.of(torch.stack(list(stats.values())).sum())

        return self._summed(gradients_of, gradients, is_trial)

    def _generator_gradients(self, *, is_trial: bool = False) -> dict[str, Tensor]:
        self.generator.train()
        self.fake_score.eval()
        if self._normalizes_generator and not self.recipe.share_fakes:
            force_normalize_(self.generator)
        gradients = self._gradient_sum("generator", self.generator)

        def gradients_of(rounds: Sequence[int]) -> tuple[dict[str, Tensor], Sequence[Tensor | None]]:
            engine_gradients.sync_gradients(self.generator, rounds is self.passes[-1])
            batch = self._batch(2 * self.step_index + 1, rounds)
            if self.recipe.share_fakes:
                first = self._batch(2 * self.step_index, rounds)
                batch = replace(batch, labels=first.labels, latent=first.latent, dropout_seed=first.dropout_seed)
            with DropoutSeed(batch.dropout_seed, self.generator):
                fakes, self._fakes = self._generate(batch) if self._fakes is None else self._fakes, None
                # The loss has a graph of its own, gone before the generator's is gone back: no gradient of the fake
                # score's weights is computed, and less memory is held at a time.
                images = fakes.detach().requires_grad_()
                stats, loss = self._generator_loss(batch, images, len(rounds))
                (gradient,) = torch.autograd.grad(gradients.scaled(loss), images)
                return stats, gradients.of(fakes, gradient)

        with engine_gradients.without_weight_gradients(self.fake_score):
            return self._summed(gradients_of, gradients, is_trial)

    def _gradient_sum(self, name: str, net: nn.Module) -> engine_gradients.GradientSum:
        scale = self._loss_scales[name].value if name in self._loss_scales else None
        return engine_gradients.GradientSum(net, len(self.passes), scale)

    def _summed(
        self,
        gradients_of: Callable[[Sequence[int]], tuple[dict[str, Tensor], Sequence[Tensor | None]]],
        gradients: engine_gradients.GradientSum,
        is_trial: bool,
    ) -> dict[str, Tensor]:
        """Goes through the passes and gives the net the sum of their gradients; returns their losses."""
        passes: list[dict[str, Tensor]] = []
        for stats, taken in threads.side_by_side(gradients_of, self.passes, self.num_threads):
            gradients.add(taken)
            passes.append({name: value.detach() for name, value in stats.items()})
        if not is_trial:
            gradients.finish()
        return {name: torch.stack([stats[name] for stats in passes]) for name in passes[0]}

    def _generator_loss(
        self, batch: MicroBatch, fakes: Tensor, num_micro_batches: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The generator's losses by name, and the sum of them that it descends."""
        recipe, part = self.recipe, self.recipe.adversarial
        sigma = sigma_of_time(batch.diffusion.uniform((len(fakes), 1, 1, 1)) * (recipe.tmax / 1000))
        noise = batch.diffusion.normal(fakes.shape)
        sid = losses.sid_generator_loss(
            self.teacher, self.fake_score, fakes, noise, sigma, batch.labels, alpha=recipe.alpha
        )
        stats = {"generator_sid_loss": sid.per_pixel.sum() * (recipe.lambda_sid / recipe.batch_size)}
        weight = 1.0
        if part is not None and self.is_adversarial:
            weight, scale = part.joint_weight, part.lambda_adv / recipe.batch_size * fakes[0].numel()
            per_image = losses.adversarial_generator_loss(sid, num_micro_batches=num_micro_batches)
            stats["generator_adversarial_loss"] = per_image.sum() * scale
        return stats, weight * torch.stack(list(stats.values())).sum()

    def _batch(self, batch: int, rounds: Sequence[int]) -> MicroBatch:
        return MicroBatch.joined([self._batches.get(batch, index) for index in rounds])

    @torch.no_grad()
    def _generate_alone(self, batch: MicroBatch) -> Tensor:
        """Images that no gradient goes through."""
        return self._generate(batch)

    def _shared_fakes(self, batch: MicroBatch) -> Tensor:
        """The images of both updates. A step of one pass keeps their graph for the second; others draw them again."""
        with torch.set_grad_enabled(len(self.passes) == 1), DropoutSeed(batch.dropout_seed, self.generator):
            fakes = self._generate(batch)
        if len(self.passes) == 1:
            self._fakes = fakes
        return fakes.detach()

    def _generate(self, batch: MicroBatch) -> Tensor:
        spec, sigma_init = self.generator.spec, self.recipe.sigma_init
        z = batch.latent.normal((len(batch.labels), spec.img_channels, spec.img_resolution, spec.img_resolution))
        images: Tensor = self.generator(sigma_init * z, sigma_init, batch.labels)
        return images


class Pretraining:
    """A teacher trained from scratch with the EDM loss. Source: EDM (2206.00364), section 5.

    An EDM2 net normalises its weights before every pass and weights the loss by its uncertainty head, where it has one.
    Source: EDM2 (2312.02696), sections 2.3 and B.
    """

    def __init__(self, recipe: TeacherRecipe, net: Preconditioned, batches: MicroBatches) -> None:
        self.recipe, self.net = recipe, net
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        self._batches = batches
        self._augmented = _augmentation(recipe.augment_p, net.spec)
        self._optimizer = adam(net, lr=recipe.lr, beta1=recipe.beta1, beta2=recipe.beta2, eps=recipe.adam_eps)
        self.nimg = self.step_index = 0
        self.skipped = SkippedSteps()

    def stage(self) -> str:
        """For people: what this step trains."""
        return "teacher"

    def modules(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {"net": self.net, "ema": self.ema, "optimizer": self._optimizer}

    def step(self) -> dict[str, Tensor]:
        """One update; returns the mean loss per pixel, [1]."""
        recipe = self.recipe
        self.net.train()
        if self.net.spec.architecture == "EDM2":
            force_normalize_(self.net)
        batch = self._batches.get(self.step_index, 0)
        images, augment_labels = self._augmented(self._batches.images(self.step_index, 0), batch.augment)
        sigma = (recipe.P_std * batch.diffusion.normal((len(images), 1, 1, 1)) + recipe.P_mean).exp()
        noise = batch.diffusion.normal(images.shape)
        with DropoutSeed(batch.dropout_seed, self.net):
            loss = losses.fake_score_loss(self.net, images, noise, sigma, batch.labels, augment_labels).per_pixel
            (loss.sum() / recipe.batch_size).backward()
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.lr * min(self.nimg / max(recipe.lr_rampup_nimg, 1e-8), 1.0)
        self.skipped.count("teacher", apply_gradients(self._optimizer, None))
        update_ema(
            self.ema,
            self.net,
            halflife_nimg=recipe.ema_halflife_nimg,
            rampup_ratio=recipe.ema_rampup_ratio,
            nimg=self.nimg,
            batch_size=recipe.batch_size,
        )
        self.nimg += recipe.batch_size
        self.step_index += 1
        return {"denoising_loss": loss.detach().mean()[None]}


def _augmentation(probability: float, spec: NetSpec) -> Callable[[Tensor, Draws], tuple[Tensor, Tensor | None]]:
    """What gives a net's inputs their augmentation and its labels: nothing, where the net takes no such labels."""
    if probability and spec.augment_dim:
        return AugmentPipe(p=probability)
    return lambda images, draws: (images, None)


def trainable_copy(net: Preconditioned, dropout: float, *, keep_logvar: bool) -> Preconditioned:
    """A copy that trains, with this dropout, and with its uncertainty head or without."""
    copied = copy.deepcopy(net).requires_grad_(True)
    copied.set_dropout(dropout)
    if not keep_logvar:
        drop_logvar_(copied)
    return copied
