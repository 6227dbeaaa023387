"""SiD, SiDA and SiD2A: the generator's losses as pure functions, and the method that draws for them and scales them.

Shapes and manners as in score_losses.py.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sidactl.methods.base import Batch, Losses, Method, Nets, Schedule
from sidactl.methods.discriminator import discriminator_loss, micro_batch_mean
from sidactl.methods.score_losses import fake_score_loss, logvar_of
from sidactl.nets import Denoiser
from sidactl.noise import sigma_of_time
from sidactl.recipes import NetSpec, SidRecipe

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


class Sid(Method):
    """SiD, SiDA where the recipe has an adversarial part, and SiD2A. Source: SiDA (2410.14919), Algorithms 1 and 2.

    Follows the published code where it departs from the algorithm as printed: fresh noise for either update (unless
    recipe.share_fakes), strict gates.
    """

    recipe: SidRecipe

    def __init__(self, recipe: SidRecipe, spec: NetSpec) -> None:
        super().__init__(recipe, spec)
        self.schedule = Schedule(shares="images" if recipe.share_fakes else "nothing")
        if recipe.adversarial is not None:
            clip_value = recipe.adversarial.clip_gradient_value
            self.updates["fake_score"] = dataclasses.replace(self.updates["fake_score"], clip_value=clip_value)

    def stage(self, nimg: int) -> str:
        return "SiDA" if self.recipe.is_adversarial(nimg) else "SiD"

    def score_losses(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> Losses:
        recipe, adversarial = self.recipe, self.recipe.adversarial
        sigma = (recipe.P_std * batch.diffusion.normal((len(x), 1, 1, 1)) + recipe.P_mean).exp()
        x, augment_labels = nets.augmented(x, batch.augment)
        noise = batch.diffusion.normal(x.shape)
        reals, real_augment_labels = None, None
        if adversarial is not None:
            reals, real_augment_labels = nets.augmented(batch.reals(), batch.augment)
        score = fake_score_loss(
            nets.fake_score,
            x,
            noise,
            sigma,
            batch.labels,
            augment_labels,
            real_images=reals,
            real_augment_labels=real_augment_labels,
        )
        losses = {"fake_score_loss": score.per_pixel.sum() / recipe.batch_size}
        if adversarial is not None:
            per_image = discriminator_loss(
                score, sigma, sigma_data=nets.fake_score.spec.sigma_data, num_micro_batches=batch.num_micro_batches
            )
            losses["discriminator_loss"] = per_image.sum() * (adversarial.discriminator_scale / recipe.batch_size)
        return losses

    def image_gradient(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> tuple[Losses, Tensor]:
        losses, descended = self._generator_losses(nets, batch, x, nimg)
        return losses, nets.gradient(descended, x)

    def _generator_losses(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> tuple[Losses, Tensor]:
        """The generator's losses by name, and the sum of them that it descends."""
        recipe, adversarial = self.recipe, self.recipe.adversarial
        sigma = sigma_of_time(batch.diffusion.uniform((len(x), 1, 1, 1)) * (recipe.tmax / 1000))
        noise = batch.diffusion.normal(x.shape)
        sid = sid_generator_loss(nets.teacher, nets.fake_score, x, noise, sigma, batch.labels, alpha=recipe.alpha)
        losses = {"generator_sid_loss": sid.per_pixel.sum() * (recipe.lambda_sid / recipe.batch_size)}
        weight = 1.0
        if adversarial is not None and recipe.is_adversarial(nimg):
            weight, scale = adversarial.joint_weight, adversarial.lambda_adv / recipe.batch_size * x[0].numel()
            per_image = adversarial_generator_loss(sid, num_micro_batches=batch.num_micro_batches)
            losses["generator_adversarial_loss"] = per_image.sum() * scale
        return losses, weight * torch.stack(list(losses.values())).sum()
