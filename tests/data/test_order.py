"""The order of training: every image once an epoch, by its position alone."""

import json

import numpy as np
import pytest

from sidactl.data.dataset import drawn_subset
from sidactl.data.order import DataOrder
from tests.golden import golden_metrics
from tests.worlds import EXPECTED


@pytest.mark.parametrize("num_items", [1, 7, 64])
def test_order_visits_every_item_once_per_epoch(num_items: int) -> None:
    order = DataOrder(num_items, seed=3)
    for epoch in range(3):
        assert sorted(order.indices(epoch * num_items, num_items)) == list(range(num_items))


def test_order_depends_on_position_alone() -> None:
    whole = DataOrder(50, seed=9).indices(0, 400)
    for batch in (1, 7, 50, 130):
        order = DataOrder(50, seed=9)
        parts = [order.indices(start, min(batch, 400 - start)) for start in range(0, 400, batch)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    order = DataOrder(50, seed=9)
    for start in (390, 3, 250, 0, 390):
        np.testing.assert_array_equal(order.indices(start, 10), whole[start : start + 10])
    assert order.indices(5, 0).shape == (0,)


def test_order_is_fixed_for_ever_and_differs_by_seed_and_epoch() -> None:
    order = DataOrder(10, seed=5)
    assert order.indices(0, 10).tolist() == [3, 2, 4, 9, 6, 7, 0, 8, 5, 1]
    assert order.indices(10, 10).tolist() == [1, 9, 0, 6, 8, 7, 4, 3, 2, 5]
    assert DataOrder(10, seed=6).indices(0, 10).tolist() != [3, 2, 4, 9, 6, 7, 0, 8, 5, 1]


def test_order_is_uniform() -> None:
    order = DataOrder(4, seed=0)
    counts = np.zeros((4, 4))
    for epoch in range(2000):
        counts[np.arange(4), order.indices(4 * epoch, 4)] += 1
    assert np.abs(counts / 2000 - 0.25).max() < 0.04  # four standard deviations


def test_a_subset_is_drawn_as_the_published_tools_draw_it() -> None:
    loader = json.loads(golden_metrics(EXPECTED).read_text())["loader"]
    for size in (10, 25, 1000):
        for seed in (0, 1, 12345):
            expected = loader[f"edm_max{size}_seed{seed}"]
            assert drawn_subset(60, size, seed).tolist() == expected
            assert drawn_subset(60, size, seed + (1 << 31)).tolist() == expected
