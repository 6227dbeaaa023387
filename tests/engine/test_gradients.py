"""What gradients take: memory beside the next pass, and collectives."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sidactl.engine import gradients, ranks
from tests.worlds import TINY_EDM2, distillation


def test_the_gradients_of_a_pass_are_gone_before_the_next_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    run = distillation(TINY_EDM2, generator_from_nimg=None, num_accumulation_rounds=4)
    run.num_threads = 1
    computed, forward = gradients.GradientSum.of, run._batch
    last: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def noting(total: gradients.GradientSum, *arguments: Any) -> Sequence[Tensor | None]:
        found = computed(total, *arguments)
        last[:] = [weakref.ref(value) for value in found if value is not None]
        return found

    def counting(*arguments: Any) -> Any:
        alive.append(sum(reference() is not None for reference in last))
        return forward(*arguments)

    monkeypatch.setattr(gradients.GradientSum, "of", noting)
    monkeypatch.setattr(run, "_batch", counting)
    gc.disable()
    try:
        run.step()
    finally:
        gc.enable()
    assert alive == [0] * 8
    assert last


class Sent:
    """Two processes that have the same: a collective that doubles what it is given, once it is waited for."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.under_way = self.most_under_way = 0

    def all_reduce(self, values: Tensor, async_op: bool) -> "Sent.Work":
        assert async_op
        self.sizes.append(values.nbytes)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        return Sent.Work(self, values)

    class Work:
        def __init__(self, sent: "Sent", values: Tensor) -> None:
            self.sent, self.values = sent, values

        def wait(self) -> None:
            self.values *= 2
            self.sent.under_way -= 1


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("buffer_bytes", "num_collectives"), [(1 << 26, 1), (20_000, 2), (1, 12)])
def test_gradients_of_all_processes_are_summed_in_few_collectives(
    buffer_bytes: int, num_collectives: int, order: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = Sent()
    monkeypatch.setattr(gradients, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(ranks, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(ranks.dist, "all_reduce", sent.all_reduce)
    monkeypatch.setattr(ranks, "_BUFFER_BYTES", buffer_bytes)
    torch.manual_seed(0)
    net = torch.nn.Sequential(*[torch.nn.Conv2d(8, 8, 3) for _ in range(6)])
    for parameter in net.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=order)
    total = gradients.GradientSum(net, 1)
    values = [torch.randn_like(p) for p in net.parameters()]
    total.add(values)
    total.finish()
    for parameter, value in zip(net.parameters(), values, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, 2 * value)
        assert parameter.grad.stride() == parameter.stride()
    assert len(sent.sizes) == num_collectives
    assert sum(sent.sizes) == 8 * sum(p.numel() for p in net.parameters())
    assert sent.under_way == 0
    assert sent.most_under_way == min(2, num_collectives)
