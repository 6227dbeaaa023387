"""The alternating updates of distillation. The loop around the steps is in loop.py."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sidactl import methods
from sidactl.data.augment import augmentation
from sidactl.engine import configure, ranks, threads
from sidactl.engine import gradients as engine_gradients
from sidactl.nets import Preconditioned
from sidactl.nets.edm2 import drop_logvar_, force_normalize_
from sidactl.noise import sigma_of_time
from sidactl.recipes import Execution, Recipe
from sidactl.training.batches import MicroBatch, MicroBatches
from sidactl.training.updates import DropoutSeed, LossScale, SkippedSteps, adam, apply_gradients, update_ema


class Distillation:
    """SiD, SiDA and SiD2A: fake score and generator trained in turn. Source: SiDA (2410.14919), Algorithms 1 and 2.

    The fake score starts from the teacher; generator and EMA start from `generator`, or from the teacher, without an
    uncertainty head. Follows the published code where it departs from the algorithm as printed: fresh noise for either
    update (unless recipe.share_fakes), strict gates.

    EDM2's weights are normalised as recipe.forced_normalization says. In the published code a net does so in its own
    training passes in mode sid; with the adversarial part it is a hook that copies of a net inherit as it was when
    they were made: the fake score never does, the generator does, the EMA net does whenever it is evaluated.

    Several processes share the micro-batches of a step and add their gradients up, once.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: Preconditioned,
        generator: Preconditioned | None,
        batches: MicroBatches,
        execution: Execution | None = None,
    ) -> None:
        self.recipe = recipe
        self.teacher = teacher.eval().requires_grad_(False)
        self.fake_score = trainable_copy(teacher, recipe.dropout, keep_logvar=recipe.logvar)
        self.generator = trainable_copy(generator or teacher, recipe.dropout, keep_logvar=False)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        forced, is_adversarial = recipe.forced_normalization, recipe.adversarial is not None
        self._normalizes_fake_score = forced == "intended" or (forced == "published" and not is_adversarial)
        self._normalizes_generator = forced != "off"
        self._normalizes_ema = forced == "published" and is_adversarial
        if self._normalizes_ema:
            force_normalize_(self.ema)
        execution = execution or Execution()
        configure.arrange(recipe, execution, self.teacher, self.fake_score, self.generator, self.ema)
        self.passes = configure.passes_of(recipe, execution)
        # Passes of a small net take a core each. Dropout's masks come of one generator, and FSDP2 counts its passes.
        alone = not threads.is_small(self.teacher) or self.fake_score.spec.dropout > 0 or execution.shard
        self.num_threads = 1 if alone else torch.get_num_threads()
        self._batches = batches
        self._fakes: Tensor | None = None
        self._augmented = augmentation(recipe.augment_p, teacher.spec)
        self._fake_score_optimizer = adam(
            self.fake_score,
            lr=recipe.fake_score_lr,
            beta1=recipe.fake_score_beta1,
            beta2=recipe.beta2,
            eps=recipe.adam_eps,
        )
        self._generator_optimizer = adam(
            self.generator,
            lr=recipe.generator_lr,
            beta1=recipe.generator_beta1,
            beta2=recipe.beta2,
            eps=recipe.adam_eps,
        )
        self.nimg = self.step_index = 0
        # The generator's gradient goes back through all three nets.
        through = {"fake_score": (self.fake_score,), "generator": (self.teacher, self.fake_score, self.generator)}
        device = next(self.generator.parameters()).device
        self._loss_scales = {
            name: LossScale(recipe.batch_size, device)
            for name, nets in through.items()
            if any(net.compute_dtype == torch.float16 for net in nets)
        }
        self.skipped = SkippedSteps(self._loss_scales)

    @property
    def trains_generator(self) -> bool:
        """Whether this step updates the generator; before that the fake score trains alone."""
        return self.recipe.trains_generator(self.nimg)

    @property
    def is_adversarial(self) -> bool:
        """Whether this step's generator loss has its adversarial term."""
        return self.recipe.is_adversarial(self.nimg)

    def stage(self) -> str:
        """For people: what this step trains."""
        return "fake score" if not self.trains_generator else "SiDA" if self.is_adversarial else "SiD"

    def modules(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {
            "fake_score": self.fake_score,
            "generator": self.generator,
            "ema": self.ema,
            "fake_score_optimizer": self._fake_score_optimizer,
            "generator_optimizer": self._generator_optimizer,
        }

    def fit_batch_per_device(self) -> int:
        """The images at a time with which a step fits into memory, by trying, the most first; sets the passes so.

        Nothing of it remains: every draw is a function of its position, and no weight is changed.
        """
        recipe, num_rounds = self.recipe, sum(map(len, self.passes))
        micro_batch = recipe.batch_size // recipe.num_accumulation_rounds
        sizes = [n for n in range(num_rounds, 0, -1) if num_rounds % n == 0 and (n == 1 or recipe.joins_micro_batches)]
        fitting = next((n for n in sizes if self._fits(n)), 1)
        images = ranks.smallest(fitting) * micro_batch
        self.passes = configure.passes_of(recipe, Execution(batch_per_device=images))
        return images

    def _fits(self, num_micro_batches: int) -> bool:
        usual = self.passes, self._normalizes_fake_score, self._normalizes_generator
        rounds = [index for rounds in self.passes for index in rounds]
        # The second pass has the sum of gradients beside it.
        self.passes = [rounds[:num_micro_batches]] * min(2, len(rounds) // num_micro_batches)
        self._normalizes_fake_score = self._normalizes_generator = False
        try:
            self._fake_score_gradients(is_trial=True)
            self.fake_score.zero_grad(set_to_none=True)
            self._generator_gradients(is_trial=True)
        except torch.OutOfMemoryError:
            return False
        finally:
            self.passes, self._normalizes_fake_score, self._normalizes_generator = usual
            self._fakes = None
            self.fake_score.zero_grad(set_to_none=True)
            self.generator.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return True

    def step(self) -> dict[str, Tensor]:
        """One iteration: the fake score, the generator (once its turn has come), the EMA.

        Returns the scaled losses as printed by the published code, one value per pass of this process, [passes].
        """
        part = self.recipe.adversarial
        stats = self._fake_score_gradients()
        clip_value = None if part is None else part.clip_gradient_value
        self.skipped.count("fake_score", apply_gradients(self._fake_score_optimizer, clip_value))
        if self.trains_generator:
            stats |= self._generator_gradients()
            self.skipped.count("generator", apply_gradients(self._generator_optimizer, None))
        update_ema(
            self.ema,
            self.generator,
            halflife_nimg=self.recipe.ema_halflife_nimg,
            rampup_ratio=self.recipe.ema_rampup_ratio,
            nimg=self.nimg,
            batch_size=self.recipe.batch_size,
        )
        evaluations = self.nimg // self.recipe.evaluate_every_nimg
        self.nimg += self.recipe.batch_size
        self.step_index += 1
        if self._normalizes_ema and self.nimg // self.recipe.evaluate_every_nimg > evaluations:
            force_normalize_(self.ema)
        return stats

    def _fake_score_gradients(self, *, is_trial: bool = False) -> dict[str, Tensor]:
        recipe, part, psi = self.recipe, self.recipe.adversarial, self.fake_score
        psi.train()
        shares = recipe.share_fakes and (self.trains_generator or is_trial)
        self.generator.train(shares)
        # Once a step, so that the number of passes leaves no trace.
        if self._normalizes_fake_score:
            force_normalize_(psi)
        if shares and self._normalizes_generator:
            force_normalize_(self.generator)
        gradients = self._gradient_sum("fake_score", psi)

        def gradients_of(rounds: Sequence[int]) -> tuple[dict[str, Tensor], Sequence[Tensor | None]]:
            engine_gradients.sync_gradients(psi, rounds is self.passes[-1])
            batch = self._batch(2 * self.step_index, rounds)
            fakes = self._shared_fakes(batch) if shares else self._generate_alone(batch)
            sigma = (recipe.P_std * batch.diffusion.normal((len(fakes), 1, 1, 1)) + recipe.P_mean).exp()
            fakes, fake_augment = self._augmented(fakes, batch.augment)
            noise = batch.diffusion.normal(fakes.shape)
            reals, real_augment = None, None
            if part is not None:
                images = torch.cat([self._batches.images(2 * self.step_index, index) for index in rounds])
                reals, real_augment = self._augmented(images, batch.augment)
            with DropoutSeed(batch.dropout_seed, psi):
                score = methods.fake_score_loss(
                    psi,
                    fakes,
                    noise,
                    sigma,
                    batch.labels,
                    fake_augment,
                    real_images=reals,
                    real_augment_labels=real_augment,
                )
                stats = {"fake_score_loss": score.per_pixel.sum() / recipe.batch_size}
                if part is not None:
                    per_image = methods.discriminator_loss(
                        score, sigma, sigma_data=psi.spec.sigma_data, num_micro_batches=len(rounds)
                    )
                    stats["discriminator_loss"] = per_image.sum() * (part.discriminator_scale / recipe.batch_size)
                return stats, gradients.of(torch.stack(list(stats.values())).sum())

        return self._summed(gradients_of, gradients, is_trial)

    def _generator_gradients(self, *, is_trial: bool = False) -> dict[str, Tensor]:
        self.generator.train()
        self.fake_score.eval()
        if self._normalizes_generator and not self.recipe.share_fakes:
            force_normalize_(self.generator)
        gradients = self._gradient_sum("generator", self.generator)

        def gradients_of(rounds: Sequence[int]) -> tuple[dict[str, Tensor], Sequence[Tensor | None]]:
            engine_gradients.sync_gradients(self.generator, rounds is self.passes[-1])
            batch = self._batch(2 * self.step_index + 1, rounds)
            if self.recipe.share_fakes:
                first = self._batch(2 * self.step_index, rounds)
                batch = replace(batch, labels=first.labels, latent=first.latent, dropout_seed=first.dropout_seed)
            with DropoutSeed(batch.dropout_seed, self.generator):
                fakes, self._fakes = self._generate(batch) if self._fakes is None else self._fakes, None
                # The loss has a graph of its own, gone before the generator's is gone back: no gradient of the fake
                # score's weights is computed, and less memory is held at a time.
                images = fakes.detach().requires_grad_()
                stats, loss = self._generator_loss(batch, images, len(rounds))
                (gradient,) = torch.autograd.grad(gradients.scaled(loss), images)
                return stats, gradients.of(fakes, gradient)

        with engine_gradients.without_weight_gradients(self.fake_score):
            return self._summed(gradients_of, gradients, is_trial)

    def _gradient_sum(self, name: str, net: nn.Module) -> engine_gradients.GradientSum:
        scale = self._loss_scales[name].value if name in self._loss_scales else None
        return engine_gradients.GradientSum(net, len(self.passes), scale)

    def _summed(
        self,
        gradients_of: Callable[[Sequence[int]], tuple[dict[str, Tensor], Sequence[Tensor | None]]],
        gradients: engine_gradients.GradientSum,
        is_trial: bool,
    ) -> dict[str, Tensor]:
        """Goes through the passes and gives the net the sum of their gradients; returns their losses."""
        passes: list[dict[str, Tensor]] = []
        for stats, taken in threads.side_by_side(gradients_of, self.passes, self.num_threads):
            gradients.add(taken)
            passes.append({name: value.detach() for name, value in stats.items()})
        if not is_trial:
            gradients.finish()
        return {name: torch.stack([stats[name] for stats in passes]) for name in passes[0]}

    def _generator_loss(
        self, batch: MicroBatch, fakes: Tensor, num_micro_batches: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The generator's losses by name, and the sum of them that it descends."""
        recipe, part = self.recipe, self.recipe.adversarial
        sigma = sigma_of_time(batch.diffusion.uniform((len(fakes), 1, 1, 1)) * (recipe.tmax / 1000))
        noise = batch.diffusion.normal(fakes.shape)
        sid = methods.sid_generator_loss(
            self.teacher, self.fake_score, fakes, noise, sigma, batch.labels, alpha=recipe.alpha
        )
        stats = {"generator_sid_loss": sid.per_pixel.sum() * (recipe.lambda_sid / recipe.batch_size)}
        weight = 1.0
        if part is not None and self.is_adversarial:
            weight, scale = part.joint_weight, part.lambda_adv / recipe.batch_size * fakes[0].numel()
            per_image = methods.adversarial_generator_loss(sid, num_micro_batches=num_micro_batches)
            stats["generator_adversarial_loss"] = per_image.sum() * scale
        return stats, weight * torch.stack(list(stats.values())).sum()

    def _batch(self, batch: int, rounds: Sequence[int]) -> MicroBatch:
        return MicroBatch.joined([self._batches.get(batch, index) for index in rounds])

    @torch.no_grad()
    def _generate_alone(self, batch: MicroBatch) -> Tensor:
        """Images that no gradient goes through."""
        return self._generate(batch)

    def _shared_fakes(self, batch: MicroBatch) -> Tensor:
        """The images of both updates. A step of one pass keeps their graph for the second; others draw them again."""
        with torch.set_grad_enabled(len(self.passes) == 1), DropoutSeed(batch.dropout_seed, self.generator):
            fakes = self._generate(batch)
        if len(self.passes) == 1:
            self._fakes = fakes
        return fakes.detach()

    def _generate(self, batch: MicroBatch) -> Tensor:
        spec, sigma_init = self.generator.spec, self.recipe.sigma_init
        z = batch.latent.normal((len(batch.labels), spec.img_channels, spec.img_resolution, spec.img_resolution))
        images: Tensor = self.generator(sigma_init * z, sigma_init, batch.labels)
        return images


def trainable_copy(net: Preconditioned, dropout: float, *, keep_logvar: bool) -> Preconditioned:
    """A copy that trains, with this dropout, and with its uncertainty head or without."""
    copied = copy.deepcopy(net).requires_grad_(True)
    copied.set_dropout(dropout)
    if not keep_logvar:
        drop_logvar_(copied)
    return copied
