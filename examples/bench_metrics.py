"""Times the metrics: the Fréchet distance against scipy's sqrtm, precision and recall, and Inception's features.

Expect, on one core: seconds at the defaults; with --dim 2048 about 15 s, nearly all of it sqrtm's, and a
ratio above 5. Precision and recall of 50,000 x 2048 features (--num 50000 --device cuda) are meant for a GPU.
The memory of another metric: --metric gap --num 50000; features of that size are 0.41 GB a set, held-out ones a fifth.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import scipy.linalg
import torch

from sidactl import detectors, metrics
from sidactl.metrics import FeatureStats, frechet_distance, precision_recall
from sidactl.nets.inception import FIDInception

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


def bench_metric(name: str, num: int, dim: int, passes: int) -> None:
    """One metric's time, and the most memory of this process, features included."""
    real, generated, held_out = (features(rows, dim, seed) for rows, seed in ((num, 3), (num, 4), (num // 5, 5)))
    value, seconds = timed(lambda: METRICS[name](real, generated, held_out, passes))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{name}, {num} x {dim}: {seconds:.0f} s, peak {peak_bytes / 1e9:.2f} GB, {value}")


METRICS: Mapping[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], object]] = {
    "authenticity": lambda real, generated, held_out, passes: metrics.authenticity(real, generated),
    "coverage": lambda real, generated, held_out, passes: metrics.density_coverage(real, generated),
    "gap": lambda real, generated, held_out, passes: metrics.generalisation_gap(
        real, held_out, generated, num_passes=passes, seed=0
    ),
    "kid": lambda real, generated, held_out, passes: metrics.kernel_distance(real, generated, subset_size=1000, seed=0),
    "mind": lambda real, generated, held_out, passes: metrics.mind(real, generated, seed=0),
    "prec-recall": lambda real, generated, held_out, passes: metrics.precision_recall(real, generated),
    "vendi": lambda real, generated, held_out, passes: metrics.vendi(generated),
}


def bench_inception(num: int, rounds: int, device: str) -> None:
    """The detector against the same network as torch runs it by default, in turn; the ratio of the medians."""
    torch.manual_seed(0)
    plain = FIDInception().to(device).eval()
    detector = detectors.load("inception", plain.state_dict(), device=device)
    images = torch.randint(0, 256, (num, 3, 32, 32), dtype=torch.uint8)

    @torch.inference_mode()
    def run_plain() -> torch.Tensor:
        parts: list[torch.Tensor] = [plain(part.to(device)).cpu() for part in images.split(detector.images_at_once)]
        return torch.cat(parts)

    difference = float((run_plain() - detector(images)).abs().max())
    times = [(timed(run_plain)[1], timed(lambda: detector(images))[1]) for _ in range(rounds)]
    plain_sec, ours_sec = (sorted(column)[rounds // 2] for column in zip(*times, strict=True))
    print(f"inception, {num} images: {num / ours_sec:.1f} images/s, plain eager {num / plain_sec:.1f}", end=", ")
    print(f"ratio {plain_sec / ours_sec:.2f}, largest difference {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512, help="dimension of the Fréchet distance; 0 leaves it out")
    parser.add_argument("--num", type=int, default=2000, help="real and generated rows each; 0 leaves them out")
    parser.add_argument("--feature-dim", type=int, default=2048, help="dimension of precision and recall")
    parser.add_argument("--metric", choices=METRICS, help="time this one alone, on the CPU")
    parser.add_argument("--passes", type=int, default=50, help="of the gap's fit; one takes as much memory")
    parser.add_argument("--images", type=int, default=0, help="images for Inception; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=5, help="timings of Inception, each against the plain network")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; numpy reads OMP_NUM_THREADS")
    parser.add_argument("--device", default="cpu", help="device of precision and recall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.metric:
        bench_metric(options.metric, options.num, options.feature_dim, options.passes)
        return
    if options.dim:
        bench_frechet(options.dim)
    if options.images:
        bench_inception(options.images, options.rounds, options.device)
    if options.num:
        bench_precision_recall(options.num, options.feature_dim, options.device)


if __name__ == "__main__":
    main()
