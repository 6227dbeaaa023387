"""The built-in detector, and what every detector's features are made into."""

import io
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from sidactl import catalog, detectors, scores
from sidactl.artifacts import prepare_data
from sidactl.errors import SidaError
from sidactl.metrics import frechet_distance
from sidactl.nets import inception


@pytest.fixture(scope="module")
def detector() -> detectors.Detector:
    return detectors.load("tiny-digits")


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """The built-in images as the dataset holds them, uint8 [1797, 1, 8, 8] in 0..255, and their classes."""
    with zipfile.ZipFile(catalog.ASSETS / "tiny-digits.npz") as archive:
        counts, labels = (np.load(io.BytesIO(archive.read(f"{name}.npy"))) for name in ("images", "labels"))
    pixels = np.rint(counts.astype(np.float64) * 255 / 16).astype(np.uint8)
    return torch.from_numpy(pixels)[:, None], torch.from_numpy(labels.astype(np.int64))


def test_the_built_in_detector_tells_digits_apart(detector: detectors.Detector, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    with torch.no_grad():
        found = detector.logits(detector(images)).argmax(1)
    assert float((found == labels).float().mean()) > 0.98


def test_features_of_the_built_in_dataset_have_variance_one_on_average(
    detector: detectors.Detector, digits: tuple[Tensor, Tensor]
) -> None:
    features = detector(digits[0])
    assert features.shape == (1797, detector.num_features)
    assert features.dtype == torch.float32
    assert float(features.var(dim=0).mean()) == pytest.approx(1, abs=0.01)


def test_statistics_do_not_depend_on_batches_and_are_those_of_the_features(
    detector: detectors.Detector, digits: tuple[Tensor, Tensor]
) -> None:
    images = digits[0][:300]
    features = detectors.features_of(detector, [images]).double().numpy()
    for size in (7, 300):
        stats = detectors.stats_of(detector, images.split(size))
        assert stats.num_items == 300
        np.testing.assert_allclose(stats.mean, features.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(stats.covariance(), np.cov(features, rowvar=False), rtol=1e-4, atol=1e-6)


def test_features_are_the_same_bits_beside_whatever_other_images(
    detector: detectors.Detector, digits: tuple[Tensor, Tensor]
) -> None:
    images = digits[0][:70]
    features = detector(images)
    for size in (1, 2, 3, 23):
        assert torch.equal(detectors.features_of(detector, images.split(size)), features)
    assert torch.equal(detector(images.flip(0)).flip(0), features)


def test_noise_lies_further_from_the_digits_than_the_digits_from_each_other(
    detector: detectors.Detector, digits: tuple[Tensor, Tensor]
) -> None:
    def moments(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        stats = detectors.stats_of(detector, [images])
        return stats.mean, stats.covariance()

    noise = torch.randint(256, (600, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    half, other = moments(digits[0][::2]), moments(digits[0][1::2])
    assert frechet_distance(*half, *other) < 0.5
    assert frechet_distance(*half, *moments(noise)) > 10


@pytest.fixture(scope="module")
def random_features() -> detectors.Detector:
    return detectors.load("random-features")


def test_the_seeded_detector_is_the_same_for_ever(random_features: detectors.Detector) -> None:
    weights = detectors.RandomFeatures.drawn()
    assert random_features.identity == "random-features@967b4065e63610d7-fp32"
    assert [tuple(w.shape) for w in weights.values()] == [(16, 3, 3, 3), (16, 16, 3, 3), (16, 16, 3, 3)]
    # Half of the filters see no flat colour; the float32 sum of 27 or 144 weights leaves rounding alone.
    assert all(float(w[::2].sum((1, 2, 3)).abs().max()) < 1e-6 for w in weights.values())
    ramp = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(1, 3, 8, 8)
    torch.testing.assert_close(
        random_features(ramp)[0, :3], torch.tensor([2.0847950, 0.0, 1.0721439]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("size", [(4, 4), (5, 5), (28, 28), (33, 20), (96, 96), (299, 299)])
def test_the_seeded_detector_takes_any_size_and_batch(
    random_features: detectors.Detector, size: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (9, 3, *size), generator=generator, dtype=torch.uint8)
    features = random_features(images)
    assert (features.shape, features.dtype) == ((9, 128), torch.float32)
    for parts in (1, 2, 7):
        assert torch.equal(torch.cat([random_features(part) for part in images.split(parts)]), features)
    grey = images[:, :1]
    assert torch.equal(random_features(grey), random_features(grey.expand(-1, 3, -1, -1)))


def test_the_seeded_detector_refuses_what_is_smaller_than_its_layers(random_features: detectors.Detector) -> None:
    with pytest.raises(SidaError) as caught:
        random_features(torch.zeros(1, 1, 3, 8, dtype=torch.uint8))
    assert str(caught.value) == (
        "detector random-features needs images of 4x4 pixels or more, got 8x3. Score larger images."
    )


def drawings(num: int) -> Tensor:
    """Uint8 [num, 3, 32, 32]: discs of many colours and places on white."""
    rng = np.random.RandomState(0)
    y, x = np.mgrid[:32, :32]
    centre, radius = rng.uniform(8, 24, (num, 2, 1, 1)), rng.uniform(4, 10, (num, 1, 1))
    inside = (x - centre[:, 0]) ** 2 + (y - centre[:, 1]) ** 2 < radius**2
    colour = rng.randint(0, 200, (num, 3, 1, 1))
    return torch.from_numpy(np.where(inside[:, None], colour, 255).astype(np.uint8))


def test_the_seeded_detector_ranks_images_as_eyes_do(
    random_features: detectors.Detector, digits: tuple[Tensor, Tensor]
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Bounds well within what was seen: (digits, drawings) of each change, in multiples of the distance of two halves.
    bounds = {"noise": (20, 20), "blurred": (20, 4), "inverted": (20, 20), "moved": (2, 2), "lighter": (1.5, 2)}
    for which, images in enumerate((digits[0][torch.randperm(1797, generator=generator)], drawings(1800))):
        half, other = images[:898].float(), images[898:1796].float()
        blurred = torch.nn.functional.avg_pool2d(other, 3, stride=1, padding=1, count_include_pad=False)
        changed = {
            "noise": torch.randint(256, other.shape, generator=generator).float(),
            "blurred": blurred.round(),
            "inverted": 255 - other,
            "moved": other.roll(images.shape[3] // 4, dims=3),
            "lighter": (other + 16).clamp(max=255),
        }

        def moments(pixels: Tensor) -> tuple[np.ndarray, np.ndarray]:
            stats = detectors.stats_of(random_features, [pixels.to(torch.uint8)])
            return stats.mean, stats.covariance()

        same = frechet_distance(*moments(half), *moments(other))
        found = {name: frechet_distance(*moments(half), *moments(pixels)) / same for name, pixels in changed.items()}
        assert {name: value for name, value in found.items() if value < bounds[name][which]} == {}, found


def test_the_identity_is_that_of_the_weights_whatever_file_they_came_from(detector: detectors.Detector) -> None:
    state = safetensors.torch.load_file(catalog.ASSETS / "tiny-digits-detector.safetensors")
    again = detectors.load("tiny-digits", dict(reversed(state.items())))
    assert again.identity == detector.identity
    assert detector.identity.startswith("tiny-digits@")
    state["conv0.bias"][0] += 1e-6
    assert detectors.load("tiny-digits", state).identity != detector.identity


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.arange(384, dtype=torch.uint8).reshape(2, 3, 8, 8), r"torch\.uint8 \[2, 3, 8, 8\]"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), r"torch\.uint8 \[2, 1, 16, 16\]"),
        (torch.zeros(2, 1, 8, 8), r"torch\.float32 \[2, 1, 8, 8\]"),
    ],
)
def test_images_of_another_kind_are_refused(detector: detectors.Detector, images: Tensor, got: str) -> None:
    message = rf"^detector tiny-digits needs grey uint8 images of 8x8 pixels, got {got}\. "
    with pytest.raises(SidaError, match=message):
        detector(images)


def test_an_unknown_detector_is_refused_by_its_name() -> None:
    with pytest.raises(SidaError) as caught:
        detectors.load("resnet")
    assert str(caught.value) == (
        "unknown detector 'resnet'. Use one of tiny-digits, random-features, inception, dinov2, or a TorchScript file."
    )


def test_inception_and_its_features_have_one_identity_with_or_without_batch_norms_counters() -> None:
    torch.manual_seed(0)
    state = inception.FIDInception().state_dict()
    detector = detectors.load("inception", state)
    bare = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert detectors.load("inception", bare).identity == detector.identity
    images = torch.randint(0, 256, (3, 1, 20, 24), dtype=torch.uint8)
    features = detector(images)
    assert features.shape == (3, 2048)
    torch.testing.assert_close(detector(images.expand(-1, 3, -1, -1)), features, atol=1e-5, rtol=1e-5)
    assert detector.logits(features).shape == (3, 1008)
    with pytest.raises(
        SidaError, match=r"^detector inception needs grey or RGB uint8 images, got torch\.uint8 \[1, 4,"
    ):
        detector(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


class Scripted(torch.nn.Module):
    """Called as the published TorchScript detector is."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        x = images.to(torch.float32)
        return torch.stack([x.mean(dim=[1, 2, 3]), x.std(dim=[1, 2, 3])], 1)


@pytest.fixture
def scripted(tmp_path: Path) -> Path:
    path = tmp_path / "inception-2015-12-05.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Scripted()).save(path)
    return path


def test_an_evaluation_by_a_detector_without_classes_leaves_out_what_needs_them(scripted: Path, tmp_path: Path) -> None:
    data = prepare_data("tiny-digits", run=tmp_path / "run").oid
    score = scores.evaluate(data, reference=data, detector=str(scripted), run=tmp_path / "run")
    assert sorted(score.values) == ["FID", "KID", "precision", "recall"]
    with pytest.raises(SidaError) as caught:
        scores.inception_score(data, detector=str(scripted), run=tmp_path / "run")
    told = f"the inception score needs classes, detector {scripted} gives none. Pass --detector inception."
    assert str(caught.value) == told


def test_a_detector_in_torchscript_is_called_as_the_published_one(scripted: Path) -> None:
    detector = detectors.load_torchscript(scripted)
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(detector(images), Scripted()(images))
    assert (detector.name, detector.num_features) == ("inception", 2)
    assert detector.identity.startswith("inception-torchscript@")
    with pytest.raises(SidaError, match=r"^the inception score needs classes, detector inception has none\."):
        detector.logits(detector(images))


def test_what_is_no_torchscript_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"not a network")
    with pytest.raises(SidaError) as caught:
        detectors.load_torchscript(path)
    assert str(caught.value).startswith(f"{path} is not a detector in TorchScript (")
    assert "\n" not in str(caught.value)
