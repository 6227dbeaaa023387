"""The Monge Inception distance: an assignment solver's values, closed forms, its standard error."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from sidactl.errors import SidaError
from sidactl.metrics import mind


def error(*args: Any, **options: Any) -> str:
    with pytest.raises(SidaError) as caught:
        mind(*args, **options)
    return str(caught.value)


def by_assignment(real: np.ndarray, generated: np.ndarray, directions: np.ndarray) -> float:
    """The definition without sorting: the cheapest pairing of the projections on each direction."""
    costs = []
    for direction in directions / np.linalg.norm(directions, axis=1, keepdims=True):
        squares = ((real @ direction)[:, None] - (generated @ direction)) ** 2
        costs.append(squares[linear_sum_assignment(squares)].mean())
    return 3 * real.shape[1] * float(np.mean(costs))


@pytest.fixture
def rng() -> np.random.RandomState:
    return np.random.RandomState(0)


def test_mind_is_the_cheapest_pairing_of_projections(rng: np.random.RandomState) -> None:
    real, generated = rng.standard_normal((60, 5)), 2 * rng.standard_normal((60, 5)) + 1
    expected = by_assignment(real, generated, np.random.RandomState(3).standard_normal((150, 5)))
    assert mind(real, generated, num_directions=150, seed=3) == pytest.approx(expected, rel=1e-12)
    assert mind(real, generated, num_directions=150, seed=3, block=7) == pytest.approx(expected, rel=1e-12)
    assert mind(real[::-1], torch.tensor(generated), num_directions=150, seed=3) == pytest.approx(expected, rel=1e-12)
    assert mind(generated, real, num_directions=150, seed=3) == pytest.approx(expected, rel=1e-12)
    single = [torch.tensor(rows, dtype=torch.float32, requires_grad=True) for rows in (real, generated)]
    assert mind(*single, num_directions=150, seed=3) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_larger_set_is_cut_to_a_random_subset_of_the_seed(rng: np.random.RandomState, swapped: bool) -> None:
    few, many = rng.standard_normal((40, 3)), rng.standard_normal((90, 3)) + 1
    draws = np.random.RandomState(5)
    chosen = many[draws.choice(90, 40, replace=False)]
    expected = by_assignment(few, chosen, draws.standard_normal((20, 3)))
    sets = (many, few) if swapped else (few, many)
    assert mind(*sets, num_directions=20, seed=5) == pytest.approx(expected, rel=1e-12)
    assert mind(*sets, num_directions=20, seed=6) != pytest.approx(expected, rel=1e-3)


def test_mind_of_gaussians_has_closed_forms(rng: np.random.RandomState) -> None:
    real, shift = rng.standard_normal((3000, 16)), np.linspace(-1, 1, 16)
    # On u the sets lie u.m apart, and the mean of (u.m)^2 is |m|^2 / F.
    moved = mind(real, real + shift, num_directions=4000, seed=0)
    assert moved == pytest.approx(3 * shift @ shift, rel=5 * np.sqrt(2 / 4000))
    # N(0, 1) and N(0, s^2) are (s - 1)^2 apart on each of them.
    assert mind(real, 3 * rng.standard_normal((3000, 16)), seed=0) == pytest.approx(3 * 16 * 4, rel=0.03)
    assert mind(real, real[::-1], seed=0) == pytest.approx(0, abs=1e-25)


def test_fresh_images_are_nearer_the_more_there_are(rng: np.random.RandomState) -> None:
    first, second = rng.standard_normal((2, 4000, 8))
    few, many = (mind(first[:num], second[:num], seed=0) for num in (500, 4000))
    assert 0 < many < few / 4
    assert few < 1


def test_the_standard_error_falls_with_the_directions(rng: np.random.RandomState) -> None:
    """A shift is the case where directions differ most that is common: sqrt(2 / L) of the value."""
    real = rng.standard_normal((50, 64))
    spread = [
        np.std([mind(real, real + np.eye(64)[0], num_directions=num, seed=seed) for seed in range(60)]) / 3
        for num in (50, 500)
    ]
    assert spread[0] == pytest.approx(np.sqrt(2 / 50), rel=0.4)
    assert spread[1] == pytest.approx(np.sqrt(2 / 500), rel=0.4)


def test_mind_errors() -> None:
    ones = np.ones((5, 2))
    assert error(ones, np.ones((5, 3)), seed=0) == (
        "real and generated features must have one dimension, got 2 and 3. Take both from the same detector."
    )
    assert error(ones, ones, num_directions=0, seed=0).startswith("number of directions must be >= 1, got 0. ")
    assert error(ones[:0], ones, seed=0) == "real features must number >= 1, got 0. Score more images."
    assert error(ones, ones[:0], seed=0) == "generated features must number >= 1, got 0. Score more images."
    for wrong, shape in ((ones[0], "[2]"), (ones[:, :0], "[5, 0]")):
        assert error(ones, wrong, seed=0) == (
            f"generated features must be a matrix [N, F], got shape {shape}. Make each item one row."
        )
    assert error(ones * np.nan, ones, seed=0) == (
        "real features must be finite, row 0 is not. Look at the image behind it."
    )
