"""What a method of distillation is to the trainer: what it is asked for, and the values that say who steps when.

Nothing is summed over passes, clipped or stepped here: passes, processes, precision and checkpoints are the trainer's.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sidactl.nets import Denoiser
from sidactl.nets.steps import stepwise
from sidactl.noise import Draws
from sidactl.recipes import FakeScoreRecipe, FurtherRecipe, NetSpec, Recipe
from sidactl.scopes import scope

Losses = dict[str, Tensor]
"""scalars by name, as they are reported"""
Turn = Literal["fake_score", "generator"]


@dataclass(frozen=True)
class TrainingDetector:
    """A frozen detector that a method trains on: differentiable in images, and, where asked for, what reals look like.

    Images are [B, C, H, W] in [-1, 1].
    """

    features: Callable[[Tensor], Tensor]
    """[B, F]"""
    maps: Callable[[Tensor], Sequence[Tensor]]
    """of several depths, as tokens [B, C, L] each"""
    widths: Sequence[int]
    """channels of each map"""
    mean: Tensor | None = None
    """of the features of real images, float64 [F]"""
    covariance: Tensor | None = None
    """float64 [F, F]"""


class Pairs(NamedTuple):
    """Unit noise [B, C, H, W], labels [B, K], and the images [B, C, H, W] that the teacher's ODE draws of both."""

    noise: Tensor
    labels: Tensor
    images: Tensor


Distance = Callable[[Tensor, Tensor], Tensor]
"""of two sets of images [B, C, H, W] in [-1, 1], pair by pair: [B], differentiable in the first"""


class Batch(Protocol):
    """What goes through the nets at a time: a micro-batch, or several, one after the other."""

    @property
    def labels(self) -> Tensor:
        """one-hot, [B, K]"""
        ...

    @property
    def latent(self) -> Draws:
        """for the generator's input"""
        ...

    @property
    def diffusion(self) -> Draws:
        """for noise levels and noise"""
        ...

    @property
    def augment(self) -> Draws: ...

    @property
    def reals(self) -> Callable[[], Tensor]:
        """fetches the real images that have these labels, [B, C, H, W], for a method that needs them"""
        ...

    @property
    def pairs(self) -> Callable[[], Pairs]:
        """fetches as many pairs, for a method that regresses on them"""
        ...

    @property
    def real_labels(self) -> Tensor:
        """of the real images, [B, K]"""
        ...

    @property
    def chosen(self) -> Callable[[int], int]:
        """draws a number below the one given, the same for all images and both updates of a step"""
        ...

    @property
    def positions(self) -> Tensor:
        """of each image in the whole batch of a step, over all processes, int64 [B]"""
        ...

    @property
    def num_micro_batches(self) -> int: ...


@dataclass(frozen=True)
class Nets:
    """The networks that a method looks through. Either may be one that wraps others, such as a guided one."""

    teacher: Denoiser
    fake_score: Denoiser
    """the teacher itself where the method trains none"""
    augmented: Callable[[Tensor, Draws], tuple[Tensor, Tensor | None]]
    """images with the recipe's augmentation, and the labels that the fake score takes for it"""
    loss_scale: Tensor | None
    """a power of two, where gradients go back through float16"""

    @scope("generator loss backward")
    def gradient(self, loss: Tensor, x: Tensor) -> Tensor:
        """d loss / dx, through the networks that the loss was computed by; their weights get no gradient."""
        if self.loss_scale is None:
            return torch.autograd.grad(loss, x)[0]
        return torch.autograd.grad(loss * self.loss_scale, x)[0] / self.loss_scale


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Who is stepped when, and what both updates of a step share. The defaults are SiD's."""

    generator_first: bool = False
    """a step with both updates begins with the generator's"""
    generator_every: int = 1
    """the generator is stepped in one of so many steps, at first in step 0"""
    alternates: bool = False
    """the fake score is not stepped where the generator is"""
    has_dropout_everywhere: bool = False
    """teacher and fake score have the recipe's dropout in the generator's update, too, both under one mask"""
    shares: Literal["nothing", "labels", "images"] = "nothing"
    """what both updates of a step see alike, always those of the fake score's batch; noise is drawn anew in any case"""

    def turns(self, step_index: int, trains_generator: bool) -> tuple[Turn, ...]:
        """The updates of a step, in order. trains_generator: whether the generator's time has come at all."""
        if not trains_generator or step_index % self.generator_every:
            return ("fake_score",)
        return ("generator",) if self.alternates else self.order

    @property
    def order(self) -> tuple[Turn, Turn]:
        return ("generator", "fake_score") if self.generator_first else ("fake_score", "generator")


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How parameters are stepped: by Adam, or by AdamW where they decay."""

    lr: float
    beta1: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    """AdamW's, a share of the learning rate"""
    warm_up_nimg: int = 0
    """images over which the learning rate grows from 0 in a straight line"""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one of the two updates trains, and how the gradients of all of it are clipped together."""

    trained: Mapping[str, Optimisation]
    """"fake_score", "generator", or "method" for its heads; a method that does not train a fake score has none"""
    clip_value: float | None = None
    """each element goes to +- this at most"""
    clip_norm: float | None = None
    """all are scaled so that their norm is at most this"""


class Method(nn.Module, ABC):
    """What moves the generator's images, and what teaches the fake score and the heads.

    Parameters are those of heads, modules that are called; buffers are state; checkpoints keep both. All that is drawn
    comes of `batch`. Several threads may ask at a time, each for another pass: only `observe` changes anything.
    nimg: images seen before this step.
    """

    schedule: Schedule
    updates: dict[Turn, Update]
    """a method without an update of the fake score trains its generator alone"""

    may_shard = True
    """whether FSDP2 may split the heads; else every process has them whole"""

    statistics: Sequence[str] = ()
    """names of the sums that `measure` gives, where the method needs any"""

    def __init__(self, recipe: Recipe, spec: NetSpec) -> None:
        """A generator that is stepped in every step, and a fake score where the recipe has one. spec: the teacher's."""
        super().__init__()
        self.recipe, self.spec = recipe, spec
        self.schedule, self.updates = Schedule(), {}
        clip_norm = recipe.clip_gradient_norm if isinstance(recipe, FurtherRecipe) else None
        if isinstance(recipe, FakeScoreRecipe):
            fake_score = self.optimisation(recipe.fake_score_lr, recipe.fake_score_beta1)
            self.updates["fake_score"] = Update(trained={"fake_score": fake_score}, clip_norm=clip_norm)
        generator = self.optimisation(recipe.generator_lr, recipe.generator_beta1)
        self.updates["generator"] = Update(trained={"generator": generator}, clip_norm=clip_norm)

    def optimisation(self, lr: float, beta1: float) -> Optimisation:
        """Adam at this rate, with the recipe's other settings."""
        recipe = self.recipe
        how = Optimisation(lr=lr, beta1=beta1, beta2=recipe.beta2, eps=recipe.adam_eps)
        if not isinstance(recipe, FurtherRecipe):
            return how
        return replace(how, weight_decay=recipe.weight_decay, warm_up_nimg=recipe.lr_warmup_nimg)

    @abstractmethod
    def image_gradient(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> tuple[Losses, Tensor]:
        """Losses of the generator, and their gradient at its images, [B, C, H, W]: what it descends.

        x: images that require a gradient, for `nets.gradient`; a direction that needs no graph is the gradient itself.
        Sums over the batch are divided by `recipe.batch_size`, as the trainer adds gradients up over all passes.
        """

    @abstractmethod
    def score_losses(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> Losses:
        """Losses of fake score and heads on images without a graph, likewise scaled; their sum is what both descend.

        Each net and each part of the heads is asked once, about all images together: between two backward passes of
        one FSDP2 rounds to float32, and a sharded run would have other bits.
        """

    @abstractmethod
    def stage(self, nimg: int) -> str:
        """For people: what a step trains that updates the generator."""

    def generate(self, generator: Denoiser, batch: Batch) -> Tensor:
        """The generator's images [B, C, H, W]. Source: SiDA (2410.14919), eq. 1, with a_t = 1.

        Both updates ask, with a graph or without. Of several steps these are the images of the one that is trained,
        which is drawn for each step of the run, so that all of them together are matched to the data, as by few-step
        SiD (2505.12674); with graphs through all of them it is always the last, as in SiDA's code for EDM2.
        """
        spec, recipe = generator.spec, self.recipe
        z = batch.latent.normal((len(batch.labels), spec.img_channels, spec.img_resolution, spec.img_resolution))
        if not isinstance(recipe, FakeScoreRecipe) or len(recipe.levels) == 1:
            return generator(recipe.sigma_init * z, recipe.sigma_init, batch.labels)
        levels, graphs = recipe.levels, recipe.step_graphs
        if graphs == "last":
            levels = levels[: batch.chosen(len(levels)) + 1]
        fresh = partial(batch.latent.normal, z.shape)
        return stepwise(generator, z, batch.labels, levels, recipe.step_noise, fresh, graphs=graphs)

    def stepped(self) -> None:
        """Called after every update of the heads, in all processes alike; what it changes are buffers."""

    def measure(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> Mapping[str, Tensor]:
        """Sums over the images of a pass, by the names in `statistics`, before `image_gradient` is asked of any pass.

        The trainer adds them up in float64, over all passes and processes, for `observe`. The draws of `batch` are
        those that `image_gradient` gets.
        """
        raise NotImplementedError

    def observe(self, sums: Mapping[str, Tensor]) -> None:
        """Takes the sums over the whole batch, the same ones in every process; what it keeps of them are buffers.

        It is not asked where a sample, and so a sum, is not finite: that update will be skipped.
        """
        raise NotImplementedError
