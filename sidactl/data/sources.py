"""What a dataset can be made from: folders, zips, tars, IDX and npz files, each a stream of named, labelled images.

Nothing is decoded or changed here; that is prepare.py's work.
"""

import os
import re
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sidactl.data.archive import MAX_MEMBER_BYTES
from sidactl.data.dataset import tiny_digits_arrays
from sidactl.data.images import is_hidden, is_image, printable
from sidactl.data.listing import (
    IDX_TRAINING,
    WNID,
    ClassOrder,
    Convention,
    Item,
    Listing,
    OnLine,
    Rules,
    Source,
    classified,
)
from sidactl.data.packed import arrays_source, idx_source, npz_source, tar_source, zip_source
from sidactl.errors import SidaError
from sidactl.store.outputs import manifest_of
from sidactl.text import shell_word

TINY_DIGITS = "tiny-digits"


def open_source(
    source: str | Path,
    convention: Convention | None = None,
    *,
    keep_layout: bool,
    use_labels: bool = True,
    class_order: ClassOrder | None = None,
    is_partial: bool = False,
    say: OnLine = lambda line: None,
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
        return arrays_source(TINY_DIGITS, pixels[:, 0], [int(label) for label in labels])
    path = Path(source)
    name = path.name.lower()
    rules = Rules(convention, class_order, use_labels, is_partial, say)
    if path.is_dir():
        if exported := _exported_images(path):
            say(f"{path} is an export: its {exported.name} is taken")
            return zip_source(exported, keep_layout, rules)
        idx = [file for file in sorted(path.iterdir()) if IDX_TRAINING.fullmatch(file.name)]
        if idx:
            return idx_source(idx[0])
        training = _imagenet_training(path)
        if training != path:
            say(f"{path} is ImageNet: its training images in {training} alone are taken")
        return _folder(training, rules)
    if not path.exists():
        is_word = re.fullmatch(r"[\w-]+", str(source)) is not None
        built_in = f"; the dataset that is built in is {TINY_DIGITS}" if is_word else ""
        raise SidaError(f"source {source} does not exist", f"Check the path{built_in}.")
    if name.endswith(".zip") or (not path.suffix and zipfile.is_zipfile(path)):  # the store's files have no suffix
        return zip_source(path, keep_layout, rules)
    if name.endswith((".tar.gz", ".tgz", ".tar")):
        return tar_source(path)
    if re.search(r"idx3-ubyte(\.gz)?$", name):
        return idx_source(path)
    if name.endswith(".npz"):
        return npz_source(path)
    raise SidaError(
        f"source must be a folder, .zip, .npz, IDX images, or CIFAR-10's or ImageNet's .tar, got {source}",
        "Give the folder that it lies in." if is_image(name) else "Convert it to one of these.",
    )


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
        if is_named or any(re.fullmatch(WNID, entry.name) for entry in os.scandir(root / "train")):
            found = [root / "train"]
    return found[0] if found else root


def _small(path: Path) -> bytes:
    """A dataset.json; SidaError for one that is larger than those of many millions of images."""
    if path.stat().st_size > MAX_MEMBER_BYTES:
        raise SidaError(f"{path} must have at most {MAX_MEMBER_BYTES:,} bytes, got more", "Give another.")
    return path.read_bytes()


def _folder(root: Path, rules: Rules) -> Source:
    listing = Listing(root, is_image)
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
    names, _, labels, class_names = classified(listing, rules, lambda name: _small(root / name))

    def items() -> Iterator[Item]:
        for index, name in enumerate(names):
            label = None if labels is None else int(labels[index])
            yield Item(printable(f"{root / name}"), label, partial(Path, root, name))

    return Source(len(names), items, from_files=True, labels=labels, class_names=class_names)


def _holds(folder: str, inner: str) -> bool:
    return (inner + os.sep).startswith(folder + os.sep)


def _raise(error: OSError) -> None:
    raise error
