"""Making dataset zips in the EDM layout: presets, transforms, and the writing; dataset.py reads them back."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from sidactl import report
from sidactl.data.archive_writer import member_name
from sidactl.data.codec import LatentCodec
from sidactl.data.dataset import Dataset, drawn_subset
from sidactl.data.images import Pixels, decode_latents, encode_npy, quiet_pillow
from sidactl.data.listing import ClassOrder, Convention, Item, OnLine, Source
from sidactl.data.sources import open_source
from sidactl.data.transforms import TRANSFORMS, Change, Transformed, check_shape, transformed
from sidactl.data.unfinished import FILES, NoRoomError, PreparedDataset, Unfinished, open_unfinished
from sidactl.engine.ranks import scatter_in_order
from sidactl.engine.threads import map_ordered
from sidactl.errors import SidaError

Latents = NDArray[np.float32]
"""mean and standard deviation of the VAE's posterior, [8, h, w] of an image of 8h x 8w"""

Encoder = Callable[[Sequence[Pixels]], Sequence[Latents]]
"""from images uint8 [C, 8h, 8w] of one size, grey or RGB, to their latents"""

MAX_WORKERS = 16

LATENT_BATCH = 8
"""images through the VAE at once; fixed, since the last bits may depend on it"""

_LATENTS_EXTRA_BYTES = 320
"""of an image's latents in a zip: the header of the file, two of the zip, and the class"""

_TOLD_BYTES = 1_000_000_000

_SHEET_SIDE = 8


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How a published dataset was made: resolution (width, height), transform, and whether classes are kept."""

    resolution: tuple[int, int]
    transform: str | None = None
    use_labels: bool = True


# The folders of FFHQ (by thousands) and AFHQ-v2 (train, test) are no classes: their teachers are unconditional.
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "cifar10": Preset(resolution=(32, 32)),
        "imagenet64": Preset(resolution=(64, 64), transform="center-crop"),
        "ffhq64": Preset(resolution=(64, 64), use_labels=False),
        "afhqv2-64": Preset(resolution=(64, 64), use_labels=False),
        "imagenet512": Preset(resolution=(512, 512), transform="center-crop-dhariwal"),
        "fashion32": Preset(resolution=(32, 32), transform="pad"),
    }
)

_Walked = tuple[Item, Transformed | str]
"""an item and its image, or why that is left out"""


def prepare(
    source: str | Path,
    destination: Path,
    *,
    preset: str | None = None,
    transform: str | None = None,
    resolution: tuple[int, int] | None = None,
    max_images: int | None = None,
    channels: int | None = None,
    exif_rotate: bool = False,
    class_order: ClassOrder | None = None,
    convention: Convention | None = None,
    workers: int | None = None,
    skip_bad: bool = False,
    any_size: bool = False,
    encode: Encoder | None = None,
    work: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: OnLine = lambda line: None,
) -> PreparedDataset:
    """Writes `source` to the zip `destination`, whole or not at all; the bytes depend on the source and options alone.

    source: "tiny-digits"; a folder or a zip of images, with classes from its dataset.json, else from its folders (a zip
        in the EDM or EDM2 layout is verified and taken as it is, latents too, unless its images are to change);
        ImageNet in any folder or zip that it comes in, of which the training images are taken, and its
        ILSVRC2012_img_train.tar; cifar-10-python.tar.gz (training part); MNIST's IDX images, raw or gzipped, with the
        labels beside them, or their folder; a guided-diffusion .npz (arr_0 uint8 [N, H, W, 3], arr_1 classes).
        Class folders, and the names in dataset.json, count from the one folder that holds all images. Files and
        folders that are hidden, or that systems put there, are passed over.
    preset: a name in PRESETS, instead of transform and resolution. resolution: (width, height).
    transform: a name in TRANSFORMS; None scales to `resolution` without keeping the aspect ratio.
    max_images: only so many: the first of each class in turn, or without classes a random few, always the same.
    channels: 1 makes all images grey (ITU-R 601), 3 all RGB.
    exif_rotate: turn images as their orientation tag says, instead of taking them as they are stored.
    class_order: "text" sorts class folders as text even where all of them are whole numbers.
    convention: None has palettes resolved, alpha dropped, CMYK converted: files become RGB. "edm2" and "edm" do as the
        published tools do, down to their surprises: folders in a zip are no classes, class folders sort as text, images
        beside them are a class, `"labels": null` means that folders are the classes, max_images takes the first, and
        the two sort folders differently ('a-b' before or after 'a/'). "edm" also keeps grey images grey, takes palette
        images for grey indices and refuses other modes. All take the first frame of an animation, cut 16-bit RGB to 8
        bits and refuse 16-bit grey. Arrays keep their channels.
    workers: threads that decode (Pillow works outside the interpreter lock); default: one per core.
    skip_bad: leave out images that cannot be read and list them, instead of stopping at the first.
    any_size: images of any one size and shape, as scores take them; what a net is trained on is square with a side that
        is a power of two.
    encode: write latents of the images, which are stored nowhere, in EDM2's layout; of the encoder, too, depend the
        bytes. Several processes encode, the first alone calls this, the others `ranks.scatter_in_order` with no items.
        Member names are 00000/img-mean-std-00000000.npy and so on, and count what is kept.
    work: a folder in which an interrupted preparation is kept, no more than seconds of it lost; the same call with the
        same folder goes on from there, even from the end where `destination` is its images.zip. It is the caller's to
        clear.
    progress: called with (images done, images in all). say: gets a line on what was passed over or begun anew.

    Raises SidaError, naming the file, for anything that cannot be used. Results must be of one shape, square with a
    side that is a power of two unless any_size is given, and of 8 or more for latents. Member names of images count
    skipped ones too, as the published tools do.
    Source: the dataset tools of EDM (2206.00364) and EDM2 (2312.02696), pixel for pixel.
    """
    for option, value in (("max-images", max_images), ("workers", workers)):
        if value is not None and value < 1:
            raise SidaError(f"--{option} must be >= 1, got {value}", f"Pass --{option} 1 or more, or leave it out.")
    if channels not in (None, 1, 3):
        raise SidaError(f"--channels must be 1 (grey) or 3 (RGB), got {channels}", "Leave it out to keep files RGB.")
    if class_order not in (None, "numeric", "text"):
        raise SidaError(f"--class-order must be numeric or text, got {class_order!r}", "Leave it out.")
    if convention not in (None, "edm", "edm2"):
        raise SidaError(f"--convention must be edm or edm2, got {convention!r}", "Leave it out.")
    resolution, transform, use_labels = _options(preset, transform, resolution)
    change = Change(transform, resolution, convention, channels, exif_rotate, is_for_latents=encode is not None)
    with open_unfinished(destination, work, say, any_size=any_size, is_for_latents=encode is not None) as zipped:
        opened = open_source(
            source,
            convention,
            keep_layout=resolution is None and channels is None and not exif_rotate,
            use_labels=use_labels,
            class_order=class_order,
            is_partial=max_images is not None,
            say=say,
        )
        chosen = _subset(opened, max_images, use_labels, convention)
        total = sum(chosen)
        num_threads = min(workers or os.cpu_count() or 1, MAX_WORKERS) if opened.from_files else 1
        done = zipped.state.done
        with ExitStack() as stack:
            stack.enter_context(quiet_pillow())
            items = itertools.islice(itertools.compress(opened.items(), chosen), done, None)
            decode = partial(transformed, change=change)
            results = stack.enter_context(closing(map_ordered(lambda item: (item, decode(item)), items, num_threads)))
            is_copied = work is not None and destination == work / FILES[0]
            walked = _usable(
                results,
                zipped,
                skip_bad=skip_bad,
                say_turned=None if exif_rotate else say,
                begin=partial(_check_room, zipped, total, is_copied, say) if encode else None,
            )
            for batch in _encoded(walked, encode) if encode else ([each] for each in walked):
                for item, member in batch:
                    if isinstance(member, str):
                        zipped.skip(item.name, member)
                        continue
                    name = item.keep_as or member_name(done)
                    if encode:
                        name = member_name(zipped.num_images, "img-mean-std-", ".npy")
                    zipped.add(name, member.data, item.label if use_labels else None)
                done += len(batch)
                zipped.commit(done)
                if progress is not None:
                    progress(done, total)
            made = zipped.finish(f"{source}", opened.class_names if use_labels else None)
            if encode:
                sheet = _sheet_of(itertools.compress(opened.items(), chosen), zipped, change)
                made = replace(made, contact_sheet=sheet)
        return made


def _subset(opened: Source, max_images: int | None, use_labels: bool, convention: Convention | None) -> bytearray:
    """1 for each item to take, 0 for the others: the first of each class in turn; without classes a random few."""
    if max_images is None or max_images >= opened.total:
        return bytearray(b"\1") * opened.total
    order = np.arange(opened.total)
    if convention is None and (opened.labels is None or not use_labels):
        order = drawn_subset(opened.total, max_images, 0)
    elif convention is None and opened.labels is not None:
        by_class = np.argsort(opened.labels, kind="stable")
        known = opened.labels[by_class]
        turn = np.empty_like(order)
        turn[by_class] = order - np.searchsorted(known, known)
        order = np.lexsort((opened.labels, turn))
    chosen = bytearray(opened.total)
    for position in order[:max_images]:
        chosen[position] = 1
    return chosen


def check_latents_size(transform: str | None, resolution: tuple[int, int]) -> None:
    """SidaError where images of this preparation cannot have latents; told without the images."""
    width, height = resolution
    shape = (3, width if transform == "center-crop-wide" else height, width)
    check_shape(f"--resolution {width}x{height}", shape, "", shape, is_for_latents=True)


def latent_encoder(codec: LatentCodec, device: torch.device) -> Encoder:
    """What `prepare` encodes images by. Source: EDM2 (2312.02696), appendix A."""

    @torch.no_grad()
    def encode(images: Sequence[Pixels]) -> Sequence[Latents]:
        if not images:
            return []
        pixels = torch.from_numpy(np.ascontiguousarray(np.stack(images))).to(device)  # other strides, other bits
        return list(codec.mean_and_std(pixels.expand(-1, 3, -1, -1)).to("cpu", torch.float32).numpy())

    return encode


def _usable(
    results: Iterable[tuple[Item, "Transformed | SidaError | str"]],
    zipped: "Unfinished",
    *,
    skip_bad: bool,
    say_turned: OnLine | None,
    begin: Callable[[], None] | None,
) -> Iterator[_Walked]:
    """Every item with its image, or why it is left out; the error of one that cannot be used unless skip_bad.

    say_turned: gets a line on the first image that is not turned as it says. begin: called at the first image.
    """
    for item, result in results:
        if isinstance(result, SidaError):
            if not skip_bad:
                raise result
            yield item, result.message.removeprefix(f"{item.name} ")
            continue
        if isinstance(result, Transformed):
            zipped.check(item.name, result.shape)
            if result.is_turned and say_turned:
                say_turned(f"orientation tags are not applied, such as that of {item.name}; --exif-rotate applies them")
                say_turned = None
            if begin:
                begin()
                begin = None
        yield item, result


def _encoded(walked: Iterable[_Walked], encode: Encoder) -> Iterator[list[_Walked]]:
    """The same with the files of latents for pixels, batch by batch; several processes share the batches."""
    batches, ahead = itertools.tee(_batches(walked))
    pixels = ([member.pixels for _, member in batch if isinstance(member, Transformed)] for batch in ahead)
    for latents, batch in zip(scatter_in_order(encode, pixels), batches, strict=True):
        of_images = iter(latents)
        yield [(item, m if isinstance(m, str) else _latents_file(item, next(of_images))) for item, m in batch]


def _batches(walked: Iterable[_Walked]) -> Iterator[list[_Walked]]:
    """Lists with LATENT_BATCH images each, as long as there are so many, and with what is left out before them."""
    batch, num_images = list[_Walked](), 0
    for each in walked:
        batch.append(each)
        num_images += isinstance(each[1], Transformed)
        if num_images == LATENT_BATCH:
            yield batch
            batch, num_images = [], 0
    if batch:
        yield batch


def _latents_file(item: Item, latents: Latents) -> "Transformed":
    data = encode_npy(latents)
    return Transformed(data, decode_latents(data, f"latents of {item.name}").shape)


def _check_room(zipped: "Unfinished", total: int, is_copied: bool, say: OnLine) -> None:
    """Says what the latents of so many images take, if it is much; NoRoomError where the disk has not so much."""
    assert zipped.first
    _, height, width = zipped.first[1]
    size_bytes = total * (4 * 8 * (height // 8) * (width // 8) + _LATENTS_EXTRA_BYTES)
    free_bytes = shutil.disk_usage(zipped.folder).free
    takes = f"the latents of {total:,} images take {size_bytes / 1e9:,.1f} GB of the disk"
    takes += ", and as much again while they are stored" if is_copied else ""
    if size_bytes * (1 + is_copied) > free_bytes + zipped.state.image_bytes:
        raise NoRoomError(
            f"{takes}, got {free_bytes / 1e9:,.1f} GB free in {zipped.folder}",
            "Free some space or choose another disk with --run DIR.",
        )
    if size_bytes >= _TOLD_BYTES:
        say(takes)


def _sheet_of(items: Iterable[Item], zipped: "Unfinished", change: "Change") -> bytes | None:
    """The contact sheet of the images that latents were made of, which are read once more; None where none can be."""
    assert zipped.first
    shown = bytearray(zipped.num_images)
    for position in _spread(zipped.num_images, _SHEET_SIDE**2):
        shown[position] = 1
    members = (transformed(item, change=change) for item in itertools.compress(_kept(items, zipped.skipped), shown))
    # One that was changed meanwhile is no matter of the picture: whoever asked for latents looks after that.
    usable = [member for member in members if isinstance(member, Transformed)]
    pixels = [member.pixels for member in usable if member.shape == zipped.first[1]]
    return report.grid(np.stack(pixels).transpose(0, 2, 3, 1), columns=_SHEET_SIDE) if pixels else None


def _kept(items: Iterable[Item], skipped: Sequence[tuple[str, str]]) -> Iterator[Item]:
    names = (name for name, _ in skipped)
    left_out = next(names, None)
    for item in items:
        if item.name == left_out:
            left_out = next(names, None)
        else:
            yield item


def contact_sheet(dataset: Dataset, *, columns: int = _SHEET_SIDE, rows: int = _SHEET_SIDE) -> bytes:
    """PNG of at most columns x rows images, evenly spread over the dataset. Raises SidaError for latents."""
    if dataset.is_latents:
        raise SidaError(
            f"a contact sheet must be of pixels, got latents in {dataset.path}", "Prepare pixels to see them."
        )
    images = dataset.images(_spread(dataset.num_images, columns * rows))
    return report.grid(images.permute(0, 2, 3, 1).numpy(), columns=columns)


def _spread(num_images: int, at_most: int) -> NDArray[np.int64]:
    """Positions of images, evenly spread over all."""
    num_shown = min(at_most, num_images)
    return np.arange(num_shown) * num_images // num_shown


def _options(
    preset: str | None, transform: str | None, resolution: tuple[int, int] | None
) -> tuple[tuple[int, int] | None, str | None, bool]:
    if preset is not None:
        if preset not in PRESETS:
            raise SidaError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}", "Choose one of these.")
        if transform is not None or resolution is not None:
            raise SidaError(
                f"preset {preset} fixes transform and resolution, got one of them too", "Leave out one or the other."
            )
        chosen = PRESETS[preset]
        return chosen.resolution, chosen.transform, chosen.use_labels
    if transform is not None and transform not in TRANSFORMS:
        raise SidaError(f"transform must be one of {', '.join(TRANSFORMS)}, got {transform!r}", "Choose one of these.")
    if transform is not None and resolution is None:
        raise SidaError(f"transform {transform} must have a resolution, got none", "Pass --resolution, e.g. 64x64.")
    if resolution is not None and min(resolution) < 1:
        raise SidaError(f"resolution must be >= 1x1, got {resolution[0]}x{resolution[1]}", "Pass e.g. 64x64.")
    return resolution, transform, True
