"""No metric holds all pairs of points at once, nor copies of the features: 50,000 x 2048 of them must fit into 3 GB."""

import tracemalloc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sidactl import metrics
from sidactl.metrics import memorisation

NUM, DIM, BLOCK = 4000, 64, 128


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that torch and numpy held at a time of what they took within, each by its own count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        tracemalloc.start()
        try:
            function()
            of_numpy = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert seen.profiler
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        most = max(most, held)
    return most + of_numpy


def features(num: int, seed: int) -> Tensor:
    return torch.randn(num, DIM, generator=torch.Generator().manual_seed(seed))


def gap(real: Tensor, fakes: Tensor) -> float:
    return metrics.generalisation_gap(
        real, features(800, 2), fakes, seed=0, block=BLOCK, num_passes=2, num_generated=1000
    )


METRICS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "authenticity": lambda real, fakes: metrics.authenticity(real, fakes, block=BLOCK),
    "coverage": lambda real, fakes: metrics.density_coverage(real, fakes, block=BLOCK),
    "gap": gap,
    "kid": lambda real, fakes: metrics.kernel_distance(real, fakes, subset_size=100, num_subsets=5, seed=0),
    "mind": lambda real, fakes: metrics.mind(real, fakes, seed=0, num_directions=64, block=BLOCK),
    "precision and recall": lambda real, fakes: metrics.precision_recall(real, fakes, block=BLOCK),
    "vendi": lambda real, fakes: metrics.vendi(fakes),
}


@pytest.mark.parametrize("name", METRICS)
def test_memory_does_not_grow_with_the_pairs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(memorisation, "KEPT_BYTES", 1 << 20)
    real, fakes = features(NUM, 0), features(NUM, 1)
    peak = peak_bytes(lambda: METRICS[name](real, fakes))
    assert 0 < peak < NUM * NUM * 4 / 4  # a quarter of all distances in float32


def test_distances_are_kept_within_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fakes = features(NUM, 0), features(NUM, 1)
    peaks = []
    for limit in (1 << 20, 1 << 23):
        monkeypatch.setattr(memorisation, "KEPT_BYTES", limit)
        peaks.append(peak_bytes(lambda: gap(real, fakes)))
    assert (1 << 23) - (1 << 20) - 2 * BLOCK * 1000 * 4 < peaks[1] - peaks[0] < 1 << 23
