"""Noise pairing, by closed forms."""

import math

import numpy as np
import pytest
import torch

from sidactl.errors import SidaError
from sidactl.metrics import pair_distances, pairing


def test_a_distance_is_the_root_of_the_mean_squared_difference_of_values() -> None:
    first, second = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[3.0, 4.0], [3.0, 4.0]])
    assert pair_distances(first, second).tolist() == pytest.approx([5 / math.sqrt(2), 0.0])
    grown = pair_distances(10 * first.repeat(8, axis=1), 10 * second.repeat(8, axis=1))
    assert grown.tolist() == pytest.approx([50 / math.sqrt(2), 0.0])  # per value, however many there are


def test_the_ratio_is_0_for_the_same_map_and_1_for_independent_images() -> None:
    generator = torch.Generator().manual_seed(0)
    theirs, others = (torch.randn(2000, 50, generator=generator) for _ in range(2))
    random = pair_distances(others, theirs)
    assert pairing(pair_distances(theirs, theirs), random) == (0.0, 0.0)
    # Of unit normal values independent images are sqrt(2) apart; x + s e keeps x, at s.
    unkept, _ = pairing(random, random)
    assert unkept == pytest.approx(math.sqrt(2), rel=0.01)
    assert pairing(random, random)[1] == 1.0
    noise = torch.randn(2000, 50, generator=generator)
    distance, ratio = pairing(pair_distances(theirs + 0.5 * noise, theirs), random)
    assert (distance, ratio) == pytest.approx((0.5, 0.5 / math.sqrt(2)), rel=0.01)


def test_one_grey_image_for_all_noise_is_near_and_yet_keeps_nothing() -> None:
    theirs = torch.randn(500, 50, generator=torch.Generator().manual_seed(1))
    grey = torch.zeros_like(theirs)
    distance, ratio = pairing(pair_distances(grey, theirs), pair_distances(grey.flip(0), theirs))
    assert (distance, ratio) == (pytest.approx(1.0, rel=0.02), 1.0)


def test_images_that_are_all_the_same_have_a_ratio_of_1() -> None:
    assert pairing(torch.zeros(3), torch.zeros(3)) == (0.0, 1.0)


def test_what_makes_no_pairs_is_refused() -> None:
    with pytest.raises(SidaError, match=r"^pairs must be of as many rows, got 2 and 3"):
        pair_distances(np.zeros((2, 4)), np.zeros((3, 4)))
    with pytest.raises(SidaError, match=r"^a pairing needs pairs, got none"):
        pairing(torch.zeros(0), torch.zeros(0))
