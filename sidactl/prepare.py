"""Making dataset zips in the EDM layout: presets, transforms, and the writing; data.py reads them back."""

import hashlib
import itertools
import json
import os
import shutil
import struct
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import IO, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from sidactl import report
from sidactl.codec import LatentCodec
from sidactl.data import (
    LABEL_FILE,
    MAX_MEMBER_BYTES,
    Dataset,
    check_png,
    decode_latents,
    decode_pixels,
    drawn_subset,
    first_line,
    image_formats,
)
from sidactl.engine.ranks import handed_out
from sidactl.engine.threads import in_order
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.sources import ClassOrder, Convention, Item, Pixels, Say, Source, open_source
from sidactl.store import sealed, unsealed

Transform = Callable[[Image.Image, int, int], Image.Image | None]
Latents = NDArray[np.float32]
"""mean and standard deviation of the VAE's posterior, [8, h, w] of an image of 8h x 8w"""
Encoder = Callable[[Sequence[Pixels]], Sequence[Latents]]
"""from images uint8 [C, 8h, 8w] of one size, grey or RGB, to their latents"""

MAX_WORKERS = 16
SAVE_EVERY_SEC = 5.0
LATENT_BATCH = 8
"""images through the VAE at once; fixed, since the last bits may depend on it"""
_LATENTS_EXTRA_BYTES = 320
"""of an image's latents in a zip: the header of the file, two of the zip, and the class"""
_TOLD_BYTES = 1_000_000_000
_SHEET_SIDE = 8

# Of a member, on its way to the zip's directory: offset, size, CRC-32, class or -1, length of the name that follows.
_MEMBER = struct.Struct("<QIIiH")
_ZIP64_LIMIT = (1 << 31) - 1  # what Python's zipfile leaves to 32-bit fields
_FILES = ("images.zip", "members")
_STATE = "state.json"
_BLOCK_BYTES = 1 << 20


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


@dataclass(frozen=True, kw_only=True)
class PreparedDataset:
    """What `prepare` wrote. `skipped`: name and reason of each image left out, in the order of the source.

    class_names: one for each class, or None where the source has no names for them.
    """

    num_images: int
    resolution: int
    num_channels: int
    label_dim: int
    class_counts: list[int]
    skipped: list[tuple[str, str]]
    kind: Literal["pixels", "latents"]
    class_names: list[str] | None = None
    width: int | None = None
    """where it is not the height, which is `resolution`"""
    contact_sheet: bytes | None = field(default=None, repr=False)
    """PNG of the images that latents were made of; None of all else, which shows itself"""


class _Member(NamedTuple):
    """An image: bytes for the zip, or pixels uint8 [C, H, W] for the VAE; `shape` = (channels, height, width).

    is_turned: whether an orientation tag says that it is to be shown otherwise than stored.
    """

    content: bytes | Pixels
    shape: tuple[int, int, int]
    is_turned: bool = False

    @property
    def data(self) -> bytes:
        assert isinstance(self.content, bytes)
        return self.content

    @property
    def pixels(self) -> Pixels:
        assert isinstance(self.content, np.ndarray)
        return self.content


_Walked = tuple[Item, _Member | str]
"""an item and its image, or why that is left out"""


class _Change(NamedTuple):
    """What is done to every image; see `prepare`."""

    transform: str | None
    resolution: tuple[int, int] | None
    convention: Convention | None
    channels: int | None
    exif_rotate: bool
    is_for_latents: bool


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
    say: Say = lambda line: None,
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
        bytes. Several processes encode, the first alone calls this, the others `engine.handed_out` with no items.
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
    change = _Change(transform, resolution, convention, channels, exif_rotate, is_for_latents=encode is not None)
    with _unfinished(destination, work, say, any_size=any_size, is_for_latents=encode is not None) as zipped:
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
            stack.enter_context(_quiet_pillow())
            items = itertools.islice(itertools.compress(opened.items(), chosen), done, None)
            decode = partial(_encode, change=change)
            results = stack.enter_context(closing(in_order(lambda item: (item, decode(item)), items, num_threads)))
            is_copied = work is not None and destination == work / _FILES[0]
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
                    name = item.keep_as or _member_name(done)
                    if encode:
                        name = _member_name(zipped.num_images, "img-mean-std-", ".npy")
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
    _check_shape(f"--resolution {width}x{height}", shape, "", shape, is_for_latents=True)


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
    results: Iterable[tuple[Item, "_Member | SidaError | str"]],
    zipped: "_Unfinished",
    *,
    skip_bad: bool,
    say_turned: Say | None,
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
        if isinstance(result, _Member):
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
    pixels = ([member.pixels for _, member in batch if isinstance(member, _Member)] for batch in ahead)
    for latents, batch in zip(handed_out(encode, pixels), batches, strict=True):
        of_images = iter(latents)
        yield [(item, m if isinstance(m, str) else _latents_file(item, next(of_images))) for item, m in batch]


def _batches(walked: Iterable[_Walked]) -> Iterator[list[_Walked]]:
    """Lists with LATENT_BATCH images each, as long as there are so many, and with what is left out before them."""
    batch, num_images = list[_Walked](), 0
    for each in walked:
        batch.append(each)
        num_images += isinstance(each[1], _Member)
        if num_images == LATENT_BATCH:
            yield batch
            batch, num_images = [], 0
    if batch:
        yield batch


def _latents_file(item: Item, latents: Latents) -> "_Member":
    data = encode_npy(latents)
    return _Member(data, decode_latents(data, f"latents of {item.name}").shape)


class _NoRoomError(SidaError):
    """The disk is too small for what is to come; what has come is good all the same."""


def _check_room(zipped: "_Unfinished", total: int, is_copied: bool, say: Say) -> None:
    """Says what the latents of so many images take, if it is much; _NoRoomError where the disk has not so much."""
    assert zipped.first
    _, height, width = zipped.first[1]
    size_bytes = total * (4 * 8 * (height // 8) * (width // 8) + _LATENTS_EXTRA_BYTES)
    free_bytes = shutil.disk_usage(zipped.folder).free
    takes = f"the latents of {total:,} images take {size_bytes / 1e9:,.1f} GB of the disk"
    takes += ", and as much again while they are stored" if is_copied else ""
    if size_bytes * (1 + is_copied) > free_bytes + zipped.state.image_bytes:
        raise _NoRoomError(
            f"{takes}, got {free_bytes / 1e9:,.1f} GB free in {zipped.folder}",
            "Free some space or choose another disk with --run DIR.",
        )
    if size_bytes >= _TOLD_BYTES:
        say(takes)


def _sheet_of(items: Iterable[Item], zipped: "_Unfinished", change: "_Change") -> bytes | None:
    """The contact sheet of the images that latents were made of, which are read once more; None where none can be."""
    assert zipped.first
    shown = bytearray(zipped.num_images)
    for position in _spread(zipped.num_images, _SHEET_SIDE**2):
        shown[position] = 1
    members = (_encode(item, change=change) for item in itertools.compress(_kept(items, zipped.skipped), shown))
    # One that was changed meanwhile is no matter of the picture: whoever asked for latents looks after that.
    usable = [member for member in members if isinstance(member, _Member)]
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


class ZipWriter:
    """Writes images one by one as a zip in the EDM layout; a context manager that adds dataset.json at its end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._zip = _Zip(self._file, BytesIO())
        self.num_images = 0

    def add(self, pixels: Pixels, label: int | None = None) -> None:
        """One image, uint8 [H, W, C] with 1 or 3 channels, and its class; either all images have one or none."""
        png = encode_png(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        self._zip.add(_member_name(self.num_images), png, label)
        self.num_images += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._file:
            if exception[0] is None:
                self._zip.finish()


class _Zip:
    """An uncompressed zip in the EDM layout as it grows, byte for byte what Python's zipfile makes of it.

    What is to stand in its directory waits in a file of its own, so that no number of members needs memory.
    `sha256`: of what was added, images and members.
    """

    def __init__(self, images: IO[bytes], members: IO[bytes]) -> None:
        self.images, self.members = images, members
        self.sha256 = (hashlib.sha256(), hashlib.sha256())

    def add(self, name: str, data: bytes, label: int | None) -> None:
        """One member; -1 or more as `label`, None for an image without a class."""
        encoded = name.encode()
        checksum, offset = zlib.crc32(data), self.images.tell()
        local = struct.pack("<HHHHHIIIHH", 20, 0, 0, *_EPOCH, checksum, len(data), len(data), len(encoded), 0)
        local = b"PK\x03\x04" + local + encoded
        known = -1 if label is None else label
        listed = _MEMBER.pack(offset, len(data), checksum, known, len(encoded)) + encoded
        for file, sha256, text in zip((self.images, self.members), self.sha256, (local + data, listed), strict=True):
            file.write(text)
            sha256.update(text)

    def finish(self, class_names: Sequence[str] | None = None) -> Counter[int]:
        """Adds dataset.json, with the classes' names, and the directory; returns the number of images of each class."""
        counts: Counter[int] = Counter()
        text = bytearray()
        for name, *_, label in self._listed():
            if label >= 0:
                counts[label] += 1
                text += b"%s[%s, %d]" % (b", " if text else b"", json.dumps(name.decode()).encode(), label)
        names = b', "class_names": %s' % json.dumps(list(class_names)).encode() if text and class_names else b""
        self.add(LABEL_FILE, b'{"labels": %s%s}' % (b"[%s]" % text if text else b"null", names), None)
        start, count = self.images.tell(), 0
        for name, offset, size, checksum, _ in self._listed():
            is_far = offset > _ZIP64_LIMIT
            extra = struct.pack("<HHQ", 1, 8, offset) if is_far else b""
            version = 45 if is_far else 20
            fields = (version, 3, version, 0, 0, 0, *_EPOCH, checksum, size, size, len(name), len(extra), 0, 0, 0)
            entry = struct.pack("<BBBBHHHHIIIHHHHH", *fields)
            entry += struct.pack("<II", 0o644 << 16, 0xFFFFFFFF if is_far else offset)
            self.images.write(b"PK\x01\x02" + entry + name + extra)
            count += 1
        end = self.images.tell()
        size = end - start
        if count > 0xFFFF or start > _ZIP64_LIMIT or size > _ZIP64_LIMIT:
            self.images.write(b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start))
            self.images.write(b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1))
        count, size, start = min(count, 0xFFFF), min(size, 0xFFFFFFFF), min(start, 0xFFFFFFFF)
        self.images.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, size, start, 0))
        return counts

    def _listed(self) -> Iterator[tuple[bytes, int, int, int, int]]:
        """Name, offset, size, CRC-32 and class or -1 of every member so far."""
        self.members.seek(0)
        while record := self.members.read(_MEMBER.size):
            offset, size, checksum, label, length = _MEMBER.unpack(record)
            yield self.members.read(length), offset, size, checksum, label


_EPOCH = (0, (1 << 5) | 1)  # midnight of 1980-01-01 in the zip's words, whenever it was made


@dataclass(frozen=True, kw_only=True)
class _State:
    """How far a zip has come: the first `done` items of its source are these bytes of its two files."""

    done: int = 0
    num_images: int = 0
    num_skipped: int = 0
    image_bytes: int = 0
    member_bytes: int = 0


@dataclass
class _Saved:
    """What state.json says, and the hashes of the bytes that it counts."""

    state: _State = field(default_factory=_State)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    first: tuple[str, tuple[int, int, int]] | None = None
    sha256: "tuple[hashlib._Hash, hashlib._Hash]" = field(default_factory=lambda: (hashlib.sha256(), hashlib.sha256()))

    @classmethod
    def read(cls, folder: Path) -> "_Saved":
        """ValueError and its like where anything in the folder is not as it was saved."""
        said = unsealed((folder / _STATE).read_bytes())
        state = _State(**said["state"])
        saved = cls(state, [(name, reason) for name, reason in said["skipped"]])
        saved.first = said["first"] and (said["first"][0], tuple(said["first"][1]))
        sizes = (state.image_bytes, state.member_bytes)
        for name, size, sha256, known in zip(_FILES, sizes, saved.sha256, said["sha256"], strict=True):
            with (folder / name).open("rb") as file:
                while size > 0 and (data := file.read(min(size, _BLOCK_BYTES))):
                    sha256.update(data)
                    size -= len(data)
            if size or sha256.hexdigest() != known:
                raise ValueError(f"{name} is damaged")
        return saved


@dataclass
class _Unfinished:
    """A dataset zip in the making; its folder, once saved, is what another process can go on from.

    sha256: of the bytes of the two files that `state` counts.
    """

    folder: Path
    zip: _Zip
    state: _State
    skipped: list[tuple[str, str]] = field(default_factory=list)
    first: tuple[str, tuple[int, int, int]] | None = None
    num_images: int = 0
    saved_sec: float = 0.0
    sha256: "Sequence[hashlib._Hash]" = ()
    any_size: bool = False
    is_for_latents: bool = False

    @classmethod
    def open(cls, folder: Path, say: Say) -> "_Unfinished":
        """Goes on from what was saved in the folder, or begins; anew where not all of it is as it was saved."""
        saved = _Saved()
        if (folder / _STATE).exists():
            try:
                saved = _Saved.read(folder)
            except (OSError, ValueError, LookupError, TypeError) as error:
                say(
                    f"what an interrupted preparation left is not as it was saved ({first_line(error)}): beginning anew"
                )
        state, sizes = saved.state, (saved.state.image_bytes, saved.state.member_bytes)
        files = []
        for name, size in zip(_FILES, sizes, strict=True):
            (folder / name).touch()
            file = (folder / name).open("r+b")
            file.truncate(size)
            file.seek(size)
            files.append(file)
        zipped = _Zip(*files)
        zipped.sha256 = saved.sha256
        now, copies = time.monotonic(), tuple(sha256.copy() for sha256 in saved.sha256)
        return cls(folder, zipped, state, saved.skipped, saved.first, state.num_images, now, copies)

    def check(self, source_name: str, shape: tuple[int, int, int]) -> None:
        """SidaError where an image's shape is not that of the first, or cannot be used at all."""
        self.first = self.first or (source_name, shape)
        _check_shape(source_name, shape, *self.first, any_size=self.any_size, is_for_latents=self.is_for_latents)

    def add(self, name: str, data: bytes, label: int | None) -> None:
        self.zip.add(name, data, label)
        self.num_images += 1

    def skip(self, source_name: str, reason: str) -> None:
        self.skipped.append((source_name, reason))

    def commit(self, done: int) -> None:
        """What was added so far is the first `done` items of the source."""
        self.state = _State(
            done=done,
            num_images=self.num_images,
            num_skipped=len(self.skipped),
            image_bytes=self.zip.images.tell(),
            member_bytes=self.zip.members.tell(),
        )
        self.sha256 = tuple(sha256.copy() for sha256 in self.zip.sha256)
        if time.monotonic() - self.saved_sec > SAVE_EVERY_SEC:
            self.save()

    def save(self) -> None:
        """Flushes what was committed, then says so: a kill at any moment leaves one of two good states."""
        for file in (self.zip.images, self.zip.members):
            file.flush()
            os.fsync(file.fileno())
        skipped = self.skipped[: self.state.num_skipped]
        said = {
            "state": asdict(self.state),
            "skipped": skipped,
            "first": self.first,
            "sha256": [sha256.hexdigest() for sha256 in self.sha256],
        }
        temporary = self.folder / f".{_STATE}.tmp"
        with temporary.open("wb") as state_file:
            state_file.write(sealed(said))
            state_file.flush()
            os.fsync(state_file.fileno())
        temporary.replace(self.folder / _STATE)
        self.saved_sec = time.monotonic()

    def finish(self, source: str, class_names: Sequence[str] | None) -> PreparedDataset:
        """Completes the zip; SidaError where it holds no image."""
        if self.first is None:
            raise SidaError(
                f"{source} must hold an image that can be used, got none",
                "Mend the images or choose another transform.",
            )
        self.save()
        found = self.zip.finish(class_names)
        channels, size, width = self.first[1]
        if self.is_for_latents:
            channels, size, width = 8, size // 8, width // 8
        counts = [found[label] for label in range(max(max(found) + 1, len(class_names or ())))] if found else []
        return PreparedDataset(
            num_images=self.num_images,
            resolution=size,
            num_channels=channels,
            label_dim=len(counts),
            class_counts=counts,
            skipped=self.skipped,
            kind="latents" if channels == 8 else "pixels",
            width=None if width == size else width,
            class_names=list(class_names) if class_names else None,
        )


@contextmanager
def _unfinished(
    destination: Path, work: Path | None, say: Say, *, any_size: bool, is_for_latents: bool
) -> Iterator[_Unfinished]:
    """A zip to write in the block, and to complete there; becomes `destination` after it.

    An interruption leaves it in `work`, where there is one; bad input leaves nothing.
    """
    folder = work or destination.with_name(f"{destination.name}.tmp")
    try:
        folder.mkdir(exist_ok=work is not None)
        zipped = _Unfinished.open(folder, say)
        zipped.any_size, zipped.is_for_latents = any_size, is_for_latents
        with zipped.zip.images, zipped.zip.members:
            try:
                yield zipped
            except SidaError as error:
                if not (isinstance(error, _NoRoomError) and zipped.state.done):
                    for name in (*_FILES, _STATE):
                        (folder / name).unlink(missing_ok=True)
                raise
            except BaseException:
                if work:
                    zipped.save()
                raise
        if destination != folder / _FILES[0]:  # else the caller has yet to take it, and may fail to
            (folder / _FILES[0]).replace(destination)
            for name in (_FILES[1], _STATE):
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        message = f"cannot prepare {destination} ({error.strerror or error}: {error.filename or destination})"
        raise SidaError(message, "Mend that, then repeat.", exit_code=EXIT_FAILED) from error
    finally:
        if not work:
            shutil.rmtree(folder, ignore_errors=True)


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


def _center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).convert("RGB")
    return square.resize((width, height), Image.Resampling.LANCZOS)


def _center_crop_wide(image: Image.Image, width: int, height: int) -> Image.Image | None:
    crop_height = round(width * image.height / image.width)
    if image.width < width or crop_height < height:
        return None
    top, bottom = (image.height - crop_height) // 2, (image.height + crop_height) // 2
    strip = image.crop((0, top, image.width, bottom)).convert("RGB")
    canvas = Image.new("RGB", (width, width))
    canvas.paste(strip.resize((width, height), Image.Resampling.LANCZOS), (0, (width - height) // 2))
    return canvas


def _center_crop_dhariwal(image: Image.Image, width: int, height: int) -> Image.Image:
    while min(image.size) >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = width / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _pad(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.width > width or image.height > height:
        raise ValueError(f"must be at most {width}x{height} to be padded, got {image.width}x{image.height}")
    canvas = Image.new(image.mode, (width, height))
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


TRANSFORMS: Mapping[str, Transform] = MappingProxyType(
    {
        "center-crop": _center_crop,
        "center-crop-wide": _center_crop_wide,
        "center-crop-dhariwal": _center_crop_dhariwal,
        "pad": _pad,
    }
)


def _encode(item: Item, *, change: _Change) -> _Member | SidaError | str:
    """One image for the zip; the error for one that cannot be used; a reason for one that its transform leaves out."""
    transform, resolution, is_turned = change.transform, change.resolution, False
    if change.is_for_latents and item.keep_as is not None and item.keep_as.endswith(".npy"):
        raise SidaError(f"latents are made of pixels, got latents: {item.name}", "Leave out --latents.")
    try:
        loaded = item.load()
        if item.keep_as is not None:
            assert isinstance(loaded, bytes)
            if item.keep_as.endswith(".npy"):
                return _Member(loaded, decode_latents(loaded, item.name).shape)
            hint = "Pass --channels 3, which makes every image RGB, or 1 for grey."
            planes = decode_pixels(loaded, item.name, hint)
            return _Member(planes if change.is_for_latents else loaded, planes.shape)
        if isinstance(loaded, np.ndarray):
            image = Image.fromarray(loaded)
        else:
            image, is_turned = _read_image(loaded, item.name, change)
        if resolution is not None and transform is not None:
            result = TRANSFORMS[transform](image, *resolution)
            if result is None:
                return f"is too small for {transform} to {resolution[0]}x{resolution[1]}"
            image = result
        elif resolution is not None and image.size != resolution:
            image = image.resize(resolution, Image.Resampling.LANCZOS)
        if change.channels is not None:
            image = image.convert("L" if change.channels == 1 else "RGB")
    except SidaError as error:
        return error
    except ValueError as error:
        return SidaError(f"{item.name} {error}", "Choose another transform or resolution.")
    shape, pixels = (len(image.getbands()), image.height, image.width), np.asarray(image)
    planes = pixels.reshape(image.height, image.width, -1).transpose(2, 0, 1)
    return _Member(planes if change.is_for_latents else encode_png(pixels), shape, is_turned)


_ORIENTATION = 0x0112
"""the EXIF tag; 1 where an image is stored as it is to be shown"""


def _read_image(file: Path | bytes, name: str, change: _Change) -> tuple[Image.Image, bool]:
    """The first frame as mode L or RGB, and whether its orientation tag asks for a turn."""
    hint = "Mend or remove it, or go on without: prepare-data --skip-bad."
    is_edm = change.convention == "edm"
    try:
        if isinstance(file, Path) and file.stat().st_size > MAX_MEMBER_BYTES:
            raise ValueError(f"it is larger than {MAX_MEMBER_BYTES:,} bytes")
        data = file if isinstance(file, bytes) else file.read_bytes()
        check_png(data)
        with Image.open(BytesIO(data), formats=image_formats()) as opened:
            image: Image.Image = opened
            is_turned = bool(image.info.get("exif")) and image.getexif().get(_ORIENTATION, 1) != 1
            if is_turned and change.exif_rotate:
                image = ImageOps.exif_transpose(image)
            mode = image.mode
            if is_edm:
                # Palette indices become grey levels, as in the published tool; 8 bits in any case.
                readable = mode in ("L", "RGB", "P")
                pixels = Image.fromarray(np.asarray(image)) if readable else image
            else:
                readable = mode not in ("I", "F") and not mode.startswith("I;")
                pixels = image.convert("RGB") if readable else image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SidaError(f"{name} must have at most {Image.MAX_IMAGE_PIXELS} pixels, got more", hint) from error
    except UnidentifiedImageError as error:
        raise SidaError(f"{name} must be an image, got bytes that Pillow does not know", hint) from error
    except Exception as error:  # Pillow's readers raise whatever their parser trips over.
        raise SidaError(f"{name} cannot be read as an image ({first_line(error)})", hint) from error
    if not readable:
        allowed = "8-bit grey or RGB" if is_edm else "8 bits per channel"
        raise SidaError(
            f"{name} must have {allowed}, got Pillow's mode {mode}",
            "Convert it, or go on without: prepare-data --skip-bad.",
        )
    return pixels, is_turned


def encode_png(pixels: Pixels) -> bytes:
    """An uncompressed PNG of uint8 [H, W] (grey) or [H, W, 3] (RGB).

    Written here because a library's compressor, even at level 0, may change its bytes from version to version.
    Source: PNG specification (W3C), RFC 1950 and 1951.
    """
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + pixels[0].size), dtype=np.uint8)  # each row begins with its filter, 0 for none
    rows[:, 1:] = pixels.reshape(height, -1)
    raw = rows.tobytes()
    starts = range(0, len(raw), 0xFFFF)
    blocks = []
    for start in starts:
        block = raw[start : start + 0xFFFF]
        blocks.append(struct.pack("<BHH", start == starts[-1], len(block), len(block) ^ 0xFFFF) + block)
    packed = b"\x78\x01" + b"".join(blocks) + struct.pack(">I", zlib.adler32(raw))
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def encode_npy(array: NDArray[np.float32]) -> bytes:
    """The .npy file of an array, version 1.0."""
    buffer = BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _check_shape(
    name: str,
    shape: tuple[int, int, int],
    first_name: str,
    first_shape: tuple[int, int, int],
    *,
    any_size: bool = False,
    is_for_latents: bool,
) -> None:
    hint = "Pass --resolution to prepare-data, e.g. 32x32, and a --transform if the aspect ratio shall be kept."
    channels, height, width = shape
    if not any_size and (height != width or width & (width - 1)):
        raise SidaError(
            f"images must be square with a side that is a power of two, got {width}x{height} for {name}", hint
        )
    if is_for_latents and width < 8:
        raise SidaError(f"images must be at least 8x8 to have latents, got {width}x{height}", "Prepare larger images.")
    if shape[1:] != first_shape[1:]:
        first_size = f"{first_shape[2]}x{first_shape[1]}"
        raise SidaError(
            f"images must all have one size, got {first_size} for {first_name} and {width}x{height} for {name}", hint
        )
    if channels != first_shape[0]:
        got = f"{first_shape[0]} channels for {first_name} and {channels} for {name}"
        raise SidaError(
            f"images must all be grey or all RGB, got {got}", "Pass --channels 3 to prepare-data, or 1 for grey."
        )


def _member_name(index: int, stem: str = "img", suffix: str = ".png") -> str:
    number = f"{index:08d}"
    return f"{number[:5]}/{stem}{number}{suffix}"


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Pillow's remarks on odd files are dropped, but images of absurd size become errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
