"""Pairs of noise and images: what a teacher makes of it, and how much of that a generator keeps, also as a picture."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidactl.commands.features import images_per_batch
from sidactl.commands.inputs import Ref, ref_text
from sidactl.commands.resolve import load_dataset, load_net, resolve
from sidactl.commands.samplers import sampler_of
from sidactl.commands.vae import vae_for, vae_loader
from sidactl.commands.words import NETS, OnCount, RunDir, part_of
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.recipes import HeunSpec, NetSpec, OneStepSpec, SamplingForm
from sidactl.store import Artifact, Store, outputs

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from sidactl.training.batches import PairSource

PICTURED = range(12)
"""seeds of a picture"""

_LEAST_PIXELS = 64
"""a side of a pictured image"""


def teacher_of(store: Store, subject: Artifact) -> Artifact:
    """The teacher that a generator was distilled from. Raises SidaError where it is not known."""
    if subject.kind == "generator" and "teacher" in subject.inputs:
        return store.get(subject.inputs["teacher"])
    called = subject.params.get("name") or subject.oid[:12]
    what = "a generator without its teacher" if subject.kind == "generator" else f"the {subject.kind}"
    raise SidaError(f"pairs are of a generator that was distilled here, got {what} {called}", "Leave out pairs.")


def has_teacher(store: Store, subject: Artifact) -> bool:
    """Whether `teacher_of` has an answer."""
    with suppress(SidaError):
        return bool(teacher_of(store, subject))
    return False


def ode_of(teacher: Artifact) -> HeunSpec:
    """The teacher's own sampler as an ODE, without churn, so that an image follows from its noise."""
    sampler = sampler_of(teacher)
    assert isinstance(sampler, HeunSpec)
    return replace(sampler, S_churn=0.0)


PAIRS_SEED = 3 << 30
"""of the first pair that a generator is trained on: far from the seeds that scores draw from, as others are"""


def training_pairs(
    store: Store, teacher: Artifact, num: int, device: str | None, watcher: object = None, *, force: bool = False
) -> Artifact:
    """What the teacher's ODE draws of so many seeds, as samples: what DMD regresses on. All processes ask together."""
    from sidactl.commands.sample import sample

    heun = {"S_churn": 0.0} if ode_of(teacher) != sampler_of(teacher) else None
    seeds = range(PAIRS_SEED, PAIRS_SEED + num)
    tick = part_of(watcher, "the teacher's pairs")
    made = sample(teacher, seeds=seeds, heun=heun, run=store.root, device=device, force=force, say=None, tick=tick)
    return made.artifact


def pair_source(store: Store, teacher: Artifact, samples: Artifact, device: "torch.device") -> "PairSource":
    """`training_pairs` as batches take them."""
    from sidactl.training.batches import TeacherPairs

    images = load_dataset(store, samples)
    return TeacherPairs(images, images.labels, PAIRS_SEED, NetSpec.from_json(teacher.params["net"]), device)


def pairing_of(
    store: Store,
    generator: Artifact,
    sampler: OneStepSpec,
    seeds: range,
    device: "torch.device",
    *,
    setting: SamplingForm,
    class_counts: Sequence[int] | None,
    vae: Artifact | None,
    tick: OnCount | None = None,
) -> Mapping[str, float]:
    """The numbers of `metrics.pairing` over these seeds, in levels of 255; every process draws a share of the images.

    Of several processes the first has them.
    """
    import torch

    from sidactl import metrics
    from sidactl.engine import ranks, threads

    draw, size, num_threads = _drawer(store, generator, sampler, device, setting, class_counts, vae)
    starts = range(0, len(seeds), size)

    def distances(start: int) -> "tuple[torch.Tensor, torch.Tensor]":
        ours, theirs, others = (images.flatten(1).float() for images in draw(seeds[start : start + size]))
        return metrics.pair_distances(ours, theirs), metrics.pair_distances(others, theirs)

    found = list[tuple[torch.Tensor, torch.Tensor]]()
    drawn = threads.map_ordered(distances, ranks.rank_share(starts), num_threads)
    for part in ranks.gather_in_order(drawn, len(starts)):
        found.append(part)
        if tick:
            tick(min(len(found) * size, len(seeds)), len(seeds))
    if not found:
        return {}
    distance, ratio = metrics.pairing(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    return {"pair distance": distance, "pair ratio": ratio}


def _drawer(
    store: Store,
    generator: Artifact,
    sampler: OneStepSpec,
    device: "torch.device",
    setting: SamplingForm,
    class_counts: Sequence[int] | None,
    vae: Artifact | None,
) -> "tuple[Callable[[range], Sequence[torch.Tensor]], int, int]":
    """What draws the images of `sampling.paired_batch` as uint8; seeds at a time, and threads."""
    from sidactl import sampling
    from sidactl.data.codec import codec_for
    from sidactl.engine import configure, threads

    taught = teacher_of(store, generator)
    net, teacher = (
        configure.configure_for_sampling(load_net(store, artifact, device), setting) for artifact in (generator, taught)
    )
    codec = codec_for(net.spec.img_channels, vae_loader(store, vae))

    def draw(seeds: range) -> "Sequence[torch.Tensor]":
        batches = sampling.paired_batch(net, sampler, teacher, ode_of(taught), seeds, device, class_counts)
        if not all(bool(images.isfinite().all()) for images in batches):
            where = f"an image of the seeds {seeds.start} to {seeds.stop - 1}"
            raise sampling.NotFiniteError(f"{where} is not finite", "Take another precision.", exit_code=EXIT_FAILED)
        return [codec.decode(images).cpu() for images in batches]

    size = images_per_batch(net.spec.img_channels, net.spec.img_resolution)
    return draw, size, threads.threads_for(teacher)


@contextmanager
def pictured(
    path: Path | None, run: RunDir, refs: Sequence[Ref] | None = None
) -> Iterator[Callable[[Sequence[str], str | None], Sequence[str]]]:
    """What draws generators, by oid, beside their teachers' images of the same noise, to be called once in the block.

    refs: all that may be drawn, where it is known, of which one must have a teacher.

    It returns what is in each row, in words; what has no teacher is left out, and SidaError raised where nothing is
    left. A place that cannot be written is refused before; into nothing without a path.
    """
    if path is None:
        yield lambda oids, device: ()
        return
    store = Store.open(run)
    kinds = [*NETS, "samples", "dataset"]
    if refs and not any(has_teacher(store, resolve(store, ref_text(ref), kinds, any_size=True)) for ref in refs):
        raise SidaError("a picture of pairs needs a generator that was distilled here, got none", "Name one.")
    with outputs.whole([outputs.Output(path, problem_of_picture)], force=True, run=store.root) as (staged,):

        def draw(oids: Sequence[str], device: str | None) -> Sequence[str]:
            import numpy as np

            from sidactl import report
            from sidactl.engine import devices

            by_teacher: dict[str, list[Artifact]] = {}
            told = list[str]()
            for artifact in map(store.get, dict.fromkeys(oids)):
                try:
                    by_teacher.setdefault(teacher_of(store, artifact).oid, []).append(artifact)
                except SidaError as error:
                    told.append(f"left out: {error.message}")
            if not by_teacher:
                raise SidaError("a picture of pairs needs a generator that was distilled here, got none", "Name one.")
            rows: list[NDArray[np.uint8]] = []
            chosen = devices.pick_device(device)
            for oid, generators in by_teacher.items():
                for index, generator in enumerate(generators):
                    ours, theirs = _drawn(store, generator, chosen)
                    rows += [ours] if index else [theirs, ours]
                    called = store.get(oid).params["name"]
                    told += [] if index else [f"row {len(rows) - 1}: teacher {called}, its ODE"]
                    told.append(f"row {len(rows)}: {generator.params['name']} ({generator.oid[:12]}), same noise")
            if len({row.shape for row in rows}) > 1:
                raise SidaError("a picture of pairs is of images of one size, got several", "Compare fewer of them.")
            form: Any = {"columns": len(PICTURED), "min_tile": _LEAST_PIXELS, "software": report.DOTS}
            staged.write_bytes(report.grid(np.concatenate(rows), **form))
            return told

        yield draw


def problem_of_picture(path: Path) -> str:
    from PIL import Image

    from sidactl import report

    if (found := outputs.type_of(path)) != "a file":
        return found
    with suppress(OSError, SyntaxError, ValueError), Image.open(path, formats=["PNG"]) as image:
        if image.info.get("Software") == report.DOTS:
            return ""
    return "a file that is no plot of a comparison"


def _drawn(store: Store, generator: Artifact, device: "torch.device") -> "Sequence[NDArray[np.uint8]]":
    """A generator's images of the seeds that are pictured, and its teacher's, each [N, H, W, C]."""
    import torch

    sampler = sampler_of(generator)
    assert isinstance(sampler, OneStepSpec)
    vae = vae_for(store, None, generator)
    draw, size, _ = _drawer(store, generator, sampler, device, SamplingForm(), None, vae)
    parts = [draw(PICTURED[start : start + size])[:2] for start in range(0, len(PICTURED), size)]
    return [torch.cat(images).permute(0, 2, 3, 1).numpy() for images in zip(*parts, strict=True)]
