"""How fast a distillation runs here, and why: stages, parts of a step, sampling, the detector, against the peak.

Nets have random weights and data are made up, so nothing is downloaded. What a step computes is the trainer's.
"""

import dataclasses
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sidactl import catalog, detectors, nets, sampling, scopes
from sidactl.data.codec import PixelCodec
from sidactl.engine import configure, devices, meter, threads
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.nets.inception import FIDInception
from sidactl.nets.vit import VisionTransformer
from sidactl.recipes import Execution, NetSpec, OneStepSpec, Precision, Recipe, SamplingForm, SidRecipe
from sidactl.training import made_up

_WARM_UP_STEPS = 2
"""before anything is timed: allocators, kernels' caches, compilation"""

_SAMPLED_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A whole step of one stage. peak_bytes: tensors that live at the same time at most, nets and optimisers included.

    utilisation: the share of the peak, as measured here in the same precision, that the step's operations make use of.
    """

    name: str
    seconds: float
    images_per_sec: float
    sec_per_kimg: float
    flop_per_image: float
    utilisation: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a step of the last stage, all its passes together."""

    name: str
    seconds: float
    flop: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that was measured in one setting. ratios: seconds of the eager step over those of this one, by stage."""

    setting: SamplingForm
    stages: Sequence[Stage]
    parts: Sequence[Part]
    """none of the eager step"""
    peak: meter.Peak
    sampling_images_per_sec: float
    warm_up_seconds: float
    """of the first steps, in which nets are compiled"""
    num_graphs: int
    """compiled in them"""
    num_recompiled: int
    """compiled later, where nothing should be"""
    ratios: Mapping[str, float]


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
    best: SamplingForm
    """that in which the last stage is fastest"""
    detector: str
    detector_images_per_sec: float | None
    evaluation_share: float | None
    """of the time of a run at its recipe's cadence, what sampling and features take"""

    def tables(self) -> Iterator[tuple[Sequence[str], Sequence[Sequence[str | float | None]], str]]:
        """Columns, rows and title of what people read."""
        title = f"{self.teacher}, {self.mode}: {self.num_parameters:,} parameters, {self.num_rounds} x "
        title += f"{self.batch_size} images a step, {self.device}, {self.num_threads} threads"
        columns = "setting, stage, s/step, images/s, s/1k images, GFLOP/image, utilisation, of GFLOP/s, peak GB, x"
        rows: list[Sequence[str | float | None]] = []
        every = [(m.setting.name, m) for m in self.measured]
        for name, m in [*every, ("eager", self.against)] if self.against else every:
            for s in m.stages:
                numbers = [s.seconds, s.images_per_sec, s.sec_per_kimg, s.flop_per_image / 1e9, s.utilisation]
                more = [m.peak.flop_per_sec / 1e9, s.peak_bytes / 1e9, m.ratios.get(s.name)]
                rows.append([name, s.name, *map(_short, [*numbers, *more])])
            sampled, ratio = map(_short, (m.sampling_images_per_sec, m.ratios.get("sampling")))
            rows.append([name, "sampling", None, sampled, *[None] * 5, ratio])
        yield columns.split(", "), rows, title
        for name, m in every:
            total = sum(p.seconds for p in m.parts)
            lines = [[p.name, *map(_short, (p.seconds, p.seconds / total, p.flop / p.seconds / 1e9))] for p in m.parts]
            message = f"{name}: parts of a step of {m.stages[-1].name}, passes one after the other"
            if m.num_graphs:
                message += f"; {m.num_graphs} graphs compiled in {m.warm_up_seconds:.0f} s, {m.num_recompiled} later"
            yield ["part", "seconds", "share", "GFLOP/s"], lines, message
        if self.detector_images_per_sec is not None:
            row = [self.detector, _short(self.detector_images_per_sec), _short(self.evaluation_share)]
            yield ["detector", "images/s", "share of evaluations in a run"], [row], "Evaluation in the loop"

    def to_json(self) -> dict[str, Any]:
        """JsonFields JSON values."""
        return dataclasses.asdict(self)


def _short(number: float | None) -> float | None:
    """Four digits, for tables."""
    return None if number is None else float(f"{number:.4g}")


def run(
    teacher: str = "edm-cifar10-uncond",
    *,
    mode: str = "sida",
    batch_size: int | None = None,
    num_rounds: int = 1,
    num_steps: int = 3,
    settings: Sequence[SamplingForm] = (made_up.EAGER,),
    against_eager: bool = False,
    with_detector: bool = True,
    device: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda message: None,
    clock: meter.Clock = time.perf_counter,
) -> Report:
    """Measures the distillation of a teacher of the catalog in each setting, one after the other.

    batch_size: images per pass, by default the recipe's micro-batch; a step is num_rounds passes. num_steps: how often
    everything is timed, of which the median counts. against_eager: an eager step (float32, uncompiled, all of torch's
    threads in each operation) is timed in turn with each setting, and ratios are medians over those pairs. tell: is
    told what is measured next. clock: can be pickled, for the process of the eager step.
    Raises SidaError for a teacher that the catalog does not have, a mode without recipe, or counts below one.
    """
    recipe, spec = made_up.recipe_of(teacher, mode, batch_size, num_rounds, num_steps, overrides or {})
    chosen = devices.pick_device(device)
    tell("counting operations")
    flop = flop_per_image(recipe, spec, chosen)
    task = _Task(recipe, spec, chosen, flop, partial(meter.when_done, clock, chosen))
    if against_eager:
        tell("preparing the eager step")
    measured: list[Measured] = []
    with _eager_process(task) if against_eager else nullcontext() as ask:
        for setting in settings:
            tell(f"measuring {setting.name}")
            measured.append(_measure(task, setting, num_steps, ask))
        against = ask("measured") if ask else None
    best = min(measured, key=lambda m: m.stages[-1].seconds)
    detector, rate, share = catalog.DATASETS[recipe.dataset].detector, None, None
    if with_detector:
        tell(f"measuring the detector {detector}")
        rate = _detector_rate(task, detector, num_steps)
        evaluating = recipe.evaluate_num * (1 / best.sampling_images_per_sec + 1 / rate)
        share = evaluating / (evaluating + recipe.evaluate_every_nimg * best.stages[-1].sec_per_kimg / 1000)
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in nets.build(spec).parameters())
    return Report(
        teacher=teacher,
        mode=mode,
        num_parameters=num_parameters,
        batch_size=task.pass_size,
        num_rounds=num_rounds,
        num_steps=num_steps,
        device=str(chosen),
        num_threads=torch.get_num_threads(),
        measured=measured,
        against=against,
        best=best.setting,
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


def flop_per_image(recipe: Recipe, spec: NetSpec, device: torch.device) -> dict[str, dict[str, float]]:
    """Floating-point operations for each image of a step, by stage and part, counted in steps of one image.

    Counted are matrix products, convolutions and attention, a multiplication and an addition as two.
    """
    one = dataclasses.replace(recipe, batch_size=1, num_accumulation_rounds=1)
    training, flop = made_up.distillation_of(one, Execution(), spec, device), {}
    training.num_threads = 1
    for stage in list(made_up.STAGE_NIMG)[: 3 if isinstance(recipe, SidRecipe) and recipe.adversarial else 2]:
        with threads.one_thread_if(threads.is_small(training.teacher)), meter.operation_counter() as counter:
            flop[stage] = scopes.by_part(partial(made_up.step, training, stage), counter.get_total_flops)
    return flop


class _Task(NamedTuple):
    """What is measured, by a clock that waits for the device; flop_per_image: by stage and part."""

    recipe: Recipe
    spec: NetSpec
    device: torch.device
    flop_per_image: Mapping[str, Mapping[str, float]]
    clock: meter.Clock

    @property
    def pass_size(self) -> int:
        return self.recipe.batch_size // self.recipe.num_accumulation_rounds


class _Subject:
    """A distillation in one setting, ready to be timed; an eager one is without what we do for nets that are small."""

    def __init__(self, task: _Task, setting: SamplingForm, *, is_eager: bool = False) -> None:
        self._task, self._setting, self._is_eager = task, setting, is_eager
        if not is_eager:
            devices.keep_memory()  # as the loop does
        with threads.one_thread_if(is_eager):  # of one thread its passes go one after the other
            self._training = made_up.distillation_of(*made_up.in_setting(task.recipe, setting), task.spec, task.device)
        self._is_small = threads.is_small(self._training.teacher)
        # Of a small net several batches are sampled, since cores make one each.
        self._num_sampled = task.pass_size * (_SAMPLED_BATCHES if self._is_small else 1)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._peaks: list[meter.Peak] = []
        self._graphs_before, start = configure.num_graphs(), task.clock()
        for name in [*task.flop_per_image, "sampling"] * _WARM_UP_STEPS:
            self._do(name)
        self._warm_up_seconds, self._graphs = task.clock() - start, configure.num_graphs()

    def _do(self, name: str) -> None:
        """A step of this stage, or sampling as in evaluations."""
        task, net, sampler, seeds = self._task, self._training.ema, OneStepSpec(), range(self._num_sampled)
        size, codec = task.pass_size, PixelCodec()
        devices.allow_tf32(self._setting.precision == "tf32")  # another setting may have been timed in between
        if name != "sampling":
            with threads.one_thread_if(self._is_small and not self._is_eager):
                made_up.step(self._training, name)
        elif self._is_eager:
            for start in range(0, len(seeds), size):
                codec.decode(sampling.sample_batch(net, sampler, seeds[start : start + size], task.device)[0]).cpu()
        else:
            list(sampling.generate(net, seeds, sampler, device=task.device, codec=codec, batch_size=size))

    def time(self, name: str) -> float:
        """Seconds of a step of this stage, or of sampling, once more; with sampling goes the peak."""
        self._seconds[name].append(meter.seconds_of(partial(self._do, name), self._task.clock))
        if name == "sampling":
            self._peaks.append(meter.peak_of(self._setting.precision, self._task.device, self._task.clock))
        return self._seconds[name][-1]

    def measured(self, others: Mapping[str, Sequence[float]] | None = None) -> Measured:
        """All that was timed, with memory and parts; others: what the eager step took each time."""
        num_recompiled = configure.num_graphs() - self._graphs
        # Instruments see into one thread: passes one by one tell what each of them takes.
        num_at_once, self._training.num_threads = min(self._training.num_threads, len(self._training.passes)), 1
        peak = max(self._peaks, key=lambda peak: peak.flop_per_sec)
        return Measured(
            setting=self._setting,
            stages=[self._stage(name, peak, num_at_once) for name in self._task.flop_per_image],
            parts=[] if self._is_eager else self._parts(),
            peak=peak,
            sampling_images_per_sec=self._num_sampled / statistics.median(self._seconds["sampling"]),
            warm_up_seconds=self._warm_up_seconds,
            num_graphs=self._graphs - self._graphs_before,
            num_recompiled=num_recompiled,
            ratios=ratios(others or {}, self._seconds),
        )

    def _stage(self, name: str, peak: meter.Peak, num_at_once: int) -> Stage:
        task, training, seconds = self._task, self._training, statistics.median(self._seconds[name])
        batch_size, flop = task.recipe.batch_size, sum(task.flop_per_image[name].values())
        states = [module.state_dict() for module in (training.teacher, *training.modules().values())]
        held = sum(t.nbytes for t in tree_leaves(states) if isinstance(t, Tensor))
        return Stage(
            name=name,
            seconds=seconds,
            images_per_sec=batch_size / seconds,
            sec_per_kimg=1000 * seconds / batch_size,
            flop_per_image=flop,
            utilisation=flop * batch_size / seconds / peak.flop_per_sec,
            peak_bytes=held + num_at_once * meter.peak_bytes(partial(self._do, name), task.device),
        )

    def _parts(self) -> list[Part]:
        stage, flop = list(self._task.flop_per_image.items())[-1]
        spent = [scopes.by_part(partial(self._do, stage), self._task.clock) for _ in self._seconds[stage]]
        median = {name: statistics.median(each[name] for each in spent) for name in spent[0]}
        return [Part(name=n, seconds=s, flop=flop[n] * self._task.recipe.batch_size) for n, s in median.items()]


def ratios(others: Mapping[str, Sequence[float]], own: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """What others took, over what was taken here in turn with it: medians by name."""
    pairs = {name: zip(seconds, own[name], strict=True) for name, seconds in others.items()}
    return {name: statistics.median(other / ours for other, ours in pair) for name, pair in pairs.items()}


def _measure(task: _Task, setting: SamplingForm, num_steps: int, ask_eager: Callable[..., Any] | None) -> Measured:
    subject, others = _Subject(task, setting), defaultdict[str, list[float]](list)
    for _ in range(num_steps):
        for name in [*task.flop_per_image, "sampling"]:
            subject.time(name)
            if ask_eager:
                others[name].append(ask_eager("time", name))
    return subject.measured(others)


def _serve_eager(pipe: "Connection[Any, Sequence[str]]", task: _Task) -> None:
    subject = _Subject(task, made_up.EAGER, is_eager=True)
    pipe.send(None)
    while asked := pipe.recv():
        method, *arguments = asked
        pipe.send(getattr(subject, method)(*arguments))


@contextmanager
def _eager_process(task: _Task) -> Iterator[Callable[..., Any]]:
    """Within the block calls methods of an eager subject, by their names; raises SidaError if its process has ended.

    It has one of its own because what a process does with freed memory depends on all that it did before: beside
    another subject it would find the other's memory ready.
    """
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve_eager, args=(theirs, task), daemon=True)
    process.start()
    theirs.close()

    def ask(*asked: str) -> Any:
        try:
            if asked:
                pipe.send(asked)
            return pipe.recv()
        except (EOFError, OSError):
            process.join()
            message = f"the process of the eager step has ended with code {process.exitcode}"
            hint = "Leave out --against, or pass a smaller --batch-size."
            raise SidaError(message, hint, exit_code=EXIT_FAILED) from None

    ask()
    yield ask
    pipe.send(())
    process.join()


def _detector_rate(task: _Task, name: str, num_steps: int) -> float:
    """Images per second of a detector, with random weights where it does not ship with its own."""
    made: torch.nn.Module | None = None
    if name not in detectors.SMALL:
        made = FIDInception() if name == "inception" else VisionTransformer()
    detector = detectors.load(name, None if made is None else made.state_dict(), device=task.device)
    num = detector.images_at_once if task.device.type == "cuda" or made is None else min(8, detector.images_at_once)
    channels, size = (3, 512) if task.spec.img_channels == 4 else (task.spec.img_channels, task.spec.img_resolution)
    work = partial(detector, torch.randint(256, (num, channels, size, size), dtype=torch.uint8))
    work()
    return num / statistics.median(meter.seconds_of(work, task.clock) for _ in range(num_steps))
