"""Dropout of passes that hold several micro-batches, each with the masks that it would have by itself."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """torch's dropout of x [B, ...]; within `masks_of` micro-batch by micro-batch."""
    masks = _masks
    if masks is None or not training or not probability:
        return F.dropout(x, probability, training)
    return masks.dropout(x, probability)


class _Masks:
    """A random state for each micro-batch, which torch's own becomes while its masks are drawn."""

    def __init__(self, states: Sequence[Tensor], size: int) -> None:
        self.states, self.size = list(states), size

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        count, parts = len(self.states), x.split(self.size)
        assert len(parts) % count == 0
        dropped = list(parts)
        for index, state in enumerate(self.states):
            # By itself a micro-batch of fakes would lie before its reals, one draw for both.
            own = parts[index::count]
            _set_state(state, x.device)
            found = F.dropout(own[0] if len(own) == 1 else torch.cat(own), probability, True)
            self.states[index] = _state(x.device)
            dropped[index::count] = found.split(self.size)
        return torch.cat(dropped)


_masks: _Masks | None = None
"""of the pass that is made now: passes with dropout go one by one, their backward in threads of torch's own"""


@contextmanager
def masks_of(seeds: Sequence[int], size: int, device: torch.device) -> Iterator[None]:
    """Within the block a pass holds micro-batches of `size` images, one after the other, with masks of these seeds.

    It may hold them several times over, as fakes and then as reals. Changes the state of torch's generator.
    """
    states = []
    for seed in seeds:
        torch.manual_seed(seed)
        states.append(_state(device))
    with _in_force(_Masks(states, size)):
        yield


def replayed() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What a forward pass is made in, and in what it is computed anew, so that masks are the same; for `checkpoint`."""
    anew = None if _masks is None else _Masks(_masks.states, _masks.size)
    return _in_force(_masks), _in_force(anew)


@contextmanager
def _in_force(masks: _Masks | None) -> Iterator[None]:
    global _masks
    before, _masks = _masks, masks
    try:
        yield
    finally:
        _masks = before


def _state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
