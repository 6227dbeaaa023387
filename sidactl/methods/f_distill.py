"""f-distill's weights on a direction, from the density ratio that a discriminator tells (2502.15681)."""

import torch
from torch import Tensor

from sidactl.recipes.dmd import Divergence

LOGIT_BOUND, LEAST_RATIO, MOST_RATIO = 10.0, 0.1, 20.0
"""a discriminator's logit is clamped to +- the first, the ratio it tells to lie between the others"""

NUM_BINS = 10
"""of noise levels, equally wide from 0.002 to 80: most of a rising grid's levels lie in the first"""

_EPS = 1e-6


def density_ratio(logits: Tensor) -> Tensor:
    """p_real / p_fake at noisy images, [B], from a discriminator's logits of them, [B, heads]: exp of their mean."""
    return logits.mean(dim=1).clamp(-LOGIT_BOUND, LOGIT_BOUND).exp().clamp(LEAST_RATIO, MOST_RATIO)


def f_weight(divergence: Divergence, ratio: Tensor) -> Tensor:
    """h(r) = f''(1/r)/r, up to a constant factor, which the batch's mean takes away; reverse KL has 1.

    Source: f-distill, table 1.
    """
    if divergence == "reverse-kl":
        return torch.ones_like(ratio)
    if divergence == "forward-kl":
        return ratio
    if divergence == "jensen-shannon":
        return ratio / (1 + ratio)
    if divergence == "softened-rkl":
        return 1 / (1 + ratio)
    if divergence == "hellinger":
        return ratio.sqrt()
    return 1 + ratio if divergence == "jeffreys" else 1 / ratio.clamp(min=1e-8)


def bins_of(sigma: Tensor) -> Tensor:
    """The bin of each noise level, int64, of whatever shape."""
    return ((sigma - 0.002) / ((80.0 - 0.002) / NUM_BINS)).floor().clamp(0, NUM_BINS - 1).to(torch.int64)


def updated_bins(means: Tensor, ratio: Tensor, bins: Tensor, rate: float) -> Tensor:
    """The mean ratio of each bin, [10], which a whole batch's ratios [B] move; bins that it does not hit stay."""
    hits = torch.zeros_like(means).index_add(0, bins, torch.ones_like(ratio, dtype=means.dtype))
    sums = torch.zeros_like(means).index_add(0, bins, ratio.to(means.dtype))
    return torch.where(hits > 0, rate * means + (1 - rate) * sums / (hits + _EPS), means)


def levelled(ratio: Tensor, bins: Tensor, means: Tensor) -> Tensor:
    """The ratios [B] over the mean of their bin."""
    return ratio / (means[bins] + _EPS)


def normalised(weights: Tensor, mean: Tensor) -> Tensor:
    """The weights over their mean over the whole batch."""
    return weights / (mean + _EPS)
