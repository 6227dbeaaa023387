"""How much of its teacher's map from noise to images a generator keeps."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sidactl
from sidactl import cli, sampling
from sidactl.commands import pairs
from sidactl.commands.resolve import load_net
from sidactl.commands.samplers import sampler_of
from sidactl.errors import SidaError
from sidactl.recipes import HeunSpec, OneStepSpec
from sidactl.store import Store
from tests.conftest import Finished


def test_the_numbers_are_of_what_sample_draws_of_the_same_seeds(finished: Finished) -> None:
    score = sidactl.evaluate(finished.best, ["pairs"], num=300, run=finished.root)
    store = Store.open(finished.root)
    drawn = []
    for ref, num in ((finished.best.oid, 300), ("tiny-digits", 300)):
        made = sidactl.sample(ref, num=num, run=finished.root)
        drawn.append(torch.from_numpy(made.images).flatten(1).double())
    distances = (drawn[0] - drawn[1]).square().mean(1).sqrt()
    assert score.values["pair distance"][0] == pytest.approx(float(distances.mean()), rel=1e-9)
    # A generator after few steps has lost much of the map, and not all.
    assert 0.2 < score.values["pair ratio"][0] < 1
    assert score.references["pair ratio"] == finished.best.inputs["teacher"]
    assert score.detectors["pair ratio"] == "pixels"
    taught = store.get(finished.best.inputs["teacher"])
    teacher, ode = load_net(store, taught, "cpu"), pairs.ode_of(taught)
    # The same net in one step is not its own ODE, but knows the noise.
    same = sampling.paired_batch(teacher, OneStepSpec(), teacher, ode, range(40), torch.device("cpu"))
    again = sampling.paired_batch(teacher, OneStepSpec(), teacher, ode, range(20, 40), torch.device("cpu"))
    for whole, part in zip(same, again, strict=True):  # each image by its seed, random pairs as well
        assert torch.allclose(whole[20:], part, atol=1e-5)


def test_beside_other_metrics_nothing_changes(finished: Finished) -> None:
    both = sidactl.evaluate(finished.best, ["fid", "pairs"], num=100, trials=2, run=finished.root)
    assert set(both.values) == {"FD tiny-digits", "FD tiny-digits-ssl", "pair distance", "pair ratio"}
    alone = sidactl.fid(finished.best, num=100, trials=2, run=finished.root)
    assert both.values["FD tiny-digits"] == alone.values["FD tiny-digits"]
    assert len(set(both.values["pair ratio"])) == 2
    assert both.seen == alone.seen


def test_the_ode_is_the_teachers_own_sampler_without_churn(finished: Finished) -> None:
    teacher = Store.open(finished.root).get(finished.best.inputs["teacher"])
    own = sampler_of(teacher)
    assert isinstance(own, HeunSpec)
    churning = replace(teacher, params=teacher.params | {"sampler": replace(own, S_churn=40.0).to_json()})
    assert pairs.ode_of(churning) == replace(own, S_churn=0.0)


def test_what_has_no_teacher_is_refused_in_one_line(finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        Image.new("L", (8, 8), index).save(folder / f"{index}.png")
    for ref, what in (("tiny-digits", "the teacher tiny-digits"), (str(folder), "the dataset images")):
        with pytest.raises(SidaError) as caught:
            sidactl.evaluate(ref, ["pairs"], num=2, run=finished.root)
        assert str(caught.value) == (f"pairs are of a generator that was distilled here, got {what}. Leave out pairs.")
        assert caught.value.exit_code == 2


def test_compare_draws_generators_below_their_teacher(
    finished: Finished, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root, picture = str(finished.root), tmp_path / "pairs.png"
    words = ["compare", "generator/last", "tiny-digits", "--num", "30", "--trials", "2", "--run", root]
    for path in (picture, picture):  # the second takes the place of the first
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--pairs", str(path)])
        assert ended.value.code == 0
    err = capfd.readouterr().err
    assert "row 1: teacher tiny-digits, its ODE" in err
    assert "row 2: tiny-digits-sida (" in err
    assert "left out: pairs are of a generator that was distilled here, got the teacher tiny-digits" in err
    with Image.open(io.BytesIO(picture.read_bytes())) as image:
        assert image.size == (12 * 66 - 2, 2 * 66 - 2)
        theirs = image.crop((0, 0, 12 * 66 - 2, 64))
    drawn = sidactl.sample("tiny-digits", num=12, run=finished.root)
    first = drawn.images[0, :, :, 0]
    assert [theirs.getpixel((8 * x, 0)) for x in range(8)] == first[0].tolist()


def test_a_picture_of_nothing_is_refused(finished: Finished, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "pairs.png"
    with pytest.raises(SystemExit) as ended:
        cli.main(
            [
                "compare",
                "tiny-digits",
                "--num",
                "30",
                "--trials",
                "2",
                "--run",
                str(finished.root),
                "--pairs",
                str(picture),
            ]
        )
    assert ended.value.code == 2
    assert "a picture of pairs needs a generator that was distilled here, got none" in capfd.readouterr().err
    assert not picture.exists()


def test_pairs_alone_take_neither_reference_nor_detector(finished: Finished) -> None:
    options: list[dict[str, Any]] = [{"reference": "tiny-digits"}, {"detector": "random-features"}]
    for option in options:
        with pytest.raises(SidaError, match=r"by pixels, which --(ref|detector) says nothing of"):
            sidactl.evaluate(finished.best, ["pairs"], num=4, run=finished.root, **option)
