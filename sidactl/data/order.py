"""The order in which training sees a dataset, by position."""

import numpy as np
from numpy.typing import NDArray


class DataOrder:
    """An endless shuffled order of `num_items` positions that depends on the seed alone.

    Position p of the order is entry p mod num_items of the permutation of epoch p // num_items, so any batch can be
    found from its counter, whatever the batch size, the number of processes or the interruptions before it.
    """

    def __init__(self, num_items: int, seed: int) -> None:
        assert num_items >= 1
        assert seed >= 0
        self.num_items = num_items
        self.seed = seed
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        order = self._permutations.get(epoch)
        if order is None:
            bits = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
            # Raw PCG64 output is fixed for ever; numpy may change what Generator.permutation makes of it.
            order = np.argsort(bits.random_raw(self.num_items), kind="stable")
            # Two epochs at most: a batch may straddle one boundary.
            self._permutations = dict([*self._permutations.items(), (epoch, order)][-2:])
        return order  # not looked up again: another thread may have needed other epochs meanwhile

    def indices(self, start: int, count: int) -> NDArray[np.int64]:
        """Entries start .. start+count-1 of the order: int64 [count], each in 0..num_items-1."""
        assert start >= 0
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.num_items)
            parts.append(self._permutation(epoch)[offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
