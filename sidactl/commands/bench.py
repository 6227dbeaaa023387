"""How fast a distillation runs here, and why: parts of a step, stages, sampling, detectors, against the peak.

Nets have random weights and data are made up, so nothing is downloaded. What a step computes is the trainer's.
"""

import dataclasses
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from sidactl import catalog, detectors, methods, nets, sampling
from sidactl.data import augment
from sidactl.data.codec import PixelCodec
from sidactl.data.order import DataOrder
from sidactl.engine import configure, devices, gradients
from sidactl.engine import threads as engine_threads
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.nets import Preconditioned
from sidactl.nets.inception import FIDInception
from sidactl.nets.vit import VisionTransformer
from sidactl.recipes import Execution, NetSpec, OneStepSpec, Precision, Recipe, SamplingForm, override
from sidactl.training import batches as training_batches
from sidactl.training import distillation, updates

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


STAGES = ("fake score", "SiD", "SiDA")

_WARM_UP_STEPS = 2
"""before anything is timed: allocators, kernels' caches, compilation"""

_MADE_UP_IMAGES = 1024

_PEAK_TRIES = 5

_BUSY_SECONDS = 0.1

_SAMPLED_BATCHES = 8


def _short(number: float | None) -> float | None:
    """Four digits, for tables."""
    return None if number is None else float(f"{number:.4g}")


Progress = Callable[[str], None]
"""told what is measured next"""

EAGER = SamplingForm()
"""float32 in the usual order of memory, operation by operation"""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a step: its median seconds each time, how often a step does it, and its floating-point operations.

    inside: the first of the parts that it is a piece of, so that sums leave it out.
    """

    name: str
    seconds: float
    times: int
    flop: int
    inside: str | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A whole step of one stage. peak_bytes: tensors that live at the same time at most, nets and optimisers included.

    cpu_seconds: of all threads of this process. utilisation: the share of the peak, as measured here in the same
    precision, that the step's operations make use of.
    """

    name: str
    seconds: float
    cpu_seconds: float
    images_per_sec: float
    sec_per_kimg: float
    flop_per_image: float
    utilisation: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The most floating-point operations per second that a product and a convolution reach here in one precision."""

    matrix_product: float
    convolution: float

    @property
    def flop_per_sec(self) -> float:
        return max(self.matrix_product, self.convolution)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that was measured in one setting.

    ratios: seconds of the eager step over those of this one, by stage; cpu_ratios: the same of processor time, which
    means more where others use the processor, too.
    """

    setting: SamplingForm
    stages: Sequence[Stage]
    parts: Sequence[Part]
    peak: Peak
    sampling_images_per_sec: float
    warm_up_seconds: float
    """of the first steps, in which nets are compiled"""
    num_graphs: int
    """compiled in them"""
    num_recompiled: int
    """compiled later, where nothing should be"""
    ratios: Mapping[str, float] = field(default_factory=dict)
    cpu_ratios: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `run` found. detector_images_per_sec and evaluation_share are None where the detector was not timed."""

    teacher: str
    mode: str
    num_parameters: int
    batch_size: int
    """images per pass"""
    num_rounds: int
    """passes per step"""
    num_steps: int
    device: str
    num_threads: int
    measured: Sequence[Measured]
    against: Measured | None
    detector: str
    detector_images_per_sec: float | None
    evaluation_share: float | None
    """of the time of a run at its recipe's cadence, what sampling and features take"""

    @property
    def best(self) -> Measured:
        """The setting whose last stage is fastest."""
        return min(self.measured, key=lambda m: m.stages[-1].seconds)

    def tables(self) -> Iterator[tuple[Sequence[str], Sequence[Sequence[str | float | None]], str]]:
        """Columns, rows and title of what people read."""
        every = [(m.setting.name, m) for m in self.measured]
        if self.against:
            every.append(("eager", self.against))
        title = (
            f"{self.teacher}, {self.mode}: {self.num_parameters:,} parameters, {self.num_rounds} x {self.batch_size} "
        )
        title += f"images a step, {self.device}, {self.num_threads} threads"
        columns = [
            "setting",
            "stage",
            "s/step",
            "images/s",
            "s/1k images",
            "GFLOP/image",
            "utilisation",
            "peak GB",
            "x",
        ]
        rows: list[Sequence[str | float | None]] = []
        for name, m in every:
            for s in m.stages:
                numbers = (s.seconds, s.images_per_sec, s.sec_per_kimg, s.flop_per_image / 1e9, s.utilisation)
                ratio = m.ratios.get(s.name)
                rows.append([name, s.name, *map(_short, numbers), _short(s.peak_bytes / 1e9), _short(ratio)])
            rows.append([name, "sampling", None, _short(m.sampling_images_per_sec), *[None] * 4, None])
            rows[-1] = [*rows[-1][:-1], _short(m.ratios.get("sampling"))]
        yield columns, rows, title
        for name, m in every:
            total = sum(p.seconds * p.times for p in m.parts if p.inside is None)
            lines = [
                [p.name, p.times, *map(_short, (p.seconds, p.seconds * p.times / total, p.flop / p.seconds / 1e9))]
                for p in m.parts
            ]
            note = f"{m.num_graphs} graphs compiled in {m.warm_up_seconds:.0f} s, {m.num_recompiled} later"
            peak = f"peak {m.peak.flop_per_sec / 1e9:.0f} GFLOP/s ({m.setting.precision})"
            message = f"{name}: {peak}{f'; {note}' if m.num_graphs else ''}"
            yield ["part", "times", "seconds", "share", "GFLOP/s"], lines, message
        if self.detector_images_per_sec is not None and self.evaluation_share is not None:
            row = [self.detector, _short(self.detector_images_per_sec), _short(self.evaluation_share)]
            yield ["detector", "images/s", "share of evaluations in a run"], [row], "Evaluation in the loop"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self) | {"best": dataclasses.asdict(self.best.setting)}


class _MadeUp:
    """Images of noise, or latents, with classes in turn. Implements `ImageSource`."""

    num_images = _MADE_UP_IMAGES

    def __init__(self, spec: NetSpec) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (spec.img_resolution, spec.img_resolution)
        self.is_latents, self._label_dim = spec.img_channels == 4, spec.label_dim
        if self.is_latents:
            self._items = torch.rand(self.num_images, 2 * spec.img_channels, *size, generator=generator)
        else:
            shape = (self.num_images, spec.img_channels, *size)
            self._items = torch.randint(256, shape, dtype=torch.uint8, generator=generator)

    def images(self, indices: Any) -> Tensor:
        return self._items[torch.as_tensor(indices)]

    def one_hot(self, indices: Any) -> Tensor:
        if not self._label_dim:
            return torch.zeros(len(indices), 0)
        return torch.eye(self._label_dim)[torch.as_tensor(indices) % self._label_dim]


def run(
    teacher: str = "edm-cifar10-uncond",
    *,
    mode: str = "sida",
    batch_size: int | None = None,
    num_rounds: int = 1,
    num_steps: int = 3,
    settings: Sequence[SamplingForm] = (EAGER,),
    against_eager: bool = False,
    with_detector: bool = True,
    device: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    tell: Progress = lambda message: None,
) -> Report:
    """Measures the distillation of a teacher of the catalog in each setting, one after the other.

    batch_size: images per pass, by default the recipe's micro-batch; a step is num_rounds passes. num_steps: how often
    everything is timed, of which the median is told. against_eager: an eager step (float32, uncompiled, all of torch's
    threads in each operation) is timed in turn with each setting, and ratios are medians over those pairs.
    Raises SidaError for a teacher that the catalog does not have, a mode without recipe, or counts below one.
    """
    recipe, spec = _recipe(teacher, mode, batch_size, num_rounds, num_steps, overrides or {})
    chosen = devices.pick_device(device)
    measured: list[Measured] = []
    eager: _Eager | None = None
    if against_eager:
        tell("preparing the eager step")
        eager = _Eager(recipe, spec, chosen)
    for setting in settings:
        tell(f"measuring {setting.name}")
        measured.append(_measure(_Subject(recipe, spec, setting, chosen), eager, num_steps))
    against = eager.measured() if eager else None
    detector, rate = catalog.DATASETS[recipe.dataset].detector, None
    if with_detector:
        tell(f"measuring the detector {detector}")
        rate = _detector_rate(detector, spec, chosen, num_steps)
    best = min(measured, key=lambda m: m.stages[-1].seconds)
    share = None if rate is None else _evaluation_share(recipe, best, rate)
    return Report(
        teacher=teacher,
        mode=mode,
        num_parameters=_num_parameters(spec),
        batch_size=recipe.batch_size // num_rounds,
        num_rounds=num_rounds,
        num_steps=num_steps,
        device=str(chosen),
        num_threads=torch.get_num_threads(),
        measured=measured,
        against=against,
        detector=detector,
        detector_images_per_sec=rate,
        evaluation_share=share,
    )


def sweep(device: str | None = None) -> list[SamplingForm]:
    """The settings worth trying on a device: each precision that it has, by operations and compiled."""
    precisions: list[Precision] = ["fp32", "bf16"]
    if devices.pick_device(device).type == "cuda":
        precisions = ["fp32", "tf32", "bf16", "fp16"]
    forms = [(False, False), (True, False), (False, True), (True, True)]
    return [
        SamplingForm(precision=p, channels_last=last, compile=compiled) for p in precisions for last, compiled in forms
    ]


def flop_of_parts(recipe: Recipe, spec: NetSpec) -> dict[str, int]:
    """Floating-point operations of each part of one pass, counted without computing anything.

    Counted are matrix products, convolutions and attention, a multiplication and an addition as two.
    """
    device = torch.device("meta")
    teacher = _teacher(spec, device)
    fake_score, generator = (distillation.trainable_copy(teacher, 0.0, keep_logvar=k) for k in (recipe.logvar, False))
    pass_size = recipe.batch_size // recipe.num_accumulation_rounds
    made = _Pass.make(recipe, spec, pass_size, device)
    flop: dict[str, int] = {}
    for name, do in _parts_of_pass(recipe, teacher, fake_score, generator, made):
        with FlopCounterMode(display=False) as counter:
            do()
        flop[name] = counter.get_total_flops()
    return flop


def _recipe(
    teacher: str, mode: str, batch_size: int | None, num_rounds: int, num_steps: int, overrides: Mapping[str, Any]
) -> tuple[Recipe, NetSpec]:
    """The catalog's recipe with all stages in reach, and the teacher's net."""
    for flag, count in (("--batch-size", batch_size), ("--rounds", num_rounds), ("--steps", num_steps)):
        if count is not None and count < 1:
            raise SidaError(f"{flag} must be >= 1, got {count}", f"Pass {flag} 1 or more.")
    known = {name: entry for name, entry in catalog.TEACHERS.items() if entry.recipes}
    if teacher not in known:
        raise SidaError(f"unknown teacher {teacher!r}", f"Use one of {', '.join(known)}.")
    recipes: Mapping[str, Recipe] = {str(name): recipe for name, recipe in known[teacher].recipes.items()}
    if mode not in recipes:
        raise SidaError(f"{teacher} has no recipe of mode {mode!r}", f"It has {', '.join(recipes)}.")
    recipe = override(recipes[mode], overrides)
    pass_size = batch_size or recipe.batch_size // recipe.num_accumulation_rounds
    recipe = dataclasses.replace(
        recipe, batch_size=pass_size * num_rounds, num_accumulation_rounds=num_rounds, generator_from_nimg=1_000_000
    )
    if recipe.adversarial:
        part = dataclasses.replace(recipe.adversarial, adversarial_from_nimg=2_000_000)
        recipe = dataclasses.replace(recipe, adversarial=part)
    return recipe, known[teacher].net


_STAGE_NIMG = {"fake score": 500_000, "SiD": 1_500_000, "SiDA": 2_500_000}
"""images seen, of the recipe that `_recipe` makes, at which each stage is"""


def _teacher(spec: NetSpec, device: torch.device) -> Preconditioned:
    """A net with random weights, none of which is zero, so that no kernel has it easier than in earnest."""
    with torch.device(device):
        net = nets.build(spec)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator) if device.type != "meta" else parameter
            parameter.add_(0.02 * noise.to(device))
    net.set_dropout(0.0)
    return net.eval().requires_grad_(False)


def _num_parameters(spec: NetSpec) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in nets.build(spec).parameters())


class _Subject:
    """A distillation in one setting, ready to be timed; an eager one is without what we do for nets that are small."""

    def __init__(
        self, recipe: Recipe, spec: NetSpec, setting: SamplingForm, device: torch.device, *, is_eager: bool = False
    ) -> None:
        self.setting, self.device, self.spec, self._is_eager = setting, device, spec, is_eager
        self.recipe = override(recipe, {"precision": setting.precision})
        if not is_eager:
            devices.keep_memory()  # as the loop does
        batches = training_batches.DatasetBatches(
            _MadeUp(spec),
            DataOrder(_MADE_UP_IMAGES, recipe.seed),
            batch_size=recipe.batch_size,
            num_rounds=recipe.num_accumulation_rounds,
            seed=recipe.seed,
            device=device,
        )
        self.batches = batches
        execution = Execution(compile=setting.compile, channels_last=setting.channels_last)
        with engine_threads.one_thread_if(is_eager):  # of one thread its passes go one after the other
            self.training = distillation.Distillation(self.recipe, _teacher(spec, device), None, batches, execution)
        self.is_small = engine_threads.is_small(self.training.teacher)
        self.stages = STAGES if recipe.adversarial else STAGES[:2]
        start, self._graphs_before = time.perf_counter(), configure.num_graphs()
        for stage in self.stages:
            for _ in range(_WARM_UP_STEPS):
                self.step(stage)
        self.sample()
        _wait(device)
        self.warm_up_seconds, self._graphs = time.perf_counter() - start, configure.num_graphs()
        self._taken = _Timings()
        self._peak = Peak(matrix_product=0, convolution=0)

    def time(self, stage: str) -> "Taken":
        """Times a step of this stage, or sampling, once more."""
        taken = _time(self.sample if stage == "sampling" else partial(self.step, stage), self.device)
        self._taken.note(stage, taken)
        return taken

    def note_peak(self) -> None:
        """Measures the peak once more, of which the highest counts."""
        now = peak_of(self.recipe.precision, self.device)
        self._peak = Peak(
            matrix_product=max(self._peak.matrix_product, now.matrix_product),
            convolution=max(self._peak.convolution, now.convolution),
        )

    def measured(self, others: Sequence[Mapping[str, "Taken"]]) -> Measured:
        """All that was timed; others: what the eager step took each time."""
        recompiled = configure.num_graphs() - self._graphs
        flop = flop_of_parts(self.recipe, self.spec)
        with self.threads():
            parts = _time_parts(self, flop, 1 if self._is_eager else len(self._taken))
        of_stage = {name: [taken[name] for taken in self._taken] for name in self.stages}
        pairs = list(zip(others, self._taken, strict=True)) if others else []
        names = self._taken[0] if others else ()
        return Measured(
            setting=self.setting,
            stages=[_stage(self, name, taken, flop, self._peak) for name, taken in of_stage.items()],
            parts=parts,
            peak=self._peak,
            sampling_images_per_sec=self.num_sampled / statistics.median(t["sampling"].seconds for t in self._taken),
            warm_up_seconds=self.warm_up_seconds,
            num_graphs=self._graphs - self._graphs_before,
            num_recompiled=recompiled,
            ratios={n: statistics.median(other[n].seconds / own[n].seconds for other, own in pairs) for n in names},
            cpu_ratios={
                n: statistics.median(other[n].cpu_seconds / own[n].cpu_seconds for other, own in pairs) for n in names
            },
        )

    def step(self, stage: str) -> None:
        self.training.nimg = _STAGE_NIMG[stage]
        assert self.training.stage() == stage
        devices.allow_tf32(self.setting.precision == "tf32")  # another setting may have been timed in between
        with self.threads():
            self.training.step()

    def threads(self) -> AbstractContextManager[None]:
        """Within it the threads are those of a training step."""
        return engine_threads.one_thread_if(self.is_small and not self._is_eager)

    def sample(self) -> None:
        """Draws images in one step as in evaluations."""
        net, step, seeds = self.training.ema, OneStepSpec(), range(self.num_sampled)
        size = self.recipe.batch_size // self.recipe.num_accumulation_rounds
        if not self._is_eager:
            list(sampling.generate(net, seeds, step, device=self.device, codec=PixelCodec(), batch_size=size))
            return
        for start in range(0, len(seeds), size):
            images, _ = sampling.sample_batch(net, step, seeds[start : start + size], self.device)
            PixelCodec().decode(images).cpu()

    @property
    def num_sampled(self) -> int:
        """A batch, or of a small net several, since cores make one each."""
        batches = _SAMPLED_BATCHES if self.is_small else 1
        return batches * self.recipe.batch_size // self.recipe.num_accumulation_rounds


def _measure(subject: _Subject, eager: "_Eager | None", num_steps: int) -> Measured:
    for _ in range(num_steps):
        for stage in (*subject.stages, "sampling"):
            subject.time(stage)
            if eager:
                eager.time(stage)
        subject.note_peak()
    return subject.measured(eager.taken[-num_steps:] if eager else [])


class _Eager:
    """An eager subject, timed in turn with others from a process of its own.

    What a process does with freed memory depends on all that it did before: beside another in one process it would
    find the other's memory ready.
    """

    def __init__(self, recipe: Recipe, spec: NetSpec, device: torch.device) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve_eager, args=(theirs, recipe, spec, str(device)), daemon=True)
        self._process.start()
        theirs.close()
        self.taken = _Timings()
        with self._alive():
            self._pipe.recv()

    def time(self, stage: str) -> None:
        self.taken.note(stage, self._asked(stage))

    def measured(self) -> Measured:
        measured: Measured = self._asked(None)
        self._process.join()
        return measured

    def _asked(self, stage: str | None) -> Any:
        with self._alive():
            self._pipe.send(stage)
            return self._pipe.recv()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            self._process.join()
            hint = "Leave out --against, or pass a smaller --batch-size."
            message = f"the process of the eager step has ended with code {self._process.exitcode}"
            raise SidaError(message, hint, exit_code=EXIT_FAILED) from None


def _serve_eager(pipe: "Connection[Any, str | None]", recipe: Recipe, spec: NetSpec, device: str) -> None:
    subject = _Subject(recipe, spec, EAGER, torch.device(device), is_eager=True)
    pipe.send(None)
    while stage := pipe.recv():
        taken = subject.time(stage)
        if stage == "sampling":
            subject.note_peak()
        pipe.send(taken)
    pipe.send(subject.measured([]))


def _stage(subject: _Subject, name: str, taken: Sequence["Taken"], flop: Mapping[str, int], peak: Peak) -> Stage:
    recipe, seconds = subject.recipe, statistics.median(t.seconds for t in taken)
    of_step = sum(
        n for part, n in flop.items() if part not in _INSIDE and (name != STAGES[0] or part in _OF_FAKE_SCORE)
    )
    of_step *= recipe.num_accumulation_rounds
    return Stage(
        name=name,
        seconds=seconds,
        cpu_seconds=statistics.median(t.cpu_seconds for t in taken),
        images_per_sec=recipe.batch_size / seconds,
        sec_per_kimg=1000 * seconds / recipe.batch_size,
        flop_per_image=of_step / recipe.batch_size,
        utilisation=of_step / seconds / peak.flop_per_sec,
        peak_bytes=_peak_bytes(subject, name),
    )


# The parts of a step
_INSIDE = {"discriminator on reals": "fake-score step forward"}
"""parts that are timed once more by themselves"""

_OF_FAKE_SCORE = ("data", "generator forward", "fake-score step forward", "fake-score step backward")


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """The tensors that one pass starts from."""

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    labels: Tensor | None
    reals: Tensor
    augment_labels: Tensor | None

    @classmethod
    def make(cls, recipe: Recipe, spec: NetSpec, num: int, device: torch.device) -> "_Pass":
        def normal() -> Tensor:
            return torch.randn(num, spec.img_channels, spec.img_resolution, spec.img_resolution, device=device)

        labels = None
        if spec.label_dim:
            labels = functional.one_hot(torch.arange(num, device=device) % spec.label_dim, spec.label_dim)
        is_augmented = recipe.augment_p and spec.augment_dim
        return cls(
            latents=normal(),
            noise=normal(),
            sigma=(recipe.P_std * torch.randn(num, 1, 1, 1, device=device) + recipe.P_mean).exp(),
            labels=None if labels is None else labels.to(torch.float32),
            reals=normal().clamp(-1, 1),
            augment_labels=torch.zeros(num, spec.augment_dim, device=device) if is_augmented else None,
        )


def _parts_of_pass(
    recipe: Recipe, teacher: Preconditioned, fake_score: Preconditioned, generator: Preconditioned, made: _Pass
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What the networks do in one pass, in order; each must be done before the next is asked for."""
    part, sigma, labels = recipe.adversarial, made.sigma, made.labels
    got: dict[str, Tensor] = {}

    def generate(*, graph: bool) -> None:
        with torch.set_grad_enabled(graph):
            got["fakes"] = generator(recipe.sigma_init * made.latents, recipe.sigma_init, labels)

    def fake_score_step() -> None:
        score = methods.fake_score_loss(
            fake_score,
            got["fakes"].detach(),
            made.noise,
            sigma,
            labels,
            made.augment_labels,
            real_images=made.reals if part else None,
            real_augment_labels=made.augment_labels,
        )
        got["loss"] = score.per_pixel.sum()
        if part:
            got["loss"] = got["loss"] + methods.discriminator_loss(score, sigma).sum()

    def discriminate() -> None:
        logits = fake_score.logits(made.reals + sigma * made.noise, sigma, labels, made.augment_labels)
        functional.softplus(-logits).sum().backward()

    def forward(net: Preconditioned) -> None:
        got["x"] = (got["fakes"].detach() + sigma * made.noise).requires_grad_()
        denoised, logits = net.denoise_and_logits(got["x"], sigma, labels)
        got["out"] = denoised.sum() + (logits.sum() if net is fake_score and part else 0)

    def backward() -> None:
        (got["gradient"],) = torch.autograd.grad(got["out"], got["x"])

    generator.eval()
    fake_score.train()
    yield "generator forward", lambda: generate(graph=False)
    yield "fake-score step forward", fake_score_step
    yield "fake-score step backward", lambda: got.pop("loss").backward()
    if part:
        yield "discriminator on reals", discriminate
    generator.train()
    fake_score.eval()
    yield "generator forward with graph", lambda: generate(graph=True)
    with gradients.without_weight_gradients(fake_score):
        yield "teacher forward", lambda: forward(teacher)
        yield "teacher backward", backward
        yield "fake score forward", lambda: forward(fake_score)
        yield "fake score backward", backward
    yield "generator backward", lambda: got["fakes"].backward(got["gradient"])


def _time_parts(subject: _Subject, flop: Mapping[str, int], num_steps: int) -> list[Part]:
    training, recipe, device, spec = subject.training, subject.recipe, subject.device, subject.spec
    num_rounds = recipe.num_accumulation_rounds
    pass_size = recipe.batch_size // num_rounds
    made = _Pass.make(recipe, spec, pass_size, device)
    seconds: dict[str, list[float]] = {}
    own = training.modules()
    optimizers = [own["fake_score_optimizer"], own["generator_optimizer"]]

    def data() -> None:
        batch = subject.batches.get(0, 0)
        images = subject.batches.images(0, 0)
        if recipe.augment_p and spec.augment_dim:
            augmented = augment.AugmentPipe(p=recipe.augment_p)
            for _ in range(2):
                augmented(images, batch.augment)

    def optimise() -> None:
        for optimizer in optimizers:
            assert isinstance(optimizer, torch.optim.Optimizer)
            updates.apply_gradients(optimizer, None)

    def average() -> None:
        updates.update_ema(
            training.ema,
            training.generator,
            halflife_nimg=recipe.ema_halflife_nimg,
            rampup_ratio=recipe.ema_rampup_ratio,
            nimg=_STAGE_NIMG["SiD"],
            batch_size=recipe.batch_size,
        )

    def once() -> Iterator[tuple[str, Callable[[], None]]]:
        yield "data", data
        yield from _parts_of_pass(recipe, training.teacher, training.fake_score, training.generator, made)
        yield "optimisers", optimise
        yield "EMA", average

    for index in range(num_steps + 1):
        for name, do in once():
            taken = _seconds_of(do, device)
            if index:  # the first time some of them are compiled
                seconds.setdefault(name, []).append(taken)
    return [
        Part(
            name=name,
            seconds=statistics.median(times),
            times=1 if name in ("optimisers", "EMA") else 2 * num_rounds if name == "data" else num_rounds,
            flop=flop.get(name, 0),
            inside=_INSIDE.get(name),
        )
        for name, times in seconds.items()
    ]


# The machine
def peak_of(precision: str, device: torch.device) -> Peak:
    """Measures a matrix product and a convolution, large enough to keep the device busy, with the threads of now."""
    dtype = configure.DTYPES[precision]
    sides, nums = ((256, 512, 1024, 2048), (1, 4, 16)) if device.type == "cpu" else ((8192,), (512,))
    devices.allow_tf32(precision == "tf32")

    def product(side: int) -> tuple[Callable[[], object], int]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return lambda: a @ b, 2 * side**3

    def convolution(num: int, is_last: bool) -> tuple[Callable[[], object], int]:
        image = torch.randn(num, 256, 32, 32, device=device).to(dtype)
        kernel = torch.randn(256, 256, 3, 3, device=device).to(dtype)
        x, w = (_last(image), _last(kernel)) if is_last else (image, kernel)
        return partial(functional.conv2d, x, w, padding=1), 2 * image.numel() * 256 * 9

    with torch.no_grad():
        return Peak(
            matrix_product=_highest_rate((product(side) for side in sides), device),
            convolution=max(
                _highest_rate((convolution(num, is_last) for num in nums), device) for is_last in (False, True)
            ),
        )


def _highest_rate(growing: Iterable[tuple[Callable[[], object], int]], device: torch.device) -> float:
    """The most operations per second; ends at a size that keeps the device busy, since some lack fast bf16 or fp16."""
    highest = 0.0
    for do, flop in growing:
        seconds = [_seconds_of(do, device)]
        while len(seconds) <= _PEAK_TRIES and seconds[-1] < _BUSY_SECONDS * _PEAK_TRIES:
            seconds.append(_seconds_of(do, device))
        highest = max(highest, flop / min(seconds))
        if min(seconds) > _BUSY_SECONDS:
            break
    return highest


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class Taken(NamedTuple):
    """What something took: by the clock, and of all threads' processor time."""

    seconds: float
    cpu_seconds: float


class _Timings(list[dict[str, Taken]]):
    """What each stage and sampling took, round after round."""

    def note(self, stage: str, taken: Taken) -> None:
        if not self or stage in self[-1]:
            self.append({})
        self[-1][stage] = taken


def _time(do: Callable[[], object], device: torch.device) -> Taken:
    _wait(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    do()
    _wait(device)
    return Taken(time.perf_counter() - start, time.process_time() - cpu_start)


def _seconds_of(do: Callable[[], object], device: torch.device) -> float:
    return _time(do, device).seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(subject: _Subject, stage: str) -> int:
    """The most bytes that tensors of this distillation hold at a time in a step of this stage."""
    held = sum(_bytes_of(subject.training))
    if subject.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(subject.device)
        before = torch.cuda.memory_allocated(subject.device)
        subject.step(stage)
        return held + torch.cuda.max_memory_allocated(subject.device) - before
    # The profiler does not see into other threads: passes one by one tell what each of them takes.
    training = subject.training
    num_threads, training.num_threads = training.num_threads, 1
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _no_native_messages(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        subject.step(stage)
    training.num_threads = num_threads
    assert profile.profiler is not None
    result = profile.profiler.kineto_results
    assert result is not None
    events = sorted((e for e in result.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = most = 0
    for event in events:
        now += event.nbytes()
        most = max(most, now)
    return held + most * min(num_threads, len(training.passes))


@contextmanager
def _no_native_messages() -> Iterator[None]:
    """Within the block nothing reaches stderr: torch's profiler writes there without being asked."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _bytes_of(training: distillation.Distillation) -> Iterator[int]:
    """Sizes of the tensors that stay from step to step."""
    modules: Sequence[Any] = (training.teacher, *training.modules().values())
    for module in modules:
        if isinstance(module, torch.optim.Optimizer):
            yield from (t.nbytes for state in module.state.values() for t in state.values())
        else:
            yield from (t.nbytes for t in (*module.parameters(), *module.buffers()))


# Evaluation
def _detector_rate(name: str, spec: NetSpec, device: torch.device, num_steps: int) -> float:
    """Images per second of a detector, with random weights where it does not ship with its own."""
    made: torch.nn.Module | None = None
    if name not in detectors.SMALL:
        made = FIDInception() if name == "inception" else VisionTransformer()
    detector = detectors.load(name, None if made is None else made.state_dict(), device=device)
    num = detector.images_at_once if device.type == "cuda" or made is None else min(8, detector.images_at_once)
    size = 512 if spec.img_channels == 4 else spec.img_resolution
    channels = 3 if spec.img_channels == 4 else spec.img_channels
    images = torch.randint(256, (num, channels, size, size), dtype=torch.uint8)
    detector(images)
    return num / statistics.median(_seconds_of(lambda: detector(images), device) for _ in range(num_steps))


def _evaluation_share(recipe: Recipe, measured: Measured, detector_rate: float) -> float:
    evaluating = recipe.evaluate_num * (1 / measured.sampling_images_per_sec + 1 / detector_rate)
    training = recipe.evaluate_every_nimg * measured.stages[-1].sec_per_kimg / 1000
    return evaluating / (evaluating + training)
