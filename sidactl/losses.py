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

from sidactl.nets import Denoiser

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
    real_logits: Tensor | None
    """of the real images, where there are some"""


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
    *,
    real_images: Tensor | None = None,
    real_augment_labels: Tensor | None = None,
) -> ScoreLoss:
    """Denoising loss per pixel, with the logits map of the same pass, and that of real images where they are given.

    Real images take the noise, sigma and labels of the others; they go through the encoder together with them, and
    not through the decoder. With a logvar head the loss is weight / exp(u) * error^2 + u. Trains a teacher too, given
    real images as `images`.
    Source: SiDA (2410.14919), eq. 5; EDM (2206.00364), eq. 2; EDM2 (2312.02696), eq. 14 for u.
    """
    noisy, given, augment, sigmas = images + sigma * noise, labels, augment_labels, sigma
    if real_images is not None:
        noisy, sigmas = torch.cat([noisy, real_images + sigma * noise]), torch.cat([sigma, sigma])
        given = None if labels is None else torch.cat([labels, labels])
        if augment_labels is not None and real_augment_labels is not None:
            augment = torch.cat([augment_labels, real_augment_labels])
    denoised, logits = fake_score.denoise_and_logits(noisy, sigmas, given, augment, num_denoised=len(images))
    loss = denoising_weight(sigma, fake_score.spec.sigma_data) * (denoised - images) ** 2
    logvar = _logvar(fake_score, sigma)
    if logvar is not None:
        loss = loss / logvar.exp() + logvar
    real_logits = None if real_images is None else logits[len(images) :]
    return ScoreLoss(loss, logits[: len(images)], logvar, real_logits)


def discriminator_loss(
    score: ScoreLoss, sigma: Tensor, *, sigma_data: float = 0.5, num_micro_batches: int = 1
) -> Tensor:
    """Binary cross-entropy per image of telling noisy real images from noisy fakes, both of which `score` has seen.

    Each cross-entropy is averaged over positions and micro-batch, of which the batch may hold several; logits are not
    clamped. Source: SiDA (2410.14919), eqs. 9 and 10, with the sign that the published code has (eq. 10 is printed
    without its minus).
    """
    assert score.real_logits is not None
    real, fakes = (_micro_batch_mean(F.softplus(x), num_micro_batches) for x in (-score.real_logits, score.logits))
    loss = denoising_weight(sigma, sigma_data) * ((real + fakes) / 2)
    return loss if score.logvar is None else loss / score.logvar.exp()


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


def adversarial_generator_loss(sid: SidLoss, *, num_micro_batches: int = 1) -> Tensor:
    """Adversarial loss per image: how little the fake score's encoder takes the generator's images for real.

    softplus(-logits), logits clamped to +- 10 (no gradient outside), averaged over positions and micro-batch, times
    the weight of the SiD term. Source: SiDA (2410.14919), eqs. 7 and 8; the published code has cross-entropy where
    eq. 7 prints a plain average.
    """
    clamped = sid.logits.clamp(-LOGIT_BOUND, LOGIT_BOUND)
    return _micro_batch_mean(F.softplus(-clamped), num_micro_batches) * sid.weight


def _micro_batch_mean(values: Tensor, num_micro_batches: int) -> Tensor:
    """The mean of each micro-batch for each of its images, [B, 1, 1, 1]."""
    means = values.reshape(num_micro_batches, -1).mean(dim=1, keepdim=True)
    return means.expand(-1, len(values) // num_micro_batches).reshape(-1, 1, 1, 1)


def _logvar(net: Denoiser, sigma: Tensor) -> Tensor | None:
    return net.logvar(sigma) if net.spec.logvar_channels else None
