"""What is stored, or asked, keeps its name: digests of recipes and networks, questions' keys, oids, tensors' names.

A change of any of these makes run directories forget what they know. Whoever means to change one says so in the
changelog; a field that is added to a recipe is left out of its JSON while it holds its default (`JsonFields._later`).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sidactl
from sidactl import catalog
from sidactl.commands import reference
from sidactl.recipes import SID_MODES
from sidactl.store import Store, digest
from sidactl.training import checkpoints
from tests.conftest import SHORT, instead_of

RECIPES = {
    "tiny-digits": "340a3c7971eb57b9",
    "edm-cifar10-uncond": "9d15cb86dd60fc15",
    "edm-cifar10-cond": "820f88fd7f9375d3",
    "edm-imagenet64": "9b1e12c71ac3b91f",
    "edm-ffhq64": "08c15a8cab75836f",
    "edm-afhqv2": "007584abe7f8d4ed",
    "edm2-xs": "750a7a5c53e2aaf4",
    "edm2-xs-dino": "13906817f4a45a37",
    "edm2-s": "b40f75d5b20c7292",
    "edm2-s-dino": "3e8b3262ebba1507",
    "edm2-s-guided": "8f9ddcc8ea9d381f",
    "edm2-m": "d4b1cbeee75fc24e",
    "edm2-m-dino": "1db3b4fbaf35eab1",
    "edm2-l": "e9def30f7b3300c8",
    "edm2-l-dino": "d08caf81a0e53ebc",
    "edm2-xl": "c8d108b1845d4947",
    "edm2-xl-dino": "cde8aef24d1ceaac",
    "edm2-xxl": "10442e4e24cbae74",
    "edm2-xxl-dino": "6ff738b4bd2cba87",
    "edm2-img64-s": "60ea6c304338478e",
    "edm2-img64-m": "67f6eef1063b0630",
    "edm2-img64-l": "dba1a4ce0866fd88",
    "edm2-img64-xl": "0927840cb42fdabe",
}
NETS = {
    "tiny-digits": "807a9cbe4a8c84bf",
    "tiny-digits-guide": "e2febc11c4881542",
    "edm-cifar10-uncond": "4e033cd6d7d5076b",
    "edm-cifar10-cond": "017b27184d241249",
    "edm-imagenet64": "eb8eecdc6b4fec30",
    "edm-ffhq64": "4a5737e60570cb81",
    "edm-afhqv2": "6fa79ff9dded18a9",
    "edm2-xs": "f1adb94ab3ad821c",
    "edm2-xs-dino": "f1adb94ab3ad821c",
    "edm2-s": "bf5168cf811abdd3",
    "edm2-s-dino": "bf5168cf811abdd3",
    "edm2-m": "d1ed565f00e6eff9",
    "edm2-m-dino": "d1ed565f00e6eff9",
    "edm2-l": "52f2c416aa4c3be6",
    "edm2-l-dino": "52f2c416aa4c3be6",
    "edm2-xl": "dd53580b95a73a00",
    "edm2-xl-dino": "dd53580b95a73a00",
    "edm2-xxl": "4baf274397bb9c21",
    "edm2-xxl-dino": "4baf274397bb9c21",
    "edm2-s-guided": "bf5168cf811abdd3",
    "edm2-xs-uncond": "8ad4952ae00191e9",
    "edm2-img64-s": "e976e823389b07c8",
    "edm2-img64-m": "ec941cb439300d8c",
    "edm2-img64-l": "23e99205221c2c72",
    "edm2-img64-xl": "4deab734308cf2ca",
}
GENERATORS = "e66fc0af87f7d773"
OIDS = {
    "teacher/tiny-digits": "e966e3fc9d712024",
    "dataset/ten": "9c5062c8432fe586",
    "detector/tiny-digits": "8236b0b7f2330649",
    "detector/random-features": "7600d3dbac7880be",
}
IMAGES = "ec330f790945fbd3"
KEYS = {
    "fetch-teacher": ["8160ca7101689bb6"],
    "prepare-data": ["31deb23d40de9a31", "b306847097f63725", "d7d517c754ba3b7d"],
    "sample": ["863dd0b1cffb17e2"],
    "fetch-detector": ["5a12b4218657f3c0", "3f3b895d72abf8e8"],
    "stats": ["4ef32ca3b5e1a502", "13a74d2d7b821fa9"],
    "features": ["2af5bb5468ae1b1b", "1d2e35f3400cab55"],
    "score": ["b49d017efb594987", "0d923df70ed696d3"],
    "import-stats": ["69916e8f69986c07"],
    "train-teacher": ["cf5d1bd4cc76f4f0"],
    "distill": ["7f8edc011c85b66a", "3d02d629ea50ab09", "b8e9d9b1af76df66", "465354beb884f3ad"],
}
KINDS = {
    "sid": ["ema", "fake_score", "fake_score_optimizer", "generator", "generator_optimizer"],
    "sida": ["ema", "fake_score", "fake_score_optimizer", "generator", "generator_optimizer"],
}
TENSORS = {"sid": [1308, "5415875e66964dc3"], "sida": [1308, "5415875e66964dc3"]}


def test_recipes_of_the_catalog_keep_their_digests() -> None:
    found = {
        name: digest({mode: teacher.recipes[mode].to_json() for mode in SID_MODES})[:16]
        for name, teacher in catalog.TEACHERS.items()
        if teacher.recipes
    }
    assert found == RECIPES


def test_networks_of_the_catalog_keep_their_digests() -> None:
    found = {name: digest([t.net.to_json(), t.sampler.to_json()])[:16] for name, t in catalog.TEACHERS.items()}
    assert found == NETS
    generators = {name: [g.net.to_json(), g.sampler.to_json()] for name, g in catalog.GENERATORS.items()}
    assert digest(generators)[:16] == GENERATORS


SMALL = {name: SHORT[name] for name in ("batch_size", "generator_from_nimg", "evaluate_num")} | {
    "duration_nimg": 32,
    "evaluate_every_nimg": 32,
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run directory in which every command was asked once, of inputs that are the same on every machine."""
    folder = tmp_path_factory.mktemp("asked")
    run = folder / "run"
    teacher = sidactl.fetch_teacher("tiny-digits", run=run)
    labels = sidactl.prepare_data(None, classes=10, name="ten", run=run)
    np.savez(folder / "statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    np.savez(folder / "images.npz", arr_0=images)
    data = sidactl.prepare_data(folder / "images.npz", name="images", run=run)
    sidactl.sample(teacher, seeds=range(2), steps=1, run=run)
    sidactl.evaluate(data, ["fid", "prec-recall"], reference=data, detector="random-features", run=run)
    sidactl.fid(teacher, num=4, steps=1, heun={"S_churn": 1}, run=run)
    reference.find(Store.open(run), str(folder / "statistics.npz"), teacher, "moments")
    sidactl.train_teacher(
        data, name="mine", duration_nimg=32, batch_size=16, model_channels=8, channel_mult=(1,), run=run
    )
    sidactl.distill(teacher=teacher, mode="sid", dataset=labels, score=False, run=run, device="cpu", **SMALL)
    sidactl.distill(
        teacher=teacher, mode="sida", adversarial_from=0, teacher_score="none", run=run, device="cpu", **SMALL
    )
    return Store.open(run)


def test_artifacts_that_are_built_in_keep_their_oids(asked: Store) -> None:
    found = {name: asked.resolve(name).oid[:16] for name in OIDS}
    assert found == OIDS


def test_questions_keep_their_keys(asked: Store) -> None:
    lines = [json.loads(line) for line in (asked.root / "log.jsonl").read_text().splitlines()]
    found: dict[str, list[str]] = {}
    for line in lines:
        found.setdefault(line["command"], []).append(line["key"][:16])
    data = asked.resolve("dataset/images").oid[:16]
    if data != IMAGES:
        pytest.skip(f"zlib compresses otherwise here than where the keys were taken ({data})")
    assert found == KEYS


def test_checkpoints_keep_the_names_and_shapes_of_their_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, dict[str, list[int]]] = {}
    for mode, options in (("sid", {}), ("sida", {"adversarial_from": 0})):
        taken: dict[str, list[int]] = {}

        def take(tensors: Any, folder: Path, taken: dict[str, list[int]] = taken) -> None:
            taken.update({name: list(tensor.shape) for name, tensor in tensors.items()})

        with monkeypatch.context() as patch:
            instead_of(checkpoints._save_tensors, take, patch)
            sidactl.distill(
                teacher="tiny-digits",
                mode=mode,
                score=False,
                run=tmp_path / mode,
                device="cpu",
                **SMALL,
                **options,
            )
        found[mode] = taken
    kinds = {mode: sorted({name.partition(".")[0] for name in taken}) for mode, taken in found.items()}
    assert kinds == KINDS
    assert {mode: [len(taken), digest(taken)[:16]] for mode, taken in found.items()} == TENSORS
