"""What a word may mean: a ref, a name of the catalog, a file, a folder; nothing is read here."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from sidactl import catalog
from sidactl.errors import MissingError, SidaError
from sidactl.foreign import download
from sidactl.store import KINDS, Artifact, Store

OnCount = Callable[[int, int], None]
"""called with (images done, images in all)"""

RunDir: TypeAlias = str | os.PathLike[str] | None

NetKind = Literal["teacher", "generator"]

NETS: tuple[NetKind, ...] = ("teacher", "generator")

NET_FILES = (".pkl", ".safetensors")

DATA_FILES = (".zip", ".npz")

_IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

_OTHER_FILES = {suffix: f"a single {suffix[1:].upper()} image" for suffix in _IMAGE_FILES} | {
    ".npy": "an .npy array",
    ".tar": "a tar archive",
    ".tgz": "a tar archive",
    ".gz": "a compressed file",
    ".pt": "a torch file",
    ".pth": "a torch file",
    ".ckpt": "a checkpoint of another tool",
}
"""what people take for a dataset or network, by suffix"""


@cache
def say_once(line: str) -> None:
    download.to_stderr(line)


def stored(store: Store, text: str, kinds: Sequence[str]) -> Artifact:
    """As `Store.resolve`; where images are asked for, which a folder may hold, the error says that there is none."""
    try:
        return store.resolve(text, kinds)
    except MissingError as error:
        if "dataset" not in kinds or "/" in text:
            raise
        raise MissingError(f"{error.message}, and no such file or folder", error.hint) from error


def not_readable(store: Store, text: str, kinds: Sequence[str]) -> SidaError | None:
    """What is wrong with a word that is no ref but looks like a path; None for any other word."""
    path, suffix = Path(text), suffix_of(text)
    is_below = "/" in text and text.partition("/")[0] not in KINDS
    looks_like_path = is_below or text.startswith((".", "~")) or suffix in (*NET_FILES, *DATA_FILES, *_OTHER_FILES)
    if is_ref(store, text) or not (looks_like_path or path.exists()):
        return None
    wanted = [*([" or ".join(NET_FILES)] if set(NETS) & set(kinds) else [])]
    wanted += ["a folder, .zip or .npz of images"] if "dataset" in kinds else []
    if not wanted or re.fullmatch("[0-9a-fA-F]{4,}", text):
        return None
    if not path.exists():
        return SidaError(f"{text}: no such file or folder", "Check the path, or see sidactl ls for names.")
    if path.is_dir():
        got, hint = "a folder", "Name a file in it."
    else:
        got = f"{_OTHER_FILES.get(suffix, f'a {suffix} file' if suffix else 'a file without a suffix')}"
        hint = "Give the folder that it lies in." if suffix in _IMAGE_FILES else "Convert it to one of these."
        if text.lower().endswith((".tar", ".tar.gz", ".tgz", "idx3-ubyte", "idx3-ubyte.gz")) and "dataset" in kinds:
            hint = "Make a dataset of it with: sidactl prepare-data"
    return SidaError(f"{text} is {got}, {' or '.join(wanted)} is needed", hint)


def not_prepared(entry: catalog.Dataset) -> MissingError:
    """What a dataset of the catalog is refused with that is not in the run directory and cannot be downloaded."""
    words = f"--preset {entry.name}{' --latents' if entry.is_latent else ''} --name {entry.name}"
    return MissingError(
        f"dataset {entry.name} must be prepared from its files",
        f"Get them from {entry.where}, then run sidactl prepare-data PATH {words}.",
    )


def is_ref(store: Store, text: str) -> bool:
    """Whether an artifact of any kind has this name, with or without its kind."""
    return bool(store.refs_called(text))


def is_source(store: Store, text: str, kinds: Sequence[str]) -> bool:
    """Whether `text` means a URL, file or folder from which an artifact of these kinds is to be made.

    Raises SidaError where it could be an artifact or a catalog name as well.
    """
    is_file = "://" in text or (suffix_of(text) in (*NET_FILES, *DATA_FILES) and not is_ref(store, text))
    return is_file or (_is_readable(text, kinds) and means_path(store, text, kinds))


def _is_readable(text: str, kinds: Sequence[str]) -> bool:
    """Whether there is a folder or file of this name from which an artifact of these kinds could be made."""
    suffixes = (*(NET_FILES if {*NETS} & {*kinds} else ()), *(DATA_FILES if "dataset" in kinds else ()))
    return ("dataset" in kinds and os.path.isdir(text)) or (suffix_of(text) in suffixes and os.path.isfile(text))


def means_path(store: Store, text: str, kinds: Sequence[str]) -> bool:
    """Whether `text` means a folder or file that is there, and not an artifact of these kinds or a catalog name.

    Raises SidaError where it could be either.
    """
    if not os.path.exists(text) or text in store.refs():
        return False
    if text.startswith((".", "/")):
        return True
    in_catalog = catalog_entries(store, text, kinds)
    if any(text == f"{kind}/{name}" for kind, name in in_catalog):
        return False
    refs = [ref for ref in store.refs() if ref.partition("/")[0] in kinds and ref.partition("/")[2] == text]
    oids = [found.oid for found in store.starting_with(text) if found.kind in kinds]
    others = dict.fromkeys(
        [
            *refs,
            *(f"{kind}/{name}" for kind, name in in_catalog),
            *(oid[:12] if len(text) < 12 else oid for oid in oids),
        ]
    )
    if others:
        what = "folder" if os.path.isdir(text) else "file"
        raise SidaError(
            f"'{text}' is the name of a {what} and of {' and '.join(others)}",
            f"Write ./{text} for the {what}, or {' or '.join(others)}.",
        )
    return True


def catalog_entries(store: Store, text: str, kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Kind and name of the catalog's entries that `text` names, bare or as "kind/name" where no ref is called so."""
    groups: Mapping[str, Mapping[str, catalog.Entry]] = {
        "teacher": catalog.TEACHERS,
        "generator": {**catalog.GENERATORS, **catalog.COMPARISONS},
        "dataset": catalog.DATASETS,
        "stats": catalog.REFERENCES,
        "vae": catalog.VAES,
    }
    found = []
    for kind in (kind for kind in groups if kind in kinds):
        name = text.removeprefix(f"{kind}/")
        if name in groups[kind] and (name == text or text not in store.refs()):
            found.append((kind, name))
    return found


def part_of(watcher: object, what: str, unit: str = "images") -> OnCount | None:
    """A tick for a part of some work that has images, or bytes, of its own to count, such as those of a reference.

    None where `watcher`, a tick or watch, has no method `part` for them, as a plain function has not.
    """
    part = getattr(watcher, "part", None)
    return part(what, unit) if part else None


def suffix_of(path_or_url: str) -> str:
    """The suffix in lower case, with its dot."""
    return Path(path_or_url.partition("?")[0] if "://" in path_or_url else path_or_url).suffix.lower()


def plain_name(stem: str) -> str:
    """A file's name as a ref's: without what a ref must not have, and not to be read as an oid."""
    plain = re.sub(r"\.\.+", ".", re.sub(r"[^A-Za-z0-9._+-]+", "-", stem)).lstrip(".-") or "net"
    return f"net-{plain}" if re.fullmatch(r"[0-9a-fA-F]{4,}", plain) else plain


def require_pixels(artifact: Artifact) -> None:
    require_images(artifact)
    if artifact.results["kind"] == "latents":
        raise SidaError(f"latents are made of pixels, got dataset {artifact.oid[:12]} of latents", "Use it as it is.")


def require_images(artifact: Artifact) -> None:
    """Raises SidaError for a dataset of classes alone."""
    if artifact.results.get("kind") == "labels":
        raise SidaError(
            f"images are needed, got dataset {artifact.oid[:12]} of classes alone", "Give a dataset with images."
        )


def shape_for_nets(data: Artifact) -> tuple[int | None, int | None, int]:
    """Resolution, channels and classes of a dataset as a network sees it; no resolution or channels without images."""
    results: Mapping[str, Any] = data.results
    channels = results["num_channels"]
    # Stored are mean and standard deviation of every latent channel.
    channels = channels // 2 if results.get("kind") == "latents" else channels
    return results["resolution"], channels, results["label_dim"]
