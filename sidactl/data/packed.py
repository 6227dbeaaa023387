"""Sources that are single files: zips, tars, CIFAR's archive, IDX and npz files."""

import gzip
import os
import pickletools
import re
import struct
import tarfile
import tokenize
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from sidactl.data.archive import MAX_MEMBER_BYTES, ZipArchive, check_directory
from sidactl.data.images import LAYOUT, Pixels, first_line, is_hidden, is_image, is_item, printable
from sidactl.data.labels import MAX_LABEL, check_label
from sidactl.data.listing import (
    AGAIN,
    IMAGENET_TRAINING,
    SPLITS,
    WNID,
    Item,
    Listing,
    Rules,
    Source,
    classified,
    common_folder,
    indices_of,
    top_folder,
)
from sidactl.errors import SidaError

_CIFAR_HINT = "Download cifar-10-python.tar.gz again."

_BLOCK_BYTES = 1 << 20

_MAX_NPY_HEADER = 1 << 16

_MAX_TAR_HEADER = 1 << 20
"""of long names and the like, which must be unpacked to be passed over; and links and folders have no content"""


def arrays_source(name: str, images: Pixels, labels: list[int]) -> Source:
    def items() -> Iterator[Item]:
        for index, image in enumerate(images):
            yield Item(f"image {index} of {name}", labels[index], partial(_same, image))

    return Source(len(images), items, from_files=False, labels=np.array(labels, dtype=np.int64))


def _same(image: Pixels) -> Pixels:
    return image


def _imagenet_part(names: Sequence[str]) -> str | None:
    """The folder of ImageNet's training images among the names in a zip, ending in "/"; None for any other zip."""
    for name in names:
        before, found, _ = name.partition(f"{IMAGENET_TRAINING}/")
        if found and (not before or before.endswith("/")):
            return before + found
    base = common_folder(names)
    part = re.compile(re.escape(f"{base}train/") + WNID + "/")
    is_split = {top_folder(name[len(base) :]) for name in names} <= SPLITS
    return f"{base}train/" if is_split and any(map(part.match, names)) else None


def zip_source(path: Path, keep_layout: bool, rules: Rules) -> Source:
    archive = ZipArchive(path)
    listing = Listing(path, is_item)
    by_name = archive.by_name
    part = _imagenet_part([*archive.names_of(by_name[archive.is_item[by_name]])] or [""])
    if part is not None:
        rules.say(f"{path} is ImageNet: its training images in {part} alone are taken")
    for name in archive.names:
        if part is None or name.startswith(part):
            listing.add(name)
    listing.folders.update(f for f in archive.folders if f.startswith(part or "") and not is_hidden(f))
    listing.finish(rules.say)
    names, base, labels, class_names = classified(listing, rules, archive.read, in_folders=False)
    # What is read is checked as it is; what is not might be an image, were it not for a damaged name.
    row_of = {name: row for row, name in enumerate(archive.names)}
    rows = np.fromiter((row_of[name] for name in names), np.int64, len(names))
    archive.check(range(len(archive)) if rules.is_partial else np.delete(np.arange(len(archive)), rows))
    if re.search(r"(^|/)\d{5}/$", base):  # all images in the first folder of a layout
        base = base[:-6]
    kept = keep_layout and all(LAYOUT.fullmatch(name, len(base)) for name in names)
    if not kept and names[0].endswith(".npy"):
        raise SidaError(
            f"latents in {path} can only be taken as they are, got other options or names of another layout",
            "Leave out --resolution, --channels and the like, or prepare the pixels.",
        )

    def items() -> Iterator[Item]:
        for index, (name, row) in enumerate(zip(names, rows, strict=True)):
            label = None if labels is None else int(labels[index])
            load = partial(archive.read_row, int(row))
            yield Item(printable(f"{name} in {path}"), label, load, name[len(base) :] if kept else None)

    return Source(len(names), items, from_files=True, labels=labels, class_names=class_names)


def tar_source(path: Path) -> Source:
    """CIFAR-10's archive, or ImageNet's, which is a tar of tars."""
    with _refusing_tar(path), _open_tar(path) as file:
        try:
            first, _ = next(_tar_members(file), ("", 0))
        except tarfile.TarError as error:
            raise tarfile.ReadError("file could not be opened successfully") from error
        is_plain = not isinstance(file, gzip.GzipFile)
    return (
        imagenet_tar_source(path)
        if is_plain and re.fullmatch(WNID + r"\.tar", PurePosixPath(first).name)
        else cifar_source(path)
    )


def _open_tar(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path) if is_packed else path.open("rb", buffering=0))


@contextmanager
def _refusing_tar(path: Path) -> Iterator[None]:
    hint = AGAIN if path.suffix.lower() == ".tar" else _CIFAR_HINT
    try:
        yield
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise SidaError(f"{path} is not a readable tar archive ({first_line(error)})", hint) from error


def _tar_members(file: IO[bytes]) -> Iterator[tuple[str, int]]:
    """Name and size of each file in a tar, whose content is what comes next in `file`.

    Python's reader ends without a word at a damaged header; here it is a TarError, as is an end without its mark.
    Source: POSIX.1-2017, ustar interchange format.
    """
    while True:
        header = file.read(tarfile.BLOCKSIZE)
        if len(header) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends too early")
        if not any(header):
            return
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        after = file.tell() + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if member.size < 0:
            raise tarfile.ReadError("a member of negative size")
        if not member.isreg() and member.size > _MAX_TAR_HEADER:
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        if member.isreg():
            yield member.name, member.size
        file.seek(after)


def imagenet_tar_source(path: Path) -> Source:
    """ILSVRC2012_img_train.tar: a tar with one tar for each class, n01440764.tar, of its JPEGs."""
    names: list[str] = []
    starts, sizes = array("q"), array("q")
    classes: list[str] = []
    with _refusing_tar(path), path.open("rb", buffering=0) as file:
        for outer, outer_size in _tar_members(file):
            class_name, suffix = os.path.splitext(PurePosixPath(outer).name)
            if is_hidden(outer):
                continue
            if suffix != ".tar":
                raise SidaError(f"{path} must hold a tar for each class, got {printable(outer)} too", "Unpack it.")
            classes.append(class_name)
            end = file.tell() + outer_size
            for inner, size in _tar_members(file):
                if file.tell() + size > end:
                    raise tarfile.ReadError(f"{outer} is longer than it says")
                if is_image(inner) and not is_hidden(PurePosixPath(inner).name):
                    names.append(f"{class_name}/{PurePosixPath(inner).name}")
                    starts.append(file.tell())
                    sizes.append(size)
    if len(set(classes)) < len(classes) or len(set(names)) < len(names):
        raise SidaError(f"names in {path} must be unique, got one twice", AGAIN)
    if not names:
        raise SidaError(f"{path} must hold images, got none", "Check the path.")
    classes.sort()
    order = sorted(range(len(names)), key=names.__getitem__)
    labels = indices_of([names[i] for i in order], classes)

    def load(start: int, size: int) -> bytes:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(size)

    def items() -> Iterator[Item]:
        for index, i in enumerate(order):
            yield Item(printable(f"{names[i]} in {path}"), int(labels[index]), partial(load, starts[i], sizes[i]))

    return Source(len(names), items, from_files=True, labels=labels, class_names=classes)


def cifar_source(path: Path) -> Source:
    """The five training batches of cifar-10-python.tar.gz, in their order."""
    batches: dict[str, bytes] = {}
    first = None
    with _refusing_tar(path), _open_tar(path) as file:
        for member, size in _tar_members(file):
            first = first or member
            name = PurePosixPath(member).name
            if re.fullmatch("data_batch_[1-5]", name) and size <= MAX_MEMBER_BYTES // 5:
                batches[name] = file.read(size)
        # To the end of the stream, where its checksum is.
        while file.read(_BLOCK_BYTES):
            pass
    images, labels = [], []
    if not batches:
        raise SidaError(
            f"a .tar must be CIFAR-10's or ImageNet's training archive, got {path} with "
            f"{printable(first) if first else 'no file'}",
            "Unpack it and give the folder.",
        )
    for name in (f"data_batch_{number}" for number in range(1, 6)):
        if name not in batches:
            raise SidaError(f"{path} must hold CIFAR-10's data_batch_1 to data_batch_5, got no {name}", _CIFAR_HINT)
        planes, classes = _cifar_batch(batches.pop(name), f"{name} in {path}")
        images.append(planes.transpose(0, 2, 3, 1))
        labels += classes
    return arrays_source(path.name, np.concatenate(images), labels)


def _cifar_batch(pickled: bytes, where: str) -> tuple[Pixels, list[int]]:
    """Pixels [N, 3, 32, 32] and classes, picked out of the listing of a pickle's opcodes; nothing in it is executed.

    The pickle is a dict: the numbers after its key "labels" are the classes, the long string after "data" the pixels.
    """
    key, data = "", b""
    labels: list[int] = []
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            match opcode.name, argument:
                case "SHORT_BINSTRING", ("batch_label" | "labels" | "data" | "filenames") as text:
                    key = text
                case "BINSTRING", str(text) if key == "data":
                    data = text.encode("latin-1")
                case "BININT1", int(number) if key == "labels":
                    labels.append(number)
    except ValueError as error:
        raise SidaError(f"{where} is not a batch of CIFAR-10 ({first_line(error)})", _CIFAR_HINT) from error
    if not labels or len(data) != 3072 * len(labels) or max(labels) > 9:
        got = f"{len(data)} bytes, {len(labels)} labels, highest {max(labels, default=None)}"
        raise SidaError(f"{where} must hold 3072 bytes per label and labels 0 to 9, got {got}", _CIFAR_HINT)
    return np.frombuffer(data, dtype=np.uint8).reshape(-1, 3, 32, 32), labels


def idx_source(path: Path) -> Source:
    """IDX images with the labels beside them: train-images-idx3-ubyte and train-labels-idx1-ubyte, raw or .gz."""
    label_path = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if not label_path.exists():
        raise SidaError(f"labels of {path} must lie beside it, got no {label_path.name}", "Put them there.")
    with _open_idx(path) as file, _open_idx(label_path) as label_file:
        num_images, height, width = _idx_header(file, 3, path)
        (num_labels,) = _idx_header(label_file, 1, label_path)
        if num_labels != num_images:
            raise SidaError(f"{label_path} must hold {num_images} labels, got {num_labels}", "Download both again.")
        labels = _take(label_file, num_labels, label_path)
        _check_end(label_file, 0, label_path)
        if not 0 < height * width <= MAX_MEMBER_BYTES:
            raise SidaError(f"images of {path} must have a usable size, got {width}x{height}", AGAIN)
        _check_end(file, num_images * height * width, path)

    def items() -> Iterator[Item]:
        with _open_idx(path) as file:
            _idx_header(file, 3, path)
            for i in range(num_images):
                pixels = np.frombuffer(_take(file, height * width, path), dtype=np.uint8).reshape(height, width)
                yield Item(f"image {i} of {path.name}", labels[i], partial(_same, pixels))

    known = np.frombuffer(labels, dtype=np.uint8).astype(np.int64)
    return Source(num_images, items, from_files=False, labels=known)


def _check_end(file: IO[bytes] | gzip.GzipFile, num_bytes: int, path: Path) -> None:
    """Reads so many bytes up to the end of the stream, where its checksum is; SidaError where it ends elsewhere."""
    while data := _take(file, min(num_bytes, _BLOCK_BYTES), path):
        num_bytes -= len(data)
    try:
        rest = file.read(1)
    except (EOFError, OSError, zlib.error) as error:
        raise SidaError(f"{path} is damaged ({first_line(error)})", AGAIN) from error
    if rest:
        raise SidaError(f"{path} is damaged (it goes on after its last item)", AGAIN)


def _open_idx(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _idx_header(file: IO[bytes] | gzip.GzipFile, num_dims: int, path: Path) -> tuple[int, ...]:
    if _take(file, 4, path) != bytes((0, 0, 8, num_dims)):
        raise SidaError(f"{path} must be an IDX file of bytes in {num_dims} dimensions, got another", AGAIN)
    return struct.unpack(f">{num_dims}I", _take(file, 4 * num_dims, path))


def _take(file: IO[bytes] | gzip.GzipFile, count: int, path: Path) -> bytes:
    try:
        data = file.read(count)
    except (EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise SidaError(f"{path} is damaged ({first_line(error)})", AGAIN) from error
    if len(data) != count:
        raise SidaError(f"{path} is damaged (it ends too early)", AGAIN)
    return data


def npz_source(path: Path) -> Source:
    """A guided-diffusion batch: arr_0 uint8 [N, H, W, 3], read image by image, and arr_1 classes if there are any."""
    (num_images, height, width, channels), classes = _npz_arrays(path)
    if classes is not None:
        for i in np.flatnonzero((classes < 0) | (classes > MAX_LABEL))[:1]:
            check_label(int(classes[i]), f"image {i} of {path}")

    def items() -> Iterator[Item]:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            _npy_shape(file)
            for i in range(num_images):
                flat = np.frombuffer(_take(file, height * width * channels, path), dtype=np.uint8)
                pixels = flat.reshape((height, width) if channels == 1 else (height, width, 3))
                label = None if classes is None else int(classes[i])
                yield Item(f"image {i} of {path.name}", label, partial(_same, pixels))

    labels = None if classes is None else classes.astype(np.int64)
    return Source(num_images, items, from_files=False, labels=labels)


def _npz_arrays(path: Path) -> tuple[tuple[int, ...], NDArray[np.integer] | None]:
    """Shape of arr_0, and arr_1."""
    hint = "Make it with arr_0 (images, uint8 NHWC) and, where there are classes, arr_1 (integers)."
    try:
        with zipfile.ZipFile(path) as archive:
            with archive.open("arr_0.npy") as file:
                shape = _npy_shape(file)
            sizes = {member.filename: member.file_size for member in archive.infolist()}
            for member in archive.infolist():
                with archive.open(member) as file:
                    while file.read(_BLOCK_BYTES):  # to the end, where its checksum is compared
                        pass
        check_directory(path)
        if sizes.get("arr_1.npy", 0) > 8 * shape[0] + _MAX_NPY_HEADER:
            raise SidaError(f"arr_1 in {path} must be {shape[0]:,} integers, got more", hint)
        with np.load(path, allow_pickle=False) as arrays:
            classes = arrays.get("arr_1")
    except KeyError as error:
        raise SidaError(f"{path} must hold images in arr_0, got none", hint) from error
    except (
        ValueError,
        SyntaxError,
        tokenize.TokenError,
        EOFError,
        OSError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise SidaError(f"{path} cannot be read ({first_line(error)})", hint) from error
    if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
        raise SidaError(f"arr_0 in {path} must be [N, H, W, 1 or 3], got {list(shape)}", hint)
    if classes is not None and (classes.shape != shape[:1] or classes.dtype.kind not in "iu"):
        got = f"{classes.dtype} {list(classes.shape)}"
        raise SidaError(f"arr_1 in {path} must be {shape[0]} integers, got {got}", hint)
    return shape, classes


def _npy_shape(file: IO[bytes]) -> tuple[int, ...]:
    """Reads the header of an .npy up to its first pixel; ValueError unless it is uint8 in C order."""
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, is_fortran, dtype = read_header[np.lib.format.read_magic(file)](file)
    if dtype != np.uint8 or is_fortran:
        raise ValueError(f"arr_0 must be uint8 in C order, got {dtype}{' in Fortran order' if is_fortran else ''}")
    return shape
