"""The kernel distance (KID): a distance without bias where images are few."""

import numpy as np
import torch

from sidactl.errors import SidaError
from sidactl.metrics.features import Array, Features, as_rows, check_same_dimension


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
    sets = [as_rows(generated, "generated features"), as_rows(real, "real features")]
    check_same_dimension("real and generated features", sets[1].shape[1], sets[0].shape[1])
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
