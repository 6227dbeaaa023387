"""Metrics: the published numbers, closed forms, and errors in one line."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from sidactl.errors import SidaError
from sidactl.metrics import (
    FeatureStats,
    frechet_distance,
    guided_diffusion_precision_recall,
    inception_score,
    kernel_distance,
    precision_recall,
)
from tests.golden import golden_metrics

Arrays = dict[str, np.ndarray]


def load(name: str) -> Arrays:
    with np.load(golden_metrics(name), allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def expected(name: str) -> Any:
    return json.loads(golden_metrics(name).read_text())


def stats_of(*batches: np.ndarray) -> FeatureStats:
    stats = FeatureStats()
    for batch in batches:
        stats.add(batch)
    return stats


def error(function: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(SidaError) as caught:
        function(*args, **options)
    return str(caught.value)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# Fréchet distance


@pytest.mark.parametrize("name", ["full_d16", "full_d64", "full_d256"])
def test_frechet_full_rank_agrees_with_every_published_form(name: str) -> None:
    arrays, values = load(f"frechet/{name}.npz"), expected("frechet/expected.json")["cases"][name]
    distance = frechet_distance(**arrays)
    for form in ("edm", "edm2", "sid", "guided_diffusion", "torch_fidelity", "edm_swapped"):
        assert distance == pytest.approx(values[form], rel=1e-9)
    swapped = frechet_distance(arrays["mu2"], arrays["sigma2"], arrays["mu1"], arrays["sigma1"])
    assert swapped == pytest.approx(distance, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("rankdef_both", 1e-6),
        ("rankdef_gen_fullrank_ref", 1e-6),
        ("near_identical", 1e-10),
        ("identical", 1e-10),
    ],
)
def test_frechet_of_singular_or_equal_covariances(name: str, tolerance: float) -> None:
    values = expected("frechet/expected.json")["cases"][name]
    distance = frechet_distance(**load(f"frechet/{name}.npz"))
    assert distance == pytest.approx(values["edm"], rel=0, abs=tolerance)
    # Dropping the null space keeps us closer to the exact value than the published root of the product is.
    assert abs(distance - values["true_60_digits"]) <= abs(values["edm"] - values["true_60_digits"])


def test_frechet_of_diagonal_gaussians_has_a_closed_form() -> None:
    std1, std2 = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 0.5])
    distance = frechet_distance(np.zeros(3), np.diag(std1**2), np.array([1.0, -2.0, 0.0]), np.diag(std2**2))
    assert distance == pytest.approx(5 + ((std1 - std2) ** 2).sum(), rel=1e-14)


def test_frechet_of_a_point_is_the_squared_distance_plus_the_trace() -> None:
    mean = np.array([3.0, 4.0])
    assert frechet_distance(mean, np.zeros((2, 2)), np.zeros(2), np.eye(2)) == pytest.approx(27, rel=1e-14)
    assert frechet_distance(mean, np.zeros((2, 2)), mean, np.zeros((2, 2))) == 0


def test_frechet_of_shapes_that_disagree() -> None:
    assert error(frechet_distance, np.zeros(4), np.eye(4), np.zeros(3), np.eye(3)) == (
        "means must be [F] and covariances [F, F] with one F, got mu1 [4], sigma1 [4, 4], mu2 [3], sigma2 [3, 3]. "
        "Take both from the same detector."
    )


def test_frechet_names_the_row_that_is_not_finite() -> None:
    sigma = np.eye(4)
    sigma[2, 1] = np.nan
    assert error(frechet_distance, np.zeros(4), np.eye(4), np.zeros(4), sigma) == (
        "sigma2 must be finite, row 2 is not. Look at the images behind it."
    )


def asymmetric(size: int) -> np.ndarray:
    sigma = np.eye(size)
    sigma[0, 1] = 0.3
    return sigma


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (
            asymmetric(4),
            "sigma2 must be symmetric, it differs from its transpose by up to 0.3, its largest value is 1",
        ),
        (np.diag([1.0, 2.0, -0.5, 1.0]), "sigma2 must hold variances >= 0, that of feature 2 is -0.5"),
        (
            np.eye(4) + 2 * np.eye(4)[[1, 0, 2, 3]] * np.array([[1], [1], [0], [0]]),
            "sigma2 must be positive semidefinite, its smallest eigenvalue is -1, its largest 3",
        ),
        (np.eye(4) * 1j, "sigma2 must hold real numbers, got complex128"),
        (np.eye(4, dtype=bool), "sigma2 must hold real numbers, got bool"),
        (np.full((4, 4), "1.0"), "sigma2 must hold real numbers, got text"),
        (np.full((4, 4), None), "sigma2 must hold real numbers, got Python objects"),
    ],
)
def test_frechet_refuses_what_is_no_covariance_with_the_size_of_its_defect(sigma: np.ndarray, message: str) -> None:
    told = f"{message}. These are no moments of features: make them again."
    assert error(frechet_distance, np.zeros(4), np.eye(4), np.zeros(4), sigma) == told


def test_frechet_takes_covariances_with_the_rounding_of_float32_and_of_singular_ones(rng: np.random.Generator) -> None:
    features = rng.standard_normal((40, 90)) * np.linspace(0.1, 3, 90) + 5
    exact = np.cov(features, rowvar=False)  # of rank 39
    rows = features.astype(np.float32)
    sums = (rows.T @ rows / 40).astype(np.float64) - np.outer(rows.mean(0), rows.mean(0))
    single = sums * 40 / 39
    assert np.linalg.eigvalsh(exact)[0] < 0
    assert np.linalg.eigvalsh(single)[0] < -1e-7
    mean, other = features.mean(0), np.eye(90)
    assert frechet_distance(mean, single, np.zeros(90), other) == pytest.approx(
        frechet_distance(mean, exact, np.zeros(90), other), rel=1e-4
    )


# Moments


@pytest.mark.parametrize("batch_size", [1, 64, 211, 1000])
def test_stats_agree_with_the_published_ones_at_any_batch_size(batch_size: int) -> None:
    arrays = load("frechet/features_to_stats.npz")
    for side in ("gen", "ref"):
        features = arrays[f"features_{side}"]
        stats = stats_of(*(features[i : i + batch_size] for i in range(0, len(features), batch_size)))
        assert stats.num_items == len(features)
        for convention, ddof, tolerance in (
            ("edm2", 1, 1e-13),
            ("sid", 0, 1e-13),
            ("guided_diffusion", 1, 1e-6),
            ("torch_fidelity", 1, 1e-6),
        ):
            np.testing.assert_allclose(stats.mean, arrays[f"mu_{side}_{convention}"], rtol=1e-10, atol=tolerance)
            np.testing.assert_allclose(
                stats.covariance(ddof), arrays[f"sigma_{side}_{convention}"], rtol=1e-10, atol=1e-13
            )
    first = stats_of(arrays["features_gen"][:150])
    np.testing.assert_allclose(first.mean, arrays["mu_sid_first150"], rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(first.covariance(0), arrays["sigma_sid_first150"], rtol=1e-10, atol=1e-13)


def test_frechet_from_features_by_each_convention() -> None:
    arrays, values = load("frechet/features_to_stats.npz"), expected("frechet/expected.json")["features_to_stats"]
    gen, ref = stats_of(arrays["features_gen"]), stats_of(arrays["features_ref"])
    for name, ddof_gen, ddof_ref, tolerance in (
        ("gen_edm2__ref_edm2", 1, 1, 1e-8),
        ("gen_sid__ref_sid", 0, 0, 1e-8),
        ("gen_sid__ref_edm2", 0, 1, 1e-8),
        ("gen_torch_fidelity__ref_torch_fidelity", 1, 1, 1e-5),
        ("gen_guided_diffusion__ref_guided_diffusion", 1, 1, 1e-5),
    ):
        distance = frechet_distance(gen.mean, gen.covariance(ddof_gen), ref.mean, ref.covariance(ddof_ref))
        assert distance == pytest.approx(values[name], rel=tolerance)


def test_scores_against_the_published_reference_files() -> None:
    features, values = load("stats_formats/features.npz"), expected("stats_formats/expected.json")
    edm, virtual = load("stats_formats/ref_edm.npz"), load("stats_formats/VIRTUAL_standin.npz")
    gen = stats_of(features["gen_fid"])
    np.testing.assert_allclose(gen.mean, features["gen_mu_fid_edm2"], rtol=1e-10)
    np.testing.assert_allclose(gen.covariance(), features["gen_sigma_fid_edm2"], rtol=1e-10, atol=1e-13)
    ref_dino, gen_dino = stats_of(features["ref_fd_dinov2"]), stats_of(features["gen_fd_dinov2"])
    gen_spatial = stats_of(features["gen_spatial"])
    for value, tolerance, stats, ddof, mu, sigma in (
        (values["edm"], 1e-8, gen, 1, edm["mu"], edm["sigma"]),
        (values["sid_npz"], 1e-8, gen, 0, edm["mu"], edm["sigma"]),
        (values["sid_VIRTUAL_npz"], 1e-8, gen, 0, virtual["mu"], virtual["sigma"]),
        (values["edm2_from_pkl"]["fd_dinov2"], 1e-8, gen_dino, 1, ref_dino.mean, ref_dino.covariance()),
        (values["sid_edm2_pkl_fid_and_dinov2"][1], 1e-8, gen_dino, 0, ref_dino.mean, ref_dino.covariance()),
        (values["guided_diffusion_fid"], 1e-5, gen, 1, virtual["mu"], virtual["sigma"]),
        (values["guided_diffusion_sfid"], 1e-5, gen_spatial, 1, virtual["mu_s"], virtual["sigma_s"]),
    ):
        assert frechet_distance(stats.mean, stats.covariance(ddof), mu, sigma) == pytest.approx(value, rel=tolerance)


def test_stats_lose_nothing_where_the_mean_dwarfs_the_spread(rng: np.random.Generator) -> None:
    spread = rng.integers(-512, 512, (300, 5)) / 1024
    batches = np.split(spread + 1e8, [1, 7, 250])
    np.testing.assert_allclose(stats_of(*batches).covariance(), np.cov(spread, rowvar=False), rtol=1e-6, atol=1e-9)


def test_stats_added_up_on_a_device_are_those_of_the_cpu(rng: np.random.Generator) -> None:
    """As rows on a GPU are, with some added on the CPU between, as after an interruption."""
    features = rng.standard_normal((100, 6)) * np.arange(1, 7) + 50
    whole, added = stats_of(features), FeatureStats()
    for index, part in enumerate(np.split(features, [3, 40, 60])):
        if index == 2:
            added = FeatureStats.from_arrays(added.arrays())
            added.add(part)
        else:
            added._add_on_device(torch.from_numpy(part))
    assert added.num_items == 100
    np.testing.assert_allclose(added.mean, whole.mean, rtol=1e-13)
    for _ in range(2):  # what was added up there counts once
        np.testing.assert_allclose(added.covariance(), whole.covariance(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(whole.covariance(), np.cov(features, rowvar=False), rtol=1e-12, atol=1e-12)


def test_stats_own_their_memory(rng: np.random.Generator) -> None:
    features = rng.standard_normal((8, 3))
    before = features.copy()
    first = stats_of(features)
    restored = FeatureStats.from_arrays(first.arrays())
    covariance = first.covariance()
    restored.add(features + 2)
    np.testing.assert_array_equal(first.covariance(), covariance)
    np.testing.assert_array_equal(features, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stats_take_tensors_with_gradient_of_any_width(dtype: torch.dtype) -> None:
    features = torch.arange(12.0).reshape(4, 3).to(dtype).requires_grad_()
    stats = FeatureStats()
    stats.add(features)
    np.testing.assert_array_equal(stats.mean, [4.5, 5.5, 6.5])


def test_stats_refuse_what_they_cannot_use() -> None:
    stats = stats_of(np.zeros((1, 3)))
    assert error(stats.covariance) == "a covariance needs >= 2 images, got 1. Score more images."
    assert error(stats.add, np.zeros((2, 4))) == (
        "features must have one dimension, got 3 and 4. Take both from the same detector."
    )
    assert error(stats.add, np.array([[0, 0, 0], [0, math.inf, 0]])) == (
        "features must be finite, row 2 is not. Look at the image behind it."
    )
    assert error(stats.add, np.zeros((2, 3, 1))) == (
        "features must be a matrix [N, F], got shape [2, 3, 1]. Make each item one row."
    )
    assert stats.num_items == 1


# Inception score


@pytest.mark.parametrize("case", ["main", "c1008", "extreme"])
def test_inception_score_agrees_with_the_published_ones(case: str) -> None:
    logits = load("inception_score/arrays.npz")[f"logits_{case}"]
    values = expected("inception_score/expected.json")[case]
    assert inception_score(logits) == pytest.approx(values["float64_10_contiguous_splits"], rel=1e-9)
    assert inception_score(logits) == pytest.approx(values["torch_fidelity_no_shuffle"], rel=1e-9)
    assert inception_score(logits, 1) == pytest.approx(values["float64_single_split"], rel=1e-9)
    permuted = logits[np.random.RandomState(2020).permutation(len(logits))]
    assert inception_score(permuted) == pytest.approx(values["torch_fidelity_default_shuffle_seed2020"], rel=1e-9)
    parts = [inception_score(logits[i : i + 50], 1)[0] for i in range(0, len(logits), 50)]
    assert [np.mean(parts), np.std(parts)] == pytest.approx(values["float64_splits_of_50_last_shorter"], rel=1e-9)
    if case != "extreme":  # SiD's and guided-diffusion's float32 probabilities underflow to NaN there
        assert inception_score(logits) == pytest.approx(values["sid_10_splits_float32_probs"], rel=1e-5)
        fewer = values["sid_num_gen_smaller"]
        assert inception_score(logits[: fewer["num_gen"]]) == pytest.approx(fewer["result"], rel=1e-5)
        assert inception_score(logits, 1)[0] == pytest.approx(values["guided_diffusion_split5000"], rel=1e-5)
        assert np.mean(parts) == pytest.approx(values["guided_diffusion_split50"], rel=1e-5)


def test_inception_score_of_certain_and_of_uninformative_classes() -> None:
    assert inception_score(np.tile(1e4 * np.eye(7), (10, 1))) == pytest.approx((7, 0))
    assert inception_score(np.zeros((20, 7))) == pytest.approx((1, 0))


def test_inception_score_errors() -> None:
    assert error(inception_score, np.zeros((9, 4))) == (
        "number of splits must be from 1 to 9, got 10. Score more images, or pass a smaller --num-splits."
    )
    assert error(inception_score, np.array([[0.0], [np.nan]]), 1) == (
        "logits must be finite, row 1 is not. Look at the image behind it."
    )


# Precision and recall


@pytest.mark.parametrize("name", ["d32", "d128", "d2048", "ties"])
def test_precision_recall_agrees_with_the_published_ones(name: str) -> None:
    arrays = load(f"precision_recall/{name}.npz")
    values = expected("precision_recall/expected_precision_recall.json")["cases"][name]
    real, gen = arrays["real"], arrays["gen"]

    def pair(key: str) -> Any:
        return pytest.approx((values[key]["precision"], values[key]["recall"]), rel=1e-6, abs=0)

    for block in (4096, 333):
        assert precision_recall(real, gen, block=block, precision="float64") == pair("exact_float64_k3")
        assert precision_recall(real, gen, block=block) == pair("sid_float32_rows256_cols333")
        assert precision_recall(real, gen, block=block) == pair("torch_fidelity_input1gen_input2real")
    assert precision_recall(real, gen, 2, precision="float64") == pair("for_debugging_k2")
    assert precision_recall(real, gen, 4, precision="float64") == pair("for_debugging_k4")
    assert precision_recall(real, gen, precision="float64") == (
        arrays["gen_inside_real_exact"].mean(),
        arrays["real_inside_gen_exact"].mean(),
    )
    # Half precision may round a few points across a radius, unless every distance is exact.
    few = 0 if name == "ties" else 4
    for value, key in (
        (precision_recall(real, gen, precision="float16"), "sid_float16_rows10000_cols10000"),
        (guided_diffusion_precision_recall(real, gen), "guided_diffusion_fp16_first_tf"),
    ):
        assert abs(value[0] - values[key]["precision"]) * len(gen) <= few + 1e-4
        assert abs(value[1] - values[key]["recall"]) * len(real) <= few + 1e-4


@pytest.mark.parametrize("name", ["d32", "d128", "d2048"])
def test_guided_diffusion_form_repeats_what_overflows_in_float32(name: str) -> None:
    arrays = load(f"precision_recall/{name}.npz")
    values = expected("precision_recall/expected_precision_recall.json")["cases"][name]
    value = guided_diffusion_precision_recall(arrays["real"] * np.float32(256), arrays["gen"] * np.float32(256))
    single = values["guided_diffusion_same_graph_in_fp32_tf"]
    assert value == (single["precision"], single["recall"])


def test_a_collapsed_generator_is_precise_and_a_scattered_one_covers(rng: np.random.Generator) -> None:
    real = rng.standard_normal((400, 8))
    precision, recall = precision_recall(real, 0.05 * rng.standard_normal((300, 8)))
    assert precision > 0.95
    assert recall < 0.05
    precision, recall = precision_recall(real, 4 * rng.standard_normal((300, 8)))
    assert precision < 0.1
    assert recall > 0.9


def test_precision_counts_generated_points_and_recall_real_ones() -> None:
    real = np.array([[0.0], [1.0], [2.0], [3.0], [100.0], [101.0], [102.0], [103.0]])
    generated = np.array([[0.5], [1.5], [2.5], [3.5], [1000.0], [1001.0]])
    # Four of six generated points lie in the first real cluster; the two outliers, whose third neighbour is about 1000
    # away, make the generated manifold cover every real point.
    precision, recall = precision_recall(real, generated, precision="float64")
    assert (precision, recall) == (4 / 6, 1.0)
    assert precision_recall(generated, real, precision="float64") == (recall, precision)


def test_equal_sets_have_full_precision_and_recall(rng: np.random.Generator) -> None:
    features = rng.standard_normal((60, 4))
    assert precision_recall(features, features[::-1]) == (1, 1)
    features.setflags(write=False)
    assert precision_recall(torch.tensor(features), features, block=7) == (1, 1)


def test_precision_recall_errors() -> None:
    ones = np.ones((5, 2))
    assert error(precision_recall, ones, np.ones((5, 3))) == (
        "real and generated features must have one dimension, got 2 and 3. Take both from the same detector."
    )
    assert error(precision_recall, ones, ones[:3]) == (
        "generated features must number >= k + 1 = 4, got 3. Score more images, or pass a smaller --neighbours."
    )
    assert error(precision_recall, ones, ones, 0) == "k must be >= 1, got 0. The published metric uses 3."
    bad = ones.copy()
    bad[3, 1] = -np.inf
    assert error(precision_recall, bad, ones) == (
        "real features must be finite, row 3 is not. Look at the image behind it."
    )
    wide = np.diag(np.full(5, 1e3))
    assert error(precision_recall, wide, wide, precision="float16") == (
        "feature distances must fit in float16, they overflow. Use a higher precision."
    )


# Kernel distance


@pytest.mark.parametrize("name", ["d32", "d128", "ties", "d2048"])
def test_kernel_distance_agrees_with_the_published_draws(name: str) -> None:
    arrays, values = load(f"precision_recall/{name}.npz"), expected("precision_recall/expected_kid.json")[name]
    sets = (arrays["real"], arrays["gen"])
    smallest = min(map(len, sets))
    for num_subsets, size in ((10, 50), (7, 64)):
        sid = kernel_distance(*sets, num_subsets=num_subsets, subset_size=size, seed=1234)
        assert sid[0] == pytest.approx(values[f"sid_seed1234_subsets{num_subsets}_max{size}"], rel=1e-4, abs=2e-6)
        fidelity = kernel_distance(*sets, num_subsets=num_subsets, subset_size=size, seed=2020)
        published = values[f"torch_fidelity_seed2020_subsets{num_subsets}_size{size}"].values()
        assert fidelity == pytest.approx(tuple(published), rel=1e-4, abs=2e-6)
    same_draws = values["float64_same_draws_as_sid_seed1234_subsets10_max50"]
    exact = kernel_distance(*sets, num_subsets=10, subset_size=50, seed=1234)
    assert exact == pytest.approx((same_draws["mean"], same_draws["std"]), rel=1e-9)
    if smallest < 1000:
        whole = kernel_distance(*sets, subset_size=smallest, seed=1234)[0]
        assert whole == pytest.approx(values["sid_seed1234_subsets100_max1000"], rel=1e-4, abs=2e-6)


def test_kernel_distance_over_the_published_hundred_subsets() -> None:
    arrays, values = load("precision_recall/d32.npz"), expected("precision_recall/expected_kid.json")["d32"]
    sets = (arrays["real"], arrays["gen"])
    sid = kernel_distance(*sets, seed=1234)[0]
    assert sid == pytest.approx(values["sid_seed1234_subsets100_max1000"], rel=1e-4, abs=2e-6)
    published = values["torch_fidelity_seed2020_subsets100_size1000"].values()
    assert kernel_distance(*sets, seed=2020) == pytest.approx(tuple(published), rel=1e-4, abs=2e-6)


def test_kernel_distance_is_zero_on_average_for_one_distribution(rng: np.random.Generator) -> None:
    real, generated = rng.standard_normal((2, 2000, 4))
    mean, std = kernel_distance(real, generated, num_subsets=50, subset_size=100, seed=0)
    assert abs(mean) < std
    assert kernel_distance(real, generated + 1, num_subsets=5, subset_size=100, seed=0)[0] > 1


def test_kernel_distance_errors() -> None:
    ones = np.ones((5, 2))
    assert error(kernel_distance, ones, ones, seed=0) == (
        "subset size must be from 2 to 5, got 1000. Pass a size both sets have."
    )
    assert error(kernel_distance, ones, ones, subset_size=5, num_subsets=0, seed=0) == (
        "number of subsets must be >= 1, got 0. The published metric uses 100."
    )
    assert error(kernel_distance, ones, np.ones((5, 3)), subset_size=5, seed=0) == (
        "real and generated features must have one dimension, got 2 and 3. Take both from the same detector."
    )
