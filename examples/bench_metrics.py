"""Times the metrics on synthetic features: the Fréchet distance against scipy's sqrtm, and precision and recall.

Expect, on one core: seconds at the defaults; with --dim 2048 about 15 s, nearly all of it sqrtm's, and a
ratio above 5. Precision and recall of 50,000 x 2048 features (--num 50000 --device cuda) are meant for a GPU.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import scipy.linalg
import torch

from sidactl.metrics import FeatureStats, frechet_distance, precision_recall

T = TypeVar("T")


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """The function's result and the seconds it took."""
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def features(num: int, dim: int, seed: int, device: str = "cpu") -> torch.Tensor:
    """Features [num, dim] float32 whose standard deviations fall off as those of Inception features do."""
    generator = torch.Generator(device).manual_seed(seed)
    std = torch.linspace(0, -4, dim, device=device).exp()
    return torch.randn(num, dim, generator=generator, device=device) * std + 0.4


def sqrtm_form(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """The published arithmetic: the trace of the matrix root of the covariances' product."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return float(np.real(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)))


def bench_frechet(dim: int) -> None:
    sets = []
    for seed, num in ((1, 3 * dim), (2, 5 * dim // 2)):
        stats = FeatureStats()
        stats.add(features(num, dim, seed))
        sets += [stats.mean, stats.covariance()]
    ours, seconds = timed(lambda: frechet_distance(*sets))
    reference, reference_seconds = timed(lambda: sqrtm_form(*sets))
    print(f"frechet distance, d = {dim}: {seconds:.2f} s, sqrtm {reference_seconds:.2f} s", end=", ")
    print(f"ratio {reference_seconds / seconds:.1f}, relative difference {abs(ours / reference - 1):.1e}")


def bench_precision_recall(num: int, dim: int, device: str) -> None:
    real, generated = features(num, dim, 3, device), features(num, dim, 4, device) * 0.95
    (precision, recall), seconds = timed(lambda: precision_recall(real, generated))
    if device.startswith("cuda"):
        peak_bytes = torch.cuda.max_memory_allocated(device)
    else:
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"precision and recall, {num} x {dim}: {seconds:.2f} s, peak {peak_bytes / 1e9:.2f} GB", end=", ")
    print(f"precision {precision:.3f}, recall {recall:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512, help="dimension of the Fréchet distance; 0 leaves it out")
    parser.add_argument("--num", type=int, default=2000, help="real and generated rows each; 0 leaves them out")
    parser.add_argument("--feature-dim", type=int, default=2048, help="dimension of precision and recall")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; numpy reads OMP_NUM_THREADS")
    parser.add_argument("--device", default="cpu", help="device of precision and recall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.dim:
        bench_frechet(options.dim)
    if options.num:
        bench_precision_recall(options.num, options.feature_dim, options.device)


if __name__ == "__main__":
    main()
