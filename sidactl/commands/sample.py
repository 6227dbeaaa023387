"""The command `sample`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

from sidactl.commands.evaluation import num_previewed
from sidactl.commands.features import images_per_batch
from sidactl.commands.inputs import Count, Ref, Seeds, count_of, optional_ref, ref_text, run_of, seeds_of, whole
from sidactl.commands.question import Question, rank0_first
from sidactl.commands.reference import class_of
from sidactl.commands.resolve import load_dataset, load_net, resolve
from sidactl.commands.samplers import chosen_sampler, drawn_on, note_of_steps
from sidactl.commands.vae import (
    check_vae_is_there,
    is_of_latents,
    other_vae,
    vae_digest,
    vae_for,
    vae_label,
    vae_loader,
)
from sidactl.commands.words import NETS, OnCount, RunDir
from sidactl.errors import SidaError
from sidactl.foreign import download
from sidactl.recipes import OneStepSpec, SamplingForm
from sidactl.recipes.distillation import GUIDANCE_INTERVAL, is_guidance_interval
from sidactl.store import Artifact, Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampled:
    """A samples artifact with its content: images uint8 [N, H, W, C], labels int64 [N] or None, seeds.

    Wherever a ref is expected it does as one, and says which run directory it lies in.
    """

    artifact: Artifact
    store: Store

    @property
    def oid(self) -> str:
        """That of the artifact."""
        return self.artifact.oid

    @cached_property
    def images(self) -> "NDArray[np.uint8]":
        dataset = load_dataset(self.store, self.artifact)
        return dataset.images(range(dataset.num_images)).permute(0, 2, 3, 1).numpy()

    @cached_property
    def labels(self) -> "NDArray[np.int64] | None":
        return load_dataset(self.store, self.artifact).labels

    @property
    def seeds(self) -> Sequence[int]:
        return _seeds_from_json(self.artifact.params["seeds"])


def sample(
    ref: Ref,
    *,
    seeds: Seeds | None = None,
    num: Count | None = None,
    class_index: SupportsIndex | str | None = None,
    steps: SupportsIndex | None = None,
    sampler: Literal["one-step", "heun"] | None = None,
    heun: Mapping[str, float] | None = None,
    guide: Ref | None = None,
    guidance: float = 1.0,
    guidance_interval: Sequence[float] = (),
    vae: Ref | None = None,
    setting: SamplingForm | None = None,
    name: str | None = None,
    run: RunDir = None,
    device: str | None = None,
    force: bool = False,
    say: download.OnLine | None = download.to_stderr,
    tick: OnCount | None = None,
) -> Sampled:
    """Images of a teacher or generator, one per seed, as a samples artifact (a zip in the EDM layout, and a grid).

    num: so many from seed 0 on, such as "10k", instead of `seeds`; 64 where neither is given.
    The sampler defaults to the net's own: one step for a generator, Heun for a teacher. heun: fields of HeunSpec to
    take in place of the teacher's, such as {"S_churn": 0}. guide: a weaker teacher that Heun's sampler moves away from,
    `guidance` times as far (1 = not at all); without it the teacher itself without labels. guidance_interval: the
    lowest and the highest noise level at which it does. Noise and class of an image depend on its seed alone.
    class_index: one class for all images, by its index or by its name in the net's dataset.
    vae: what decodes latents, as in `distill`; by default the one that the net was made with, or the usual one.
    setting: of the nets' arithmetic, float32 by default; another precision is another question. say: takes the line
    that an answer is an old one.
    """
    if seeds is not None and num is not None:
        raise SidaError("num and seeds cannot both be given", "Pass one of them.")
    count = 64 if num is None else count_of(num, "num")
    seeds = seeds_of(range(count) if seeds is None else seeds)
    if not seeds:
        raise SidaError(f"sample count must be >= 1, got {min(count, 0)}", "Pass --num 1 or more.")
    if class_index is not None and not isinstance(class_index, str):
        class_index = whole(class_index, "class_index")
    steps = None if steps is None else whole(steps, "steps")
    if not math.isfinite(guidance):
        raise SidaError(f"guidance must be finite, got {guidance}", "Pass another --guidance.")
    if interval := tuple(map(float, guidance_interval)):
        if guidance == 1:
            raise SidaError("a guidance interval counts for nothing with --guidance 1", "Pass --guidance 1.4, too.")
        if not is_guidance_interval(interval):
            got = ",".join(f"{level:g}" for level in interval)
            what = f"the guidance interval must be {GUIDANCE_INTERVAL}, got {got}"
            raise SidaError(what, "Pass --guidance-interval 0.2,3.")
    if guide is not None and guidance == 1 and say:
        say("warning: a guide counts for nothing with --guidance 1")
    store = Store.open(run_of(ref, run))
    if name:
        store.check_name("samples", name)
    vae = optional_ref(vae, "the VAE")
    with rank0_first():
        subject = resolve(store, ref_text(ref), NETS, recheck=force)
        decoder = vae_for(store, vae, subject, recheck=force)
    if say and (warning := other_vae(subject, decoder)):
        say(f"warning: {warning}")
    chosen = chosen_sampler(subject, sampler, steps, heun)
    if say and (note := note_of_steps(subject, chosen)):
        say(f"warning: {note}")
    if isinstance(class_index, str):
        class_index = class_of(store, subject, class_index)
    setting = setting or SamplingForm()
    params: dict[str, Any] = {
        "seeds": _seeds_to_json(seeds),
        "class_index": class_index,
        "sampler": chosen.to_json(),
        **setting.of_images(),
        **drawn_on(device),
    }
    inputs = {"net": subject}
    if guide is not None:
        inputs["guide"] = resolve(store, ref_text(guide, "the guide"), ["teacher"], recheck=force)
        params["guidance"] = guidance
    elif guidance != 1:
        if isinstance(chosen, OneStepSpec):
            raise SidaError("guidance needs the heun sampler of a teacher", "Leave out --guidance.")
        if not subject.params["net"].get("label_dim"):
            raise SidaError(f"guidance {guidance:g} of a net without classes needs a guide", "Pass --guide REF.")
        params["guidance"] = guidance
    if interval:
        params["guidance_interval"] = list(interval)
    question = Question(
        store=store,
        command="sample",
        params=params | ({"vae": vae_digest(decoder)} if decoder else {}),
        inputs=inputs,
        refs=[name] if name else [],
        force=force,
        say=say,
    )
    if known := question.known_by_all():
        return Sampled(known, store)
    store.check_writable()
    if decoder is None and is_of_latents(subject):
        check_vae_is_there(store)

    from sidactl import report, sampling
    from sidactl.data import archive_writer
    from sidactl.engine import configure, devices, ranks
    from sidactl.nets.guided import Unlabelled

    chosen_device = devices.pick_device(device)
    used: dict[str, Any] = {
        role: configure.configure_for_sampling(load_net(store, artifact, chosen_device), setting)
        for role, artifact in inputs.items()
    }
    net = used["net"]
    size = images_per_batch(net.spec.img_channels, net.spec.img_resolution)
    if guidance != 1 and guide is None:
        used["guide"] = Unlabelled(net)
    batches = sampling.generate(
        net,
        seeds,
        chosen,
        device=chosen_device,
        class_index=class_index,
        guide=used.get("guide"),
        guidance=guidance,
        guidance_interval=interval,
        load_vae=vae_loader(store, decoder),
        batch_size=size,
    )
    drawn = ranks.gather_in_order(batches.shared(), len(batches))
    if ranks.rank_and_size()[0] > 0:
        list(drawn)  # nothing, but the others wait for this process's share
        return Sampled(store.get(ranks.receive()), store)
    made_with = {"vae": decoder.oid} if decoder else {}
    by = {"vae": vae_label(decoder)} if decoder else {}
    with store.scratch() as path:
        first: NDArray[np.uint8] | None = None
        with archive_writer.ZipWriter(path) as writer:
            for batch in drawn:
                images = batch.images.permute(0, 2, 3, 1).numpy()
                first = images[: num_previewed(images.shape[1])] if first is None else first
                for index, image in enumerate(images):
                    writer.add(image, None if batch.labels is None else int(batch.labels[index]))
                if tick:
                    tick(writer.num_images, len(seeds))
        assert first is not None
        artifact = store.put(
            "samples",
            {"images.zip": path, "grid.png": report.grid(first)},
            inputs={role: artifact.oid for role, artifact in inputs.items()} | made_with,
            params=params | {"name": subject.params["name"], "dataset": subject.params["dataset"]} | by,
            results={"num_images": len(seeds), "nfe": chosen.nfe},
        )
    artifact = question.record(artifact)
    return Sampled(store.get(ranks.broadcast_from_rank0(lambda: artifact.oid)), store)


def _seeds_to_json(seeds: Sequence[int]) -> dict[str, int] | list[int]:
    if isinstance(seeds, range) and seeds.step == 1:
        return {"first": seeds.start, "count": len(seeds)}
    return [int(seed) for seed in seeds]


def _seeds_from_json(value: Any) -> Sequence[int]:
    return range(value["first"], value["first"] + value["count"]) if isinstance(value, Mapping) else value
