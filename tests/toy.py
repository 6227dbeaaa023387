"""A method that asks of the trainer all that it can carry; `python -m tests.toy WORDS OF SIDACTL` has it as sida."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidactl import methods
from sidactl.methods.base import Batch, Losses, Method, Nets, Optimisation, Schedule, Update
from sidactl.methods.score_losses import fake_score_loss
from sidactl.recipes import NetSpec, Recipe


class Toy(Method):
    """The generator's images are pulled to what the teacher makes of them, and away from what a head tells from reals.

    The pull is divided by its mean distance over the whole batch, as a running mean knows it.
    """

    statistics = ("distance", "num_images")
    distance: Tensor

    def __init__(self, recipe: Recipe, spec: NetSpec) -> None:
        super().__init__(recipe, spec)
        num_pixels = spec.img_channels * spec.img_resolution**2
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(num_pixels, 32), nn.SiLU(), nn.Linear(32, 1))
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("distance", torch.ones(()))
        self.schedule = Schedule(generator_first=True, generator_every=2, shares="images")
        how = Optimisation(lr=recipe.fake_score_lr, beta1=0.9, weight_decay=0.01, warm_up_nimg=2 * recipe.batch_size)
        self.updates = {
            "fake_score": Update(trained={"fake_score": how, "method": replace(how, lr=1e-2)}, clip_norm=1.0),
            "generator": Update(trained={"generator": replace(how, lr=recipe.generator_lr)}, clip_norm=1.0),
        }

    def stage(self, nimg: int) -> str:
        return "toy"

    def measure(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> Mapping[str, Tensor]:
        pulled = self._pull(nets, batch, x)
        return {"distance": pulled.abs().mean(dim=(1, 2, 3)).sum(), "num_images": torch.tensor(len(x))}

    def observe(self, sums: Mapping[str, Tensor]) -> None:
        self.distance.lerp_((sums["distance"] / sums["num_images"]).to(torch.float32), 0.5)

    def image_gradient(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> tuple[Losses, Tensor]:
        pulled = self._pull(nets, batch, x)
        direction = pulled / self.distance / self.recipe.batch_size
        adversarial = 0.1 * F.softplus(-self._logits(x)).sum() / self.recipe.batch_size
        losses = {"pull": (pulled**2).sum() / self.recipe.batch_size, "adversarial": adversarial}
        return losses, direction + nets.gradient(adversarial, x)

    def score_losses(self, nets: Nets, batch: Batch, x: Tensor, nimg: int) -> Losses:
        sigma = batch.diffusion.normal((len(x), 1, 1, 1)).exp()
        score = fake_score_loss(nets.fake_score, x, batch.diffusion.normal(x.shape), sigma, batch.labels)
        of_fakes, of_reals = self._logits(torch.cat([x, batch.reals()])).chunk(2)
        told = F.softplus(of_fakes) + F.softplus(-of_reals)
        return {"score": score.per_pixel.sum() / self.recipe.batch_size, "head": told.sum() / self.recipe.batch_size}

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x) + self.bias
        return logits

    @torch.no_grad()
    def _pull(self, nets: Nets, batch: Batch, x: Tensor) -> Tensor:
        """From the teacher's images to x, [B, C, H, W]."""
        sigma = 0.5 + batch.diffusion.uniform((len(x), 1, 1, 1))
        noisy = x + sigma * batch.diffusion.normal(x.shape)
        return x - nets.teacher(noisy, sigma, batch.labels)


if __name__ == "__main__":
    from sidactl.__main__ import main

    methods.METHODS["sida"] = Toy
    main()
