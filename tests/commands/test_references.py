"""What images are scored against: published statistics in every format, datasets, and what is refused."""

import dataclasses
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import sidactl
from sidactl import catalog, detectors, prepare_data
from sidactl.commands import features, fetch, moments, reference, resolve, scorers
from sidactl.commands import score as commands_score
from sidactl.errors import SidaError
from sidactl.nets import inception
from sidactl.store import Store
from tests.conftest import instead_of
from tests.golden import golden_metrics

CPU = torch.device("cpu")


def by_rows(name: str, rows: np.ndarray[Any, Any], identity: str = "") -> detectors.Detector:
    """A detector whose features of an image are the row that the image's first pixel names."""
    table = torch.from_numpy(rows)

    def extract(images: Tensor) -> Tensor:
        return table[images[:, 0, 0, 0].long() % len(table)]

    return detectors.Detector(name, rows.shape[1], identity or f"{name}@golden", CPU, extract, is_published=True)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray[Any, Any]]:
    with np.load(golden_metrics("stats_formats/features.npz")) as arrays:
        return dict(arrays)


@pytest.fixture
def fifty(tmp_path: Path) -> Path:
    """50 generated images; the first pixel of image i is i."""
    path = tmp_path / "generated.npz"
    images = np.zeros((50, 8, 8, 3), np.uint8)
    images[:] = np.arange(50)[:, None, None, None]
    np.savez(path, arr_0=images)
    return path


@pytest.fixture
def by_golden_features(golden: dict[str, np.ndarray[Any, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"inception": golden["gen_fid"], "dinov2": golden["gen_fd_dinov2"]}
    instead_of(scorers._weights_digest, lambda store, name: name, monkeypatch)
    instead_of(
        scorers.load_detector,
        lambda store, name, device, resize, trust_code: by_rows(
            name, rows[name], f"{name}@golden{'-pil' * (resize == 'pil')}"
        ),
        monkeypatch,
    )


@pytest.mark.usefixtures("by_golden_features")
@pytest.mark.parametrize(
    ("file", "command", "convention", "expected", "tolerance"),
    [
        ("ref_edm.npz", "fid", "edm", ["edm"], 1e-8),
        ("ref_edm.npz", "fid", "sid", ["sid_npz"], 1e-8),
        ("ref_edm2.pkl", "fid", "edm", ["edm2_from_pkl", "fid"], 1e-8),
        ("ref_edm2.pkl", "fd_dinov2", "edm", ["edm2_from_pkl", "fd_dinov2"], 1e-8),
        ("ref_edm2.pkl", "fid", "sid", ["sid_edm2_pkl_fid_only"], 1e-8),
        ("ref_edm2.pkl", "fd_dinov2", "sid", ["sid_edm2_pkl_fid_and_dinov2", 1], 1e-8),
        ("ref_edm2_numpy1_paths.pkl", "fid", "edm", ["edm2_from_pkl", "fid"], 1e-8),
        ("ref_edm2_numpy1_paths.pkl", "fd_dinov2", "edm", ["edm2_from_pkl", "fd_dinov2"], 1e-8),
        ("VIRTUAL_standin.npz", "fid", "sid", ["sid_VIRTUAL_npz"], 1e-8),
        ("VIRTUAL_standin.npz", "fid", "edm", ["guided_diffusion_fid"], 1e-5),
    ],
)
def test_scores_against_published_files_are_the_golden_ones(
    fifty: Path, tmp_path: Path, file: str, command: str, convention: str, expected: list[Any], tolerance: float
) -> None:
    value = json.loads(golden_metrics("stats_formats/expected.json").read_text())
    for key in expected:
        value = value[key]
    path = str(golden_metrics(f"stats_formats/{file}"))
    score = getattr(commands_score, command)(str(fifty), reference=path, convention=convention, run=tmp_path / "run")
    assert score.value == pytest.approx(value, rel=tolerance)
    name = {"fid": "FID", "fd_dinov2": "FD-DINOv2"}[command]
    assert list(score.values) == [name]
    stats = Store.open(tmp_path / "run").get(score.references[name])
    assert (stats.kind, stats.params["source"]) == ("stats", path)


@pytest.mark.usefixtures("by_golden_features")
def test_an_evaluation_takes_all_that_a_reference_allows_in_one_pass(fifty: Path, tmp_path: Path) -> None:
    path, run = str(golden_metrics("stats_formats/ref_edm2.pkl")), tmp_path / "run"
    ticks: list[tuple[int, int]] = []
    score = sidactl.evaluate(
        str(fifty), ["fid", "fd-dinov2"], reference=path, run=run, tick=lambda *told: ticks.append(told)
    )
    assert list(score.values) == ["FD-DINOv2", "FID"] or list(score.values) == ["FID", "FD-DINOv2"]
    assert ticks == [(0, 50), (50, 50)]
    chosen = scorers.applicable_metrics(
        Store.open(run), resolve.resolve(Store.open(run), str(fifty), ["dataset"]), {"reference": path}
    )
    assert chosen == ["fid", "fd-dinov2", "inception-score"]


def refused(run: Path, ref: str, command: Any = sidactl.fid, **options: Any) -> str:
    before = sorted(run.rglob("*")) if (run / "asked").exists() else []
    with pytest.raises(SidaError) as caught:
        command(ref, run=run, **options)
    assert caught.value.exit_code == 2
    assert not [p for p in sorted(run.rglob("*")) if p not in before and "score" in p.name]
    return str(caught.value)


@pytest.mark.usefixtures("by_golden_features")
def test_what_a_reference_cannot_be(fifty: Path, tmp_path: Path) -> None:
    run, ref = tmp_path / "run", str(fifty)
    stats = str(golden_metrics("stats_formats/ref_edm.npz"))
    pkl = str(golden_metrics("stats_formats/ref_edm2.pkl"))
    assert refused(run, ref, reference=str(tmp_path / "no.npz")) == (
        f"{tmp_path / 'no.npz'} cannot be read: No such file or directory. Check the path."
    )
    assert refused(run, ref) == "a dataset needs another to be compared with, got none. Pass --ref DATASET."
    for path in (stats, pkl):
        assert refused(run, ref, sidactl.prec_recall, reference=path) == (
            f"precision, recall and KID need images, got the statistics {path}. Pass --ref with a dataset or a folder."
        )
    assert refused(run, ref, sidactl.fd_dinov2, reference=stats) == (
        "ref_edm.npz holds statistics by inception, not by dinov2. Pass another --ref, or --detector."
    )
    assert refused(run, ref, sidactl.fd_dinov2, reference=pkl, resize="pil") == (
        "published statistics by dinov2 hold for --resize torch, got pil. Score against the dataset itself."
    )
    assert refused(run, ref, sidactl.fd_dinov2, reference=pkl, detector="inception") == (
        "fd-dinov2 is by detector dinov2, got 'inception'. Leave out --detector."
    )
    half = tmp_path / "half.npz"
    np.savez(half, mu=np.zeros(3), arr_0=np.zeros(2))
    assert "arr_0" in refused(run, ref, reference=str(half))
    odd = tmp_path / "odd.npz"
    np.savez(odd, mu=np.zeros(8), sigma=np.zeros((8, 7)))
    assert refused(run, ref, reference=str(odd)) == (
        f"mu and sigma in {odd} must be [F] and [F, F], got [8] and [8, 7]. Download the file again."
    )
    wide = tmp_path / "wide.npz"
    np.savez(wide, mu=np.zeros(9), sigma=np.eye(9))
    assert refused(run, ref, reference=str(wide)) == (
        "wide.npz holds 9 features, inception gives 8. Pass another --ref, or --detector."
    )
    bad = tmp_path / "bad.npz"
    np.savez(bad, mu=np.full(8, np.nan), sigma=np.eye(8))
    assert refused(run, ref, reference=str(bad)) == (f"mu and sigma in {bad} must be finite. Download the file again.")
    torn = tmp_path / "torn.npz"
    torn.write_bytes(Path(stats).read_bytes()[:300])
    assert refused(run, ref, reference=str(torn)) == (f"{torn} is damaged or not an npz file. Download it again.")
    empty = tmp_path / "empty.pkl"
    empty.write_bytes(pickle.dumps({"num_images": 3}))
    assert refused(run, ref, reference=str(empty)) == (
        f"{empty} must hold fid or fd_dinov2 with mu and sigma, got num_images. "
        "Give a reference file that EDM2 published."
    )


def lower(value: float) -> np.ndarray[Any, Any]:
    sigma = np.eye(8)
    sigma[3, 1] = value
    return sigma


IMPOSSIBLE: dict[str, tuple[Any, Any, str]] = {
    "asymmetric": (np.zeros(8), lower(0.3), "sigma in {where} must be symmetric, it differs from its transpose by up "),
    "negative variance": (
        np.zeros(8),
        np.diag([1.0] * 7 + [-2]),
        "sigma in {where} must hold variances >= 0, that of ",
    ),
    "indefinite": (
        np.zeros(8),
        lower(3.0) + lower(3.0).T - np.eye(8),
        "sigma in {where} must be positive semidefinite, its smallest eigenvalue is -2, its largest 4.",
    ),
    "text": (np.full(8, "1"), np.eye(8), "mu in {where} must hold real numbers, got text."),
    "complex": (np.zeros(8), np.eye(8) * (1 + 0j), "sigma in {where} must hold real numbers, got complex128."),
    "truth values": (np.zeros(8), np.eye(8, dtype=bool), "sigma in {where} must hold real numbers, got bool."),
    "infinite": (np.zeros(8), np.full((8, 8), np.inf), "mu and sigma in {where} must be finite."),
    "too large": (np.zeros(8), np.eye(8) * 1e308, "mu and sigma in {where} must be at most 1e+100, got 1e+308."),
    "empty": (np.zeros(0), np.zeros((0, 0)), "mu and sigma in {where} must be [F] and [F, F], got [0] and [0, 0]."),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_statistics_are_refused_before_a_detector_is_looked_for(
    name: str, fifty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("a detector was looked for")

    instead_of(scorers._weights_digest, never, monkeypatch)
    mu, sigma, message = IMPOSSIBLE[name]
    path, pickled = tmp_path / "stats.npz", tmp_path / "stats.pkl"
    np.savez(path, mu=mu, sigma=sigma)
    assert refused(tmp_path / "run", str(fifty), reference=str(path)).startswith(message.format(where=path))
    if name in ("text", "complex"):
        return  # of which the reader of pickles knows no arrays
    pickled.write_bytes(pickle.dumps({"fid": {"mu": mu, "sigma": sigma}}))
    told = refused(tmp_path / "run", str(fifty), reference=str(pickled))
    assert told.startswith(message.format(where=f"fid in {pickled}"))


def test_statistics_of_objects_and_of_plain_words_are_refused(fifty: Path, tmp_path: Path) -> None:
    path, pickled = tmp_path / "stats.npz", tmp_path / "stats.pkl"
    np.savez(path, mu=np.full(8, None), sigma=np.eye(8))
    assert refused(tmp_path / "run", str(fifty), reference=str(path)) == (
        f"mu and sigma in {path} must hold real numbers, got Python objects. Save them as plain arrays."
    )
    pickled.write_bytes(pickle.dumps({"fid": {"mu": "zero", "sigma": [[1.0], [2.0, 3.0]]}}))
    assert refused(tmp_path / "run", str(fifty), reference=str(pickled)) == (
        f"mu in fid in {pickled} must hold real numbers, got text. These are no moments of features: make them again."
    )


@pytest.mark.usefixtures("by_golden_features")
def test_published_statistics_of_few_images_are_warned_of(fifty: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for num, warnings in ((8, 1), (9, 0)):
        path = tmp_path / f"of-{num}.pkl"
        path.write_bytes(pickle.dumps({"num_images": num, "fid": {"mu": np.zeros(8), "sigma": np.eye(8)}}))
        score = sidactl.fid(str(fifty), reference=str(path), run=run)
        assert len(score.warnings) == warnings
        kept = Store.open(run).get(score.references["FID"])
        assert ("num_images" in kept.params) == bool(warnings)
    first = sidactl.fid(str(fifty), reference=str(tmp_path / "of-8.pkl"), run=run).warnings[0]
    assert first.startswith("8 reference images are few for 8 features: ")


class Evil:
    def __reduce__(self) -> Any:
        return print, ("executed",)


@pytest.mark.usefixtures("by_golden_features")
def test_a_reference_that_would_execute_is_refused(
    fifty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = tmp_path / "evil.pkl"
    evil.write_bytes(pickle.dumps({"fid": {"mu": Evil(), "sigma": 1}}))
    assert "Nothing was executed." in refused(tmp_path / "run", str(fifty), reference=str(evil))
    assert capsys.readouterr().out == ""


def test_statistics_under_another_identity_do_not_compare(fifty: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "run")
    data = resolve.resolve(store, str(fifty), ["dataset"])
    rng = np.random.default_rng(0)
    first, second = (by_rows("inception", rng.standard_normal((50, 4)), f"inception@{i}") for i in "ab")
    features.stats_of(store, data, first)
    stats = next(a for a in store.artifacts() if a.kind == "stats")
    assert moments.detector_name(stats) == "inception"
    held = moments.moments(store, stats, first)
    assert held
    assert held.mean.shape == (4,)
    with pytest.raises(SidaError) as caught:
        moments.moments(store, stats, second)
    assert str(caught.value) == (
        "statistics compare under one detector alone, these are by inception@a, the images are measured by "
        "inception@b. Score with the detector file that made them, or against the dataset itself."
    )


def test_features_that_are_not_finite_name_the_image(
    fifty: Path, tmp_path: Path, golden: dict[str, np.ndarray[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = golden["gen_fid"].copy()
    rows[37] = np.nan
    instead_of(scorers._weights_digest, lambda store, name: name, monkeypatch)
    instead_of(scorers.load_detector, lambda *arguments, **options: by_rows("inception", rows), monkeypatch)
    message = refused(tmp_path / "run", str(fifty), reference=str(golden_metrics("stats_formats/ref_edm.npz")))
    assert message == "features by inception must be finite, those of image 37 are not. Look at that image."


@pytest.mark.usefixtures("by_golden_features")
def test_few_images_and_imagenet64s_swapped_files_are_warned_of(fifty: Path, tmp_path: Path) -> None:
    swapped = tmp_path / "VIRTUAL_imagenet64_labeled.npz"
    swapped.write_bytes(golden_metrics("stats_formats/VIRTUAL_standin.npz").read_bytes())
    few = sidactl.fid(str(fifty), num=8, reference=str(swapped), run=tmp_path / "run")
    assert few.warnings == [
        "8 images are few for 8 features: the distance is far too high by their number alone; compare only with scores "
        "of as many, better of 50,000",
        "the published FIDs of ImageNet 64 are against --ref imagenet64; this file is for precision and recall",
    ]
    assert few.to_json()["warnings"] == few.warnings
    plain = golden_metrics("stats_formats/ref_edm.npz")
    assert sidactl.fid(str(fifty), reference=str(plain), run=tmp_path / "run").warnings == []


def test_published_statistics_in_place_of_another_dataset_of_the_same_name_are_warned_of(
    fifty: Path, tmp_path: Path
) -> None:
    store = Store.open(tmp_path / "run")
    data = resolve.resolve(store, str(fifty), ["dataset"], any_size=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    entry = catalog.REFERENCES["cifar10"]
    assert entry.source is not None
    stats = store.put("stats", {"stats.npz": weights}, params={"name": "cifar10", "source": entry.source.url})
    generator = store.put("generator", {"model.safetensors": weights}, params={}, inputs={"dataset": data.oid})
    samples = store.put("samples", {"images.npy": weights}, params={}, inputs={"net": generator.oid})
    for subject in (generator, samples):
        assert reference.warning(store, subject, stats) == (
            "the statistics of cifar10 are of 50,000 images, the network was trained on 50: "
            f"--ref {data.oid[:12]} compares with these"
        )
    teacher = store.put("teacher", {"model.safetensors": weights}, params={})
    assert reference.warning(store, teacher, stats) is None
    assert reference.warning(store, generator, data) is None


@pytest.mark.usefixtures("by_golden_features")
def test_precision_and_recall_take_the_images_of_a_virtual_batch(fifty: Path, tmp_path: Path) -> None:
    virtual = str(golden_metrics("stats_formats/VIRTUAL_standin.npz"))
    score = sidactl.prec_recall(str(fifty), reference=virtual, convention="guided-diffusion", run=tmp_path / "run")
    store = Store.open(tmp_path / "run")
    assert store.get(score.references["precision"]).kind == "dataset"
    assert store.get(score.references["precision"]).results["num_images"] == 24


def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **files: bytes) -> None:
    """Puts these files in the catalog, by entry, as if they were at their publisher's."""
    for name, data in files.items():
        group = catalog.DETECTORS if name in catalog.DETECTORS else catalog.REFERENCES
        entry = group[name]
        assert entry.source
        path = tmp_path / Path(entry.source.url).name
        path.write_bytes(data)
        source = dataclasses.replace(entry.source, url=path.as_uri(), sha256=None, size_bytes=None)
        monkeypatch.setitem(group, name, dataclasses.replace(entry, source=source))  # type: ignore[arg-type,misc]


def test_the_default_reference_of_a_published_dataset_is_its_published_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = golden_metrics("stats_formats/ref_edm.npz").read_bytes()
    published(tmp_path, monkeypatch, ffhq64=data)
    store = Store.open(tmp_path / "run")
    net = catalog.TEACHERS["tiny-digits"].net.to_json()
    params = {"name": "mine", "net": net, "dataset": "ffhq64"}
    subject = store.put("generator", {"model.safetensors": b""}, params=params)
    found = reference.find(store, None, subject, "moments")
    assert (found.kind, found.params["name"]) == ("stats", "ffhq64")
    assert reference.find(store, "ffhq64", subject, "moments").oid == found.oid
    assert moments.detector_name(found) == "inception"
    classes = prepare_data(None, classes=10, run=store.root)  # as mode sid trains on where images are not there
    free = store.put("generator", {"model.safetensors": b""}, inputs={"dataset": classes.oid}, params=params)
    assert reference.find(store, None, free, "moments").oid == found.oid
    with pytest.raises(SidaError, match=r"^dataset ffhq64 must be prepared from its files\. "):
        reference.find(store, None, subject, "images")


def test_a_detector_is_downloaded_once_checked_and_loaded_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    state = inception.FIDInception().state_dict()
    buffer = io.BytesIO()
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, buffer)
    published(tmp_path, monkeypatch, inception=buffer.getvalue())
    store = Store.open(tmp_path / "run")
    kept = fetch.fetch_detector("inception", run=store.root)
    assert kept.kind == "detector"
    assert store.refs()["detector/inception"] == kept.oid
    (tmp_path / "pt_inception-2015-12-05-6726825d.pth").unlink()
    loaded = scorers.load_detector(store, "inception", CPU)
    assert loaded.identity == detectors.load("inception", state).identity
    path = tmp_path / "own.safetensors"
    safetensors.torch.save_file(state, path)
    assert scorers.load_detector(store, str(path), CPU).identity == loaded.identity


def test_a_file_that_is_not_the_detector_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return print, ("executed",)

    buffer = io.BytesIO()
    torch.save({"fc.weight": torch.zeros(2, 2)}, buffer)
    for data, message in (
        (buffer.getvalue(), "the weights do not fit FIDInception"),
        (
            pickle.dumps({"a": Hostile()}, protocol=2),
            "refused, the pickle names __builtin__.print, which is not on the list",
        ),
        (b"PK" + buffer.getvalue()[2:-1], "damaged "),
    ):
        published(tmp_path, monkeypatch, inception=data)
        with pytest.raises(SidaError, match=message):
            fetch.fetch_detector("inception", run=tmp_path / "run")
        store = Store.open(tmp_path / "run")
        assert not store.refs()
        assert not [p for p in (store.root / "tmp").glob("*") if p.suffix != ".lock"]


def test_an_unknown_detector_has_its_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(SidaError) as caught:
        sidactl.fid("tiny-digits", num=2, detector="dinov3", run=tmp_path / "run")
    assert str(caught.value) == "unknown detector 'dinov3'. Did you mean 'dinov2'?"
