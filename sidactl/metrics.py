"""Distances between sets of features, and the moments they need; no network, no image and no file is touched here."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import scipy.linalg
import torch
from scipy.special import log_softmax, logsumexp
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


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Fréchet distance of two Gaussians, in float64; symmetric, and 0 for equal ones up to rounding (1e-12).

    `mu*` [F] and `sigma*` [F, F] are mean and covariance; a covariance may be singular. The distance is |mu1 - mu2|^2
    + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2)). With sigma_i = R_i R_i' and P = R1' R2, the symmetric P P'
    has the eigenvalues of sigma1 sigma2 (but for zeros), and the last trace is the sum of their roots. Errors: shapes
    that do not agree, values that are not real and finite, covariances that none can be.

    Source: GANs trained by a two time-scale update rule (1706.08500), eq. 6.
    """
    statistics = {"mu1": mu1, "sigma1": sigma1, "mu2": mu2, "sigma2": sigma2}
    mu1, sigma1, mu2, sigma2 = arrays = [real_array(value, name) for name, value in statistics.items()]
    num = mu1.size
    if not num or [value.shape for value in arrays] != [(num,), (num, num), (num,), (num, num)]:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in zip(statistics, arrays, strict=True))
        raise SidaError(f"means must be [F] and covariances [F, F] with one F, got {shapes}", ONE_DETECTOR)
    for name, value in zip(statistics, arrays, strict=True):
        bad = np.flatnonzero(~np.isfinite(value.reshape(num, -1)).all(1))
        if bad.size:
            raise SidaError(f"{name} must be finite, row {bad[0]} is not", "Look at the images behind it.")

    roots = []
    for name, sigma in (("sigma1", sigma1), ("sigma2", sigma2)):
        check_symmetric(sigma, name)
        roots.append(root := _root(sigma))
        # Where it has a negative eigenvalue, the factors end before it.
        if np.abs(sigma - root @ root.T).max() > ROUNDING * np.abs(sigma).max():
            check_positive(sigma, name)
    product = roots[0].T @ roots[1]
    if product.shape[0] > product.shape[1]:
        product = product.T
    # A root without columns is that of a zero covariance, which scipy's solver refuses.
    eigenvalues = scipy.linalg.eigvalsh(product @ product.T, driver="evr") if product.size else np.zeros(1)
    trace = np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(eigenvalues.clip(min=0)).sum()
    return float(np.square(mu1 - mu2).sum() + trace)


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


def _root(sigma: Array) -> Array:
    """R [F, rank] with R R' = sigma [F, F], by pivoted Cholesky, which drops what is rounding noise."""
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
    root: Array = np.empty_like(factor)
    root[pivots - 1] = np.tril(factor)
    return root[:, :rank]


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

    def add(self, features: Features) -> None:
        """Takes in the rows of `features` [N, F]; errors where they are not finite or F changes."""
        rows = _rows(features, "features", self.num_items).to("cpu", torch.float64).numpy()
        if len(rows):
            mean = rows.mean(0)
            shift = self._move_mean(len(rows), mean)
            self._scatter(np.vstack([rows - mean, shift]))

    def merge(self, other: "FeatureStats") -> None:
        """Takes in all rows of `other`, which another process may have seen."""
        if other.num_items:
            shift = self._move_mean(other.num_items, other.mean)
            self.scatter += other.scatter
            self._scatter(shift[None])

    def _move_mean(self, num_items: int, mean: Array) -> Array:
        """Counts in `num_items` rows of mean `mean`; the row [F] whose outer product the move adds to scatter."""
        if not self.num_items:
            self.mean, self.scatter = np.zeros(len(mean)), np.zeros((len(mean), len(mean)), order="F")
        _same_dimension("features", len(self.mean), len(mean))
        shift, total = mean - self.mean, self.num_items + num_items
        row: Array = shift * math.sqrt(self.num_items * num_items / total)
        self.mean += shift * (num_items / total)
        self.num_items = total
        return row

    def _scatter(self, rows: Array) -> None:
        # In place and on one triangle: at F = 2048 and batches of 64, five times as fast as adding rows.T @ rows.
        self.scatter = scipy.linalg.blas.dsyrk(1.0, rows.T, 1.0, self.scatter, lower=1, overwrite_c=1)

    def covariance(self, ddof: int = 1) -> Array:
        """Covariance [F, F]: scatter over N - ddof; 1 as EDM reports it, 0 as SiD does for generated images."""
        if self.num_items < 2:
            raise SidaError(f"a covariance needs >= 2 images, got {self.num_items}", "Score more images.")
        return (self.scatter + np.tril(self.scatter, -1).T) / (self.num_items - ddof)

    def arrays(self) -> dict[str, Array]:
        """The whole state by name, as `from_arrays` takes it back."""
        return {"num_items": np.array(self.num_items), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> "FeatureStats":
        """The state that `arrays` gave, on its own memory."""
        mean, scatter = np.array(arrays["mean"], np.float64), np.array(arrays["scatter"], np.float64, order="F")
        return cls(num_items=int(arrays["num_items"]), mean=mean, scatter=scatter)


def inception_score(logits: Features, num_splits: int = 10) -> tuple[float, float]:
    """Mean and population standard deviation of the Inception score over `num_splits` parts, in float64.

    `logits` [N, classes] are the classifier's without its bias; part i holds rows floor(i N / num_splits) up to
    floor((i + 1) N / num_splits) in the order given. exp(E_x KL(p(y|x) || p(y))), from log-probabilities, so that
    none underflows.

    Source: Improved techniques for training GANs (1606.03498), section 4.
    """
    rows = _rows(logits, "logits").cpu()
    if not 1 <= num_splits <= len(rows):
        raise SidaError(
            f"number of splits must be from 1 to {len(rows)}, got {num_splits}",
            "Score more images, or pass a smaller --num-splits.",
        )
    scores = []
    for i in range(num_splits):
        part = rows[i * len(rows) // num_splits : (i + 1) * len(rows) // num_splits].to(torch.float64).numpy()
        log_p = log_softmax(part, axis=1)
        log_marginal = logsumexp(log_p, axis=0) - math.log(len(part))
        scores.append(np.exp((np.exp(log_p) * (log_p - log_marginal)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    real: Features, generated: Features, *, num_subsets: int = 100, subset_size: int = 1000, seed: int
) -> tuple[float, float]:
    """Mean and population standard deviation over random subsets of the kernel Inception distance, in float64.

    The unbiased squared MMD of `subset_size` rows of each set under the kernel (x.y / F + 1)^3. Rows are drawn without
    replacement by numpy's RandomState(seed), generated before real: these are torch-fidelity's draws at seed 2020, and
    SiD's after np.random.seed(seed), whose subset size is at most that of either set. Errors: a set smaller than that,
    dimensions that differ, values that are not finite.

    Source: Demystifying MMD GANs (1801.01401), section 4.
    """
    sets = [_rows(generated, "generated features"), _rows(real, "real features")]
    _same_dimension("real and generated features", sets[1].shape[1], sets[0].shape[1])
    smallest = min(map(len, sets))
    if not 2 <= subset_size <= smallest:
        raise SidaError(f"subset size must be from 2 to {smallest}, got {subset_size}", "Pass a size both sets have.")
    if num_subsets < 1:
        raise SidaError(f"number of subsets must be >= 1, got {num_subsets}", "The published metric uses 100.")
    rng = np.random.RandomState(seed)
    estimates = []
    for _ in range(num_subsets):
        chosen = [rows[rng.choice(len(rows), subset_size, replace=False)] for rows in sets]
        x, y = (rows.to("cpu", torch.float64).numpy() for rows in chosen)
        same = 0.0
        for rows in (x, y):
            kernel = _cubic_kernel(rows, rows)
            same += (kernel.sum() - np.trace(kernel)) / (subset_size * (subset_size - 1))
        estimates.append(same - 2 * _cubic_kernel(x, y).mean())
    return float(np.mean(estimates)), float(np.std(estimates))


def _cubic_kernel(x: Array, y: Array) -> Array:
    kernel: Array = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel


def precision_recall(
    real: Features,
    generated: Features,
    k: int = 3,
    *,
    precision: Literal["float16", "float32", "float64"] = "float32",
    block: int = 4096,
) -> tuple[float, float]:
    """(precision, recall): the share of generated points in the real manifold, and of real ones in the generated one.

    `real` [N, F] and `generated` [M, F] are compared on the device of `real`, `block` rows against `block` rows at a
    time. A manifold is the union of balls around its points, each with the distance to the point's k-th neighbour, the
    point itself not counted, as radius; a ball's surface belongs to it. `precision` is that of the distances, "float16"
    being SiD's. Errors: fewer than k + 1 points, dimensions that differ, values that are not finite or do not fit.

    Source: Improved precision and recall metric (1904.06991), eq. 1-3.
    """
    dtype = getattr(torch, precision)

    def euclidean(u: Tensor, v: Tensor) -> Tensor:
        return torch.cdist(u.to(dtype), v.to(dtype), compute_mode="use_mm_for_euclid_dist")

    return _precision_recall(real, generated, k, block, euclidean)


def guided_diffusion_precision_recall(
    real: Features, generated: Features, k: int = 3, *, block: int = 4096
) -> tuple[float, float]:
    """(precision, recall) as `precision_recall`, with the arithmetic of guided-diffusion's evaluator.

    Squared distances |u|^2 - 2 u.v + |v|^2, clipped at 0, in float16; where one overflows, its block again in float32.

    Source: Diffusion models beat GANs on image synthesis (2105.05233), evaluation suite.
    """

    def squared(u: Tensor, v: Tensor) -> Tensor:
        for dtype in (torch.float16, torch.float32):
            a, b = u.to(dtype), v.to(dtype)
            distances = a.square().sum(1)[:, None] - 2 * (a @ b.T) + b.square().sum(1)
            if distances.isfinite().all():
                break
        return distances.clamp(min=0).float()

    return _precision_recall(real, generated, k, block, squared)


def _precision_recall(
    real: Features, generated: Features, k: int, block: int, distance: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, float]:
    reals = _rows(real, "real features")
    fakes = _rows(generated, "generated features").to(reals.device)
    _same_dimension("real and generated features", reals.shape[1], fakes.shape[1])
    if k < 1:
        raise SidaError(f"k must be >= 1, got {k}", "The published metric uses 3.")
    for name, rows in (("real", reals), ("generated", fakes)):
        if len(rows) <= k:
            raise SidaError(
                f"{name} features must number >= k + 1 = {k + 1}, got {len(rows)}",
                "Score more images, or pass a smaller --neighbours.",
            )
    real_radii, fake_radii = (_radii(rows, k, block, distance) for rows in (reals, fakes))

    fake_inside = torch.zeros(len(fakes), dtype=torch.bool, device=reals.device)
    real_inside = torch.zeros(len(reals), dtype=torch.bool, device=reals.device)
    for i in _blocks(reals, block):
        for j in _blocks(fakes, block):
            distances = distance(reals[i], fakes[j])
            fake_inside[j] |= (distances <= real_radii[i, None]).any(0)
            real_inside[i] |= (distances <= fake_radii[j]).any(1)
    return int(fake_inside.sum()) / len(fakes), int(real_inside.sum()) / len(reals)


def _radii(rows: Tensor, k: int, block: int, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Distance [N] of each of `rows` to its k-th neighbour; each pair of blocks is compared once."""
    nearest = distance(rows[:1], rows[:1]).new_full((len(rows), k + 1), math.inf)
    blocks = _blocks(rows, block)
    for index, i in enumerate(blocks):
        for j in blocks[index:]:
            distances = distance(rows[i], rows[j])
            for part, columns in ((i, distances), (j, distances.T))[: 1 if i == j else 2]:
                nearest[part] = torch.cat([nearest[part], columns], 1).topk(k + 1, largest=False).values
    if not nearest.isfinite().all():
        dtype = str(nearest.dtype).removeprefix("torch.")
        raise SidaError(f"feature distances must fit in {dtype}, they overflow", "Use a higher precision.")
    return nearest[:, k]


def _blocks(rows: Tensor, block: int) -> list[slice]:
    return [slice(start, start + block) for start in range(0, len(rows), block)]


def _rows(features: Features, name: str, offset: int = 0) -> Tensor:
    """`features` as a tensor [N, F] without a copy where possible, all finite; rows are counted from `offset`."""
    if isinstance(features, Tensor):
        rows = features.detach()
    else:  # torch refuses numpy's negative strides and warns of read-only memory
        rows = torch.from_numpy(np.require(features, requirements=["C", "W"]))
    if rows.ndim != 2:
        raise SidaError(f"{name} must be a matrix [N, F], got shape {list(rows.shape)}", "Make each item one row.")
    # Both extremes are NaN in a row that holds one; this needs no mask as large as the matrix.
    low, high = rows.aminmax(dim=1)
    bad = (low.isfinite() & high.isfinite()).logical_not().nonzero()
    if len(bad):
        raise SidaError(f"{name} must be finite, row {offset + int(bad[0])} is not", "Look at the image behind it.")
    return rows


def _same_dimension(name: str, first: int, second: int) -> None:
    if first != second:
        raise SidaError(f"{name} must have one dimension, got {first} and {second}", ONE_DETECTOR)
