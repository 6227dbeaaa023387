"""Adversarial Diffusion Distillation (ADD, 2311.17042) and its latent form (LADD, 2403.12015).

No training code of either is published: what follows is the papers', in EDM's notation, and its scores are ours.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sidactl.methods.base import Batch, Losses, Method, Nets, TrainingDetector, Update
from sidactl.methods.discriminator import adversarial_loss, r1_penalty, telling_loss
from sidactl.methods.dmd import feature_shapes
from sidactl.nets import Denoiser
from sidactl.nets.heads import TokenHeads
from sidactl.noise import draw_levels
from sidactl.recipes import AddRecipe, NetSpec, NoiseLevels


def distillation_weight(kind: Literal["exponential", "sds", "sds-flat"], sigma: Tensor) -> Tensor:
    """c(t) of ADD's distillation term at EDM's noise levels, [B, 1, 1, 1].

    With alpha = 1 / sqrt(1 + sigma^2) and sigma_vp = sigma alpha: alpha (exponential), or alpha w / (2 sigma_vp), with
    which the gradient is w (eps_hat - eps), that of score distillation sampling: w = sigma_vp^2 (sds), or 1 (sds-flat).
    Source: ADD (2311.17042), section 3.3.
    """
    alpha = (1 + sigma**2).rsqrt()
    if kind == "exponential":
        return alpha
    sigma_vp = sigma * alpha
    return alpha * (sigma_vp**2 if kind == "sds" else 1) / (2 * sigma_vp)


def distillation_direction(images: Tensor, f: Tensor, weight: Tensor) -> Tensor:
    """The gradient of weight |x - f|^2 with f detached, [B, C, H, W], where f is what the teacher makes of noisy x."""
    return 2 * weight * (images - f)


class Add(Method):
    """A generator of noised real images; heads on frozen features tell what it makes from real images.

    The features are a detector's of clean images (ADD), or the teacher's at noise levels of their own (LADD).
    """

    recipe: AddRecipe
    may_shard = False

    def __init__(self, recipe: AddRecipe, spec: NetSpec, detector: TrainingDetector | None = None) -> None:
        super().__init__(recipe, spec)
        self._detector = detector
        self.generator_time = NoiseLevels.parse(recipe.generator_time, "generator_time")
        noisy = recipe.discriminator_time != "none"
        self.discriminator_time = NoiseLevels.parse(recipe.discriminator_time, "discriminator_time") if noisy else None
        by_detector = recipe.discriminator_features == "detector"
        assert not by_detector or detector
        widths = detector.widths if by_detector and detector else [channels for channels, _ in feature_shapes(spec)]
        self.heads = TokenHeads(widths, spec.label_dim, images_together=recipe.images_together)
        how = self.optimisation(recipe.discriminator_lr, recipe.beta1)
        self.updates["fake_score"] = Update(trained={"method": how}, clip_norm=recipe.clip_gradient_norm)

    def stage(self, nimg: int) -> str:
        return "generator"

    def generate(self, generator: Denoiser, batch: Batch) -> Tensor:
        """What the generator makes of real images with noise at one of its levels, the first of them pure noise."""
        levels = self.recipe.levels
        reals = batch.reals()
        chosen = batch.latent.integers(len(levels), (len(reals), 1, 1, 1))
        sigma = sum(level * (chosen == index) for index, level in enumerate(levels))
        assert isinstance(sigma, Tensor)
        noise = batch.latent.normal(reals.shape)
        return generator(reals * (chosen > 0) + sigma * noise, sigma, batch.real_labels)

    def image_gradient(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> tuple[Losses, Tensor]:
        recipe, losses, gradient = self.recipe, Losses(), torch.zeros_like(x)
        if recipe.lambda_distill:
            sigma = draw_levels(self.generator_time, batch.diffusion, len(x))
            noise = batch.diffusion.normal(x.shape)
            with torch.no_grad():
                f = nets.teacher(x + sigma * noise, sigma, batch.real_labels)
                weight = distillation_weight(recipe.distillation_weight, sigma)  # type: ignore[arg-type]  # no nfsd
                scale = recipe.lambda_distill / recipe.batch_size
                losses["generator_distillation_loss"] = (weight * (x - f) ** 2).sum() * scale
                gradient = distillation_direction(x, f, weight) * scale
        if recipe.lambda_adv:
            logits = self.heads(self._features(nets, batch, x), batch.real_labels)
            per_image = adversarial_loss(recipe.discriminator_loss, logits)
            adversarial = per_image.sum() * (recipe.lambda_adv / recipe.batch_size)
            losses["generator_adversarial_loss"] = adversarial
            gradient = gradient + nets.gradient(adversarial, x)
        return losses, gradient

    def score_losses(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> Losses:
        recipe, labels = self.recipe, batch.real_labels
        with torch.no_grad():
            reals = self._features(nets, batch, batch.reals())
            fakes = self._features(nets, batch, x)
        if recipe.r1_gamma:
            reals = [each.requires_grad_() for each in reals]
        # Fakes and reals apart, as each normalises with its like; both at once, so that each head is asked once.
        logits = self.heads(
            [torch.cat([of_fakes, of_reals]) for of_fakes, of_reals in zip(fakes, reals, strict=True)],
            torch.cat([labels, labels]),
        )
        of_fakes, of_reals = logits.chunk(2)
        scale = recipe.discriminator_scale / recipe.batch_size
        losses = {"discriminator_loss": telling_loss(recipe.discriminator_loss, of_fakes, of_reals).sum() * scale}
        if recipe.r1_gamma:
            losses["discriminator_penalty"] = r1_penalty(of_reals, reals).sum() * (recipe.r1_gamma / 2 * scale)
        return losses

    def stepped(self) -> None:
        self.heads.iterate_norms()

    def _features(self, nets: Nets, batch: Batch, images: Tensor) -> Sequence[Tensor]:
        """Tokens of each map, [B, C, L]."""
        if self.discriminator_time is not None:
            sigma = draw_levels(self.discriminator_time, batch.diffusion, len(images))
            images = images + sigma * batch.diffusion.normal(images.shape)
        if self.recipe.discriminator_features == "detector":
            assert self._detector
            return self._detector.maps(images)
        return [each.flatten(2) for each in nets.teacher.features(images, sigma, batch.real_labels)]
