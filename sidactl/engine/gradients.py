"""Gradients of a step: summed over passes and processes, and none of weights that do not train."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from sidactl.engine.configure import is_compiled
from sidactl.engine.ranks import all_reduce_sums, rank_and_size
from sidactl.engine.sharding import is_sharded, local
from sidactl.nets import Preconditioned
from sidactl.nets.edm2 import MPConv


class GradientSum:
    """The gradients of a net, added up over the passes of a step and once over all processes.

    It adds in float64: Adam without momentum makes steps as large out of small gradients as out of large ones, so that
    sums which differ in their last bit, as those of other orders do, would lead to another run within a few steps.
    Of what is sharded FSDP2 adds up the rest, in the same way. Of weights that are held normalised (`edm2.holding`) the
    gradients with respect to what is held are summed, and then go back through the normalisation once.

    loss_scale: a power of two, on the net's device, that losses are multiplied by and the sums divided by, so that the
    small gradients of a loss divided by a large batch are numbers of float16; exact in every other type.
    """

    def __init__(self, net: nn.Module, num_passes: int, loss_scale: Tensor | None = None) -> None:
        trained = [p for p in net.parameters() if p.requires_grad]
        self._parameters = [p for p in trained if not is_sharded(p)]
        self._sharded = [p for p in trained if is_sharded(p)]
        self._is_needed = num_passes > 1 or rank_and_size()[1] > 1
        self._loss_scale = loss_scale
        held = {m.weight: m for m in net.modules() if isinstance(m, MPConv) and m.held is not None}
        self._normalizers = {p: held[p] for p in self._parameters if p in held}
        self._leaves = [cast(Tensor, held[p].held) if p in held else p for p in self._parameters]
        self._sums: dict[nn.Parameter, Tensor] = {}

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss, or a gradient of it, whose gradients `add` takes."""
        return loss if self._loss_scale is None else loss * self._loss_scale

    def of(self, output: Tensor, gradient: Tensor | None = None) -> Sequence[Tensor | None]:
        """The gradients of a pass, to be added; of a net that is not sharded several threads may ask at a time.

        gradient: that of a loss which was `scaled`, with respect to the output; without it the output is the loss.
        """
        if gradient is None:
            output = self.scaled(output)
        if not self._sharded:
            return torch.autograd.grad(output, self._leaves, gradient, allow_unused=True)
        torch.autograd.backward(output, gradient)
        gradients = [p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return gradients

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Takes the gradients of a pass."""
        for parameter, value in zip(self._parameters, gradients, strict=True):
            if value is None:
                continue
            if not self._is_needed and parameter in self._normalizers:
                value = self._normalizers[parameter].gradient(value)
            if value.stride() != parameter.stride():  # the fused optimiser takes both for laid out alike
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            if not self._is_needed:
                parameter.grad = value
            elif parameter in self._sums:
                self._sums[parameter] += value
            else:
                self._sums[parameter] = value.to(torch.float64)

    def finish(self) -> None:
        """Gives the net the sum of all that was taken, in all processes, without the loss scale."""
        if self._loss_scale is not None:
            for parameter in self._sharded:
                if parameter.grad is not None:
                    local(parameter.grad).div_(self._loss_scale)
            for parameter in () if self._is_needed else self._parameters:
                if parameter.grad is not None:  # not in its place: autograd may give two parameters the same tensor
                    parameter.grad = parameter.grad / self._loss_scale
        finished: deque[nn.Parameter] = deque()

        def taken() -> Iterator[Tensor]:
            while self._sums:  # one by one, so that not all of both is held at a time
                parameter, values = self._sums.popitem()
                finished.append(parameter)
                yield values
                del values

        for values in all_reduce_sums(taken()):
            parameter = finished.popleft()
            if self._loss_scale is not None:
                values /= self._loss_scale
            if parameter in self._normalizers:
                values = self._normalizers[parameter].gradient(values)
            parameter.grad = torch.empty_like(parameter).copy_(values)  # laid out as the fused optimiser takes it


@contextmanager
def without_weight_gradients(net: Preconditioned) -> Iterator[None]:
    """Within the block a compiled net computes no gradients of its weights, whatever is asked for.

    What is not compiled leaves them out by itself where only gradients of its inputs are asked for.
    """
    if not is_compiled(net):
        yield
        return
    trained = [p for p in net.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def sync_gradients(net: nn.Module, now: bool) -> None:
    """Whether the next backward pass of what is sharded of it adds up gradients over the processes."""
    for module in net.modules():
        if hasattr(module, "set_requires_gradient_sync"):
            cast(Any, module).set_requires_gradient_sync(now, recurse=False)
