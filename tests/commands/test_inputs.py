"""What Python callers may pass: paths, arrays, integers of any make, our own objects, and the command's words."""

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sidactl
from sidactl.commands import inputs
from sidactl.errors import SidaError
from sidactl.recipes import Adversarial, Execution, NetSpec, SidRecipe, TeacherRecipe
from sidactl.store import Store
from tests.conftest import SHORT, Finished


@pytest.mark.parametrize(
    ("given", "seeds"),
    [
        (np.arange(4), range(4)),
        (np.array([7, 5], np.uint8), [7, 5]),
        (torch.arange(2, 5), range(2, 5)),
        (torch.tensor(9), range(9, 10)),
        (np.int64(9), range(9, 10)),
        (3, range(3, 4)),
        ([np.int64(5), torch.tensor(6)], [5, 6]),
        ([0, 1, 2], [0, 1, 2]),
        (range(0, 6, 2), range(0, 6, 2)),
        ("0-3,9", [0, 1, 2, 3, 9]),
        (iter((1, 2)), [1, 2]),
        (np.array([], int), []),
    ],
)
def test_seeds_of_any_make_are_ints_in_their_order(given: Any, seeds: Any) -> None:
    got = inputs.seeds_of(given)
    assert got == seeds
    assert type(got) is type(seeds)
    assert all(type(seed) is int for seed in got)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (np.arange(3.0), "each of seeds must be a whole number, got 0.0. Pass an int."),
        ([1.5], "each of seeds must be a whole number, got 1.5. Pass an int."),
        ([True], "each of seeds must be a whole number, got True. Pass an int."),
        (np.zeros((2, 2), int), "each of seeds must be a whole number, got builtins.list. Pass an int."),
        (range(-1, 3), "seeds must be from 0 to 4294967295, got -1. Choose others."),
        ([3, 1 << 32], "seeds must be from 0 to 4294967295, got 4294967296. Choose others."),
    ],
)
def test_what_is_no_seed_is_refused(given: Any, text: str) -> None:
    with pytest.raises(SidaError) as caught:
        inputs.seeds_of(given)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("given", "count"), [("10k", 10_000), (np.int64(7), 7), (torch.tensor(8), 8), (np.array(9), 9), (5, 5)]
)
def test_counts_take_suffixes_and_any_integer(given: Any, count: int) -> None:
    got = inputs.count_of(given, "num")
    assert (got, type(got)) == (count, int)


def test_what_is_no_count_size_or_ref_is_refused() -> None:
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: inputs.count_of(1.5, "num"), "num must be a whole number, got 1.5. Pass an int."),  # type: ignore[arg-type]
        (lambda: inputs.size_of((1, 2, 3), "size"), "size must be a width and a height, got 3 numbers"),
        (lambda: inputs.size_of("99999x8", "size"), "size must be from 1 to 16,384 pixels a side, got 99999x8"),
        (lambda: inputs.size_of(0, "size"), "size must be from 1 to 16,384 pixels a side, got 0x0"),
        (lambda: inputs.ref_text(3), "a ref must be text, a path or an artifact, got 3"),  # type: ignore[arg-type]
    ]
    for call, text in refused:
        with pytest.raises(SidaError, match=f"^{re.escape(text)}"):
            call()


def test_a_path_is_never_taken_for_a_ref() -> None:
    assert inputs.ref_text("tiny-digits") == "tiny-digits"
    assert inputs.ref_text(Path("tiny-digits")) == os.path.join(".", "tiny-digits")
    assert inputs.ref_text(Path("a/b.zip")) == "a/b.zip"


def test_words_of_flags_are_names_of_fields() -> None:
    given = {
        "duration": "2k",
        "evaluate_every": np.int64(500),
        "batch_size": torch.tensor(64),
        "alpha": np.float32(0.5),
    }
    values = inputs.field_values(given, SidRecipe, Adversarial, Execution)
    assert values == {"duration_nimg": 2000, "evaluate_every_nimg": 500, "batch_size": 64, "alpha": 0.5}
    assert [type(value) for value in values.values()] == [int, int, int, float]
    given = {"p_mean": -1.0, "channel_mult": np.array([1, 2]), "generator_from": None, "odd": 1, "compile": np.True_}
    values = inputs.field_values(given, SidRecipe, TeacherRecipe, NetSpec, Execution)
    assert values == {
        "P_mean": -1.0,
        "channel_mult": (1, 2),
        "generator_from_nimg": None,
        "odd": 1,
        "compile": True,
    }
    json.dumps(values)
    with pytest.raises(SidaError) as caught:
        inputs.field_values({"duration": 1, "duration_nimg": 1}, SidRecipe)
    assert str(caught.value) == "duration and duration_nimg are one and the same, got both. Pass one of them."
    with pytest.raises(SidaError, match=r"^alpha must be a number, got '1x'"):
        inputs.field_values({"alpha": "1x"}, SidRecipe)
    with pytest.raises(
        SidaError, match=r"^duration must be a whole number of images such as 500, 50k or 1.5M, got '2q'"
    ):
        inputs.field_values({"duration": "2q"}, SidRecipe)


def test_the_commands_words_ask_the_same_question_as_the_fields(finished: Finished) -> None:
    words = {name.removesuffix("_nimg"): value for name, value in SHORT.items()} | {"duration": "0.096k"}
    again = sidactl.distill(teacher="tiny-digits", mode="sida", run=finished.root, shard=False, **words)
    assert again.oid == finished.best.oid


def test_our_own_objects_and_paths_do_as_refs(fresh_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = sidactl.fetch_teacher("tiny-digits", run=fresh_run)
    drawn = sidactl.sample(teacher, num=np.int64(70), steps=2, run=os.fspath(fresh_run))
    assert drawn.images.shape == (70, 8, 8, 1)
    assert drawn.oid == sidactl.sample("tiny-digits", seeds=np.arange(70), steps=2, run=fresh_run).oid
    score = sidactl.fid(drawn)  # in the run directory that it came from
    assert float(score) == score.value == sidactl.fid(drawn.oid, run=fresh_run).value
    assert sidactl.show(score, run=fresh_run).artifact.kind == "score"
    exported = sidactl.export(drawn, tmp_path / "png", form="png")
    dataset = sidactl.prepare_data(exported, max_images="50", resolution="8x8", run=fresh_run)
    assert dataset.results["num_images"] == 50
    assert dataset.oid == sidactl.prepare_data(str(exported), max_images=50, resolution=(8, 8), run=fresh_run).oid
    paths = sidactl.files(drawn)
    assert set(paths) == {"images.zip", "grid.png"}
    with zipfile.ZipFile(paths["images.zip"]) as archive:
        assert len(archive.namelist()) >= 70
    assert Image.open(io.BytesIO(paths["grid.png"].read_bytes())).format == "PNG"
    assert not (tmp_path / "sida-run").exists()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda run: sidactl.sample("tiny-digits", num=4, seeds=[1], run=run), "num and seeds cannot both be given"),
        (lambda run: sidactl.sample("tiny-digits", num=-5, run=run), "sample count must be >= 1, got -5"),
        (lambda run: sidactl.fid("tiny-digits", num=2.5, run=run), "num must be a whole number, got 2.5"),
        (lambda run: sidactl.fid("tiny-digits", nun=2, run=run), "unknown option 'nun'"),
        (
            lambda run: sidactl.fid("tiny-digits", num=9, first_seed=-1, run=run),
            "seeds of all trials must be from 0 to 4294967295, got -1",
        ),
        (
            lambda run: sidactl.distill(teacher="tiny-digits", mode="sida", duration=1, duration_nimg=1, run=run),
            "duration and duration_nimg are one and the same, got both",
        ),
    ],
)
def test_what_does_not_do_is_one_line(call: Callable[[Path], object], text: str, tmp_path: Path) -> None:
    with pytest.raises(SidaError, match=f"^{re.escape(text)}"):
        call(tmp_path / "run")


def test_the_package_lists_every_function_and_stays_light() -> None:
    code = (
        "import sys, sidactl\n"
        "names = set(dir(sidactl))\n"
        "assert not {'torch', 'numpy', 'click', 'typing', 're'} & set(sys.modules), sys.modules.keys()\n"
        "print(' '.join(sorted(names)))\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    listed = set(done.stdout.split())
    assert set(sidactl.__all__) <= listed
    assert {"distill", "sample", "fid", "show", "ls", "verify", "gc", "export", "env", "files"} <= listed
    for name in sidactl.__all__:
        assert getattr(sidactl, name) is not None
    assert sidactl.fid is sidactl.fid
    with pytest.raises(AttributeError, match="has no attribute 'sampl'"):
        _ = sidactl.sampl


def test_help_shows_the_functions_with_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    import pydoc

    told = pydoc.render_doc(sidactl, renderer=pydoc.plaintext)
    for name in ("distill(", "sample(", "fid(", "export(", "files("):
        assert f"\n    {name}" in told


def test_events_and_answers_have_their_time(finished: Finished) -> None:
    (events,) = finished.root.glob("logs/*/events.jsonl")
    lines = [
        json.loads(line) for path in (events, finished.root / "log.jsonl") for line in path.read_bytes().splitlines()
    ]
    for line in lines:
        assert datetime.fromisoformat(line["time"]).utcoffset() is not None
    assert "time" not in json.dumps(Store(finished.root).get(finished.best.oid).results)


SCRIPT = """
from pathlib import Path

import numpy as np
import torch

import sidactl

net = sidactl.load(Path("a/net.pkl"))
noise: torch.Tensor = net(torch.zeros(1, 1, 8, 8), torch.tensor(1.0))
drawn = sidactl.sample("tiny-digits", num="10k", steps=np.int64(3))
drawn = sidactl.sample(drawn.artifact, seeds=np.arange(8))
drawn = sidactl.sample(drawn, seeds=torch.arange(8), class_index=3)
best = sidactl.distill(teacher="tiny-digits", mode="sida", duration="2k", run=Path("r"))
score = sidactl.fid(best, num="1k", reference=Path("a/b.zip"), trials=2)
number: float = float(score) + score.value
paths: dict[str, Path] = sidactl.files(best)
folder: Path = sidactl.export(best, "out", form="png")
data = sidactl.prepare_data(Path("a"), max_images="5k", resolution="64x64")
kinds: list[str] = [artifact.kind for artifact, names in sidactl.ls()]
distance: float = sidactl.metrics.frechet_distance(np.zeros(1), np.eye(1), np.zeros(1), np.eye(1))
"""


@pytest.mark.slow
def test_a_users_script_passes_mypy_in_strict_mode(tmp_path: Path) -> None:
    pytest.importorskip("mypy")

    def checked(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "script.py").write_text(text)
        (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\nuntyped_calls_exclude = torch\n")
        environment = os.environ | {"MYPYPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-m", "mypy", "script.py"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)

    done = checked(SCRIPT)
    assert done.returncode == 0, done.stdout
    done = checked('import sidactl\nsidactl.fid("x", num=[1])\nsidactl.sampl("x")\n')
    assert 'Module has no attribute "sampl"' in done.stdout
    assert 'Argument "num" to "fid" has incompatible type' in done.stdout
