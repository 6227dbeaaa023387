"""The losses of SiD and SiDA, as pure functions: noise and sigma are arguments, nothing is scaled, averaged or drawn.

Common shapes: images and noise [B, C, H, W] in [-1, 1] or unit normal, sigma [B, 1, 1, 1], labels one-hot [B, K],
logits maps [B, 1, r, r]. A loss per pixel is [B, C, H, W], a loss per image [B, 1, 1, 1]. Nothing is masked: a sample
that is not finite gives losses that are not finite, and the trainer skips that update (the published code drops such
samples; tests/test_losses.py shows that all others are equal).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sidactl.diffusion import Denoiser

LOGIT_BOUND = 10.0
"""the generator's adversarial term clamps logits to +- this, as the published code does; not in the paper"""
WEIGHT_FLOOR = 1e-5
"""least mean absolute error that the generator losses divide by, as in the published code"""


class ScoreLoss(NamedTuple):
    """What one pass of the fake score over noisy images gives."""

    per_pixel: Tensor
    logits: Tensor
    logvar: Tensor | None
    """u(sigma) [B, 1, 1, 1] where the net has that head"""


class SidLoss(NamedTuple):
    """What one pass of teacher and fake score over the generator's noisy images gives."""

    per_pixel: Tensor
    logits: Tensor
    weight: Tensor
    """[B, 1, 1, 1], without gradient; both generator terms carry it"""


def denoising_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's loss weight gamma(t) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.

    Source: EDM (2206.00364), table 1.
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def fake_score_loss(
    fake_score: Denoiser,
    images: Tensor,
    noise: Tensor,
    sigma: Tensor,
    labels: Tensor | None = None,
    augment_labels: Tensor | None = None,
) -> ScoreLoss:
    """Denoising loss per pixel, with the logits map of the same pass.

    With a logvar head the loss is weight / exp(u) * error^2 + u. Trains a teacher too, given real images.
    Source: SiDA (2410.14919), eq. 5; EDM (2206.00364), eq. 2; EDM2 (2312.02696), eq. 14 for u.
    """
    denoised, logits = fake_score.denoise_and_logits(images + sigma * noise, sigma, labels, augment_labels)
    loss = denoising_weight(sigma, fake_score.spec.sigma_data) * (denoised - images) ** 2
    logvar = _logvar(fake_score, sigma)
    if logvar is not None:
        loss = loss / logvar.exp() + logvar
    return ScoreLoss(loss, logits, logvar)


def discriminator_loss(
    fake_score: Denoiser,
    real_images: Tensor,
    fake: ScoreLoss,
    noise: Tensor,
    sigma: Tensor,
    labels: Tensor | None = None,
    augment_labels: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy per image of telling noisy real images from noisy fakes (whose pass is `fake`).

    Real images take the noise and sigma of the fakes. Each cross-entropy is averaged over batch and positions, so the
    value depends on the micro-batch; logits are not clamped. Source: SiDA (2410.14919), eqs. 9 and 10, with the sign
    that the published code has (eq. 10 is printed without its minus).
    """
    real_logits = fake_score.logits(real_images + sigma * noise, sigma, labels, augment_labels)
    cross_entropy = (F.softplus(-real_logits).mean() + F.softplus(fake.logits).mean()) / 2
    loss = denoising_weight(sigma, fake_score.spec.sigma_data) * cross_entropy
    return loss if fake.logvar is None else loss / fake.logvar.exp()


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
        logvar = _logvar(fake_score, sigma)
        if logvar is not None:
            weight = weight / logvar.exp()
    return SidLoss((f - g) * ((f - images) - alpha * (f - g)) * weight, logits, weight)


def adversarial_generator_loss(sid: SidLoss) -> Tensor:
    """Adversarial loss per image: how little the fake score's encoder takes the generator's images for real.

    softplus(-logits), logits clamped to +- 10 (no gradient outside), averaged over batch and positions, times the
    weight of the SiD term. Source: SiDA (2410.14919), eqs. 7 and 8; the published code has cross-entropy where eq. 7
    prints a plain average.
    """
    return F.softplus(-sid.logits.clamp(-LOGIT_BOUND, LOGIT_BOUND)).mean() * sid.weight


def _logvar(net: Denoiser, sigma: Tensor) -> Tensor | None:
    return net.logvar(sigma) if net.spec.logvar_channels else None
