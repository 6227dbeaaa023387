"""What a dataset can be made from: folders, zips, tars, IDX and npz files, each a stream of named, labelled images.

Nothing is decoded or changed here; that is prepare.py's work.
"""

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from sidactl.data import (
    LABEL_FILE,
    LAYOUT,
    MAX_LABEL,
    MAX_MEMBER_BYTES,
    ZipArchive,
    check_directory,
    check_label,
    first_line,
    is_hidden,
    is_image,
    is_item,
    labels_of,
    parse_labels,
    printable,
    tiny_digits_arrays,
)
from sidactl.errors import SidaError
from sidactl.outputs import manifest_of
from sidactl.text import shell_word

Convention = Literal["edm", "edm2"]
"""whose rules: those of a published tool, down to its surprises"""
ClassOrder = Literal["numeric", "text"]
Say = Callable[[str], None]
"""called with one line for people"""
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
    """`total` items, read one after the other, from the first at each call; `from_files` where threads are worth it.

    labels: int64 [total], or None; class_names: the name of each class, where they have names.
    """

    total: int
    items: Callable[[], Iterator[Item]]
    from_files: bool
    labels: NDArray[np.int64] | None = None
    class_names: Sequence[str] | None = None


_CIFAR_HINT = "Download cifar-10-python.tar.gz again."
_AGAIN = "Download it again."
_BY_THOUSANDS = re.compile(r"(\d{5})/img\1\d{3}\.png")
_IDX_TRAINING = re.compile(r"train-images[-.]idx3-ubyte(\.gz)?")
_WNID = r"n\d{8}"
_IMAGENET_TRAINING = "CLS-LOC/train"
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_PICTURES_UNREAD = (
    *(".heic", ".heif", ".psd", ".svg", ".eps", ".pdf", ".dng", ".cr2", ".nef", ".arw", ".raw", ".exr", ".hdr"),
    *(".npy", ".h5"),
)
_ARCHIVES = (".zip", ".npz", ".tar", ".tgz", ".gz", ".7z", ".rar")
_BLOCK_BYTES = 1 << 20
_MAX_NPY_HEADER = 1 << 16
_MAX_TAR_HEADER = 1 << 20
"""of long names and the like, which must be unpacked to be passed over; and links and folders have no content"""


def open_source(
    source: str | Path,
    convention: Convention | None = None,
    *,
    keep_layout: bool,
    use_labels: bool = True,
    class_order: ClassOrder | None = None,
    is_partial: bool = False,
    say: Say = lambda line: None,
) -> Source:
    """The images of `source` (see `prepare.prepare`) in their published order.

    keep_layout: a zip that is in the EDM or EDM2 layout already is to keep names and bytes. use_labels: whether class
    folders matter. class_order: of folders that are whole numbers. is_partial: not all items will be read. say: gets
    what was passed over.

    Raises SidaError for what is no such source, before any of it is used where an archive is damaged, an image has no
    label, or it is not clear what the classes are; so does reading the items, where one of them is damaged.
    """
    if source == TINY_DIGITS:
        pixels, labels = tiny_digits_arrays()
        return _arrays(TINY_DIGITS, pixels[:, 0], [int(label) for label in labels])
    path = Path(source)
    name = path.name.lower()
    rules = _Rules(convention, class_order, use_labels, is_partial, say)
    if path.is_dir():
        if exported := _exported_images(path):
            say(f"{path} is an export: its {exported.name} is taken")
            return _zip(exported, keep_layout, rules)
        idx = [file for file in sorted(path.iterdir()) if _IDX_TRAINING.fullmatch(file.name)]
        if idx:
            return _idx(idx[0])
        training = _imagenet_training(path)
        if training != path:
            say(f"{path} is ImageNet: its training images in {training} alone are taken")
        return _folder(training, rules)
    if not path.exists():
        is_word = re.fullmatch(r"[\w-]+", str(source)) is not None
        built_in = f"; the dataset that is built in is {TINY_DIGITS}" if is_word else ""
        raise SidaError(f"source {source} does not exist", f"Check the path{built_in}.")
    if name.endswith(".zip") or (not path.suffix and zipfile.is_zipfile(path)):  # the store's files have no suffix
        return _zip(path, keep_layout, rules)
    if name.endswith((".tar.gz", ".tgz", ".tar")):
        return _tar(path)
    if re.search(r"idx3-ubyte(\.gz)?$", name):
        return _idx(path)
    if name.endswith(".npz"):
        return _npz(path)
    raise SidaError(
        f"source must be a folder, .zip, .npz, IDX images, or CIFAR-10's or ImageNet's .tar, got {source}",
        "Give the folder that it lies in." if is_image(name) else "Convert it to one of these.",
    )


def _arrays(name: str, images: Pixels, labels: list[int]) -> Source:
    def items() -> Iterator[Item]:
        for index, image in enumerate(images):
            yield Item(f"image {index} of {name}", labels[index], partial(_same, image))

    return Source(len(images), items, from_files=False, labels=np.array(labels, dtype=np.int64))


def _same(image: Pixels) -> Pixels:
    return image


class _Rules(NamedTuple):
    """How classes are found among files."""

    convention: Convention | None
    class_order: ClassOrder | None
    use_labels: bool
    is_partial: bool
    say: Say


class _Listing:
    """The files of a folder or zip, as paths with "/" relative to it: images, dataset.json in any spelling, others."""

    def __init__(self, where: Path, is_wanted: Callable[[str], bool]) -> None:
        self.where = where
        self.images: list[str] = []
        self.label_files: list[str] = []
        self.others: list[str] = []
        self.folders: set[str] = set()
        self._is_wanted = is_wanted
        self._passed_over: dict[str, tuple[int, str]] = {}

    def add(self, name: str) -> None:
        if is_hidden(name):
            if is_image(name):
                self._pass_over("hidden or system files with the suffix of an image", name)
        elif self._is_wanted(name):
            self.images.append(name)
        else:
            if _last(name) == LABEL_FILE:
                self.label_files.append(name)
            elif re.fullmatch(r"(labels?|classes|metadata|annotations)\.(json|csv|tsv|txt|npy)", _last(name)):
                self._pass_over(f"files that may hold labels, which {LABEL_FILE} alone gives", name)
            if os.path.splitext(name)[1].lower() in _PICTURES_UNREAD:
                self._pass_over("files of formats that are not read", name)
            elif _last(name).endswith(_ARCHIVES):
                self._pass_over("archives", name)
            self.others.append(name)

    def _pass_over(self, what: str, name: str) -> None:
        number, first = self._passed_over.get(what, (0, name))
        self._passed_over[what] = number + 1, first

    def finish(self, say: Say) -> None:
        """Sorts the images, and says what was passed over; SidaError where there is no image."""
        if not self.images:
            raise SidaError(f"{self.where} must hold images, got none", "Check the path.")
        self.images.sort()
        for what, (number, first) in self._passed_over.items():
            say(f"passed over in {self.where}: {number:,} {what}, the first {printable(first)}")


def _last(name: str) -> str:
    return PurePosixPath(name).name.lower()


class _Found(NamedTuple):
    """The images in their order, how they are named in the folder `base` ("" or ending in "/"), and their classes."""

    names: list[str]
    base: str
    labels: NDArray[np.int64] | None
    class_names: list[str] | None


def _classified(listing: _Listing, rules: _Rules, read: Callable[[str], bytes], *, in_folders: bool = True) -> _Found:
    """The classes of a listing: those of its dataset.json, else its class folders.

    Both count from the folder that holds all images, at whatever depth. in_folders: whether a published tool takes
    folders for classes here.
    """
    names = listing.images
    if rules.convention is not None:
        names = sorted(names, key=(lambda name: name.split("/")) if rules.convention == "edm" else None)
        given = parse_labels(read(LABEL_FILE), _in(listing, LABEL_FILE)) if LABEL_FILE in listing.label_files else None
        if given and given.labels is not None:
            where = _in(listing, LABEL_FILE)
            return _Found(names, "", labels_of(given.labels, names, where, allow_more=True), None)
        classes = sorted({_top(name) for name in names})
        if len(classes) < 2 or not in_folders or not rules.use_labels:
            return _Found(names, "", None, None)
        if rules.class_order == "numeric":
            classes = _in_order(classes)
        return _Found(names, "", _indices(names, classes), None)
    if not rules.use_labels:
        return _Found(names, _common_folder(names), None, None)
    base, label_file = _base(listing)
    if label_file is not None:
        where = _in(listing, label_file)
        given = parse_labels(read(label_file), where)
        if given.labels is None:
            return _Found(names, base, None, None)
        inner = [name[len(base) :] for name in names]
        return _Found(names, base, labels_of(given.labels, inner, where), given.class_names)
    classes = _class_folders(listing, base)
    if not classes:
        return _Found(names, base, None, None)
    if rules.class_order != "text":
        classes = _in_order(classes)
        moved = next((i for i, name in enumerate(classes) if _is_number(name) and int(name[-9:]) != i), None)
        if moved is not None and all(map(_is_number, classes)):
            rules.say(
                f"class folders are counted from 0 in their order, so {classes[moved]} is class {moved}; "
                "an empty folder keeps the place of a class without images"
            )
    if {name.lower() for name in classes} <= _SPLITS:
        rules.say(f"warning: the classes are {' and '.join(classes)}; if these are parts of a dataset, prepare one")
    labels = _indices([name[len(base) :] for name in names], classes)
    return _Found(names, base, labels, [printable(name) for name in classes])


def _in(listing: _Listing, name: str) -> str:
    return f"{listing.where / name}" if listing.where.is_dir() else f"{printable(name)} in {listing.where}"


def _base(listing: _Listing) -> tuple[str, str | None]:
    """The folder that names count from, and its dataset.json: the first with one on the way down to all images.

    Without one, the first with an empty folder in it, which is a class, or else the one that holds all images.
    """
    parts = _common_folder(listing.images).split("/")[:-1]
    levels = ["".join(f"{part}/" for part in parts[:depth]) for depth in range(len(parts) + 1)]
    for level in levels:
        here = [name for name in listing.label_files if name.rpartition("/")[0] + "/" == (level or "/")]
        if len(here) > 1:
            raise SidaError(
                f"labels must be in one file, got {here[0]} and {here[1]} in {listing.where}", "Remove one of them."
            )
        if here:
            return level, here[0]
    if listing.label_files:
        raise SidaError(
            f"{LABEL_FILE} must lie in a folder that holds all images, got {_in(listing, listing.label_files[0])}",
            'Move it to the top and name images from there; or put {"labels": null} there to go without.',
        )
    return next((level for level in levels if _folders_in(listing, level)[1]), levels[-1]), None


def _folders_in(listing: _Listing, base: str) -> tuple[set[str], set[str], dict[str, str]]:
    """Of the folders directly in `base`: those with images, the empty ones, and the first file in those with others."""

    def tops(names: Iterable[str]) -> Iterator[tuple[str, str]]:
        inner = ((name, name[len(base) :]) for name in names if name.startswith(base))
        return ((_top(rest), name) for name, rest in inner if "/" in rest)

    with_images = {top for top, _ in tops(listing.images)}
    bare: dict[str, str] = {}
    for top, name in tops(listing.others):
        if top not in with_images:
            bare.setdefault(top, name)
    listed = {folder[len(base) :] for folder in listing.folders if folder.startswith(base)}
    empty = {_top(f"{folder}/") for folder in listed if folder} - with_images - set(bare)
    return with_images, empty, bare


def _class_folders(listing: _Listing, base: str) -> list[str]:
    """The class folders in `base`, sorted as text; none where there are less than two, or folders of a thousand each.

    SidaError where it is not clear which images are of a class, or which folder is one.
    """
    names = listing.images
    with_images, empty, bare = _folders_in(listing, base)
    loose = next((name for name in names if "/" not in name[len(base) :]), None)
    if not with_images or (loose is None and len(with_images | empty) < 2):
        return []
    if all(_BY_THOUSANDS.fullmatch(name, len(base)) for name in names):
        return []
    hint = f'or put a {LABEL_FILE} with {{"labels": null}} at the top to go without classes.'
    if loose is not None:
        raise SidaError(
            f"images must all lie in class folders, or none of them, got {_in(listing, loose)} beside the folder "
            f"{printable(min(with_images))}",
            f"Move it into a folder, {hint}",
        )
    if bare:
        folder, first = min(bare.items())
        raise SidaError(
            f"a class folder must hold images or be empty, got {printable(folder)} with {_in(listing, first)}",
            f"Move it away, empty it, {hint}",
        )
    return sorted(with_images | empty)


def _is_number(name: str) -> bool:
    return re.fullmatch("[0-9]+", name) is not None


def _in_order(classes: list[str]) -> list[str]:
    """Class folders by number where all are whole numbers, else as they are."""
    if not all(map(_is_number, classes)):
        return classes
    return sorted(classes, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name))


def _indices(names: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
    index = {name: number for number, name in enumerate(classes)}
    return np.fromiter((index[_top(name)] for name in names), np.int64, len(names))


def _common_folder(names: Sequence[str]) -> str:
    """The deepest folder that holds all of the sorted names: "" or ending in "/"."""
    return "".join(os.path.commonprefix([names[0], names[-1]]).rpartition("/")[:2])  # noqa: RUF071


def _exported_images(root: Path) -> Path | None:
    """The zip of images in a folder that our export wrote; None in any other folder, and in one of loose pictures.

    SidaError in one of an artifact that is no images: the pictures in it only show what it does.
    """
    manifest = manifest_of(root)
    if manifest is None:
        return None
    if manifest["kind"] not in ("dataset", "samples"):
        raise SidaError(
            f"source must hold images, got the export of a {manifest['kind']}: {root}",
            f"Draw some with: sidactl fetch-teacher {shell_word(root / 'model.safetensors')} | sidactl sample --num 10k"
            if (root / "model.safetensors").is_file()
            else "Give another.",
        )
    return root / "images.zip" if (root / "images.zip").is_file() else None


def _imagenet_training(root: Path) -> Path:
    """The training images of ImageNet in any of the folders that it unpacks to; any other folder is its own."""
    inner = ("ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "CLS-LOC/train")
    found = [root / part for part in inner if (root / part).is_dir()]
    if not found and (root / "train").is_dir():
        is_named = root.resolve().name == "CLS-LOC"
        if is_named or any(re.fullmatch(_WNID, entry.name) for entry in os.scandir(root / "train")):
            found = [root / "train"]
    return found[0] if found else root


def _imagenet_part(names: Sequence[str]) -> str | None:
    """The folder of ImageNet's training images among the names in a zip, ending in "/"; None for any other zip."""
    for name in names:
        before, found, _ = name.partition(f"{_IMAGENET_TRAINING}/")
        if found and (not before or before.endswith("/")):
            return before + found
    base = _common_folder(names)
    part = re.compile(re.escape(f"{base}train/") + _WNID + "/")
    is_split = {_top(name[len(base) :]) for name in names} <= _SPLITS
    return f"{base}train/" if is_split and any(map(part.match, names)) else None


def _small(path: Path) -> bytes:
    """A dataset.json; SidaError for one that is larger than those of many millions of images."""
    if path.stat().st_size > MAX_MEMBER_BYTES:
        raise SidaError(f"{path} must have at most {MAX_MEMBER_BYTES:,} bytes, got more", "Give another.")
    return path.read_bytes()


def _folder(root: Path, rules: _Rules) -> Source:
    listing = _Listing(root, is_image)
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_raise):
        here = os.path.realpath(folder)
        # A link to a folder that holds it would be followed for ever.
        subfolders[:] = [sub for sub in subfolders if not _holds(os.path.realpath(os.path.join(folder, sub)), here)]
        inner = Path(folder).relative_to(root).as_posix()
        prefix = "" if inner == "." else f"{inner}/"
        listing.folders.update(f"{prefix}{sub}" for sub in subfolders if not is_hidden(f"{prefix}{sub}"))
        for file in files:
            listing.add(f"{prefix}{file}")
    listing.finish(rules.say)
    names, _, labels, class_names = _classified(listing, rules, lambda name: _small(root / name))

    def items() -> Iterator[Item]:
        for index, name in enumerate(names):
            label = None if labels is None else int(labels[index])
            yield Item(printable(f"{root / name}"), label, partial(Path, root, name))

    return Source(len(names), items, from_files=True, labels=labels, class_names=class_names)


def _top(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def _holds(folder: str, inner: str) -> bool:
    return (inner + os.sep).startswith(folder + os.sep)


def _raise(error: OSError) -> None:
    raise error


def _zip(path: Path, keep_layout: bool, rules: _Rules) -> Source:
    archive = ZipArchive(path)
    listing = _Listing(path, is_item)
    by_name = archive.by_name
    part = _imagenet_part([*archive.names_of(by_name[archive.is_item[by_name]])] or [""])
    if part is not None:
        rules.say(f"{path} is ImageNet: its training images in {part} alone are taken")
    for name in archive.names:
        if part is None or name.startswith(part):
            listing.add(name)
    listing.folders.update(f for f in archive.folders if f.startswith(part or "") and not is_hidden(f))
    listing.finish(rules.say)
    names, base, labels, class_names = _classified(listing, rules, archive.read, in_folders=False)
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


def _tar(path: Path) -> Source:
    """CIFAR-10's archive, or ImageNet's, which is a tar of tars."""
    with _refusing_tar(path), _open_tar(path) as file:
        try:
            first, _ = next(_tar_members(file), ("", 0))
        except tarfile.TarError as error:
            raise tarfile.ReadError("file could not be opened successfully") from error
        is_plain = not isinstance(file, gzip.GzipFile)
    return (
        _imagenet_tar(path) if is_plain and re.fullmatch(_WNID + r"\.tar", PurePosixPath(first).name) else _cifar(path)
    )


def _open_tar(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path) if is_packed else path.open("rb", buffering=0))


@contextmanager
def _refusing_tar(path: Path) -> Iterator[None]:
    hint = _AGAIN if path.suffix.lower() == ".tar" else _CIFAR_HINT
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


def _imagenet_tar(path: Path) -> Source:
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
        raise SidaError(f"names in {path} must be unique, got one twice", _AGAIN)
    if not names:
        raise SidaError(f"{path} must hold images, got none", "Check the path.")
    classes.sort()
    order = sorted(range(len(names)), key=names.__getitem__)
    labels = _indices([names[i] for i in order], classes)

    def load(start: int, size: int) -> bytes:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(size)

    def items() -> Iterator[Item]:
        for index, i in enumerate(order):
            yield Item(printable(f"{names[i]} in {path}"), int(labels[index]), partial(load, starts[i], sizes[i]))

    return Source(len(names), items, from_files=True, labels=labels, class_names=classes)


def _cifar(path: Path) -> Source:
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
        _check_end(label_file, 0, label_path)
        if not 0 < height * width <= MAX_MEMBER_BYTES:
            raise SidaError(f"images of {path} must have a usable size, got {width}x{height}", _AGAIN)
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
        raise SidaError(f"{path} is damaged ({first_line(error)})", _AGAIN) from error
    if rest:
        raise SidaError(f"{path} is damaged (it goes on after its last item)", _AGAIN)


def _open_idx(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _idx_header(file: IO[bytes] | gzip.GzipFile, num_dims: int, path: Path) -> tuple[int, ...]:
    if _take(file, 4, path) != bytes((0, 0, 8, num_dims)):
        raise SidaError(f"{path} must be an IDX file of bytes in {num_dims} dimensions, got another", _AGAIN)
    return struct.unpack(f">{num_dims}I", _take(file, 4 * num_dims, path))


def _take(file: IO[bytes] | gzip.GzipFile, count: int, path: Path) -> bytes:
    try:
        data = file.read(count)
    except (EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise SidaError(f"{path} is damaged ({first_line(error)})", _AGAIN) from error
    if len(data) != count:
        raise SidaError(f"{path} is damaged (it ends too early)", _AGAIN)
    return data


def _npz(path: Path) -> Source:
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
