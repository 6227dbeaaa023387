"""The built-in detector, and what every detector's features are made into."""

import dataclasses
import hashlib
import io
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import sidactl
from sidactl import catalog, detectors, prepare_data
from sidactl.commands import dataset_stats, scorers, scores
from sidactl.commands import features as commands_features
from sidactl.commands.files import read_state_dict
from sidactl.errors import SidaError
from sidactl.metrics import frechet_distance
from sidactl.nets import inception
from sidactl.nets import random_features as nets_random_features
from sidactl.store import Store


def collected(detector: detectors.Detector, batches: Sequence[Tensor]) -> commands_features.Collected:
    """What is collected of these batches, under the name "d"."""
    return commands_features.collect(
        commands_features.Work(len(batches), lambda first: iter(batches[first:]), {"d": detector}, ["d"])
    )


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
    rows = detector(images).double().numpy()
    for size in (7, 300):
        stats = collected(detector, images.split(size)).stats["d"]
        assert stats.num_items == 300
        np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(stats.covariance(), np.cov(rows, rowvar=False), rtol=1e-4, atol=1e-6)


def test_features_are_the_same_bits_beside_whatever_other_images(
    detector: detectors.Detector, digits: tuple[Tensor, Tensor]
) -> None:
    images = digits[0][:70]
    rows = detector(images)
    for size in (1, 2, 3, 23):
        assert torch.equal(collected(detector, images.split(size)).features["d"].rows, rows)
    assert torch.equal(detector(images.flip(0)).flip(0), rows)


def test_noise_lies_further_from_the_digits_than_the_digits_from_each_other(
    detector: detectors.Detector, digits: tuple[Tensor, Tensor]
) -> None:
    def moments(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        stats = collected(detector, [images]).stats["d"]
        return stats.mean, stats.covariance()

    noise = torch.randint(256, (600, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    half, other = moments(digits[0][::2]), moments(digits[0][1::2])
    assert frechet_distance(*half, *other) < 0.5
    assert frechet_distance(*half, *moments(noise)) > 10


@pytest.fixture(scope="module")
def random_features() -> detectors.Detector:
    return detectors.load("random-features")


def test_the_seeded_detector_is_the_same_for_ever(random_features: detectors.Detector) -> None:
    weights = nets_random_features.RandomFeatures.drawn()
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
            stats = collected(random_features, [pixels.to(torch.uint8)]).stats["d"]
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
        "unknown detector 'resnet'. Use one of tiny-digits, random-features, tiny-digits-ssl, inception, dinov2, "
        "efficientnet-lite0, timm:NAME, or a TorchScript file."
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
    score = sidactl.evaluate(data, reference=data, detector=str(scripted), trust_code=True, run=tmp_path / "run")
    by = detectors.load_torchscript(scripted, trust_code=True).short_identity
    assert sorted(score.values) == [f"FD {by}", f"KID {by}", "precision", "recall"]
    with pytest.raises(SidaError) as caught:
        sidactl.inception_score(data, detector=str(scripted), trust_code=True, run=tmp_path / "run")
    told = f"the inception score needs classes, detector {scripted} gives none. Pass --detector inception."
    assert str(caught.value) == told


def test_a_detector_in_torchscript_is_called_as_the_published_one(scripted: Path) -> None:
    detector = detectors.load_torchscript(scripted, trust_code=True)
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
        detectors.load_torchscript(path, trust_code=True)
    assert str(caught.value).startswith(f"{path} is not a detector in TorchScript (")
    assert "\n" not in str(caught.value)


class FiveRows(torch.nn.Module):
    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return torch.zeros(2 if len(images) == 2 else 5, 3)


class Widening(torch.nn.Module):
    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return torch.zeros(len(images), 3 if len(images) == 2 else 4)


class Pair(torch.nn.Module):
    def forward(self, images: Tensor, return_features: bool = False) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(images), 3), torch.zeros(len(images), 3)


class Late(torch.nn.Module):
    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        assert len(images) == 2, "too late"
        return torch.zeros(len(images), 3)


class NotFinite(torch.nn.Module):
    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return torch.full((len(images), 3), float("nan"))


@pytest.mark.parametrize(
    ("net", "told"),
    [
        (
            FiveRows(),
            r"detector inception-torchscript@\w{16} must give features \[64, 3\] of 64 images, got .*\[5, 3\]",
        ),
        (
            Widening(),
            r"detector inception-torchscript@\w{16} must give features \[64, 3\] of 64 images, got .*\[64, 4\]",
        ),
        (Pair(), r".*net\.pt must give features \[2, F\] of 2 images, got a tuple\. Give another\."),
        (Late(), r"detector .*net\.pt failed on 64 images \(.*too late\)\. Give another\."),
        (NotFinite(), r"features by inception must be finite, those of image 0 are not\. Look at that image\."),
    ],
)
def test_what_a_detector_must_not_give_ends_the_score_in_one_line(
    net: torch.nn.Module, told: str, tmp_path: Path
) -> None:
    path, run = tmp_path / "net.pt", tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(net).save(path)
    data = prepare_data("tiny-digits", run=run).oid
    with pytest.raises(SidaError, match=f"^{told}") as caught:
        sidactl.fid(data, reference=data, num=70, detector=str(path), trust_code=True, run=run)
    assert "\n" not in str(caught.value)
    assert not [artifact for artifact in Store.open(run).artifacts() if artifact.kind in ("score", "stats")]


def test_features_of_references_that_are_not_finite_are_refused() -> None:
    bad = detectors.Detector(
        "x", 2, "x@1-fp32", torch.device("cpu"), lambda images: torch.full((len(images), 2), torch.inf)
    )
    with pytest.raises(SidaError, match=r"^features by x must be finite, those of image 0 are not\."):
        collected(bad, [torch.zeros(3, 1, 8, 8, dtype=torch.uint8)])


def test_a_flipped_bit_in_a_file_of_weights_is_found_before_it_is_used(scripted: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1000)}, weights)

    def run(path: Path) -> detectors.Detector:
        return detectors.load_torchscript(path, trust_code=True)

    for path, read, told in (
        (
            weights,
            read_state_dict,
            "damaged (Bad CRC-32 for file '{}'). Nothing was executed. Download the file again.",
        ),
        (scripted, run, "damaged: the checksum of {} is wrong. Download it again."),
    ):
        read(path)  # type: ignore[operator]
        whole = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda member: member.compress_size)
        at = largest.header_offset + 64 + len(largest.filename) + largest.compress_size // 2
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(SidaError) as caught:
            read(path)  # type: ignore[operator]
        assert str(caught.value).replace(f"{path}: ", "").replace(f"{path} is ", "") == told.format(largest.filename)


class Hostile(torch.nn.Module):
    """What a TorchScript file may do: write a file."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        torch.save(images, self.path)
        return images.to(torch.float32).mean([2, 3])


def test_torchscript_of_others_runs_only_where_it_is_trusted(tmp_path: Path) -> None:
    path, written, run = tmp_path / "net.pt", tmp_path / "written", tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Hostile(str(written))).save(path)
    told = (
        f"{path} is a program in TorchScript, and not the published one: it could write and delete files of yours. "
        "If you trust whoever made it, score with --trust-code; a state dict (.safetensors, .pth) is never run."
    )
    asked: list[Callable[[], object]] = [
        lambda: detectors.load_torchscript(path),
        lambda: sidactl.fid("tiny-digits", num=4, detector=str(path), run=run, device="cpu"),
        lambda: sidactl.evaluate("tiny-digits", num=4, detector=str(path), run=run, device="cpu"),
        lambda: sidactl.distill(teacher="tiny-digits", mode="sida", detector=str(path), run=run, device="cpu"),
        lambda: dataset_stats.dataset_stats("tiny-digits", detector=str(path), run=run, device="cpu"),
    ]
    for ask in asked:
        with pytest.raises(SidaError) as caught:
            ask()
        assert str(caught.value) == told
        assert not written.exists()
    sidactl.fid("tiny-digits", num=4, detector=str(path), trust_code=True, run=run, device="cpu")
    assert written.exists()


def test_only_the_published_files_give_a_number_called_fid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripted: Path
) -> None:
    torch.manual_seed(0)
    own = tmp_path / "inception.pth"
    torch.save(inception.FIDInception().state_dict(), own)
    run = tmp_path / "run"
    store, cpu = Store.open(run), torch.device("cpu")
    images = prepare_data("tiny-digits", run=run, max_images=12).oid

    for path, entry in ((own, "inception"), (scripted, "inception-torchscript")):
        by = scorers.load_detector(store, str(path), cpu, trust_code=True)
        assert scores.name_of("fid", by) == f"FD {by.short_identity}" != "FID"
        assert by.short_identity.startswith(f"{entry}@")
        # If it were the one that is published, it would be the FID.
        known = catalog.DETECTORS[entry]
        assert known.source
        source = dataclasses.replace(known.source, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        with monkeypatch.context() as patch:
            patch.setitem(catalog.DETECTORS, entry, dataclasses.replace(known, source=source))  # type: ignore[arg-type]
            assert scores.name_of("fid", scorers.load_detector(store, str(path), cpu)) == "FID"
    told = sidactl.evaluate(images, ["fid", "kid"], reference=images, detector=str(scripted), trust_code=True, run=run)
    assert [(name, number["name"]) for name, number in told.to_json()["scores"].items()] == [
        (name, name) for name in (f"FD {by.short_identity}", f"KID {by.short_identity}")
    ]
    (shown,) = sidactl.show(images, run=run).scores
    assert list(shown.values) == list(told.values)
