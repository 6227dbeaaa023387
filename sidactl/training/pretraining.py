"""The EDM update that trains a teacher from scratch. The loop around the steps is in loop.py."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sidactl import methods
from sidactl.data.augment import augmentation
from sidactl.engine import devices
from sidactl.methods.base import Optimisation
from sidactl.nets import Preconditioned
from sidactl.nets.edm2 import force_normalize_
from sidactl.recipes import TeacherRecipe
from sidactl.training.batches import MicroBatches
from sidactl.training.state import StepSoFar
from sidactl.training.updates import SkippedSteps, adam, apply_gradients, dropout_seeded, update_ema


class Pretraining:
    """A teacher trained from scratch with the EDM loss. Source: EDM (2206.00364), section 5.

    An EDM2 net normalises its weights before every pass and weights the loss by its uncertainty head, where it has one.
    Source: EDM2 (2312.02696), sections 2.3 and B.
    """

    def __init__(self, recipe: TeacherRecipe, net: Preconditioned, batches: MicroBatches) -> None:
        self.recipe, self.net = recipe, net
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        self._batches = batches
        self._augmented = augmentation(recipe.augment_p, net.spec)
        how = Optimisation(lr=recipe.lr, beta1=recipe.beta1, beta2=recipe.beta2, eps=recipe.adam_eps)
        self._optimizer = adam({"net": (net, how)})
        self.nimg = self.step_index = 0
        self.so_far = StepSoFar()
        self.skipped = SkippedSteps()

    def stage(self) -> str:
        """For people: what this step trains."""
        return "teacher"

    def modules(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {"net": self.net, "ema": self.ema, "optimizer": self._optimizer}

    def step(self, should_stop: Callable[[], bool] = lambda: False) -> dict[str, Tensor]:
        """One update, of a single pass, which is made to its end; returns the mean loss per pixel, [1]."""
        with devices.fastest_convolutions(next(self.net.parameters()).device):
            return self._step()

    def _step(self) -> dict[str, Tensor]:
        recipe = self.recipe
        self.net.train()
        if self.net.spec.architecture == "EDM2":
            force_normalize_(self.net)
        batch = self._batches.get(self.step_index, 0)
        images, augment_labels = self._augmented(batch.reals(), batch.augment)
        sigma = (recipe.P_std * batch.diffusion.normal((len(images), 1, 1, 1)) + recipe.P_mean).exp()
        noise = batch.diffusion.normal(images.shape)
        labels = batch.labels
        if recipe.label_dropout:
            assert batch.label_dropout
            labels = labels * (batch.label_dropout.uniform((len(labels), 1)) >= recipe.label_dropout)
        with dropout_seeded(batch, self.net):
            loss = methods.fake_score_loss(self.net, images, noise, sigma, labels, augment_labels).per_pixel
            (loss.sum() / recipe.batch_size).backward()
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.lr * min(self.nimg / max(recipe.lr_rampup_nimg, 1e-8), 1.0)
        self.skipped.count("teacher", apply_gradients(self._optimizer, None))
        update_ema(
            self.ema,
            self.net,
            halflife_nimg=recipe.ema_halflife_nimg,
            rampup_ratio=recipe.ema_rampup_ratio,
            nimg=self.nimg,
            batch_size=recipe.batch_size,
        )
        self.nimg += recipe.batch_size
        self.step_index += 1
        return {"denoising_loss": loss.detach().mean()[None]}
