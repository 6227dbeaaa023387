"""What teaches a discriminator, as pure functions; shapes and manners as in score_losses.py."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sidactl.methods.score_losses import ScoreLoss, denoising_weight


def discriminator_loss(
    score: ScoreLoss, sigma: Tensor, *, sigma_data: float = 0.5, num_micro_batches: int = 1
) -> Tensor:
    """Binary cross-entropy per image of telling noisy real images from noisy fakes, both of which `score` has seen.

    Each cross-entropy is averaged over positions and micro-batch, of which the batch may hold several; logits are not
    clamped. Source: SiDA (2410.14919), eqs. 9 and 10, with the sign that the published code has (eq. 10 is printed
    without its minus).
    """
    assert score.real_logits is not None
    real, fakes = (micro_batch_mean(F.softplus(x), num_micro_batches) for x in (-score.real_logits, score.logits))
    loss = denoising_weight(sigma, sigma_data) * ((real + fakes) / 2)
    return loss if score.logvar is None else loss / score.logvar.exp()


def micro_batch_mean(values: Tensor, num_micro_batches: int) -> Tensor:
    """The mean of each micro-batch for each of its images, [B, 1, 1, 1]."""
    means = values.reshape(num_micro_batches, -1).mean(dim=1, keepdim=True)
    return means.expand(-1, len(values) // num_micro_batches).reshape(-1, 1, 1, 1)


def adversarial_loss(kind: Literal["softplus", "hinge"], logits: Tensor) -> Tensor:
    """How little each image is taken for real, [B]: the mean over its logits, [B, heads], which a generator descends.

    softplus: softplus(-l), of DMD2 (2405.14867) and Diffusion-GAN (2206.02262); hinge: -l, of StyleGAN-T (2301.09515),
    as ADD (2311.17042) names it.
    """
    return (F.softplus(-logits) if kind == "softplus" else -logits).mean(dim=1)


def telling_loss(kind: Literal["softplus", "hinge"], of_fakes: Tensor, of_reals: Tensor) -> Tensor:
    """How badly each pair of a fake and a real image is told apart, [B]: the mean over logits, [B, heads] each."""
    if kind == "softplus":
        return F.softplus(of_fakes).mean(dim=1) + F.softplus(-of_reals).mean(dim=1)
    return F.relu(1 + of_fakes).mean(dim=1) + F.relu(1 - of_reals).mean(dim=1)


def r1_penalty(of_reals: Tensor, features: Sequence[Tensor]) -> Tensor:
    """|gradient|^2 of the mean logit of each real image with respect to what the heads saw of it, [B].

    of_reals: logits [B, n], with a graph back to the features, which is kept, so that the penalty can be descended.
    Source: Mescheder et al. (1801.04406), eq. 9; on the inputs of heads as ADD (2311.17042) has it.
    """
    gradients = torch.autograd.grad(of_reals.mean(dim=1).sum(), features, create_graph=True)
    return torch.stack([each.square().flatten(1).sum(dim=1) for each in gradients]).sum(dim=0)
