"""The alternating updates of distillation. The loop around the steps is in loop.py."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sidactl import methods
from sidactl.data.augment import augmentation
from sidactl.engine import configure, devices, failures, ranks, sharding, threads
from sidactl.engine import gradients as engine_gradients
from sidactl.methods.base import Distance, Losses, Nets, TrainingDetector, Turn
from sidactl.nets import Denoiser, Preconditioned
from sidactl.nets.edm2 import drop_logvar_, force_normalize_, holding
from sidactl.nets.guided import Guided
from sidactl.recipes import BASE_BYTES, Execution, FakeScoreRecipe, Memory, Recipe, SidRecipe
from sidactl.scopes import scope
from sidactl.training import trials
from sidactl.training.batches import MicroBatch, MicroBatches
from sidactl.training.state import StepSoFar, StoppedError
from sidactl.training.updates import LossScale, Side, SkippedSteps, dropout_seeded, update_ema

Rounds = Sequence[int]
"""of a pass: the micro-batches of a batch that go through the nets at once"""
Shared = dict[int, Tensor]
"""images of a step that its second update takes over from the first, by the first round of their pass"""


class Distillation:
    """Fake score and generator, trained in turn as the method of the recipe's mode says.

    The fake score starts from the teacher; generator and EMA start from `generator`, or from the teacher, without an
    uncertainty head. Several processes share the micro-batches of a step and add their gradients up, once.

    EDM2's weights are normalised as recipe.forced_normalization says. In the published code a net does so in its own
    training passes in mode sid; with the adversarial part it is a hook that copies of a net inherit as it was when
    they were made: the fake score never does, the generator does, the EMA net does whenever it is evaluated.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: Preconditioned,
        generator: Preconditioned | None,
        batches: MicroBatches,
        execution: Execution | None = None,
        trained_on: TrainingDetector | Distance | None = None,
        guide: Preconditioned | None = None,
    ) -> None:
        """guide: what the teacher moves away from with the recipe's teacher_guidance; None = itself without labels."""
        self.recipe, self._execution = recipe, (execution := execution or Execution())
        self._device = device = next(teacher.parameters()).device
        self.method = methods.of(recipe, teacher.spec, trained_on).to(device)
        trained = {name for update in self.method.updates.values() for name in update.trained}
        has_heads = any(parameter.requires_grad for parameter in self.method.parameters())
        assert has_heads == ("method" in trained), "heads need an optimiser"
        self.teacher = self.fake_score = teacher.eval().requires_grad_(False)
        if "fake_score" in trained:
            keep_logvar = isinstance(recipe, FakeScoreRecipe) and recipe.logvar
            self.fake_score = trainable_copy(teacher, recipe.dropout, keep_logvar=keep_logvar)
        if self.method.schedule.has_dropout_everywhere:
            teacher.set_dropout(recipe.dropout)
        self.generator = trainable_copy(generator or teacher, recipe.dropout, keep_logvar=False)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        forced = recipe.forced_normalization
        is_adversarial = isinstance(recipe, SidRecipe) and recipe.adversarial is not None
        self._normalizes_ema = forced == "published" and is_adversarial
        if self._normalizes_ema:
            force_normalize_(self.ema)
        self._sharded = configure.configure_for_training(
            recipe, execution, self.teacher, self.fake_score, self.generator, self.ema, guide
        )
        self.guide = guide.eval().requires_grad_(False) if guide else None
        self.notes = self._sharded.told()
        if execution.shard and self.method.may_shard:
            sharding.shard_parts_(self.method)
        # FSDP2 gathers weights for each pass, so that holding them normalised would hold all of them whole.
        self._holds = not execution.shard
        self._forever = ExitStack()
        if (self._holds and self.teacher is not self.fake_score) or self._sharded.has_whole_teacher:
            self._forever.enter_context(holding(self.teacher))
        if self._holds and self.guide:
            self._forever.enter_context(holding(self.guide))
        if self._sharded.has_whole_teacher:
            configure.keep_as_computed_(self.teacher)
        self.passes, self._joins = configure.passes_of(recipe, execution), recipe.joins_micro_batches(execution)
        # A small net runs one pass per core; not with dropout (one global generator) nor FSDP2 (passes in turn).
        alone = not threads.is_small(self.teacher) or recipe.dropout > 0 or execution.shard
        self.num_threads = 1 if alone else torch.get_num_threads()
        self._batches, self._augmented = (
            batches,
            augmentation(recipe.augment_p if isinstance(recipe, FakeScoreRecipe) else 0.0, teacher.spec),
        )
        self.nimg = self.step_index = 0
        self.so_far, self._is_sharded = StepSoFar(), execution.shard
        normalizes = {
            "fake_score": forced == "intended" or (forced == "published" and not is_adversarial),
            "generator": forced != "off",
        }
        # The generator's gradient goes back through all three nets.
        through = {"fake_score": (self.fake_score,), "generator": (self.teacher, self.fake_score, self.generator)}
        loss_scales = {
            turn: LossScale(recipe.batch_size, device)
            for turn, nets in through.items()
            if any(net.compute_dtype == torch.float16 for net in nets)
        }
        modules = {"fake_score": self.fake_score, "generator": self.generator, "method": self.method}
        self.sides = {
            turn: Side(
                update,
                modules,
                normalizes=normalizes[turn],
                loss_scale=loss_scales.get(turn),
                zeroes=recipe.nonfinite == "zero",
            )
            for turn, update in self.method.updates.items()
        }
        self.skipped = SkippedSteps({side.name: side.loss_scale for side in self.sides.values() if side.loss_scale})

    @property
    def trains_generator(self) -> bool:
        """Whether the generator's turn has come; before that the fake score trains alone."""
        return self.recipe.trains_generator(self.nimg)

    def stage(self) -> str:
        """For people: what this step trains."""
        return self.method.stage(self.nimg) if self.trains_generator else "fake score"

    def modules(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """Everything that changes, by the name that it has in checkpoints; a method only where it has a state."""
        trained = {name: module for side in self.sides.values() for name, module in side.modules.items()}
        state = {"method": self.method} if self.method.state_dict() else {}
        optimizers = {f"{side.name}_optimizer": side.optimizer for side in self.sides.values()}
        return {**trained, "ema": self.ema, **state, **optimizers}

    def step(self, should_stop: Callable[[], bool] = lambda: False) -> Losses:
        """One iteration: the fake score and the heads on the generator's images, the generator, the average.

        Who has a turn, in which order, and what both see alike is the method's schedule. Returns the losses that the
        method reports, one value per pass of this process, [passes]; a step that goes on where another was told to
        stop has those of the updates that were left. should_stop: looked at between passes; see `StoppedError`.
        """
        with devices.fastest_convolutions(self._device):
            return self._step(should_stop)

    def _step(self, should_stop: Callable[[], bool]) -> Losses:
        schedule = self.method.schedule
        turns = [turn for turn in schedule.turns(self.step_index, self.trains_generator) if turn in self.sides]
        shared: Shared | None = {} if schedule.shares == "images" and len(turns) == 2 else None
        losses: Losses = {}
        for turn in turns if shared is not None else ():  # the first update has the generator in training mode, too
            self._normalize(turn)
        # Shared images come of what the generator holds in the first update, and their gradient goes back to that.
        with self._holding(self.generator, trains=True) if shared is not None else nullcontext():
            for turn in turns[self.so_far.turns :]:
                self._normalize(turn)
                # The images that a generator stepped since then had handed on cannot be had again.
                is_last_chance = shared is not None and self.so_far.turns and turn == "fake_score"
                losses |= self._update(turn, shared, None if is_last_chance else should_stop)
                self.so_far.turns += 1
        self.so_far = StepSoFar()
        self._average()
        self.nimg += self.recipe.batch_size
        self.step_index += 1
        return losses

    def _normalize(self, turn: Turn) -> None:
        if self.so_far.once(f"{turn} normalized"):
            self.sides[turn].normalize()

    def _update(self, turn: Turn, shared: Shared | None, should_stop: Callable[[], bool] | None) -> Losses:
        """Sums gradients over passes and processes, and steps with them unless one is not finite."""
        if turn == "generator" and self.method.statistics and self.so_far.once("observed"):
            sums = self._statistics(shared)
            if all(bool(each.isfinite().all()) for each in sums.values()):  # else this update will be skipped
                self.method.observe(sums)
        side = self.sides[turn]
        total, losses = self._gradients(turn, self.passes, shared, should_stop)
        total.finish()
        self.skipped.count(side.name, side.step(self.nimg), side.were_finite)
        if "method" in side.modules:
            self.method.stepped()
        return losses

    def _gradients(
        self,
        turn: Turn,
        passes: Sequence[Rounds],
        shared: Shared | None,
        should_stop: Callable[[], bool] | None = None,
    ) -> tuple[engine_gradients.GradientSum, Losses]:
        """The sum of an update's gradients over these passes, before it is finished, and its losses, [passes].

        Raises StoppedError where should_stop() is true between passes.
        """
        side, nets, found = self.sides[turn], self._nets(turn, shared), list[Losses]()

        def gradients_of(rounds: Rounds) -> tuple[Losses, Sequence[Tensor | None]]:
            side.sync_gradients(rounds is passes[-1] or self._sharded.reduces_each_pass)
            batch = self._batch(turn, rounds)
            images = self._images(turn, batch, rounds, shared, keeps_graph=len(passes) == 1)
            if turn == "fake_score":
                with dropout_seeded(batch, self.fake_score):
                    with scope("fake score forward"):
                        seen = self._with_labels_dropped(nets, batch)
                        losses = self.method.score_losses(seen, batch, images.detach(), self.nimg)
                    with scope("fake score backward"):
                        return losses, total.of(torch.stack(list(losses.values())).sum())
            # The gradient at the images has a graph of its own, gone before the generator's is gone back: no gradient
            # of the fake score's weights is computed, and less memory is held at a time.
            with scope("generator loss"):
                x, looked_through = images.detach().requires_grad_(), self._with_dropout(nets, batch)
                losses, gradient = self.method.image_gradient(looked_through, batch, x, self.nimg)
            with scope("generator backward"):
                return losses, total.of(images, total.scaled(gradient))

        goes_back = turn == "generator"
        with (
            engine_gradients.without_weight_gradients(self.fake_score) if goes_back else nullcontext(),
            self._holding(self.generator, trains=goes_back),
            self._holding(self.fake_score, trains=not goes_back),
        ):
            total = side.gradient_sum(len(passes))
            for losses, gradients in threads.map_ordered(gradients_of, passes, self.num_threads):
                total.add(gradients)
                found.append({name: value.detach() for name, value in losses.items()})
                del losses, gradients  # or they would be held through the next pass
                if should_stop and len(found) < len(passes) and self._stops(should_stop):
                    break
        if should_stop and ranks.any_rank(len(found) < len(passes)):
            side.optimizer.zero_grad()
            raise StoppedError
        return total, {name: torch.stack([losses[name] for losses in found]) for name in found[0]}

    def _stops(self, should_stop: Callable[[], bool]) -> bool:
        """Between passes each process asks for itself, but that passes of what is sharded need all of them."""
        return ranks.any_rank(should_stop()) if self._is_sharded else should_stop()

    @contextmanager
    def _holding(self, net: Preconditioned, *, trains: bool) -> Iterator[None]:
        """Within the block EDM2's weights are normalised once; see `edm2.holding`."""
        with holding(net, trains=trains) if self._holds else nullcontext():
            yield

    def _nets(self, turn: Turn, shared: Shared | None) -> Nets:
        """The networks; in training mode is what the update steps, and the generator where both take its images."""
        for name, side in self.sides.items():
            side.train(name == turn or (name == "generator" and shared is not None))
        if self.method.schedule.has_dropout_everywhere:
            self.teacher.train(turn == "generator")
            self.fake_score.train()
        recipe, teacher, fake_score = self.recipe, cast(Denoiser, self.teacher), cast(Denoiser, self.fake_score)
        if isinstance(recipe, FakeScoreRecipe) and recipe.teacher_guidance != 1:
            teacher = Guided(teacher, self.guide, recipe.teacher_guidance, recipe.guidance_interval)
        if isinstance(recipe, FakeScoreRecipe) and recipe.score_guidance != 1:
            fake_score = Guided(fake_score, None, recipe.score_guidance, recipe.guidance_interval)
        return Nets(teacher, fake_score, self._augmented, self.sides[turn].scale)

    def _with_labels_dropped(self, nets: Nets, batch: MicroBatch) -> Nets:
        """The networks as the fake score trains: where it is to guide itself some images have no label for it."""
        recipe = self.recipe
        if not isinstance(nets.fake_score, Guided) or not isinstance(recipe, FakeScoreRecipe):
            return nets
        assert batch.label_dropout
        kept = batch.label_dropout.uniform((len(batch.labels), 1)) >= recipe.score_label_dropout
        return replace(nets, fake_score=replace(nets.fake_score, keep=kept.to(torch.float32)))

    def _with_dropout(self, nets: Nets, batch: MicroBatch) -> Nets:
        """The networks with dropout under the masks of the pass, where the method wants that of all of them."""
        if not (self.method.schedule.has_dropout_everywhere and self.recipe.dropout):
            return nets
        teacher, fake_score = _Masked(self.teacher, batch), _Masked(self.fake_score, batch)
        return replace(nets, teacher=cast(Denoiser, teacher), fake_score=cast(Denoiser, fake_score))

    def _batch(self, turn: Turn, rounds: Rounds) -> MicroBatch:
        """What a pass is fed with. A step has two batches, the fake score's and the generator's, at fixed positions."""

        def joined(index: int) -> MicroBatch:
            return MicroBatch.joined([self._batches.get(2 * self.step_index + index, round) for round in rounds])

        if turn == "fake_score":
            return joined(0)
        shares, batch = self.method.schedule.shares, joined(1)
        if shares != "nothing":
            first = joined(0)
            batch = replace(batch, labels=first.labels, reals=first.reals, labels_of_reals=first.labels_of_reals)
        if shares == "images":
            batch = replace(batch, latent=first.latent, dropout_seeds=first.dropout_seeds, pairs=first.pairs)
        return batch

    def _images(
        self, turn: Turn, batch: MicroBatch, rounds: Rounds, shared: Shared | None, *, keeps_graph: bool
    ) -> Tensor:
        """The generator's images, with their graph for its own update; the second update of a step takes shared ones.

        keeps_graph: shared images have their graph from the first; else the generator draws them again for its update.
        """
        first, _ = self.method.schedule.order
        if shared is not None and turn != first and rounds[0] in shared:
            return shared.pop(rounds[0])
        has_graph = turn == "generator" or (shared is not None and keeps_graph)
        with torch.set_grad_enabled(has_graph):
            images = self._generate(batch)
        if shared is not None and turn == first and has_graph:
            shared[rounds[0]] = images if turn == "fake_score" else images.detach()
        return images

    @scope("generator forward")
    def _generate(self, batch: MicroBatch) -> Tensor:
        with dropout_seeded(batch, self.generator):
            return self.method.generate(self.generator, batch)

    def _statistics(self, shared: Shared | None) -> dict[str, Tensor]:
        """The method's statistics, sums over the generator's batch in float64, all passes of all processes."""
        nets = self._nets("generator", shared)

        @torch.no_grad()
        def of_pass(rounds: Rounds) -> Mapping[str, Tensor]:
            batch = self._batch("generator", rounds)
            return self.method.measure(nets, batch, self._generate(batch), self.nimg)

        with self._holding(self.generator, trains=True), self._holding(self.fake_score, trains=False):
            found = list(threads.map_ordered(of_pass, self.passes, self.num_threads))
        each = {name: torch.stack([sums[name] for sums in found]) for name in self.method.statistics}
        return {name: ranks.all_reduce_sum(sums.sum(dim=0, dtype=torch.float64)) for name, sums in each.items()}

    def fit_batch_per_device(self, memory: Callable[[], tuple[int, int]], clock: trials.Clock) -> trials.Fit:
        """The images at a time with which a step is fastest of those that fit into memory, by trying; sets passes so.

        memory: bytes of the device that are free, and all of them; a twentieth stays free. The first size is the one
        that the estimate gives. Nothing of it remains: every draw is a function of its position, and no weight is
        changed. The time is that of an image.
        """
        recipe, num_rounds = self.recipe, sum(map(len, self.passes))
        micro_batch = recipe.batch_size // recipe.num_accumulation_rounds
        sizes = [n for n in range(1, num_rounds + 1) if num_rounds % n == 0 and (n == 1 or self._joins)]
        ranks.open_collectives(self._device)  # whose buffers are beside torch's memory
        num_parameters, most = sum(p.numel() for p in self.teacher.parameters()), (1 - trials.SPARE) * memory()[1]

        def estimated(num_micro_batches: int) -> int:
            execution = replace(self._execution, batch_per_device=num_micro_batches * micro_batch)
            num_devices = ranks.rank_and_size()[1]
            return Memory.of(recipe, self.teacher.spec, num_parameters, execution, num_devices=num_devices).total_bytes

        start = max((n for n in sizes if estimated(n) - BASE_BYTES <= most), default=1)
        fit = trials.fastest(sizes, start, partial(self._seconds_per_image, memory=memory, clock=clock))
        images = fit.size * micro_batch
        self.passes = configure.passes_of(recipe, Execution(batch_per_device=images))
        return fit._replace(size=images)

    def seconds_per_image(
        self, memory: Callable[[], tuple[int, int]], clock: trials.Clock
    ) -> tuple[float | None, str | None]:
        """What an image takes in passes as they are, the slowest process's; or None, and why, where they do not run.

        Nothing of it remains, as after `fit_batch_per_device`.
        """
        seconds, why = None, None
        try:
            seconds = self._seconds_per_image(len(self.passes[0]), memory=memory, clock=clock)
        except RuntimeError as error:  # a compiler that is not there, or that fails
            why = str(error).strip().partition("\n")[0] or type(error).__name__
        return trials.slowest(seconds), ranks.any_message(why)

    def _seconds_per_image(
        self, num_micro_batches: int, *, memory: Callable[[], tuple[int, int]], clock: trials.Clock
    ) -> float | None:
        """What the gradients of both updates take of so many at a time; None where they do not fit."""
        rounds = [index for rounds in self.passes for index in rounds]
        # The second pass has the sum of gradients beside it.
        passes = [rounds[:num_micro_batches]] * min(2, len(rounds) // num_micro_batches)

        def work() -> None:
            shared: Shared | None = {} if self.method.schedule.shares == "images" else None
            for turn in (turn for turn in self.method.schedule.order if turn in self.sides):
                self._gradients(turn, passes, shared)
                self.sides[turn].optimizer.zero_grad()

        try:
            with devices.fastest_convolutions(self._device):  # whose workspaces take memory, too
                work()
                free, total = memory()  # while torch still keeps the most that it held
                if free < trials.SPARE * total:
                    return None
                micro_batch = self.recipe.batch_size // self.recipe.num_accumulation_rounds
                return trials.least_seconds(work, clock) / (len(passes) * num_micro_batches * micro_batch)
        except Exception as error:
            if not failures.is_out_of_memory(error, in_trial=True):
                raise
            return None
        finally:
            for side in self.sides.values():
                side.optimizer.zero_grad()
            torch.cuda.empty_cache()

    def _average(self) -> None:
        """Moves the EMA net, and normalises it before an evaluation, where the published code does."""
        recipe, nimg = self.recipe, self.nimg
        update_ema(
            self.ema,
            self.generator,
            halflife_nimg=recipe.ema_halflife_nimg,
            rampup_ratio=recipe.ema_rampup_ratio,
            nimg=nimg,
            batch_size=recipe.batch_size,
        )
        every = recipe.evaluate_every_nimg
        if self._normalizes_ema and (nimg + recipe.batch_size) // every > nimg // every:
            force_normalize_(self.ema)


class _Masked:
    """A network whose every pass has the dropout masks of one micro-batch. Implements `Denoiser`."""

    def __init__(self, net: Preconditioned, batch: MicroBatch) -> None:
        self.spec, self._net, self._batch = net.spec, net, batch

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        return cast(Tensor, self._masked(self._net, *inputs, **options))

    def __getattr__(self, name: str) -> Any:
        return partial(self._masked, getattr(self._net, name))

    def _masked(self, call: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        with dropout_seeded(self._batch, self._net):
            return call(*inputs, **options)


def trainable_copy(net: Preconditioned, dropout: float, *, keep_logvar: bool) -> Preconditioned:
    """A copy that trains, with this dropout, and with its uncertainty head or without."""
    copied = copy.deepcopy(net).requires_grad_(True)
    copied.set_dropout(dropout)
    if not keep_logvar:
        drop_logvar_(copied)
    return copied
