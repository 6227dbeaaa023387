"""Density and coverage: the published package's values, which is which, and memory by blocks; FDr's errors."""

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from sidactl.errors import SidaError
from sidactl.metrics import density_coverage, frechet_ratio, precision_recall


def error(function: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(SidaError) as caught:
        function(*args, **options)
    return str(caught.value)


def by_definition(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    radii = np.sort(cdist(real, real), axis=1)[:, k]
    inside = cdist(real, generated) < radii[:, None]
    return inside.sum() / (k * len(generated)), inside.any(1).mean()


@pytest.fixture
def rng() -> np.random.RandomState:
    return np.random.RandomState(0)


def test_density_and_coverage_agree_with_the_published_package(rng: np.random.RandomState) -> None:
    real = rng.standard_normal((300, 16))
    generated = 0.8 * rng.standard_normal((200, 16)) + 0.1
    # prdc.compute_prdc(real, generated, k) of prdc 0.2
    assert density_coverage(real, generated, 1) == pytest.approx((2.33, 0.5666666666666667), rel=1e-12)
    assert density_coverage(real, generated) == pytest.approx((2.384, 0.98), rel=1e-12)
    assert precision_recall(real, generated, 5) == pytest.approx((0.995, 0.5433333333333333), rel=1e-12)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_density_and_coverage_by_definition(rng: np.random.RandomState, k: int) -> None:
    real, generated = rng.standard_normal((83, 6)), 1.2 * rng.standard_normal((61, 6))
    expected = pytest.approx(by_definition(real, generated, k), rel=1e-12)
    for block in (4096, 10):
        assert density_coverage(real, generated, k, precision="float64", block=block) == expected
    assert density_coverage(real[::-1], torch.tensor(generated[::-1].copy()), k, precision="float64") == expected


def test_the_surface_of_a_ball_is_outside() -> None:
    real = np.array([[0.0], [1.0], [2.0], [3.0]])
    # Each ball has radius 1; the two generated points lie on surfaces of balls, and in the centres of others.
    assert density_coverage(real, np.array([[1.0], [4.0]]), 1, precision="float64") == (0.5, 0.25)
    assert precision_recall(real, np.array([[1.0], [4.0]]), 1, precision="float64") == (1, 1)


def test_a_collapsed_generator_is_dense_and_outliers_cost_density_alone(rng: np.random.RandomState) -> None:
    modes = np.repeat(np.eye(5) * 20, 100, 0)
    real, fresh = (modes + rng.standard_normal((500, 5)) for _ in range(2))
    density, coverage = density_coverage(real, fresh)
    assert density == pytest.approx(1, abs=0.1)
    assert coverage > 0.9
    collapsed = density_coverage(real, 0.5 * rng.standard_normal((500, 5)) + modes[0])
    assert collapsed[0] > 1.5
    assert collapsed[1] < 0.25
    scattered = density_coverage(real, np.concatenate([fresh, 100 + 10 * rng.standard_normal((500, 5))]))
    assert scattered == (pytest.approx(density / 2), coverage)
    # Outliers among the real images: recall's balls around them would take in what the generator never drew.
    assert density_coverage(np.concatenate([real, 1e3 + np.eye(5)]), fresh, 3)[0] == pytest.approx(density, abs=0.1)


def test_coverage_of_fresh_images_has_a_closed_form(rng: np.random.RandomState) -> None:
    num, k = 400, 5
    for num_fresh in (200, 800):
        found = [
            density_coverage(rng.standard_normal((num, 4)), rng.standard_normal((num_fresh, 4)))[1] for _ in range(10)
        ]
        missed = math.comb(num - 1 + num_fresh - k, num_fresh) / math.comb(num - 1 + num_fresh, num_fresh)
        assert np.mean(found) == pytest.approx(1 - missed, abs=0.01)


def test_density_coverage_errors() -> None:
    ones = np.ones((6, 2))
    assert error(density_coverage, ones, np.ones((5, 3))) == (
        "real and generated features must have one dimension, got 2 and 3. Take both from the same detector."
    )
    assert error(density_coverage, ones[:5], ones) == (
        "real features must number >= k + 1 = 6, got 5. Score more images, or pass a smaller --neighbours."
    )
    assert error(density_coverage, ones, ones, 0) == "k must be >= 1, got 0. The published metric uses 5."
    assert error(density_coverage, ones, ones[:0]) == "generated features must number >= 1, got 0. Score more images."
    for wrong, shape in ((ones[0], "[2]"), (ones[:, :0], "[6, 0]")):
        assert error(density_coverage, wrong, ones) == (
            f"real features must be a matrix [N, F], got shape {shape}. Make each item one row."
        )
    bad = ones.copy()
    bad[3, 1] = -np.inf
    assert error(density_coverage, ones, bad) == (
        "generated features must be finite, row 3 is not. Look at the image behind it."
    )
    wide = np.diag(np.full(6, 1e3))
    assert error(density_coverage, wide, wide, precision="float16") == (
        "feature distances must fit in float16, they overflow. Use a higher precision."
    )


def test_no_metric_holds_a_distance_of_every_pair() -> None:
    """A process of its own, as a peak stays; a matrix of all pairs would take 144 MB."""
    script = """
import resource, torch
from sidactl.metrics import authenticity, density_coverage, mind, vendi
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
real, generated = torch.randn(2, 6_000, 16)
def run(num):
    density_coverage(real[:num], generated[:num], block=512)
    authenticity(real[:num], generated[:num], block=512)
    mind(real[:num], generated[:num], num_directions=64, seed=0)
    vendi(generated[:num])
run(600)
before = peak()
run(6_000)
print((peak() - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 70


def test_frechet_ratio_is_the_mean_over_detectors() -> None:
    assert frechet_ratio([(3.0, 2.0)]) == 1.5
    assert frechet_ratio([(3.0, 2.0), (1.0, 2.0), (4.0, 1.0)]) == 2.0
    assert frechet_ratio([(0.0, 2.0)]) == 0


def test_frechet_ratio_errors() -> None:
    assert error(frechet_ratio, []) == "a Fréchet ratio needs >= 1 detector, got none. Name a detector."
    for distance, held_out in ((1.0, 0.0), (1.0, -1e-9), (1.0, math.nan), (math.nan, 1.0), (math.inf, 1.0)):
        assert error(frechet_ratio, [(1.0, 1.0), (distance, held_out)]) == (
            "Fréchet distances must be finite and that of held-out images positive, "
            f"got {distance:.3g} and {held_out:.3g} of detector 2. Hold out images that are not in the reference."
        )
