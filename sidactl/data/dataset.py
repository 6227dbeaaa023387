"""A prepared dataset: images or latents with labels, by index."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sidactl.catalog import ASSETS
from sidactl.data.archive import ZipArchive
from sidactl.data.images import decode_latents, decode_pixels, printable
from sidactl.data.labels import LABEL_FILE, class_counts, labels_in_order, labels_of, parse_labels
from sidactl.errors import SidaError


class Dataset:
    """A dataset zip in the EDM layout: images (or .npy latents) and a dataset.json with their classes.

    `num_images`, `resolution` (height), `width` (the same for what a net is trained on), `num_channels` (1, 3, or 8 for
    latents), `is_latents`;
    `labels`: int64 [N] or None; `label_dim`: number of classes, 0 without labels; `class_names`: theirs, or None.
    Items are decoded at random from the zip, in any number of processes. Where all of them fit into `cache_bytes`
    (per process) they stay decoded in memory once read. Raises SidaError for a zip that is not of this layout.
    Source: the dataset format of EDM (2206.00364) and EDM2 (2312.02696).
    """

    def __init__(self, path: Path, *, cache_bytes: int = 1 << 30) -> None:
        self.path = Path(path)
        self._archive = ZipArchive(self.path)
        by_name = self._archive.by_name
        self._rows = by_name[self._archive.is_item[by_name]]
        # An image would be missing, were its name damaged in the zip's directory alone.
        self._archive.check(np.flatnonzero(~self._archive.is_item))
        if not len(self._rows):
            raise SidaError(f"{self.path} must hold images, got none", "Make a dataset with prepare-data.")
        self.num_images = len(self._rows)
        self.is_latents = self.name(0).lower().endswith(".npy")
        first = self._decode(0)
        self._shape = first.shape
        self.num_channels, self.resolution, self.width = first.shape
        self.labels, self.class_names, self.label_dim = self._read_labels()
        # Not touched until written: the system commits this memory image by image.
        fits = self.num_images * first.nbytes <= cache_bytes
        self._cache = np.empty((self.num_images, *first.shape), first.dtype) if fits else None
        self._cached = np.zeros(self.num_images if fits else 0, dtype=bool)

    def __getstate__(self) -> dict[str, Any]:
        cache = None if self._cache is None else np.empty_like(self._cache[:0])
        return self.__dict__ | {"_cache": cache, "_cached": np.zeros_like(self._cached)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._cache is not None:
            self._cache = np.empty((self.num_images, *self._shape), self._cache.dtype)

    @property
    def names(self) -> list[str]:
        """Of all images, in their order; made anew at every call."""
        return list(self._archive.names_of(self._rows))

    def name(self, index: int) -> str:
        """Of one image."""
        return self._archive.member(self._rows[index]).name

    def _read_labels(self) -> tuple[NDArray[np.int64] | None, list[str] | None, int]:
        row = self._archive.row_of(LABEL_FILE)
        if row is None:
            return None, None, 0
        where = f"{LABEL_FILE} in {self.path}"
        text = self._archive.read_row(row)
        if plain := labels_in_order(text, self._archive.names_of(self._rows), self.num_images):
            labels, rest = plain
            with suppress(SidaError):  # which is of the whole text, below
                found = parse_labels(rest, where)
                return labels, found.class_names, found.label_dim
        found = parse_labels(text, where)
        if found.labels is None:
            return None, None, 0
        return labels_of(found.labels, self.names, where), found.class_names, found.label_dim

    def _decode(self, index: int) -> NDArray[Any]:
        member = self._archive.member(self._rows[index])
        decode = decode_latents if self.is_latents else decode_pixels
        return decode(self._archive.read_member(member), f"{printable(member.name)} in {self.path}")

    def _item(self, index: int) -> NDArray[Any]:
        item = self._decode(index)
        if item.shape != self._shape:
            got = f"{list(item.shape)} for {printable(self.name(index))}"
            raise SidaError(
                f"images in {self.path} must all be {list(self._shape)}, got {got}", "Convert it with prepare-data."
            )
        return item

    def images(self, indices: Sequence[int] | NDArray[np.int64] | torch.Tensor) -> torch.Tensor:
        """Items by position: uint8 [B, C, H, W] in 0..255, or float32 [B, 8, h, w] for latents."""
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        if index.size and (index.min() < 0 or index.max() >= self.num_images):
            raise IndexError(f"dataset positions must be in 0..{self.num_images - 1}")
        if self._cache is None:
            items = [self._item(int(i)) for i in index]
            dtype = np.float32 if self.is_latents else np.uint8
            return torch.from_numpy(np.stack(items) if items else np.empty((0, *self._shape), dtype))
        for i in np.unique(index[~self._cached[index]]):
            self._cache[i] = self._item(int(i))
            self._cached[i] = True
        return torch.from_numpy(self._cache[index])

    def one_hot(self, indices: Sequence[int] | NDArray[np.int64] | torch.Tensor) -> torch.Tensor:
        """Classes by position: one-hot float32 [B, label_dim]; [B, 0] without labels."""
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        vectors = torch.zeros(len(index), self.label_dim)
        if self.labels is not None:
            vectors[torch.arange(len(index)), torch.from_numpy(self.labels[index])] = 1
        return vectors

    def class_counts(self) -> list[int]:
        """Number of images of each class, `label_dim` long; empty without labels."""
        return [] if self.labels is None else class_counts(self.labels, self.label_dim)


def drawn_subset(num_items: int, size: int, seed: int) -> NDArray[np.int64]:
    """`size` of the positions 0 .. num_items - 1 in ascending order, drawn as EDM's and EDM2's tools draw a subset."""
    positions = np.arange(num_items)
    np.random.RandomState(seed % (1 << 31)).shuffle(positions)
    return np.sort(positions[:size])


def tiny_digits_arrays() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The built-in digits: pixels uint8 [1797, 1, 8, 8] and classes int64 [1797] in 0..9.

    The stored ink counts v = 0..16 become round(255 v / 16), so that pixel / 127.5 - 1 is v / 8 - 1 within 1/255.
    Source: UCI Optical Recognition of Handwritten Digits (CC BY 4.0), test part.
    """
    with np.load(ASSETS / "tiny-digits.npz", allow_pickle=False) as stored:
        pixels = np.rint(stored["images"] * (255 / 16)).astype(np.uint8)
        return pixels[:, None], stored["labels"].astype(np.int64)
