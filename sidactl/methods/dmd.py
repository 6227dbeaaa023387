"""Distribution matching: Diff-Instruct, DMD, DMD2 as published and as FastGen has it, and f-distill.

The direction is a gradient at the generator's images already: no network is gone back through for it. Shapes and
manners as in score_losses.py.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sidactl.methods import f_distill
from sidactl.methods.base import Batch, Distance, Losses, Method, Nets, Schedule, Update
from sidactl.methods.discriminator import adversarial_loss, telling_loss
from sidactl.methods.score_losses import denoising_loss, logvar_of
from sidactl.methods.sid import WEIGHT_FLOOR, sid_generator_loss
from sidactl.nets import Denoiser
from sidactl.nets.heads import ConvolutionHeads
from sidactl.noise import draw_levels
from sidactl.recipes import MatchingRecipe, NetSpec, NoiseLevels, PairedRecipe
from sidactl.recipes.dmd import SHARED

Weight = Literal["one", "inverse", "inverse-eps", "inverse-floor"]


def direction_weight(kind: Weight, images: Tensor, f: Tensor) -> Tensor:
    """The weight of each image's direction, [B, 1, 1, 1]: one, or over its mean |x - f|, of which DMD2 takes no floor.

    inverse: DMD2 (2405.14867), its code; inverse-eps: + 1e-6, FastGen's; inverse-floor: at least 1e-5, SiD's.
    """
    error = (images - f).abs().mean(dim=(1, 2, 3), keepdim=True)
    if kind == "one":
        return torch.ones_like(error)
    if kind == "inverse-eps":
        return 1 / (error + 1e-6)
    return 1 / (error.clamp(min=WEIGHT_FLOOR) if kind == "inverse-floor" else error)


def matching_direction(images: Tensor, f: Tensor, g: Tensor, weight: Weight = "inverse") -> Tensor:
    """weight (g - f), [B, C, H, W], with f and g the images as teacher and fake score denoise them; to be descended.

    Source: Diff-Instruct (2305.18455), with weight one; DMD (2311.18828) and DMD2 (2405.14867), eq. 2 and their code.
    A sample that is not finite stays so, where DMD2's code puts zeros: the trainer skips the update and says so.
    """
    return (g - f) * direction_weight(weight, images, f)


class Matching(Method):
    """Generator along the direction between fake score and teacher, with a discriminator where the recipe has one."""

    recipe: MatchingRecipe
    ratio_means: Tensor
    weight_mean: Tensor

    def __init__(self, recipe: MatchingRecipe, spec: NetSpec) -> None:
        super().__init__(recipe, spec)
        self.schedule = Schedule(
            generator_first=recipe.order == "generator-first",
            generator_every=recipe.generator_every,
            alternates=recipe.alternate,
            shares=recipe.share,
            has_dropout_everywhere=recipe.direction_dropout,
        )
        self.generator_time = NoiseLevels.parse(recipe.generator_time, "generator_time")
        self.score_time = NoiseLevels.parse(recipe.score_time, "score_time")
        own = recipe.discriminator_time != SHARED
        self.discriminator_time = NoiseLevels.parse(recipe.discriminator_time, "discriminator_time") if own else None
        self.heads: ConvolutionHeads | None = None
        self._num_maps = 0
        if recipe.discriminator_features != "none":
            shapes = feature_shapes(spec)
            self._num_maps = 1 if recipe.discriminator_features == "fake-score" else recipe.discriminator_maps
            self.heads = ConvolutionHeads(shapes[-self._num_maps :])  # from the coarsest on; of 0 all
            trained = dict(self.updates["fake_score"].trained)
            trained["method"] = self.optimisation(recipe.discriminator_lr, recipe.fake_score_beta1)
            self.updates["fake_score"] = Update(trained=trained, clip_norm=recipe.clip_gradient_norm)
        if recipe.f_divergence != "reverse-kl":
            self.statistics = ("ratio", "sigma")
            self.register_buffer("ratio_means", torch.ones(f_distill.NUM_BINS))
            self.register_buffer("weight_mean", torch.ones(()))

    def stage(self, nimg: int) -> str:
        return "generator"

    def _per_pixel(self, x: Tensor) -> float:
        """What a sum over the pixels of a batch's part is multiplied by, in the recipe's unit."""
        return 1 / self.recipe.batch_size / (x[0].numel() if self.recipe.loss_unit == "mean" else 1)

    def image_gradient(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> tuple[Losses, Tensor]:
        recipe = self.recipe
        sigma = draw_levels(self.generator_time, batch.diffusion, len(x))
        noise = batch.diffusion.normal(x.shape)
        adversarial, gradients, weight = Losses(), [], torch.ones(())
        if self.heads and (recipe.lambda_adv or recipe.f_divergence != "reverse-kl"):
            levels, levels_noise = sigma, noise
            if self.discriminator_time is not None:
                levels = draw_levels(self.discriminator_time, batch.diffusion, len(x))
                levels_noise = batch.diffusion.normal(x.shape)
            logits = self._logits(nets, x + levels * levels_noise, levels, batch.labels)
            if recipe.f_divergence != "reverse-kl":
                weight = self._divergence_weight(logits.detach(), sigma)
            if recipe.lambda_adv:
                loss = adversarial_loss(recipe.discriminator_loss, logits).sum() * (
                    recipe.lambda_adv / recipe.batch_size
                )
                adversarial["generator_adversarial_loss"] = loss
                gradients.append(nets.gradient(loss, x))  # before the direction is made: one graph at a time
        if recipe.direction == "sid":
            sid = sid_generator_loss(nets.teacher, nets.fake_score, x, noise, sigma, batch.labels, alpha=recipe.alpha)
            loss = (weight * sid.per_pixel).sum() * self._per_pixel(x)
            losses, direction = {"generator_sid_loss": loss}, nets.gradient(loss, x)
        else:
            losses, direction = self._matched(nets, batch, x, noise, sigma, weight)
        return losses | adversarial, sum(gradients, direction)

    @torch.no_grad()
    def _matched(
        self, nets: Nets, batch: Batch, x: Tensor, noise: Tensor, sigma: Tensor, weight: Tensor
    ) -> tuple[Losses, Tensor]:
        """The detached direction, and the loss that published code reports for it."""
        recipe, noisy = self.recipe, x + sigma * noise
        f = nets.teacher(noisy, sigma, batch.labels)
        g = nets.fake_score(noisy, sigma, batch.labels)
        direction = weight * matching_direction(x, f, g, recipe.generator_weight)
        logvar = logvar_of(nets.fake_score, sigma)
        if logvar is not None:
            direction = direction / logvar.exp()
        told = direction * x if recipe.generator_weight == "one" else direction**2 / 2
        return {"generator_matching_loss": told.sum() * self._per_pixel(x)}, direction * self._per_pixel(x)

    def score_losses(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> Losses:
        recipe, draws, num_images = self.recipe, batch.diffusion, len(x)
        x, augment_labels = nets.augmented(x, batch.augment)
        if recipe.order == "generator-first":  # as DMD2 draws
            noise = draws.normal(x.shape)
            sigma = draw_levels(self.score_time, draws, num_images)
        else:
            sigma = draw_levels(self.score_time, draws, num_images)
            noise = draws.normal(x.shape)
        told = self._told_apart(batch, x, noise, sigma) if self.heads else _Seen([], [], [])
        noisy, sigmas, labels = [x + sigma * noise], [sigma], [batch.labels]
        features: Sequence[Tensor] = ()
        if recipe.discriminator_features == "fake-score":
            of_all = (torch.cat([*one, *more]) for one, more in zip((noisy, sigmas, labels), told, strict=True))
            denoised, maps = nets.fake_score.denoise_and_features(*of_all, num_denoised=num_images)
            # The fakes are those of the denoising loss where the discriminator has no noise levels of its own.
            features = [maps[-1][-2 * num_images :]]
        else:
            denoised = nets.fake_score(noisy[0], sigma, batch.labels, augment_labels)
            if self.heads:
                with torch.no_grad():
                    fakes = (noisy, sigmas, labels) if self.discriminator_time is None else ([], [], [])
                    of_all = (torch.cat([*one, *more]) for one, more in zip(fakes, told, strict=True))
                    features = nets.teacher.features(*of_all)[-self._num_maps :]
        per_pixel = denoising_loss(
            denoised,
            x,
            sigma,
            nets.fake_score.spec.sigma_data,
            logvar_of(nets.fake_score, sigma),
            recipe.score_weight,
        )
        losses = {"fake_score_loss": per_pixel.sum() * self._per_pixel(x)}
        if self.heads:
            of_fakes, of_reals = self.heads(features).chunk(2)
            per_image = telling_loss(recipe.discriminator_loss, of_fakes, of_reals)
            losses["discriminator_loss"] = per_image.sum() * (recipe.discriminator_scale / recipe.batch_size)
        return losses

    def _told_apart(self, batch: Batch, x: Tensor, noise: Tensor, sigma: Tensor) -> "_Seen":
        """What the discriminator sees beside the noisy fakes of the denoising loss: its own, if any, and reals."""
        time, draws, num_images = self.discriminator_time, batch.diffusion, len(x)
        reals, levels = batch.reals(), draw_levels(time or self.score_time, draws, num_images)
        seen = _Seen([reals + levels * draws.normal(x.shape)], [levels], [batch.real_labels])
        if time is not None:
            levels = draw_levels(time, draws, num_images)
            fakes = x + levels * draws.normal(x.shape)
            seen = _Seen([fakes, *seen.noisy], [levels, *seen.sigma], [batch.labels, *seen.labels])
        return seen

    def _logits(self, nets: Nets, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """[B, heads]"""
        assert self.heads
        if self.recipe.discriminator_features == "fake-score":
            features = nets.fake_score.features(noisy, sigma, labels)[-1:]
        else:
            features = nets.teacher.features(noisy, sigma, labels)[-self._num_maps :]
        logits: Tensor = self.heads(features)
        return logits

    def _divergence_weight(self, logits: Tensor, sigma: Tensor) -> Tensor:
        """h of each image, [B, 1, 1, 1], over its mean over the whole batch, as `observe` has found it."""
        ratio = f_distill.density_ratio(logits)
        levelled = f_distill.levelled(ratio, f_distill.bins_of(sigma.flatten()), self.ratio_means)
        weights = f_distill.f_weight(self.recipe.f_divergence, levelled)
        return f_distill.normalised(weights, self.weight_mean).reshape(-1, 1, 1, 1)

    def measure(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> Mapping[str, Tensor]:
        """The ratio of each image and its noise level, at its place in the batch, [batch_size] each."""
        sigma = draw_levels(self.generator_time, batch.diffusion, len(x))
        noisy = x + sigma * batch.diffusion.normal(x.shape)
        ratio = f_distill.density_ratio(self._logits(nets, noisy, sigma, batch.labels))
        empty = torch.zeros(self.recipe.batch_size, dtype=torch.float64, device=x.device)
        return {
            "ratio": empty.index_add(0, batch.positions, ratio.double()),
            "sigma": empty.index_add(0, batch.positions, sigma.flatten().double()),
        }

    def observe(self, sums: Mapping[str, Tensor]) -> None:
        ratio, bins = sums["ratio"].to(self.ratio_means.dtype), f_distill.bins_of(sums["sigma"])
        means = f_distill.updated_bins(self.ratio_means, ratio, bins, self.recipe.ratio_rate)
        weights = f_distill.f_weight(self.recipe.f_divergence, f_distill.levelled(ratio, bins, means))
        self.ratio_means.copy_(means)
        self.weight_mean.copy_(weights.mean())


def mean_squared_difference(images: Tensor, others: Tensor) -> Tensor:
    """The mean over pixels, [B]."""
    return (images - others).square().flatten(1).mean(dim=1)


class Paired(Matching):
    """Distribution matching beside a regression on the teacher's own images of the same noise: DMD (2311.18828).

    A pass has twice as many images of the generator: those that are matched, and, after them, those of pairs.
    """

    recipe: PairedRecipe

    def __init__(self, recipe: PairedRecipe, spec: NetSpec, distance: Distance | None = None) -> None:
        super().__init__(recipe, spec)
        self._distance = distance or mean_squared_difference

    def generate(self, generator: Denoiser, batch: Batch) -> Tensor:
        """The images that are matched, then those of pairs, [2 B, C, H, W]."""
        pairs, sigma_init = batch.pairs(), self.recipe.sigma_init
        noise = torch.cat([batch.latent.normal(pairs.noise.shape), pairs.noise])
        return generator(sigma_init * noise, sigma_init, torch.cat([batch.labels, pairs.labels]))

    def image_gradient(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> tuple[Losses, Tensor]:
        matched, paired = x.chunk(2)
        losses, gradient = super().image_gradient(nets, batch, matched, nimg)
        num_pixels = x[0].numel() if self.recipe.loss_unit == "sum" else 1
        scale = self.recipe.lambda_reg * num_pixels / self.recipe.batch_size
        regression = self._distance(paired, batch.pairs().images).sum() * scale
        losses["generator_regression_loss"] = regression
        return losses, torch.cat([gradient, nets.gradient(regression, paired)])

    def score_losses(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> Losses:
        return super().score_losses(nets, batch, x.chunk(2)[0], nimg)


class _Seen(NamedTuple):
    """Noisy images by parts, their noise levels and labels."""

    noisy: list[Tensor]
    sigma: list[Tensor]
    labels: list[Tensor]


def feature_shapes(spec: NetSpec) -> list[tuple[int, int]]:
    """Channels and resolution of the maps that `Denoiser.features` gives of a network of this form."""
    return [(spec.model_channels * mult, spec.img_resolution >> level) for level, mult in enumerate(spec.channel_mult)]
