"""What a dataset can be made from: folders, zips, CIFAR-10, IDX and npz files, each a stream of named, labelled images.

Nothing is decoded or changed here; that is prepare.py's work.
"""

import gzip
import os
import pickletools
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sidactl.data import (
    LABEL_FILE,
    MAX_MEMBER_BYTES,
    ZipArchive,
    check_label,
    first_line,
    label_of,
    parse_labels,
    readable_extensions,
    tiny_digits_arrays,
)
from sidactl.errors import SidaError

Convention = Literal["edm", "edm2"]
Pixels = NDArray[np.uint8]

TINY_DIGITS = "tiny-digits"


class Item(NamedTuple):
    """One image of a source, still to be read: `load` gives its file, bytes, or pixels uint8 [H, W] or [H, W, 3].

    `keep_as` is its member name where the bytes go into the dataset as they are.
    """

    name: str
    label: int | None
    load: Callable[[], Path | bytes | Pixels]
    keep_as: str | None = None


class Source(NamedTuple):
    """`total` items, read one after the other; `from_files` where decoding them is worth threads."""

    total: int
    items: Iterable[Item]
    from_files: bool


_CIFAR_HINT = "Download cifar-10-python.tar.gz again."
_LAYOUT = re.compile(r"\d{5}/(img\d{8}\.png|img-mean-std-\d{8}\.npy)")
_IDX_TRAINING = re.compile(r"train-images[-.]idx3-ubyte(\.gz)?")


def open_source(source: str | Path, convention: Convention, *, keep_layout: bool) -> Source:
    """The images of `source` (see `prepare.prepare`) in their published order.

    `keep_layout`: a zip that is in the EDM or EDM2 layout already is to keep names and bytes. Raises SidaError for
    what is no such source; so does reading the items, where one of them is damaged or has no label.
    """
    if source == TINY_DIGITS:
        pixels, labels = tiny_digits_arrays()
        return _arrays(TINY_DIGITS, pixels[:, 0], [int(label) for label in labels])
    path = Path(source)
    name = path.name.lower()
    if path.is_dir():
        training = [path / inner / "Data/CLS-LOC/train" for inner in ("", "ILSVRC")]
        idx = [file for file in sorted(path.iterdir()) if _IDX_TRAINING.fullmatch(file.name)]
        if idx:
            return _idx(idx[0])
        return _folder(next((folder for folder in training if folder.is_dir()), path), convention)
    if not path.exists():
        raise SidaError(f"source {source} does not exist", f"Check the path, or pass {TINY_DIGITS}.")
    if name.endswith(".zip"):
        return _zip(path, keep_layout)
    if name.endswith((".tar.gz", ".tgz", ".tar")):
        return _cifar(path)
    if re.search(r"idx3-ubyte(\.gz)?$", name):
        return _idx(path)
    if name.endswith(".npz"):
        return _npz(path)
    raise SidaError(
        f"source must be a folder, .zip, .npz, CIFAR-10 .tar.gz or IDX images, got {source}",
        "Convert it to one of these.",
    )


def _arrays(name: str, images: Pixels, labels: list[int]) -> Source:
    items = (Item(f"image {i} of {name}", labels[i], partial(_same, images[i])) for i in range(len(images)))
    return Source(len(images), items, from_files=False)


def _same(image: Pixels) -> Pixels:
    return image


def _folder(root: Path, convention: Convention) -> Source:
    extensions = readable_extensions()
    names = []
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_raise):
        here = os.path.realpath(folder)
        # A link to a folder that holds it would be followed for ever.
        subfolders[:] = [sub for sub in subfolders if not _holds(os.path.realpath(os.path.join(folder, sub)), here)]
        inner = Path(folder).relative_to(root)
        names += [(inner / file).as_posix() for file in files if os.path.splitext(file)[1].lower() in extensions]
    if not names:
        raise SidaError(f"{root} must hold images, got none", "Check the path.")
    names.sort(key=(lambda name: name.split("/")) if convention == "edm" else None)
    label_file = root / LABEL_FILE
    given = parse_labels(label_file.read_bytes(), str(label_file)) if label_file.exists() else None
    classes = sorted({_top(name) for name in names})
    if given is None and len(classes) > 1:
        index = {name: number for number, name in enumerate(classes)}
        given = {name: index[_top(name)] for name in names}

    def items() -> Iterator[Item]:
        for name in names:
            label = None if given is None else label_of(given, name, str(label_file))
            yield Item(f"{root / name}", label, partial(Path, root, name))

    return Source(len(names), items(), from_files=True)


def _top(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def _holds(folder: str, inner: str) -> bool:
    return (inner + os.sep).startswith(folder + os.sep)


def _raise(error: OSError) -> None:
    raise error


def _zip(path: Path, keep_layout: bool) -> Source:
    archive = ZipArchive(path)
    extensions = readable_extensions() | {".npy"}
    names = sorted(name for name in archive.names if os.path.splitext(name)[1].lower() in extensions)
    if not names:
        raise SidaError(f"{path} must hold images, got none", "Check the path.")
    kept = keep_layout and all(_LAYOUT.fullmatch(name) for name in names)
    if not kept and names[0].endswith(".npy"):
        raise SidaError(
            f"latents in {path} can only be taken as they are, got a resolution or names of another layout",
            "Leave out --resolution, or prepare the pixels.",
        )
    where = f"{LABEL_FILE} in {path}"
    given = parse_labels(archive.read(LABEL_FILE), where) if LABEL_FILE in archive else None

    def items() -> Iterator[Item]:
        for name in names:
            label = None if given is None else label_of(given, name, where)
            yield Item(f"{name} in {path}", label, partial(archive.read, name), name if kept else None)

    return Source(len(names), items(), from_files=True)


def _cifar(path: Path) -> Source:
    """The five training batches of cifar-10-python.tar.gz, in their order."""
    batches: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                file = archive.extractfile(member) if re.fullmatch("data_batch_[1-5]", name) else None
                if file is not None and member.size <= MAX_MEMBER_BYTES // 5:
                    batches[name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise SidaError(f"{path} is not a readable tar archive ({first_line(error)})", _CIFAR_HINT) from error
    images, labels = [], []
    for name in (f"data_batch_{number}" for number in range(1, 6)):
        if name not in batches:
            raise SidaError(f"{path} must hold CIFAR-10's data_batch_1 to data_batch_5, got no {name}", _CIFAR_HINT)
        planes, classes = _cifar_batch(batches.pop(name), f"{name} in {path}")
        images.append(planes.transpose(0, 2, 3, 1))
        labels += classes
    return _arrays(path.name, np.concatenate(images), labels)


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


def _idx(path: Path) -> Source:
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
    if not 0 < height * width <= MAX_MEMBER_BYTES:
        raise SidaError(f"images of {path} must have a usable size, got {width}x{height}", "Download it again.")

    def items() -> Iterator[Item]:
        with _open_idx(path) as file:
            _idx_header(file, 3, path)
            for i in range(num_images):
                pixels = np.frombuffer(_take(file, height * width, path), dtype=np.uint8).reshape(height, width)
                yield Item(f"image {i} of {path.name}", labels[i], partial(_same, pixels))

    return Source(num_images, items(), from_files=False)


def _open_idx(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _idx_header(file: IO[bytes] | gzip.GzipFile, num_dims: int, path: Path) -> tuple[int, ...]:
    if _take(file, 4, path) != bytes((0, 0, 8, num_dims)):
        raise SidaError(
            f"{path} must be an IDX file of bytes in {num_dims} dimensions, got another", "Download it again."
        )
    return struct.unpack(f">{num_dims}I", _take(file, 4 * num_dims, path))


def _take(file: IO[bytes] | gzip.GzipFile, count: int, path: Path) -> bytes:
    try:
        data = file.read(count)
    except (EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise SidaError(f"{path} is damaged ({first_line(error)})", "Download it again.") from error
    if len(data) != count:
        raise SidaError(f"{path} is damaged (it ends too early)", "Download it again.")
    return data


def _npz(path: Path) -> Source:
    """A guided-diffusion batch: arr_0 uint8 [N, H, W, 3], read image by image, and arr_1 classes if there are any."""
    (num_images, height, width, channels), classes = _npz_arrays(path)

    def items() -> Iterator[Item]:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            _npy_shape(file)
            for i in range(num_images):
                flat = np.frombuffer(_take(file, height * width * channels, path), dtype=np.uint8)
                pixels = flat.reshape((height, width) if channels == 1 else (height, width, 3))
                label = None if classes is None else check_label(int(classes[i]), f"image {i} of {path}")
                yield Item(f"image {i} of {path.name}", label, partial(_same, pixels))

    return Source(num_images, items(), from_files=False)


def _npz_arrays(path: Path) -> tuple[tuple[int, ...], NDArray[np.integer] | None]:
    """Shape of arr_0, and arr_1."""
    hint = "Make it with arr_0 (images, uint8 NHWC) and, where there are classes, arr_1 (integers)."
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape = _npy_shape(file)
        with np.load(path, allow_pickle=False) as arrays:
            classes = arrays.get("arr_1")
    except KeyError as error:
        raise SidaError(f"{path} must hold images in arr_0, got none", hint) from error
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
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
