"""Features of images and their moments: mean and covariance, summed up batch by batch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from sidactl.errors import SidaError

Array = np.ndarray[Any, np.dtype[Any]]

Features = Array | Tensor

ONE_DETECTOR = "Take both from the same detector."

NOT_STATISTICS = "These are no moments of features: make them again."

ROUNDING = 1e-5
"""how far from symmetric and positive semidefinite a covariance may be, of its largest value: sums in float32 over some
thousand features leave 1e-6, those in float64, as published, less than 1e-12"""

LARGEST = 1e100
"""beyond this squares of features, and sums of them, would overflow"""


def real_array(value: Any, name: str) -> Array:
    """Numbers as float64; SidaError for text, complex numbers, truth values and all else that is none."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        array = np.asarray(None)
    if array.dtype.kind not in "fiu":
        got = "Python objects" if array.dtype.kind == "O" else "text" if array.dtype.kind in "US" else array.dtype
        raise SidaError(f"{name} must hold real numbers, got {got}", NOT_STATISTICS)
    return array.astype(np.float64, copy=False)


def check_symmetric(sigma: Array, name: str) -> None:
    """Raises SidaError where a covariance [F, F] of finite values differs from its transpose, or has a variance < 0."""
    allowed = ROUNDING * np.abs(sigma).max()
    if (defect := np.abs(sigma - sigma.T).max()) > allowed:
        raise SidaError(
            f"{name} must be symmetric, it differs from its transpose by up to {defect:.3g}, "
            f"its largest value is {np.abs(sigma).max():.3g}",
            NOT_STATISTICS,
        )
    if (lowest := np.diag(sigma).min()) < -allowed:
        index = int(np.diag(sigma).argmin())
        raise SidaError(f"{name} must hold variances >= 0, that of feature {index} is {lowest:.3g}", NOT_STATISTICS)


def check_positive(sigma: Array, name: str) -> None:
    """Raises SidaError where a symmetric [F, F] has a negative eigenvalue; takes a second at F = 2048."""
    eigenvalues = scipy.linalg.eigvalsh(sigma)
    if eigenvalues[0] < -ROUNDING * max(eigenvalues[-1], -eigenvalues[0]):
        raise SidaError(
            f"{name} must be positive semidefinite, its smallest eigenvalue is {eigenvalues[0]:.3g}, "
            f"its largest {eigenvalues[-1]:.3g}",
            NOT_STATISTICS,
        )


@dataclass(kw_only=True, eq=False)
class FeatureStats:
    """Count, mean [F] and scatter of feature rows, in float64; scatter [F, F] sums the outer products of deviations.

    Batches are merged by their deviations from the mean, so the result does not depend on how rows were grouped and
    nothing is lost where the mean is large beside the spread. Of `scatter` only the lower triangle is kept.

    Source: Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample variances (1979).
    """

    num_items: int = 0
    mean: Array = field(default_factory=lambda: np.zeros(0))
    scatter: Array = field(default_factory=lambda: np.zeros((0, 0)))
    _on_device: Tensor | None = None
    """what is still to be added to the scatter, [F, F]"""

    def add(self, features: Features) -> None:
        """Takes in the rows of `features` [N, F]; errors where they are not finite or F changes.

        Rows on a GPU are added up there, in float64, too: under torchrun a process has one thread of the CPU.
        """
        rows = as_rows(features, "features", self.num_items).to(torch.float64)
        if not len(rows):
            return
        if rows.device.type != "cpu":
            self._add_on_device(rows)
            return
        array = rows.numpy()
        mean = array.mean(0)
        shift = self._move_mean(len(array), mean)
        # In place and on one triangle: at F = 2048 and batches of 64, five times as fast as adding rows.T @ rows.
        apart = np.vstack([array - mean, shift])
        self.scatter = scipy.linalg.blas.dsyrk(1.0, apart.T, 1.0, self.scatter, lower=1, overwrite_c=1)

    def _add_on_device(self, rows: Tensor) -> None:
        mean = rows.mean(0)
        shift = torch.from_numpy(self._move_mean(len(rows), mean.cpu().numpy())).to(rows)
        apart = torch.cat([rows - mean, shift[None]])
        if self._on_device is None:
            self._on_device = torch.zeros_like(mean[None] * mean[:, None])
        self._on_device.addmm_(apart.T, apart)

    def _settle(self) -> Array:
        """The scatter, with what was added up on a GPU."""
        if self._on_device is not None:
            self.scatter += np.tril(self._on_device.cpu().numpy())
            self._on_device = None
        return self.scatter

    def _move_mean(self, num_items: int, mean: Array) -> Array:
        """Counts in `num_items` rows of mean `mean`; the row [F] whose outer product the move adds to scatter."""
        if not self.num_items:
            self.mean, self.scatter = np.zeros(len(mean)), np.zeros((len(mean), len(mean)), order="F")
        check_same_dimension("features", len(self.mean), len(mean))
        shift, total = mean - self.mean, self.num_items + num_items
        row: Array = shift * math.sqrt(self.num_items * num_items / total)
        self.mean += shift * (num_items / total)
        self.num_items = total
        return row

    def covariance(self, ddof: int = 1) -> Array:
        """Covariance [F, F]: scatter over N - ddof; 1 as EDM reports it, 0 as SiD does for generated images."""
        if self.num_items < 2:
            raise SidaError(f"a covariance needs >= 2 images, got {self.num_items}", "Score more images.")
        scatter = self._settle()
        return (scatter + np.tril(scatter, -1).T) / (self.num_items - ddof)

    def arrays(self) -> dict[str, Array]:
        """The whole state by name, as `from_arrays` takes it back."""
        return {"num_items": np.array(self.num_items), "mean": self.mean, "scatter": self._settle()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> "FeatureStats":
        """The state that `arrays` gave, on its own memory."""
        mean, scatter = np.array(arrays["mean"], np.float64), np.array(arrays["scatter"], np.float64, order="F")
        return cls(num_items=int(arrays["num_items"]), mean=mean, scatter=scatter)


def in_blocks(rows: Tensor, block: int) -> list[slice]:
    return [slice(start, start + block) for start in range(0, len(rows), block)]


def as_rows(features: Features, name: str, offset: int = 0) -> Tensor:
    """`features` as a tensor [N, F] without a copy where possible, all finite; rows are counted from `offset`."""
    if isinstance(features, Tensor):
        rows = features.detach()
    else:  # torch refuses numpy's negative strides and warns of read-only memory
        rows = torch.from_numpy(np.require(features, requirements=["C", "W"]))
    if rows.ndim != 2 or not rows.shape[1]:
        raise SidaError(f"{name} must be a matrix [N, F], got shape {list(rows.shape)}", "Make each item one row.")
    # Both extremes are NaN in a row that holds one; this needs no mask as large as the matrix.
    low, high = rows.aminmax(dim=1)
    bad = (low.isfinite() & high.isfinite()).logical_not().nonzero()
    if len(bad):
        raise SidaError(f"{name} must be finite, row {offset + int(bad[0])} is not", "Look at the image behind it.")
    return rows


def as_sets(**sets: Features) -> list[Tensor]:
    """Each of the named sets as `as_rows`, on the device of the first; SidaError where their dimensions differ."""
    named = {name.replace("_", "-"): features for name, features in sets.items()}
    rows = [as_rows(features, f"{name} features") for name, features in named.items()]
    first = next(iter(named))
    for name, others in list(zip(named, rows, strict=True))[1:]:
        check_same_dimension(f"{first} and {name} features", rows[0].shape[1], others.shape[1])
    return [each.to(rows[0].device) for each in rows]


def check_number(least: int, **sets: Tensor) -> None:
    for name, rows in sets.items():
        if len(rows) < least:
            raise SidaError(
                f"{name.replace('_', '-')} features must number >= {least}, got {len(rows)}", "Score more images."
            )


def mean_and_std(rows: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Mean and sample standard deviation of each column of `rows` [N, F], each [F] in float64, N >= 2."""
    mean, squares = (torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device) for _ in range(2))
    for i in in_blocks(rows, block):
        mean += rows[i].to(torch.float64).sum(0) / len(rows)
    for i in in_blocks(rows, block):
        squares += (rows[i].to(torch.float64) - mean).square().sum(0)
    return mean, (squares / (len(rows) - 1)).sqrt()


def check_same_dimension(name: str, first: int, second: int) -> None:
    if first != second:
        raise SidaError(f"{name} must have one dimension, got {first} and {second}", ONE_DETECTOR)
