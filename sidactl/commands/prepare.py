"""The command `prepare-data`: images, classes alone, or latents of a dataset."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, SupportsIndex

from sidactl import catalog, launch
from sidactl.commands.inputs import Count, Ref, Size, count_of, optional_ref, size_of, whole
from sidactl.commands.prepare_images import (
    How,
    LatentsBy,
    as_usual,
    files_made,
    labels_called,
    plain_source,
    preparation,
    prepare_images,
    prepare_labels,
    prepared_as_usual,
    results_of,
)
from sidactl.commands.question import Question, rank0_first
from sidactl.commands.resolve import resolve
from sidactl.commands.vae import chosen_vae, vae_label, vae_loader
from sidactl.commands.words import OnCount, RunDir, means_path, require_pixels
from sidactl.errors import SidaError
from sidactl.foreign import download
from sidactl.store import Artifact, Store

if TYPE_CHECKING:
    from sidactl.data.listing import ClassOrder, Convention
    from sidactl.data.prepare import Encoder

_ENCODING = "encoding"
"""what the first of several processes tells the others where there are latents to be made"""


def prepare_data(
    source: Ref | None,
    *,
    preset: str | None = None,
    transform: str | None = None,
    resolution: Size | None = None,
    max_images: Count | None = None,
    channels: int | None = None,
    exif_rotate: bool = False,
    class_order: "ClassOrder | None" = None,
    convention: "Convention | None" = None,
    workers: int | None = None,
    skip_bad: bool = False,
    latents: bool = False,
    vae: Ref | None = None,
    labels_only: bool = False,
    classes: SupportsIndex | None = None,
    any_size: bool = False,
    with_stats: bool = False,
    name: str | None = None,
    offline: bool = False,
    mirror: str | None = None,
    run: RunDir = None,
    device: str | None = None,
    force: bool = False,
    recheck: bool = False,
    say: download.OnLine | None = download.to_stderr,
    tick: OnCount | None = None,
) -> Artifact:
    """A dataset artifact: one uncompressed zip in the EDM layout, and a contact sheet.

    Takes what `prepare.prepare` takes, and the name of a dataset whose files the catalog knows where to download
    (cifar10; offline, mirror: as in `download.fetch`), which is prepared by its preset and gets this name unless other
    options are given. An interrupted preparation goes on where it was, to the same artifact.
    latents: the VAE's means and standard deviations of the images instead, for EDM2; the images themselves are kept
        nowhere, unless the source is a dataset artifact: then they stay what the latents are compared with. The VAE
        runs on `device`. vae: another than the usual one: a folder that diffusers saved, or OWNER/NAME in the Hugging
        Face hub.
    any_size: images of any one size, to be scored; nets are trained on squares with a side that is a power of two.
    with_stats: feature statistics are to be made of it next; refused are latents without their images.
    labels_only: no images, but their classes, from a dataset.json, its URL, or the catalog's imagenet512-labels; or,
        without a source, `classes` of them, each once. That is all that mode sid needs for its training batches.
    recheck: as in `resolve`. say: takes the line that an answer is an old one.

    Raises SidaError, naming the file, for what cannot be used.
    """
    store = Store.open(run)
    if name:
        store.check_name("dataset", name)
    source, vae = optional_ref(source, "the source"), optional_ref(vae, "the VAE")
    if vae is not None and not latents:
        raise SidaError(f"--vae is for --latents, got {vae} without", "Pass --latents, or leave it out.")
    classes = None if classes is None else whole(classes, "classes")
    options: dict[str, Any] = {
        "preset": preset,
        "transform": transform,
        "resolution": None if resolution is None else size_of(resolution, "--resolution"),
        "max_images": None if max_images is None else count_of(max_images, "--max-images"),
        "skip_bad": skip_bad,
    }
    # Only what is not as usual, so that a dataset prepared as usual keeps its oid.
    others = {
        "channels": channels,
        "exif_rotate": exif_rotate,
        "class_order": None if class_order == "numeric" and convention is None else class_order,
        "convention": convention,
        # Which ones: once it was the first so many.
        "subset": "by class in turn" if max_images is not None and convention is None else None,
    }
    options |= {option: value for option, value in others.items() if value}
    how = How(
        workers=workers,
        name=name,
        force=force,
        recheck=recheck,
        say=say,
        tick=tick,
        offline=offline,
        mirror=mirror,
    )
    if labels_only or classes is not None or (source and labels_called(source)):
        if latents or any(options.values()):
            raise SidaError("labels without images take no options of images, got some", "Leave them out.")
        return prepare_labels(store, source, classes, how)
    if source is None:
        raise SidaError("a source is needed, got none", "Name a folder, an archive, or tiny-digits.")
    if latents:
        if resolution is not None:
            from sidactl.data import prepare

            prepare.check_latents_size(transform, size_of(resolution, "--resolution"))
        if with_stats and _streams(store, source, options):
            raise SidaError(
                f"feature statistics are of images, which latents of {source} are made without",
                "Make a dataset of it first (prepare-data PATH --name NAME), then prepare-data dataset/NAME --latents.",
            )
        with rank0_first():
            encoder = None
            if vae is not None:
                encoder = chosen_vae(store, vae, offline=offline, mirror=mirror, recheck=force or recheck)
        load_vae = vae_loader(store, encoder, purpose="encoding latents", offline=offline, mirror=mirror)
        by = LatentsBy(vae, encoder, partial(_encoder, load_vae, device))
        return _with_helpers(store, by, partial(_prepare_latents, store, source, options, how, by))
    source = plain_source(source)
    return prepare_images(store, source, as_usual(source, options), how, any_size=any_size)


def _prepare_latents(store: Store, source: str, options: Mapping[str, Any], how: How, by: LatentsBy) -> Artifact:
    """Latents of a dataset artifact, linked with it; of any other source without its pixels, which are kept nowhere."""
    pixels = None
    if not _streams(store, source, options):
        name_of_data = source.removeprefix("dataset/")
        entry = catalog.DATASETS.get(name_of_data)
        if entry and entry.source and not store.ref("dataset", name_of_data):
            pixels = prepared_as_usual(store, source, replace(how, workers=None, name=None, force=False, say=None))
        else:
            pixels = resolve(store, source, ["dataset"], recheck=how.force or how.recheck)
    if pixels is None:
        source = plain_source(source)
        return prepare_images(store, source, as_usual(source, options), how, latents=by)
    require_pixels(pixels)
    inputs = {"dataset": pixels.oid, **by.inputs}
    words = {**options, "latents": True, "vae": by.asked}
    question = Question(
        store=store,
        command="prepare-data",
        params=by.params,
        inputs={"dataset": pixels},
        task=preparation(source, {**options, **by.params}, words, how.name, inputs),
        **how.of_question(),
    )
    with question.known_or_working() as work:
        if isinstance(work, Artifact):
            return work
        from sidactl.data import prepare

        made = prepare.prepare(
            store.path(pixels, "images.zip"),
            path := work.path / "images.zip",
            encode=by.encoder(),
            workers=how.workers,
            work=work.path,
            progress=how.tick,
            say=download.to_stderr,
        )
        params = {
            "name": how.name or pixels.params["name"],
            "licence": pixels.params["licence"],
            "vae": vae_label(by.vae),
        }
        results = results_of(made) | {"skipped": pixels.results["skipped"]}
        artifact = store.put("dataset", files_made(path, made), inputs=inputs, params=params, results=results)
        return question.record(artifact)


def _streams(store: Store, source: str, options: Mapping[str, Any]) -> bool:
    """Whether latents of a source are made of its files, and not of a dataset artifact."""
    called = store.ref("dataset", source) if os.path.exists(source) else None
    if called and store.get(called).results.get("kind") == "latents":  # of which none are made: the path is meant
        return True
    return bool(any(options.values()) or means_path(store, source, ["dataset"]))


def _encoder(load_vae: Callable[[], Any], device: str | None) -> "Encoder":
    """The VAE, once it is there; tells the other processes, which are to help with it."""
    from sidactl.data import codec, prepare
    from sidactl.engine import devices, ranks

    chosen = devices.pick_device(device)
    vae = load_vae()
    if ranks.rank_and_size()[0] == 0:
        ranks.broadcast_from_rank0(lambda: _ENCODING)
    return prepare.latent_encoder(codec.LatentCodec(lambda: vae), chosen)


def _with_helpers(store: Store, by: LatentsBy, make: Callable[[], Artifact]) -> Artifact:
    """What `make` gives in the first of several processes, while the others encode their share of latents for it."""
    if launch.world_size() == 1:
        return make()
    from sidactl.engine import ranks

    if ranks.rank_and_size()[0] == 0:
        made = make()
        ranks.broadcast_from_rank0(lambda: made.oid)
        return made
    payload = ranks.receive()
    if payload == _ENCODING:
        for _ in ranks.scatter_in_order(by.encoder(), ()):
            pass
        payload = ranks.receive()
    return store.get(payload)
