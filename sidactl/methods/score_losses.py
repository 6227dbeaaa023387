"""What teaches a fake score, as pure functions: noise and sigma are arguments, nothing is scaled, averaged or drawn.

Common shapes: images and noise [B, C, H, W] in [-1, 1] or unit normal, sigma [B, 1, 1, 1], labels one-hot [B, K],
logits maps [B, 1, r, r]. A loss per pixel is [B, C, H, W], a loss per image [B, 1, 1, 1]. Nothing is masked: a sample
that is not finite gives losses that are not finite, and the trainer skips that update (the published code drops such
samples; tests/methods/test_losses.py shows that all others are equal).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sidactl.nets import Denoiser

ScoreWeight = Literal["edm", "x0", "eps"]


class ScoreLoss(NamedTuple):
    """What one pass of the fake score over noisy images gives."""

    per_pixel: Tensor
    logits: Tensor
    logvar: Tensor | None
    """u(sigma) [B, 1, 1, 1] where the net has that head"""
    real_logits: Tensor | None
    """of the real images, where there are some"""


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
    logvar = logvar_of(fake_score, sigma)
    loss = denoising_loss(denoised, images, sigma, fake_score.spec.sigma_data, logvar)
    real_logits = None if real_images is None else logits[len(images) :]
    return ScoreLoss(loss, logits[: len(images)], logvar, real_logits)


def denoising_loss(
    denoised: Tensor,
    images: Tensor,
    sigma: Tensor,
    sigma_data: float,
    logvar: Tensor | None = None,
    weight: ScoreWeight = "edm",
) -> Tensor:
    """Squared error per pixel, weighted by EDM's gamma(t), by 1 (x0) or by 1 / sigma^2 (eps); / exp(u) + u with a u.

    Source: EDM (2206.00364), table 1; x0: FastGen's DMD2; eps: SiD-LSG (2406.01561).
    """
    loss = (denoised - images) ** 2
    if weight != "x0":
        loss = (denoising_weight(sigma, sigma_data) if weight == "edm" else sigma**-2) * loss
    return loss if logvar is None else loss / logvar.exp() + logvar


def logvar_of(net: Denoiser, sigma: Tensor) -> Tensor | None:
    return net.logvar(sigma) if net.spec.logvar_channels else None
