"""Which class each named image belongs to, and what is passed over."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sidactl.data.images import Pixels, is_hidden, is_image, printable
from sidactl.data.labels import LABEL_FILE, labels_of, parse_labels
from sidactl.errors import SidaError

Convention = Literal["edm", "edm2"]
"""whose rules: those of a published tool, down to its surprises"""

ClassOrder = Literal["numeric", "text"]

OnLine = Callable[[str], None]
"""called with one line for people"""


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


AGAIN = "Download it again."

_BY_THOUSANDS = re.compile(r"(\d{5})/img\1\d{3}\.png")

IDX_TRAINING = re.compile(r"train-images[-.]idx3-ubyte(\.gz)?")

WNID = r"n\d{8}"

IMAGENET_TRAINING = "CLS-LOC/train"

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}

_PICTURES_UNREAD = (
    *(".heic", ".heif", ".psd", ".svg", ".eps", ".pdf", ".dng", ".cr2", ".nef", ".arw", ".raw", ".exr", ".hdr"),
    *(".npy", ".h5"),
)

_ARCHIVES = (".zip", ".npz", ".tar", ".tgz", ".gz", ".7z", ".rar")


class Rules(NamedTuple):
    """How classes are found among files."""

    convention: Convention | None
    class_order: ClassOrder | None
    use_labels: bool
    is_partial: bool
    say: OnLine


class Listing:
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

    def finish(self, say: OnLine) -> None:
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


def classified(listing: Listing, rules: Rules, read: Callable[[str], bytes], *, in_folders: bool = True) -> _Found:
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
        classes = sorted({top_folder(name) for name in names})
        if len(classes) < 2 or not in_folders or not rules.use_labels:
            return _Found(names, "", None, None)
        if rules.class_order == "numeric":
            classes = _in_order(classes)
        return _Found(names, "", indices_of(names, classes), None)
    if not rules.use_labels:
        return _Found(names, common_folder(names), None, None)
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
    if {name.lower() for name in classes} <= SPLITS:
        rules.say(f"warning: the classes are {' and '.join(classes)}; if these are parts of a dataset, prepare one")
    labels = indices_of([name[len(base) :] for name in names], classes)
    return _Found(names, base, labels, [printable(name) for name in classes])


def _in(listing: Listing, name: str) -> str:
    return f"{listing.where / name}" if listing.where.is_dir() else f"{printable(name)} in {listing.where}"


def _base(listing: Listing) -> tuple[str, str | None]:
    """The folder that names count from, and its dataset.json: the first with one on the way down to all images.

    Without one, the first with an empty folder in it, which is a class, or else the one that holds all images.
    """
    parts = common_folder(listing.images).split("/")[:-1]
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


def _folders_in(listing: Listing, base: str) -> tuple[set[str], set[str], dict[str, str]]:
    """Of the folders directly in `base`: those with images, the empty ones, and the first file in those with others."""

    def tops(names: Iterable[str]) -> Iterator[tuple[str, str]]:
        inner = ((name, name[len(base) :]) for name in names if name.startswith(base))
        return ((top_folder(rest), name) for name, rest in inner if "/" in rest)

    with_images = {top for top, _ in tops(listing.images)}
    bare: dict[str, str] = {}
    for top, name in tops(listing.others):
        if top not in with_images:
            bare.setdefault(top, name)
    listed = {folder[len(base) :] for folder in listing.folders if folder.startswith(base)}
    empty = {top_folder(f"{folder}/") for folder in listed if folder} - with_images - set(bare)
    return with_images, empty, bare


def _class_folders(listing: Listing, base: str) -> list[str]:
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


def indices_of(names: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
    index = {name: number for number, name in enumerate(classes)}
    return np.fromiter((index[top_folder(name)] for name in names), np.int64, len(names))


def common_folder(names: Sequence[str]) -> str:
    """The deepest folder that holds all of the sorted names: "" or ending in "/"."""
    return "".join(os.path.commonprefix([names[0], names[-1]]).rpartition("/")[:2])  # noqa: RUF071


def top_folder(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""
