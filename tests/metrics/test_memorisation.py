"""Authenticity and the generalisation gap: definitions, the published fit, copies against fresh images, errors."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

from sidactl.errors import SidaError
from sidactl.metrics import authenticity, generalisation_gap, memorisation


def error(function: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(SidaError) as caught:
        function(*args, **options)
    return str(caught.value)


@pytest.fixture
def rng() -> np.random.RandomState:
    return np.random.RandomState(0)


# Authenticity


def share_by_definition(train: np.ndarray, generated: np.ndarray) -> float:
    apart = cdist(train, train) + np.diag(np.full(len(train), np.inf))
    distances = cdist(generated, train)
    nearest = distances.argmin(1)
    return 100 * float((distances.min(1) > apart.min(1)[nearest]).mean())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_authenticity_by_definition(rng: np.random.RandomState, dtype: Any) -> None:
    train, generated = rng.standard_normal((90, 5)).astype(dtype), rng.standard_normal((70, 5)).astype(dtype)
    expected = pytest.approx(share_by_definition(train, generated))
    for block in (4096, 11):
        assert authenticity(train, generated, block=block) == expected
    assert authenticity(train[::-1], torch.tensor(generated[::-1].copy()), block=32) == expected


def test_copies_are_not_authentic_and_fresh_images_are_half_of_the_time(rng: np.random.RandomState) -> None:
    train, fresh = rng.standard_normal((2, 1000, 6))
    assert authenticity(train, train[::-1]) == 0
    assert authenticity(train, train + 1e-4 * rng.standard_normal(train.shape)) == 0
    assert authenticity(train, fresh) == pytest.approx(50, abs=10)
    assert authenticity(train, 10 + fresh) == 100
    # In many dimensions most points share a few neighbours near the centre, which are far from each other.
    assert authenticity(*rng.standard_normal((2, 500, 512))) > 65
    half = np.concatenate([train[:500], fresh[:500]])
    assert authenticity(train, half) == pytest.approx(authenticity(train, fresh[:500]) / 2)


def test_copies_are_found_beside_a_large_mean_and_among_duplicates(rng: np.random.RandomState) -> None:
    """Where distances by a matrix product in float32 are rounding alone."""
    train = (rng.standard_normal((400, 8)) + 300).astype(np.float32)
    assert authenticity(train, train) == 0
    twice = np.concatenate([train, train])
    assert authenticity(twice, train) == 0
    assert authenticity(twice, train + np.float32(1e-3)) == 100


def test_authenticity_errors() -> None:
    ones = np.ones((5, 2))
    assert error(authenticity, ones, np.ones((5, 3))) == (
        "train and generated features must have one dimension, got 2 and 3. Take both from the same detector."
    )
    assert error(authenticity, ones[:1], ones) == "train features must number >= 2, got 1. Score more images."
    assert error(authenticity, ones, ones[:0]) == "generated features must number >= 1, got 0. Score more images."
    assert error(authenticity, ones[0], ones) == (
        "train features must be a matrix [N, F], got shape [2]. Make each item one row."
    )
    assert error(authenticity, ones, ones * np.nan) == (
        "generated features must be finite, row 0 is not. Look at the image behind it."
    )
    wide = np.diag(np.full(5, 1e30)).astype(np.float32)
    assert error(authenticity, wide, wide) == (
        "feature distances must fit in float32, they overflow. Use a higher precision."
    )


# Generalisation gap


@pytest.fixture
def sets(rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Train [300, 12], held-out [200, 12] and generated [250, 12], of one distribution on a plane with noise."""
    plane = rng.standard_normal((4, 12))
    train, held_out, generated = (
        rng.standard_normal((num, 4)) @ plane + 0.3 * rng.standard_normal((num, 12)) + 2 for num in (300, 200, 250)
    )
    return train, held_out, generated


def by_autograd(train: Any, held_out: Any, generated: Any, num_passes: int = 50) -> float:
    """The published fit, dense and differentiated by torch."""
    mean, std = held_out.mean(0), held_out.std(0, ddof=1)
    train, held_out, generated = (torch.tensor((x - mean) / std) for x in (train, held_out, generated))
    num_features = train.shape[1]

    def log_density(squares: torch.Tensor, log_variances: torch.Tensor) -> torch.Tensor:
        return -0.5 * (squares / log_variances.exp() + num_features * (log_variances + math.log(2 * math.pi)))

    def squares(rows: torch.Tensor) -> torch.Tensor:
        return torch.tensor(cdist(rows, generated, "sqeuclidean"))

    from_train, from_held_out = squares(train), squares(held_out)
    from_origin = 0.81 * (train - train.mean(0)).square().sum(1, keepdim=True)
    log_variances = ((from_train.amin(0) + 1e-3) / num_features).log().requires_grad_()
    origin = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([log_variances, origin], lr=0.5)
    for _ in range(num_passes):
        optimiser.zero_grad()
        parts = log_density(from_train, log_variances) - math.log(len(generated))
        likelihood = torch.cat([parts, log_density(from_origin, origin)], 1).logsumexp(1)
        loss = -likelihood.mean() / num_features
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            log_variances.clamp_(-40, 20)
    seen, unseen = (
        log_density(each, log_variances.detach()).logsumexp(1).mean() for each in (from_train, from_held_out)
    )
    return 100 / num_features * float(unseen - seen)


def test_gap_agrees_with_the_published_fit(sets: Any) -> None:
    train, held_out, _ = sets
    gap = generalisation_gap(*sets, seed=0)
    # The steps of the published code (marcojira/fld, fld/MoG.py at 245ac7c), dense, in float64, on these arrays
    assert gap == pytest.approx(-11.329475696034141, rel=1e-9)
    assert gap == pytest.approx(by_autograd(*sets), rel=1e-9)
    near = train[:250] + 0.05 * np.random.RandomState(1).standard_normal((250, 12))
    assert generalisation_gap(train, held_out, near, seed=0) == pytest.approx(
        by_autograd(train, held_out, near), rel=1e-6
    )
    single = [torch.tensor(rows, dtype=torch.float32, requires_grad=True) for rows in sets]
    assert generalisation_gap(*single, seed=0) == pytest.approx(gap, rel=1e-4)


def test_neither_blocks_nor_order_nor_what_is_kept_count(sets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pytest.approx(generalisation_gap(*sets, seed=0), rel=1e-9)
    assert generalisation_gap(*sets, seed=1, block=37) == expected
    assert generalisation_gap(*(rows[::-1] for rows in sets), seed=0) == expected
    for kept in (0, 3 * 37 * 250 * 8):
        monkeypatch.setattr(memorisation, "KEPT_BYTES", kept)
        assert generalisation_gap(*sets, seed=0, block=37) == expected


@pytest.mark.parametrize("num_generated", [1, 2])
def test_the_fit_reaches_the_likeliest_variances(sets: Any, num_generated: int) -> None:
    """Few Gaussians, whose optimum scipy finds from the density as scipy.stats would write it."""
    train, held_out, _ = (rows[:, :3] for rows in sets)
    mean, std = held_out.mean(0), held_out.std(0, ddof=1)
    centres = np.array([[0.5, 0.0, -0.2], [-0.8, 0.3, 0.6]])[:num_generated]
    x, y = (train - mean) / std, (held_out - mean) / std

    def density(squares: np.ndarray, log_variance: float) -> np.ndarray:
        return np.exp(-0.5 * squares / np.exp(log_variance)) / (2 * np.pi * np.exp(log_variance)) ** 1.5

    def mixture(rows: np.ndarray, log_variances: np.ndarray) -> np.ndarray:
        squares = cdist(rows, centres, "sqeuclidean")
        return np.mean([density(squares[:, j], log_variances[j]) for j in range(num_generated)], axis=0)

    from_origin = 0.81 * ((x - x.mean(0)) ** 2).sum(1)
    best = minimize(
        lambda s: -np.log(mixture(x, s[:-1]) + density(from_origin, s[-1])).mean(),
        np.zeros(num_generated + 1),
        method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 5000},
    ).x[:-1]
    expected = 100 / 3 * (np.log(mixture(y, best)).mean() - np.log(mixture(x, best)).mean())
    found = generalisation_gap(train, held_out, centres * std + mean, num_passes=1000, seed=0)
    assert found == pytest.approx(expected, abs=1e-3)


def test_the_gap_of_copies_is_deep_and_that_of_fresh_images_small(rng: np.random.RandomState) -> None:
    train, held_out, fresh = rng.standard_normal((3, 400, 6))
    gap = generalisation_gap(train, held_out, fresh, seed=0)
    assert abs(gap) < 20
    near = generalisation_gap(train, held_out, train + 0.01 * rng.standard_normal(train.shape), seed=0)
    assert near < -1000
    assert generalisation_gap(train, held_out, train, seed=0) < near
    half = generalisation_gap(train, held_out, np.concatenate([train[:200], fresh[:200]]), seed=0)
    assert near < half < gap - 20
    # The sign: images that are nearer to the held-out ones.
    assert generalisation_gap(train, held_out, held_out, seed=0) > 5


def test_many_generated_images_are_cut_by_the_seed(sets: Any) -> None:
    train, held_out, generated = sets
    cut = generated[np.random.RandomState(4).choice(250, 100, replace=False)]
    expected = generalisation_gap(train, held_out, cut, seed=0)
    assert generalisation_gap(*sets, num_generated=100, seed=4) == pytest.approx(expected, rel=1e-12)
    assert generalisation_gap(*sets, num_generated=100, seed=5) != pytest.approx(expected, rel=1e-3)
    assert generalisation_gap(*sets, num_generated=250, seed=5) == generalisation_gap(*sets, seed=4)


def test_features_that_never_vary_do_not_count_for_the_fit(sets: Any) -> None:
    wider = [np.concatenate([rows, np.full((len(rows), 12), 7.0)], 1) for rows in sets]
    assert math.isfinite(generalisation_gap(*wider, seed=0))


def test_gap_errors() -> None:
    ones = np.ones((5, 2))
    assert error(generalisation_gap, ones, np.ones((5, 3)), ones, seed=0) == (
        "train and held-out features must have one dimension, got 2 and 3. Take both from the same detector."
    )
    assert error(generalisation_gap, ones, ones[:1], ones, seed=0) == (
        "held-out features must number >= 2, got 1. Score more images."
    )
    for name, sets in (("train", (ones[:0], ones, ones)), ("generated", (ones, ones, ones[:0]))):
        assert error(generalisation_gap, *sets, seed=0) == (
            f"{name} features must number >= 1, got 0. Score more images."
        )
    assert error(generalisation_gap, ones, ones[0], ones, seed=0) == (
        "held-out features must be a matrix [N, F], got shape [2]. Make each item one row."
    )
    assert error(generalisation_gap, ones, ones * np.inf, ones, seed=0) == (
        "held-out features must be finite, row 0 is not. Look at the image behind it."
    )
    assert error(generalisation_gap, ones, ones, ones, num_generated=0, seed=0).startswith(
        "number of generated points must be >= 1, got 0. "
    )
    assert error(generalisation_gap, ones, ones, ones, num_passes=0, seed=0).startswith(
        "number of passes must be >= 1, got 0. "
    )
    far = np.full((5, 2), 1e30, np.float32)
    assert error(generalisation_gap, ones.astype(np.float32), ones.astype(np.float32), far, seed=0) == (
        "likelihoods must fit in float32, they overflow. Use a higher precision."
    )
