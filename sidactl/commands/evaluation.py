"""Scores while a distillation runs and at its end: of its generators, and of its teacher."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sidactl import catalog, launch
from sidactl.commands import moments, preflight, scores
from sidactl.commands.assemble import Assembled
from sidactl.commands.features import Features
from sidactl.commands.running import OnEvent
from sidactl.commands.samplers import sampler_of
from sidactl.commands.score import evaluate
from sidactl.commands.score_question import is_answered
from sidactl.commands.scores import METRICS, ScoreOptions, name_of
from sidactl.commands.vae import is_of_latents
from sidactl.commands.words import OnCount, part_of
from sidactl.errors import SidaError
from sidactl.recipes import HeunSpec, OneStepSpec
from sidactl.store import BrokenError, Store

if TYPE_CHECKING:
    import torch

    from sidactl.data.codec import Codec
    from sidactl.detectors import Detector
    from sidactl.nets import Preconditioned
    from sidactl.training.state import Evaluate

PREVIEW_SEEDS = range(64)

# Far from the seeds that anybody scores with, so that the best checkpoint is not chosen by the images it is judged on.
SELECTION_SEED = 1 << 31


def try_scoring(
    detector: "Detector",
    reference: moments.Moments | None,
    net: "Preconditioned",
    sampler: OneStepSpec,
    load_vae: Callable[[], Any] | None = None,
) -> None:
    """Draws two images and has them measured, so that what does not fit is told before the first step."""
    from sidactl import sampling

    seeds = range(SELECTION_SEED, SELECTION_SEED + 2)
    (batch,) = sampling.generate(net, seeds, sampler, device=detector.device, load_vae=load_vae)
    found, wanted = detector(batch.images).shape[1], len(reference.mean) if reference else 0
    if reference and found != wanted:
        raise SidaError(
            f"the reference has {wanted:,} features, detector {detector.name} gives {found:,}",
            "Pass another --ref, or --detector.",
        )


@dataclass(frozen=True)
class Eye:
    """One of the scores that an evaluation gives: by which detector, and against what."""

    metric: str
    detector: "Detector"
    against: moments.Moments | Features | None


def evaluation_of(
    eyes: Sequence[Eye],
    sampler: OneStepSpec,
    num_images: int,
    tick: OnCount | None = None,
    class_counts: Sequence[int] | None = None,
    load_vae: Callable[[], Any] | None = None,
) -> "Evaluate":
    """What scores a net while it trains, by the first of these scores and the others; and a grid of images."""
    import torch

    from sidactl import sampling
    from sidactl.commands import features
    from sidactl.data.codec import codec_for
    from sidactl.engine import ranks, sharding
    from sidactl.training import state

    seeds = range(SELECTION_SEED, SELECTION_SEED + num_images)
    device = eyes[0].detector.device
    detectors = {eye.detector.identity: eye.detector for eye in eyes}
    keeps = {eye.detector.identity for eye in eyes if METRICS[eye.metric].need != "moments"}
    settings = {**scores.DEFAULTS, "order": "content"}  # as `evaluate` has them

    def evaluate(net: "Preconditioned", should_stop: Callable[[], bool]) -> state.Evaluation | None:
        net = sharding.gathered(net, device)
        size = features.images_per_batch(net.spec.img_channels, net.spec.img_resolution)
        codec = codec_for(net.spec.img_channels, load_vae, vae_dtype(device))
        samples = sampling.generate(
            net, seeds, sampler, device=device, class_counts=class_counts, codec=codec, batch_size=size
        )
        problems: list[str] = []

        def images(first: int) -> "Iterator[torch.Tensor]":
            try:
                for batch in samples.shared(first):
                    yield batch.images
            except sampling.NotFiniteError as error:
                problems.append(error.message)
                channels, side = preflight.drawn_by(net.spec)
                yield torch.zeros(1, channels, side, side, dtype=torch.uint8)  # others count on this one's share

        collected = features.collect(
            features.Work(len(samples), images, detectors, keeps),
            tick=features.out_of(tick, num_images),
            should_stop=lambda: bool(problems) or should_stop(),
            refuse=problems.append,
        )
        if ranks.any_rank(should_stop()):
            return None
        if message := ranks.any_message(problems[0] if problems else None):
            return state.Evaluation(math.nan, None, f"no score after these updates: {message}")

        def numbers() -> str:
            found: dict[str, float] = {}
            for eye in eyes:
                stats = collected.stats[eye.detector.identity]
                kept = collected.features.get(eye.detector.identity)
                found |= scores.numbers(eye.metric, eye.detector, stats, kept, eye.against, None, settings)
            return json.dumps(found)

        found: dict[str, float] = json.loads(ranks.broadcast_from_rank0(numbers))
        value = found.pop(name_of(eyes[0].metric, eyes[0].detector))
        try:
            return state.Evaluation(value, preview_of(net, sampler, codec), also=found)
        except sampling.NotFiniteError as error:
            return state.Evaluation(value, None, f"no picture: {error.message}", also=found)
        finally:
            codec.leave_device()

    return evaluate


def finite_or_none(score: float | None) -> float | None:
    """The score, or None for one that JSON has no word for."""
    return score if score is not None and math.isfinite(score) else None


def score_teacher(
    store: Store, wanted: Assembled, device: str | None, watch: OnEvent | None, force: bool
) -> float | None:
    """The teacher's score as the generator's are, for comparison; None, and said so, where it cannot be had."""
    from sidactl.training import state

    recipe, teacher = wanted.recipe, wanted.inputs["teacher"]
    nfe = sampler_of(teacher).nfe
    show = part_of(watch, f"scoring the teacher ({nfe} evaluations each)")

    def tell(message: str, kind: str = "note") -> None:
        if watch:
            watch(state.Event(kind, recipe.duration_nimg, {"message": message}))

    def tick(done: int, total: int) -> None:
        if done == 0:
            tell(f"scoring the teacher on {total:,} images ({nfe} evaluations each) for comparison")
        if show:
            show(done, total)

    try:
        options = _teacher_question(store, wanted) | {"device": device, "tick": tick, "say": None}
        try:
            return evaluate(teacher.oid, [recipe.evaluate_by], **options).value
        except BrokenError:
            if not force:
                raise
            return evaluate(teacher.oid, [recipe.evaluate_by], **(options | {"force": True})).value
    except (SidaError, RuntimeError, MemoryError) as error:
        if launch.world_size() > 1:  # the others wait for this process
            raise
        reason = error.message if isinstance(error, SidaError) else (str(error).splitlines() or [repr(error)])[0]
        tell(f"the teacher could not be scored ({reason}); the generator is kept without that comparison", "warning")
        return None


def _teacher_question(store: Store, wanted: Assembled) -> ScoreOptions:
    assert wanted.compared
    usual = catalog.VAE_NAME if is_of_latents(wanted.inputs["teacher"]) else None
    return {
        "reference": wanted.compared.oid,
        "num": wanted.recipe.evaluate_num,
        "detector": wanted.detector,
        "vae": wanted.vae.oid if wanted.vae else usual,
        "run": store.root,
    }


def is_teacher_scored(store: Store, wanted: Assembled) -> bool:
    """Whether the teacher's score is known already."""
    return is_answered(wanted.inputs["teacher"].oid, [wanted.recipe.evaluate_by], _teacher_question(store, wanted))


def vae_dtype(device: "torch.device") -> "torch.dtype":
    """In which the VAE decodes what a training looks at: on a GPU in half precision, which is several times as fast.

    The float32 decoder took more than a third of a run's wall clock with the smallest networks. On a CPU, and for
    scores that are told, it is float32.
    """
    import torch

    return torch.float16 if device.type == "cuda" else torch.float32


def preview_of(net: "Preconditioned", sampler: OneStepSpec | HeunSpec, codec: "Codec | None" = None) -> bytes:
    from sidactl import report, sampling

    device, side = next(net.parameters()).device, preflight.drawn_by(net.spec)[1]
    seeds = PREVIEW_SEEDS[: num_previewed(side)]
    batches = sampling.generate(net, seeds, sampler, device=device, codec=codec)
    return report.grid(next(iter(batches)).images.permute(0, 2, 3, 1).numpy())


def num_previewed(side: int) -> int:
    """Images of this size in a preview: at most 2,048 pixels a side, since PNGs of 4,096 take a processor 12 s each."""
    return min(len(PREVIEW_SEEDS), max(1, 2048 // side) ** 2)
