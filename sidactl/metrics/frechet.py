"""The Fréchet distance of two sets of moments: FID, FD-DINOv2 and their like."""

import math
from collections.abc import Sequence

import numpy as np
import scipy.linalg

from sidactl.errors import SidaError
from sidactl.metrics.features import ONE_DETECTOR, ROUNDING, Array, check_positive, check_symmetric, real_array


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


def _root(sigma: Array) -> Array:
    """R [F, rank] with R R' = sigma [F, F], by pivoted Cholesky, which drops what is rounding noise."""
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
    root: Array = np.empty_like(factor)
    root[pivots - 1] = np.tril(factor)
    return root[:, :rank]


def frechet_ratio(distances: Sequence[tuple[float, float]]) -> float:
    """FDr: the mean over detectors of a Fréchet distance over that of held-out real images to the same reference.

    `distances` holds a pair (of the generated images, of the held-out ones) for each detector. 1 where the generator is
    as near to the reference as fresh images are, by numbers of images that must agree; below 1 is no better than 1, it
    is nearer to the reference than the truth is. Errors: no pair, values that are not finite, a held-out distance that
    is not positive.
    """
    if not distances:
        raise SidaError("a Fréchet ratio needs >= 1 detector, got none", "Name a detector.")
    for number, (distance, held_out) in enumerate(distances, 1):
        if not (math.isfinite(distance) and math.isfinite(held_out) and held_out > 0):
            raise SidaError(
                f"Fréchet distances must be finite and that of held-out images positive, got {distance:.3g} and "
                f"{held_out:.3g} of detector {number}",
                "Hold out images that are not in the reference.",
            )
    return math.fsum(distance / held_out for distance, held_out in distances) / len(distances)
