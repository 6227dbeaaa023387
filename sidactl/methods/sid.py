"""What SiD and SiDA descend for the generator, as pure functions; shapes and manners as in score_losses.py."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sidactl.methods.discriminator import micro_batch_mean
from sidactl.methods.score_losses import logvar_of
from sidactl.nets import Denoiser

LOGIT_BOUND = 10.0
"""the generator's adversarial term clamps logits to +- this, as the published code does; not in the paper"""

WEIGHT_FLOOR = 1e-5
"""least mean absolute error that the generator losses divide by, as in the published code"""


class SidLoss(NamedTuple):
    """What one pass of teacher and fake score over the generator's noisy images gives."""

    per_pixel: Tensor
    logits: Tensor
    weight: Tensor
    """[B, 1, 1, 1], without gradient; both generator terms carry it"""


def sid_generator_loss(
    teacher: Denoiser,
    fake_score: Denoiser,
    images: Tensor,
    noise: Tensor,
    sigma: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float,
) -> SidLoss:
    """SiD loss per pixel of the generator's images, with the fake score's logits map of the same pass.

    With f, g the images denoised by teacher and fake score: (f - g) ((f - x) - alpha (f - g)) / mean|x - f|. The
    gradient flows through x and through the inputs of both networks, not through the divisor.
    Source: SiDA (2410.14919), eqs. 6 and 8; SiD (2404.04057), eq. 23. With a logvar head: divided by exp(u).
    """
    noisy = images + sigma * noise
    f = teacher(noisy, sigma, labels)
    g, logits = fake_score.denoise_and_logits(noisy, sigma, labels)
    with torch.no_grad():
        weight = 1 / (images - f).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=WEIGHT_FLOOR)
        logvar = logvar_of(fake_score, sigma)
        if logvar is not None:
            weight = weight / logvar.exp()
    return SidLoss((f - g) * ((f - images) - alpha * (f - g)) * weight, logits, weight)


def adversarial_generator_loss(sid: SidLoss, *, num_micro_batches: int = 1) -> Tensor:
    """Adversarial loss per image: how little the fake score's encoder takes the generator's images for real.

    softplus(-logits), logits clamped to +- 10 (no gradient outside), averaged over positions and micro-batch, times
    the weight of the SiD term. Source: SiDA (2410.14919), eqs. 7 and 8; the published code has cross-entropy where
    eq. 7 prints a plain average.
    """
    clamped = sid.logits.clamp(-LOGIT_BOUND, LOGIT_BOUND)
    return micro_batch_mean(F.softplus(-clamped), num_micro_batches) * sid.weight
