"""Classes without images: from a dataset.json, a number or a name, and where they will not do."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

import sidactl
from sidactl import catalog, prepare_data
from sidactl.commands import dataset_stats, running
from sidactl.commands.resolve import image_source, resolve
from sidactl.commands.words import shape_for_nets
from sidactl.errors import SidaError
from sidactl.store import Store
from tests.commands.conftest import refused_data
from tests.web import Site


def test_classes_without_images_come_from_a_dataset_json_or_a_number(run: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"labels": [["x.png", 2], ["y.png", 0], ["z.png", 2]], "other": 1}')
    published = prepare_data("dataset.json", labels_only=True, name="mine", run=run)
    assert published.results == {
        "num_images": 3,
        "resolution": None,
        "num_channels": None,
        "label_dim": 3,
        "class_counts": [1, 0, 2],
        "skipped": [],
        "kind": "labels",
    }
    assert Store(run).read(published, "dataset.json") == b'{"labels": [["x.png", 2], ["y.png", 0], ["z.png", 2]]}'
    assert prepare_data("dataset.json", labels_only=True, run=run) == published
    source = image_source(Store(run), published)
    assert source.num_images == 3
    assert source.one_hot([0, 1, 2]).tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]
    uniform = prepare_data(None, classes=1000, run=run)
    assert uniform.params["name"] == "classes-1000"
    assert uniform.results["class_counts"] == [1] * 1000
    assert torch.equal(image_source(Store(run), uniform).one_hot(range(1000)), torch.eye(1000))


def test_classes_without_images_come_from_a_url(site: Site, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site.files["/labels/dataset.json"] = data = b'{"labels": [["x.png", 2], ["y.png", 0]]}'
    url = f"{site.url}/labels/dataset.json"
    made = prepare_data(url, labels_only=True, run=run)
    assert capsys.readouterr().err.startswith(f"downloading {url}: 0.0 MB from {url}\n")
    assert made.results["class_counts"] == [1, 0, 1]
    assert made.params == {
        "name": "dataset.json",
        "licence": None,
        "source_url": url,
        "source_sha256": hashlib.sha256(data).hexdigest(),
    }
    assert prepare_data(url, labels_only=True, offline=True, run=run) == made
    assert len(site.requests) == 1
    assert not list(run.glob("tmp/*"))
    with pytest.raises(SidaError, match=r"^labels without images take no options of images"):
        prepare_data(url, labels_only=True, max_images=1, run=run)


def test_published_classes_are_fetched_by_name_and_are_those_of_their_dataset(
    site: Site, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.files["/dataset.json"] = b'{"labels": [["x.png", 999], ["y.png", 0]]}'
    source = catalog.Download(url=f"{site.url}/dataset.json")
    entry = dataclasses.replace(catalog.DATASETS["imagenet512-labels"], source=source, num_images=2)
    monkeypatch.setitem(catalog.DATASETS, entry.name, entry)
    made = prepare_data("imagenet512-labels", labels_only=True, name="mine", run=run)
    assert (made.params["name"], made.results["label_dim"]) == ("imagenet512", 1000)
    assert Store(run).refs() == {"dataset/imagenet512-labels": made.oid, "dataset/mine": made.oid}
    for asks in (
        lambda: prepare_data("imagenet512-labels", run=run),
        lambda: prepare_data(source.url, labels_only=True, run=run),
        lambda: resolve(Store(run), "imagenet512-labels", ["dataset"]),
    ):
        assert asks() == made
    assert len(site.requests) == 1
    with pytest.raises(SidaError, match=r"^dataset imagenet512 must be prepared from its files\. "):
        resolve(Store(run), "imagenet512", ["dataset"])
    elsewhere = resolve(Store(run.parent / "other"), "imagenet512-labels", ["dataset"])
    assert elsewhere == made


def test_image_source_of_images_is_the_dataset(run: Path) -> None:
    digits = prepare_data("tiny-digits", run=run)
    assert image_source(Store(run), digits).images([0]).shape == (1, 1, 8, 8)
    assert shape_for_nets(digits) == (8, 1, 10)


def test_classes_without_images_are_refused_where_images_are_needed(run: Path) -> None:
    classes = prepare_data(None, classes=10, name="ten", run=run)
    text = f"images are needed, got dataset {classes.oid[:12]} of classes alone. Give a dataset with images."
    for use in (
        lambda: sidactl.fid("dataset/ten", run=run),
        lambda: sidactl.prec_recall("dataset/ten", run=run),
        lambda: sidactl.train_teacher("dataset/ten", name="x", run=run),
        lambda: dataset_stats.dataset_stats("dataset/ten", run=run),
        lambda: prepare_data("dataset/ten", latents=True, run=run),
        lambda: sidactl.export("dataset/ten", run / "out", form="png", run=run),
    ):
        with pytest.raises(SidaError) as caught:
            use()
        assert str(caught.value) == text
    with pytest.raises(SidaError) as caught:
        sidactl.fid("tiny-digits", reference="dataset/ten", run=run)
    assert str(caught.value) == (
        "there are no images to compare with: ten is of classes alone. Pass --ref with a folder or a dataset of images."
    )


def test_classes_without_images_fit_any_net_of_as_many_classes(run: Path) -> None:
    for number in (10, 11):
        data = prepare_data(None, classes=number, run=run)
        net = catalog.TEACHERS["tiny-digits"].net
        if number == 10:
            running.check_fit(shape_for_nets(data), net, "teacher")
            continue
        with pytest.raises(SidaError, match=r"^the dataset must fit the teacher"):
            running.check_fit(shape_for_nets(data), net, "teacher")


@pytest.mark.parametrize(
    ("source", "options", "text"),
    [
        (None, {}, "a source is needed, got none. Name a folder, an archive, or tiny-digits."),
        (
            None,
            {"labels_only": True},
            "labels without images come from a dataset.json or a number of classes, got neither. "
            "Name the file, or pass --classes.",
        ),
        (
            "l.json",
            {"classes": 3},
            "labels without images come from a dataset.json or a number of classes, got both. "
            "Name the file, or pass --classes.",
        ),
        (
            "l.json",
            {"labels_only": True, "resolution": (8, 8)},
            "labels without images take no options of images, got some. Leave them out.",
        ),
        ("l.json", {"labels_only": True}, "l.json must hold labels, got none. Give a dataset.json with labels."),
        ("no.json", {"labels_only": True}, "no.json cannot be read: No such file or directory. Check the path."),
        (None, {"classes": 0}, "--classes must be from 1 to 1000000, got 0. Pass the teacher's number."),
    ],
)
def test_labels_from_no_source_from_two_or_with_options_of_images_are_refused_in_one_line(
    source: str | None, options: dict[str, Any], text: str, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "l.json").write_text('{"labels": null}')
    assert refused_data(run, source, **options) == text


def test_statistics_of_a_dataset_are_those_that_scores_use(run: Path) -> None:
    digits = prepare_data("tiny-digits", run=run)
    made = dataset_stats.dataset_stats("tiny-digits", run=run, device="cpu")
    assert made.kind == "stats"
    assert made.inputs == {"dataset": digits.oid}
    assert Store(run).refs()["stats/tiny-digits-tiny-digits"] == made.oid
    before = [*Store(run).artifacts()]
    assert sidactl.fid("dataset/tiny-digits", reference=made.oid, run=run).value == pytest.approx(0, abs=1e-6)
    assert [artifact.kind for artifact in Store(run).artifacts() if artifact not in before] == ["score"]
