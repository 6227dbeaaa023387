"""Figures that move where a generator repeats its training images. None of them proves that it does not."""

import math

import numpy as np
import torch
from torch import Tensor

from sidactl.errors import SidaError
from sidactl.metrics.features import Features, as_sets, check_number, in_blocks, mean_and_std
from sidactl.metrics.neighbours import nearest, radii, squared

KEPT_BYTES = 750_000_000
"""of distances to keep for all passes of a fit; the others are computed again in each"""


def authenticity(train: Features, generated: Features, *, block: int = 4096) -> float:
    """Percentage of generated points farther from their nearest training point than that is from its nearest other.

    `train` [N, F] and `generated` [M, F]: 100 / M times the number of j with d(generated_j, train_i) > min_{l != i}
    d(train_i, train_l), where train_i is the nearest to generated_j; Euclidean, `block` rows against `block` rows at a
    time on the device of `train`, float32 unless features are float64. 0 for copies. About 50 for as many fresh images
    of the training distribution in few dimensions and more in many, where most points share a few neighbours (92 for
    5,000 Gaussian points in 2048): read it beside that of held-out images. This is the share of 2102.08921 in percent;
    2302.04440 gives it less 50 as AuthPct, which is no share any more and 0 for nothing in particular.

    A high figure does not prove that nothing is copied: a copy counts as new where the features of detector or
    image have changed by more than neighbours in the training set differ, and a few copies among many images hardly
    move a mean. A low one may also be a generator that keeps to the densest parts. Errors: fewer than 2 training
    points, no generated ones, dimensions that differ, values that are not finite or do not fit.

    Source: How faithful is your synthetic data? (2102.08921), section 3.3.
    """
    rows, fakes = as_sets(train=train, generated=generated)
    check_number(2, train=rows)
    check_number(1, generated=fakes)
    dtype = _working_dtype(rows, fakes)
    centre, _ = mean_and_std(rows, block)

    def distance(u: Tensor, v: Tensor) -> Tensor:  # beside a large mean, differences would be lost
        return squared((u - centre).to(dtype), (v - centre).to(dtype))

    distances, index = nearest(fakes, rows, block, distance)
    apart = radii(rows, 1, block, distance)
    return 100 * int((distances > apart[index]).sum()) / len(fakes)


def generalisation_gap(
    train: Features,
    held_out: Features,
    generated: Features,
    *,
    num_generated: int = 10_000,
    num_passes: int = 50,
    seed: int,
    block: int = 1024,
) -> float:
    """How much likelier training points are than held-out ones under a mixture of Gaussians at the generated points.

    All features are normalised by the mean and standard deviation, per feature, of `held_out` [K, F]. The mixture
    p(x) = 1/M sum_j N(x; generated_j, exp(s_j) I) has log-variances s [M] that are fitted to `train` [N, F] by maximum
    likelihood; the gap is 100 / F (mean -log p(train) - mean -log p(held_out)). About 0 for images that are as near to
    the ones as to the others, negative where they are nearer to the training images, -1000 and below for copies.

    The fit: s_j begins at log((squared distance to the nearest training point + 1e-3) / F), Adam at 0.5 takes
    `num_passes` steps on the mean of -log(p(x) + N(0.9 (x - mean of train); 0, exp(s_0) I)) / F, whose second part, the
    origin, gives every point some likelihood, and after each s is cut to [-40, 20]. Published steps are taken on 10,000
    shuffled points; ours on all, so that the order of rows does not count. More than `num_generated` generated points
    are cut to a random subset, by numpy's RandomState(seed), the only draw. `block` training rows at a time, on the
    device of `train`, in float32 unless features are float64; features that are constant in `held_out` are only
    centred.

    A gap near 0 does not prove that nothing is copied: a few copies among many images hardly move a mean, and neither
    do copies that the detector does not see as such. Errors: fewer than 2 held-out points, no others, dimensions that
    differ, values that are not finite or do not fit.

    Source: Feature likelihood divergence (2302.04440), section 3 and appendix; its published code for the settings.
    """
    rows, unseen, fakes = as_sets(train=train, held_out=held_out, generated=generated)
    check_number(1, train=rows, generated=fakes)
    check_number(2, held_out=unseen)
    for name, number in (("generated points", num_generated), ("passes", num_passes)):
        if number < 1:
            raise SidaError(f"number of {name} must be >= 1, got {number}", "The published metric uses 10000 and 50.")
    if len(fakes) > num_generated:
        fakes = fakes[torch.from_numpy(np.random.RandomState(seed).choice(len(fakes), num_generated, replace=False))]
    dtype = _working_dtype(rows, unseen, fakes)
    mean, std = mean_and_std(unseen, block)
    std = torch.where(std > 0, std, 1.0)

    def normalised(features: Tensor) -> Tensor:
        return ((features - mean) / std).to(dtype)

    mixture = _Mixture(normalised(fakes))
    blocks = [rows[i] for i in in_blocks(rows, block)]
    num_kept = KEPT_BYTES // (block * len(fakes) * dtype.itemsize)
    kept = [squared(normalised(part), mixture.centres) for part in blocks[:num_kept]]

    def distances(index: int) -> Tensor:
        return kept[index] if index < len(kept) else squared(normalised(blocks[index]), mixture.centres)

    middle = sum((normalised(part).sum(0, dtype=torch.float64) for part in blocks), torch.zeros_like(mean)) / len(rows)
    from_middle = [0.81 * (normalised(part) - middle.to(dtype)).square().sum(1) for part in blocks]
    least = torch.stack([distances(index).amin(0) for index in range(len(blocks))]).amin(0)
    mixture.log_variances.copy_(((least + 1e-3) / rows.shape[1]).log())
    optimiser = torch.optim.Adam([mixture.log_variances, mixture.origin_log_variance], lr=0.5)
    for _ in range(num_passes):
        mixture.zero_gradients()
        for index in range(len(blocks)):
            mixture.add_gradients(distances(index), from_middle[index], len(rows))
        optimiser.step()
        mixture.log_variances.clamp_(-40, 20)

    seen = sum(mixture.log_likelihood(distances(index)) for index in range(len(blocks))) / len(rows)
    others = (squared(normalised(unseen[i]), mixture.centres) for i in in_blocks(unseen, block))
    gap = 100 / rows.shape[1] * (sum(map(mixture.log_likelihood, others)) / len(unseen) - seen)
    if not math.isfinite(gap):
        raise SidaError(
            f"likelihoods must fit in {dtype}, they overflow".replace("torch.", ""), "Use a higher precision."
        )
    return gap


class _Mixture:
    """Isotropic Gaussians of equal weight at `centres` [M, F], and the origin's; knows points by squared distances."""

    def __init__(self, centres: Tensor) -> None:
        self.centres = centres
        self.log_variances = centres.new_zeros(len(centres))
        self.origin_log_variance = centres.new_zeros(())

    def _log_densities(self, distances: Tensor, log_variances: Tensor) -> Tensor:
        constants = self.centres.shape[1] / 2 * (log_variances + math.log(2 * math.pi))
        return (distances * (-0.5 * torch.exp(-log_variances))).sub_(constants)

    def _weights(self, distances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [B, M] of the Gaussians at each point, the largest 1; the log-density of that one; log p(x)."""
        parts = self._log_densities(distances, self.log_variances).sub_(math.log(len(self.centres)))
        largest = parts.amax(1)
        # exp(-80) is nothing beside 1, and exp takes ten times as long where it underflows.
        weights = parts.sub_(largest[:, None]).clamp_(min=-80).exp_()
        return weights, largest, largest + weights.sum(1).log()

    def log_likelihood(self, distances: Tensor) -> float:
        """Sum of log p(x) over rows of `distances` [B, M]."""
        return float(self._weights(distances)[2].sum(dtype=torch.float64))

    def zero_gradients(self) -> None:
        for parameter in (self.log_variances, self.origin_log_variance):
            parameter.grad = torch.zeros_like(parameter)

    def add_gradients(self, distances: Tensor, from_origin: Tensor, num: int) -> None:
        """Adds these rows' part of the gradient of the loss, the mean over `num` rows.

        By hand, for half the memory: d log N / d s = (d^2 exp(-s) - F) / 2, times the share of each Gaussian in p(x).
        """
        weights, largest, likelihood = self._weights(distances)
        origin = self._log_densities(from_origin, self.origin_log_variance)
        total = torch.logaddexp(likelihood, origin)
        factors, origin_shares = torch.exp(largest - total), torch.exp(origin - total)
        self._add(self.log_variances, factors @ weights, factors @ weights.mul_(distances), num)
        self._add(self.origin_log_variance, origin_shares.sum(), origin_shares @ from_origin, num)

    def _add(self, parameter: Tensor, shares: Tensor, weighted: Tensor, num: int) -> None:
        assert parameter.grad is not None
        parameter.grad += (shares - weighted * torch.exp(-parameter) / self.centres.shape[1]) / (2 * num)


def _working_dtype(*sets: Tensor) -> torch.dtype:
    dtype = torch.float32
    for rows in sets:
        dtype = torch.promote_types(dtype, rows.dtype)
    return dtype
