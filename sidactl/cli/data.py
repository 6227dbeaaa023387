"""Commands that bring things in: fetch-teacher, prepare-data."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from sidactl.cli import console
from sidactl.cli.entry import app
from sidactl.cli.options import Device, Force, Json, Mirror, Name, Offline, Run, Vae, parsed_count, with_processes
from sidactl.cli.shown import named_classes, print_artifact, ticking
from sidactl.commands import inputs
from sidactl.errors import SidaError


@app.command("fetch-teacher")
def fetch_teacher(
    source: Annotated[str, typer.Argument(help="a name from ls --catalog, a URL, or a .pkl or .safetensors file")],
    kind: Annotated[str | None, typer.Option("--as", metavar="KIND", help="teacher or generator, for a file")] = None,
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help="what a file's network was trained on")] = None,
    name: Name = None,
    offline: Offline = False,
    mirror: Mirror = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="refuse more, such as 500M; 16G where no size is known")
    ] = None,
    run: Run = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Fetch a network by name; prints its oid.

    Example: sidactl fetch-teacher tiny-digits
    """
    from sidactl.commands import fetch

    if kind not in (None, "teacher", "generator"):
        raise SidaError(f"--as must be teacher or generator, got {kind!r}", "Leave it out to go by the file.")
    with ticking("fetch-teacher", unit="bytes") as tick:
        artifact = fetch.fetch_teacher(
            source,
            kind=kind,  # type: ignore[arg-type]  # checked above
            dataset=dataset,
            name=name,
            offline=offline,
            mirror=mirror,
            max_bytes=parsed_count(max_bytes, "--max-bytes", what="bytes"),
            run=run,
            force=force,
            progress=tick,
            say=console.note,
        )
    print_artifact(artifact, as_json)


@app.command("prepare-data")
@with_processes
def prepare_data(
    source: Annotated[
        str | None, typer.Argument(help="tiny-digits, cifar10, a folder, zip, tar.gz, IDX or npz file; see above")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="the paper's preparation of cifar10, imagenet64, ffhq64, afhqv2-64, imagenet512 or fashion32",
        ),
    ] = None,
    transform: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="center-crop, center-crop-wide, center-crop-dhariwal or pad"),
    ] = None,
    resolution: Annotated[str | None, typer.Option(metavar="WxH", help="size to scale to, such as 64x64")] = None,
    max_images: Annotated[
        str | None, typer.Option(metavar="COUNT", help="only so many, by class in turn; at random without classes")
    ] = None,
    channels: Annotated[
        int | None, typer.Option(metavar="1|3", help="1 makes all images grey (ITU-R 601), 3 all RGB")
    ] = None,
    exif_rotate: Annotated[
        bool, typer.Option("--exif-rotate", help="turn images as their orientation tag says; ignored if not given")
    ] = False,
    class_order: Annotated[
        str, typer.Option(metavar="NAME", help="of folders that are whole numbers: numeric, or text (1, 10, 2)")
    ] = "numeric",
    convention: Annotated[
        str | None, typer.Option(metavar="NAME", help="edm or edm2: classes, order and modes as its tool takes them")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="decoding threads; one per core if not given")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave out images that cannot be read")] = False,
    latents: Annotated[
        bool, typer.Option("--latents", help="the VAE's latents of the images, for EDM2; the images are not kept")
    ] = False,
    vae: Vae = None,
    labels_only: Annotated[
        bool,
        typer.Option(
            "--labels-only",
            help="classes without images, of a dataset.json, its URL or imagenet512-labels, for mode sid",
        ),
    ] = False,
    classes: Annotated[
        int | None, typer.Option(metavar="K", help="classes without images or source: K of them, equally often")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="feature statistics, too, which scores compare with")] = False,
    detector: Annotated[str | None, typer.Option(metavar="NAME", help="of --stats; the dataset's own")] = None,
    name: Name = None,
    offline: Offline = False,
    mirror: Mirror = None,
    run: Run = None,
    device: Device = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Make a dataset from images; prints its oid.

    SOURCE is a folder or zip of images (a zip in the EDM or EDM2 layout is verified and taken as it is), ImageNet as a
    folder, Kaggle's zip or ILSVRC2012_img_train.tar, cifar-10-python.tar.gz, MNIST's IDX files, an npz batch,
    tiny-digits, or cifar10, which is downloaded; with --latents a dataset artifact, too.

    With --latents images are encoded as they are read, and kept nowhere. To score against your own images make their
    dataset first: prepare-data PATH --name NAME, then prepare-data dataset/NAME --latents.

    Classes come from dataset.json, or else from the folders, in a zip as well: numbered from 0 in the order of their
    names, and by number where all are whole numbers. Hidden and system files are passed over.

    Image files become 8-bit RGB unless --channels says otherwise: grey, palette and CMYK images are converted, alpha is
    dropped, the first frame of an animation is taken, RGB of 16 bits is cut to 8, orientation tags are ignored unless
    --exif-rotate is given. Refused: 16-bit grey, damaged files, absurd sizes.

    An interrupted preparation goes on with the same command.

    Example: sidactl prepare-data tiny-digits
    """
    from sidactl.commands import dataset_stats, prepare

    if detector and not stats:
        raise SidaError("--detector is for --stats, got it alone", "Pass --stats, or leave it out.")
    with ticking("prepare-data") as tick:
        artifact = prepare.prepare_data(
            source,
            preset=preset,
            transform=transform,
            resolution=None if resolution is None else inputs.size_of(resolution, "--resolution"),
            max_images=parsed_count(max_images, "--max-images"),
            channels=channels,
            exif_rotate=exif_rotate,
            class_order=class_order,  # type: ignore[arg-type]  # prepare checks it, as the next
            convention=convention,  # type: ignore[arg-type]
            workers=workers,
            skip_bad=skip_bad,
            latents=latents,
            with_stats=stats,
            vae=vae,
            labels_only=labels_only,
            classes=classes,
            name=name,
            offline=offline,
            mirror=mirror,
            run=run,
            device=device,
            force=force,
            say=console.note,
            tick=tick,
        )
    _tell_skipped(artifact.results)
    _tell_classes(artifact.results)
    if stats:
        with ticking("feature statistics") as tick:
            made = dataset_stats.dataset_stats(
                artifact.oid, detector=detector, run=run, device=device, force=force, tick=tick
            )
        console.note(f"feature statistics: {made.oid}")
    print_artifact(artifact, as_json)


def _tell_skipped(results: Mapping[str, Any]) -> None:
    """One warning with the first few of the images that were left out."""
    skipped = results["skipped"]
    if skipped:
        first = "; ".join(f"{name} {reason}" for name, reason in skipped[:3])
        rest = f"; and {len(skipped) - 3:,} more" if len(skipped) > 3 else ""
        total = results["num_images"] + len(skipped)
        console.warn(f"{len(skipped):,} of {total:,} images were left out: {first}{rest}")


def _tell_classes(results: Mapping[str, Any]) -> None:
    """One line with the first few classes by index and name, and those without images."""
    names, counts = results.get("class_names"), results["class_counts"]
    if names:
        empty = sum(not count for count in counts)
        console.note(f"{named_classes(names)}{f'; {empty:,} of them without images' if empty else ''}")
