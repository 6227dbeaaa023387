"""From the published files to a score, as a user walks: every road on stand-ins, by the command line."""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sidactl import cli, report, sampling
from sidactl.commands import evaluation, features, resolve, scorers
from sidactl.commands import reference as commands_reference
from sidactl.commands import scores as commands_scores
from sidactl.foreign import download
from sidactl.store import Artifact, LiveDir, Store, digest
from sidactl.training import distillation
from tests import processes, standins
from tests.conftest import instead_of


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mirror") / "files"
    standins.write_mirror(folder)
    return folder


@dataclass
class Told:
    code: int
    out: str
    err: str


class Road:
    """A fresh machine: an empty run directory, a mirror, and the command line."""

    def __init__(self, root: Path, mirror: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.root, self.mirror, self.capfd = root, mirror, capfd

    @property
    def store(self) -> Store:
        return Store.open(self.root / "run")

    def __call__(self, *words: str, code: int = 0) -> Told:
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--run", str(self.root / "run")])
        out, err = self.capfd.readouterr()
        assert (ended.value.code or 0) == code, err
        return Told(code, out.strip(), err)

    def distill(self, teacher: str, mode: str, *words: str, **options: Any) -> Told:
        chosen = [*standins.FEW, *(standins.SIDA if mode != "sid" else [])]
        return self("distill", "--teacher", teacher, "--mode", mode, *chosen, "--device", "cpu", *words, **options)

    def follow(self, told: Told, **places: str) -> None:
        """Runs the command that an error advises, with what stands for a PATH in it."""
        (command,) = re.findall(r"sidactl ([a-z].*)\.\n$", told.err)
        self(*[places.get(word, word) for word in command.split()])

    def distill_imagenet(self, teacher: str) -> Told:
        """SiDA on ImageNet's folder, prepared as the first attempt without it advises."""
        root = standins.write_imagenet(self.root / "imagenet")
        self.follow(self.distill(teacher, "sida", code=2), PATH=str(root))
        return self.distill(teacher, "sida")

    def scores_agree(self, generator: str, reference: str, num: str = "3") -> None:
        """What `fid G` and `sample G | fid` print is equal, and against what they say is what trained it."""
        drawn = self("sample", generator, "--num", num, "--device", "cpu").out
        told = [self("fid", ref, "--num", num, "--device", "cpu") for ref in (generator, drawn)]
        assert float(told[0].out) == pytest.approx(float(told[1].out), rel=1e-6)
        for each in told:
            assert f", against {reference}\n" in each.err

    def precision(self, generator: str, *words: str, code: int = 0) -> Told:
        """Precision and recall of four images, by one neighbour."""
        return self("prec-recall", generator, "--num", "4", "--neighbours", "1", "--device", "cpu", *words, code=code)


@pytest.fixture
def road(tmp_path: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Road:
    for name in [name for name in os.environ if name.startswith("SIDACTL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SIDACTL_MIRROR", str(mirror))
    monkeypatch.chdir(tmp_path)
    standins.small_catalog(monkeypatch, mirror)
    return Road(tmp_path, mirror, capfd)


def test_road_of_cifar10_from_its_archive(road: Road) -> None:
    told = road.distill("edm-cifar10-uncond", "sida")
    assert (
        "scored against the published statistics cifar10, as the published runs were; --ref takes others\n" in told.err
    )
    assert "; its teacher: 1.97 (published). " in told.err
    made = road.store.get(told.out)
    assert (made.results["teacher_score"], made.results["teacher_score_is"]) == (1.97, "published")
    assert road.store.get(made.inputs["reference"]).params["name"] == "cifar10"
    road.scores_agree(told.out, "statistics cifar10")
    again = road(
        "prepare-data", str(road.mirror / "cifar-10-python.tar.gz"), "--preset", "cifar10", "--name", "cifar10"
    )
    assert again.out == made.inputs["dataset"]
    against = road("fid", told.out, "--num", "3", "--ref", "dataset/cifar10", "--device", "cpu")
    assert ", against dataset cifar10\n" in against.err
    assert ", against dataset cifar10\n" in road.precision(told.out).err


def test_road_of_imagenet64_from_its_folder(road: Road) -> None:
    told = road.distill_imagenet("edm-imagenet64")
    assert "(of 1,281,167 images, the dataset has 6)" in told.err
    road.scores_agree(told.out, "statistics imagenet64")
    assert ", against dataset imagenet64-images\n" in road.precision(told.out).err


def test_road_of_edm2_from_images_by_latents(road: Road) -> None:
    told = road.distill_imagenet("edm2-s")
    assert "scored against the published statistics imagenet512, " in told.err
    assert "(of 1,281,167 images, the dataset has 6)" in told.err
    road.scores_agree(told.out, "statistics imagenet512")
    (dataset,) = road.store.artifacts(kind="dataset")  # no pixels beside it
    assert (dataset.inputs, dataset.results["kind"]) == ({}, "latents")
    compared = road("fid", told.out, "--num", "3", "--ref", "dataset/imagenet512", "--device", "cpu", code=2)
    assert compared.err.startswith("error: latents have no images to compare with, got imagenet512. Pass --ref with ")
    refused = "error: latents have no images to compare with, got imagenet512. Pass --ref with a folder or a dataset "
    for words in ([], ["--ref", "imagenet512"]):
        assert refused in road.precision(told.out, *words, code=2).err
    road.precision(told.out, "--ref", "imagenet")
    warned = road("fid", told.out, "--num", "4", "--device", "cpu").err
    assert "are of 1,281,167 images, the network was trained on 6\n" in warned
    tuned = road.distill("edm2-s", "sid2a", "--generator", "sid/edm2-s", "--teacher-score", "measure")
    assert "generator/latest is there already; scoring the teacher goes on\n" in tuned.err
    scores: Any = road.store.get(tuned.out).results["scores"]
    assert [nimg for nimg, _ in scores] == [0, 16, 24]


def test_road_of_edm2_from_latents_that_somebody_made(road: Road, tmp_path: Path) -> None:
    (tmp_path / "img512-sd.zip").write_bytes(standins.latents_zip())
    told = road.distill("edm2-s", "sida", "--dataset", "img512-sd.zip")
    assert (
        "img512-sd.zip has no images to compare with: scored against the statistics imagenet512 of its teacher's\n"
        in told.err
    )
    road.scores_agree(told.out, "statistics imagenet512")
    compared = road("fid", told.out, "--num", "3", "--ref", "img512-sd.zip", "--device", "cpu", code=2)
    assert compared.err == (
        "error: latents have no images to compare with, got img512-sd.zip. Pass --ref with the dataset of pixels, or "
        "with published statistics such as imagenet512.\n"
    )
    refused = road.precision(told.out, code=2).err
    assert refused.endswith("got img512-sd.zip. Pass --ref with a folder or a dataset of images.\n")
    assert road.precision(told.out, "--ref", "imagenet512", code=2).err.endswith(
        "Pass --ref with a folder or a dataset of images.\n"
    )


@pytest.mark.parametrize("has_labels", [False, True])
def test_road_of_edm2_from_classes_alone(road: Road, tmp_path: Path, has_labels: bool) -> None:
    words = list[str]()
    if has_labels:
        (tmp_path / "dataset.json").write_text('{"labels": [["a.png", 1], ["b.png", 2], ["c.png", 1]]}')
        road("prepare-data", "dataset.json", "--labels-only", "--name", "shares")
        words = ["--dataset", "shares"]
    told = road.distill("edm2-s", "sid", *words)
    assert "scored against the published statistics imagenet512, " in told.err
    assert road.precision(told.out, code=2).err.endswith("Pass --ref with a folder or a dataset of images.\n")
    road.scores_agree(told.out, "statistics imagenet512")


def test_several_scores_at_once_of_a_run_by_the_published_detectors(road: Road) -> None:
    told = road.distill("edm2-s", "sid", "--evaluate-also", "inception-score,fd-dinov2", "--evaluate-num", "10")
    also: Any = road.store.get(told.out).results["also"]
    assert sorted(also) == ["FD-DINOv2", "IS"]
    assert re.search(r"\nFID \S+, IS \S+, FD-DINOv2 \S+ after 24 images\n", told.err)
    assert ", against statistics imagenet512\n" in road("fd-dinov2", told.out, "--num", "10", "--device", "cpu").err


@pytest.mark.slow
def test_every_network_of_the_catalog_comes_from_the_mirror(road: Road) -> None:
    for name in (*standins.NETS, *standins.GENERATORS):
        assert road.store.get(road("fetch-teacher", name).out).params["name"] == name


def measuring(teacher: str, folder: Path) -> list[str]:
    """Flags of a run that scores its teacher, too; one on latents finds somebody's zip of them in the folder."""
    words = ["--teacher-score", "measure", "--evaluate-num", "10"]
    if teacher == "edm2-s":
        (folder / "img512-sd.zip").write_bytes(standins.latents_zip())
        words += ["--dataset", "img512-sd.zip"]
    return words


@pytest.mark.parametrize("teacher", ["edm-cifar10-uncond", pytest.param("edm2-s", marks=pytest.mark.slow)])
def test_two_processes_take_a_road_to_the_same_generator(road: Road, tmp_path: Path, teacher: str) -> None:
    words = measuring(teacher, tmp_path)
    alone = road.distill(teacher, "sida", *words).out
    words = ["distill", "--teacher", teacher, "--mode", "sida", *standins.FEW, *standins.SIDA, *words]
    words = [str(road.mirror), *words, "--device", "cpu", "--run", str(tmp_path / "together")]
    first, second = processes.run(2, words, {}, "tests.standins")
    assert (first.code, second.code, first.out.strip()) == (0, 0, alone), first.err + second.err
    lines = (first.err + second.err).splitlines()
    downloads = [line.partition(": ")[0] for line in lines if line.startswith("downloading ")]
    assert len(downloads) == len(set(downloads)) > 2
    assert not any((tmp_path / "together/live").iterdir())


class Cut(BaseException):
    """The power fails."""


@dataclass
class Cuts:
    """Lets the power fail once at every stage of a road: the first time that it is reached, before or after it."""

    patch: pytest.MonkeyPatch
    is_before: bool
    stages: list[str] = field(default_factory=list)
    """those at which it failed so far"""
    served: Counter[str] = field(default_factory=Counter)
    num_steps: int = 0

    def at(self, owner: Any, name: str) -> None:
        """Calls of this function are stages, each by what it is called with, and by whom."""
        real: Callable[..., Any] = getattr(owner, name)

        def mortal(*given: Any, **options: Any) -> Any:
            words = [f"{g.kind} {g.params.get('name')}" if isinstance(g, Artifact) else g for g in given]
            told = [str(word) for word in words if isinstance(word, str)]
            told += [digest({key: dict(options.get(key) or {}) for key in ("params", "results")})[:8]] * bool(options)
            stage = " ".join([name, sys._getframe(1).f_code.co_name, *told])
            is_new = stage not in self.stages
            made = None if is_new and self.is_before else real(*given, **options)
            if is_new:
                self.stages.append(stage)
                raise Cut(stage)
            return made

        if isinstance(owner, type) or not real.__module__.startswith("sidactl."):
            self.patch.setattr(owner, name, mortal)
        else:
            instead_of(real, mortal, self.patch)

    def count(self) -> None:
        """Counts what the mirror serves, and the steps of training."""
        opened, step = download._open_file, distillation.Distillation.step

        def served(place: str) -> Any:
            body = opened(place)
            self.served[place.rpartition("/")[2]] += 1
            return body

        def counted(training: distillation.Distillation) -> Any:
            self.num_steps += 1
            return step(training)

        instead_of(download._open_file, served, self.patch)
        self.patch.setattr(distillation.Distillation, "step", counted)


@pytest.mark.slow
@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("teacher", ["edm-cifar10-uncond", "edm2-s"])
def test_a_road_that_fails_at_each_of_its_stages_loses_nothing(
    road: Road, tmp_path: Path, teacher: str, is_before: bool
) -> None:
    words = measuring(teacher, tmp_path)
    undisturbed = Road(tmp_path / "undisturbed", road.mirror, road.capfd)
    expected = undisturbed.distill(teacher, "sida", *words).out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "SAVE_EVERY_SEC", 0.0)
        cuts = Cuts(patch, is_before)
        cuts.count()
        for owner, name in (
            *((download, name) for name in ("fetch", "_open_file")[: 1 + is_before]),  # an open file must be closed
            *((Store, name) for name in ("put", "answer", "set_ref", "log")),
            *((LiveDir, name) for name in ("write", "clear")),
            *((resolve, "load_net"), (scorers, "load_detector"), (commands_scores, "numbers")),
            *((evaluation, "try_scoring"), (evaluation, "preview_of")),
            *((sampling, "generate"), (features, "collect"), (commands_reference, "moments")),
            *((report, "grid"), (report, "curve")),
        ):
            cuts.at(owner, name)
        for _ in range(200):
            before = len(cuts.stages)
            try:
                made = road.distill(teacher, "sida", *words).out
                break
            except Cut:
                assert len(cuts.stages) == before + 1
        assert made == expected
        assert len(cuts.stages) > 40, cuts.stages
        assert cuts.num_steps == 6
        opened = {name: count for name, count in cuts.served.items() if count > (1 if is_before else 2)}
        assert not opened
    assert not any((road.root / "run" / "live").iterdir())
    road("verify")
