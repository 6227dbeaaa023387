"""What is refused, warned of and told before anything is computed, fetched or written."""

import re
import shutil
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

import sidactl
from sidactl.cli import shown
from sidactl.commands import plan as commands_plan
from sidactl.commands import scorers
from sidactl.errors import SidaError
from sidactl.recipes import Execution
from sidactl.store import Store
from sidactl.training import state
from tests.commands.conftest import SHORT_SID, messages, planned
from tests.conftest import SHORT, Finished, Forbid


@pytest.mark.parametrize(
    ("mode", "overrides", "message"),
    [
        (
            "sida",
            {"duration_nimg": 2000},
            "the generator trains from 4,000 images on, the run ends at 2,000: it would return its teacher. "
            "Pass --generator-from 500 and --adversarial-from 1000, or a longer --duration.",
        ),
        (
            "sid",
            {"duration_nimg": 4096},
            "the generator trains from 4,000 images on, in steps of 128, the run ends at 4,096: it would return its "
            "teacher. Pass --generator-from 1024, or a longer --duration.",
        ),
        (
            "sid",
            {"duration_nimg": 100, "generator_from_nimg": 0},
            "the generator trains from 0 images on, in steps of 128, the run ends at 100: it would return its teacher. "
            "Pass --generator-from none, or a longer --duration.",
        ),
        (
            "sida",
            {"duration_nimg": 10_112},
            "the adversarial part counts from 10,000 images on, in steps of 128, the run ends at 10,112: it would be "
            "mode sid. Pass --adversarial-from 5056, or a longer --duration.",
        ),
        (
            "sida",
            {"duration_nimg": 128, "generator_from_nimg": None},
            "the adversarial part counts from 10,000 images on, the run ends at 128: it would be mode sid. "
            "Pass a longer --duration.",
        ),
    ],
)
def test_a_run_that_would_not_train_what_its_mode_is_for_is_refused(
    tmp_path: Path, mode: str, overrides: dict[str, Any], message: str
) -> None:
    for act in (
        lambda: planned(tmp_path / "run", mode=mode, overrides=overrides),
        lambda: sidactl.distill(teacher="tiny-digits", mode=mode, run=tmp_path / "run", **overrides),
    ):
        with pytest.raises(SidaError) as caught:
            act()
        assert (str(caught.value), caught.value.exit_code) == (message, 2)
    assert not (tmp_path / "run").exists()
    flag = re.search(r"Pass --(generator|adversarial)-from (\S+),", message)
    if flag:  # what it says to pass helps
        chosen = {f"{flag[1]}_from_nimg": None if flag[2] == "none" else int(flag[2])}
        rest = {"adversarial_from_nimg": 0} if mode == "sida" and flag[1] == "generator" else {}
        assert planned(tmp_path / "run", mode=mode, overrides=overrides | chosen | rest).recipe.untrained() == []
    planned(tmp_path / "run", mode=mode, overrides={"duration_nimg": 10_113})


def test_a_published_recipe_too_short_is_refused_by_its_own_numbers(tmp_path: Path) -> None:
    with pytest.raises(SidaError) as caught:
        planned(tmp_path / "run", teacher="edm-cifar10-uncond", overrides={"duration_nimg": 2000})
    assert str(caught.value) == (
        "the generator trains from 100,000 images on, the run ends at 2,000: it would return its teacher. "
        "Pass --generator-from 500 and --adversarial-from 1000, or a longer --duration."
    )


def test_asked_for_a_run_that_trains_nothing_says_so_and_returns_the_teacher(
    fresh_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[state.Event] = []
    made = sidactl.distill(
        teacher="tiny-digits",
        mode="sida",
        run=fresh_run,
        watch=events.append,
        allow_untrained=True,
        **SHORT | {"duration_nimg": 32, "generator_from_nimg": 50},
    )
    told = "the generator trains from 50 images on, the run ends at 32: it would return its teacher"
    assert [e.values["message"] for e in events if e.kind == "warning"] == [told]
    assert made.results["untrained"] == ["generator", "adversarial part"]
    teacher, generator = (sidactl.load(ref, fresh_run).state_dict() for ref in ("tiny-digits", made.oid))
    assert all(torch.equal(teacher[name], generator[name]) for name in generator)
    shown.print_generator(made, as_json=False)
    assert capsys.readouterr().err.startswith(
        "warning: nothing of the generator was trained in the 32 images of this generator: "
        "it is its teacher, unchanged\nbest generator: FD tiny-digits "
    )


def test_another_duration_moves_the_stages_of_a_teacher_of_ones_own(edm2: tuple[Path, str], tmp_path: Path) -> None:
    root, oid = edm2
    usual, short = (planned(root, teacher=oid, overrides=o).recipe for o in ({}, {"duration_nimg": 7000}))
    assert usual.duration_nimg == 70_000
    assert short.untrained() == usual.untrained() == []
    assert (
        short.generator_from_nimg,
        short.evaluate_every_nimg,
        short.checkpoint_every_nimg,
        short.ema_halflife_nimg,
        short.adversarial and short.adversarial.adversarial_from_nimg,
    ) == (400, 1000, 1000, 2000, 1000)
    assert (usual.P_mean, usual.P_std) == (-1.2, 1.2)  # as the teacher was trained
    kept = planned(root, teacher=oid, overrides={"duration_nimg": 7000, "evaluate_every_nimg": 50}).recipe
    assert (kept.evaluate_every_nimg, kept.checkpoint_every_nimg) == (50, 1000)
    with pytest.raises(SidaError, match=r"^duration_nimg must be at least 1, got 0\. "):
        planned(root, teacher=oid, overrides={"duration_nimg": 0})


def test_without_scores_the_last_generator_is_the_result_and_nothing_is_needed_for_them(
    finished: Finished, fresh_run: Path, forbidden: Forbid
) -> None:
    events: list[state.Event] = []
    with forbidden(scorers.load_detector):
        made = sidactl.distill(
            teacher="tiny-digits", mode="sida", score=False, run=fresh_run, watch=events.append, **SHORT
        )
    assert messages(events) == ["nothing is scored, and the last generator is the result"]
    assert {event.kind for event in events} == {"started", "note", "progress", "checkpoint"}
    assert (made.results["selection_score"], made.results["detector"], made.results["scores"]) == (None, None, [])
    last = Store.open(finished.root).resolve("generator/last")
    assert made.files["model.safetensors"] == last.files["model.safetensors"]
    for options, got in (({"reference": "tiny-digits"}, "--ref"), ({"detector": "inception"}, "--detector")):
        (value,) = options.values()
        with pytest.raises(SidaError) as caught:
            sidactl.distill(teacher="tiny-digits", mode="sida", score=False, run=fresh_run, **options)
        assert str(caught.value) == f"{got} is for scoring, got {value} and --no-score. Leave out one of the two."


def test_words_that_name_nothing_are_refused_by_a_plan_as_by_a_run(finished: Finished) -> None:
    root = finished.root
    nothing = f"no ref 'nowhere' in {root}, and no such file or folder. See what there is with: sidactl ls"
    for options, message in (
        ({"dataset": "nowhere"}, nothing),
        ({"reference": "nowhere"}, nothing),
        ({"mode": "sid2a", "generator": "nowhere"}, nothing.replace(", and no such file or folder", "")),
        (
            {"mode": "sid2a", "generator": "nowhere.pkl"},
            "nowhere.pkl: no such file or folder. Check the path, or see sidactl ls for names.",
        ),
        (
            {"dataset": "nowhere.zip"},
            "nowhere.zip: no such file or folder. Check the path, or see sidactl ls for names.",
        ),
        ({"dataset": "generator/best"}, "'generator/best' must be of kind dataset, got generator. See what"),
        ({"teacher_score": "foo"}, "the teacher's score must be one of published, measure, none, got 'foo'. "),
        ({"teacher_score": "published"}, "no FD tiny-digits of tiny-digits against this reference is published. "),
        ({"device": "abacus"}, "device must be cpu, cuda or cuda:N, got 'abacus'. Pass --device cpu."),
        (
            {"mode": "sid2a", "generator": "sid/cifar10-uncond-alpha1"},
            "no file of sid/cifar10-uncond-alpha1 is published, its scores alone are. Distill it: sidactl distill ",
        ),
        (
            {"mode": "sid2a", "generator": "scd/edm2-s"},
            "no file of scd/edm2-s is in the catalog, its published scores alone are. ",
        ),
        (
            {"mode": "sid2a", "generator": "sid/cifar10-uncond"},
            "the generator must be of the teacher's dataset 'tiny-digits', got one of 'cifar10'. ",
        ),
        (
            {"execution": Execution(batch_per_device=100)},
            "batch-per-device must be one of 64, 128 (micro-batches of 64), got 100. ",
        ),
    ):
        with pytest.raises(SidaError) as caught:
            planned(root, **options)
        assert str(caught.value).startswith(message)


def test_a_plan_names_what_is_fetched_first_and_what_only_the_user_can_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path / "run", teacher="edm-cifar10-uncond", mode="sid")
    assert [(need.what, need.size_bytes) for need in plan.needs] == [
        ("teacher edm-cifar10-uncond", None),
        ("statistics cifar10", None),
        ("detector inception", 95_628_359),
    ]
    assert plan.notes == [
        "dataset cifar10: mode sid needs no images, training on classes alone",
        "scored against the published statistics cifar10, as the published runs were; --ref takes others",
    ]
    sida = planned(tmp_path / "run", teacher="edm-cifar10-uncond")
    assert [astuple(need) for need in sida.needs][1] == (
        "dataset cifar10",
        "downloaded and prepared",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        170_498_071,
    )
    assert sida.missing == []
    asked = planned(tmp_path / "run", teacher="edm-cifar10-uncond", mode="sid", dataset="cifar10")
    assert [need.what for need in asked.needs][1] == "dataset cifar10"
    faces = planned(tmp_path / "run", teacher="edm-ffhq64")
    assert [error.message for error in faces.missing] == ["dataset ffhq64 must be prepared from its files"]
    with pytest.raises(SidaError, match=r"^dataset ffhq64 must be prepared from its files\. "):
        sidactl.distill(teacher="edm-ffhq64", mode="sida", run=tmp_path / "run")
    with pytest.raises(SidaError, match=r"^the dataset must fit the teacher .* = 64, 3, 0\), got 32, 3, 10\. "):
        planned(tmp_path / "run", teacher="edm-ffhq64", dataset="cifar10")
    monkeypatch.setenv("SIDACTL_OFFLINE", "1")
    with pytest.raises(SidaError, match=r"^teacher edm-cifar10-uncond must be downloaded from .*, which offline forb"):
        planned(tmp_path / "run", teacher="edm-cifar10-uncond", mode="sid")
    assert not (tmp_path / "run").exists()


def test_published_labels_are_fetched_first_for_mode_sid_alone(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    labels = {"teacher": "edm2-xs", "dataset": "imagenet512-labels"}
    plan = planned(tmp_path / "run", mode="sid", **labels)
    assert [need.what for need in plan.needs][:3] == [
        "teacher edm2-xs",
        "dataset imagenet512-labels",
        "statistics imagenet512",
    ]
    told = "scored against the published statistics imagenet512, as the published runs were; --ref takes others"
    assert plan.notes == [told]
    with pytest.raises(SidaError) as caught:
        planned(tmp_path / "run", mode="sida", **labels)
    assert str(caught.value) == (
        "images are needed, imagenet512-labels is of classes alone. Give a dataset with images."
    )


def test_a_disk_without_room_for_the_checkpoints_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**12, 0, 10**10) if hasattr(shutil, "_ntuple_diskusage") else None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SidaError) as caught:
        planned(tmp_path / "run", teacher="edm2-s", mode="sid", score=False)
    assert str(caught.value) == (
        f"the run needs about 29.1 GB in the run directory {tmp_path / 'run'}, where 10.0 GB are free. "
        "Free some space or choose another with --run DIR."
    )
    assert planned(tmp_path / "run").free_bytes == 10**10


def test_what_is_rarely_meant_is_warned_of(fresh_run: Path) -> None:
    events: list[state.Event] = []
    overrides = SHORT_SID | {"duration_nimg": 16, "alpha": -3.0, "fake_score_lr": 0.5}
    sidactl.distill(teacher="tiny-digits", mode="sid", score=False, run=fresh_run, watch=events.append, **overrides)
    assert [event.values["message"] for event in events if event.kind == "warning"] == [
        "fake_score_lr is 0.5; Adam's rates above 0.1 rarely train anything",
        "alpha is -3; values from 0 to 2 are known, 1.0 and 1.2 the published ones",
    ]


def test_a_plan_writes_nothing_and_needs_no_run_directory(tmp_path: Path) -> None:
    planned = commands_plan.plan(
        teacher="tiny-digits",
        mode="sida",
        generator=None,
        dataset=None,
        store=Store.open(tmp_path / "run"),
        overrides={"tmax": 700},
    )
    assert planned.inputs == {"teacher": "tiny-digits", "dataset": "tiny-digits"}
    assert (planned.recipe.tmax, planned.recipe.dataset) == (700, "tiny-digits")
    assert not (tmp_path / "run").exists()


def test_a_plan_for_a_foreign_file_asks_to_import_it_first(tmp_path: Path) -> None:
    with pytest.raises(SidaError) as caught:
        commands_plan.plan(
            teacher="net.pkl",
            mode="sid",
            generator=None,
            dataset=None,
            store=Store.open(tmp_path / "run"),
            overrides={},
        )
    assert (
        str(caught.value) == "teacher net.pkl must be imported before it can be planned with. Import it first: sidactl "
        "fetch-teacher net.pkl"
    )
