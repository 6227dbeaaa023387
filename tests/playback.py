"""Recorded random draws, handed out in the order in which the reference made them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Playback:
    """Implements `Draws` from a list of recorded arrays; a draw of another shape than recorded is an error."""

    def __init__(self, recorded: Sequence[np.ndarray]) -> None:
        self._recorded = [torch.from_numpy(array) for array in recorded]

    def _next(self, shape: Sequence[int]) -> Tensor:
        draw = self._recorded.pop(0)
        assert tuple(draw.shape) == tuple(shape), f"asked for {tuple(shape)}, recorded {tuple(draw.shape)}"
        return draw

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self._next(shape)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return self._next(shape)

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        return self._next(shape)

    def exhausted(self) -> bool:
        return not self._recorded
