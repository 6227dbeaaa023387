"""Which generator is better, by how much, under which eyes."""

import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scipy import stats

import sidactl
from sidactl import catalog, cli, report
from sidactl.cli import compare as cli_compare
from sidactl.commands import compare as commands_compare
from sidactl.commands import differences
from sidactl.commands import runs as commands_runs
from sidactl.commands.compare import compare
from sidactl.commands.differences import Row
from sidactl.commands.runs import Training
from sidactl.errors import SidaError
from sidactl.store import Store
from tests import processes
from tests.conftest import SHORT, Finished, Forbid

FD, BLIND = "FD tiny-digits", "FD tiny-digits-ssl"


def row(name: str, values: Mapping[str, list[list[float]]], seen: tuple[str, ...] = ()) -> Row:
    return Row(name, ["ab" * 32], None, None, None, 1, None, values, frozenset(seen))


def test_rows_are_ordered_by_a_number_that_is_blind_for_all_of_them() -> None:
    flattered = row("a", {FD: [[1.0, 1.1]], BLIND: [[9.0, 9.2]]}, (FD,))
    honest = row("b", {FD: [[2.0, 2.1]], BLIND: [[8.0, 8.1]]})
    found = differences.compared([flattered, honest], 100, 2)
    assert [each.name for each in found.rows] == ["b", "a"]
    assert (found.ordered_by, found.is_blind, found.numbers[0]) == (BLIND, True, BLIND)
    seen = differences.compared([row("a", {FD: [[1.0]]}, (FD,)), row("b", {FD: [[0.5]]})], 100, 1)
    assert ([each.name for each in seen.rows], seen.is_blind) == (["b", "a"], False)


def test_where_higher_is_better_the_highest_comes_first_and_is_the_better() -> None:
    rows = [row("low", {"precision": [[0.5, 0.6, 0.55]]}), row("high", {"precision": [[0.8, 0.9, 0.87]]})]
    found = differences.compared(rows, 100, 3)
    assert [each.name for each in found.rows] == ["high", "low"]
    assert found.differences[0].verdict == "high is better"
    higher = ("precision", "recall b", "density", "coverage", "IS b", "Vendi b", "AuthPct", "FLD gap")
    assert all(map(differences.higher_is_better, higher))
    assert not any(map(differences.higher_is_better, ("FID", "FD b", "FDr b", "KID b", "MIND b", "b FD")))


def test_a_plot_takes_the_place_of_an_earlier_one_and_of_nothing_else(
    finished: Finished, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "generator/best", "--num", "30", "--trials", "2", "--run", str(finished.root), "--plot"]

    def code(path: Path) -> int:
        with pytest.raises(SystemExit) as error:
            cli.main([*words, str(path)])
        return int(str(error.value.code))

    mine, folder = tmp_path / "mine.png", tmp_path / "folder.png"
    Image.new("RGB", (900, 9)).save(mine)
    before = mine.read_bytes()
    folder.mkdir()
    assert [code(mine), code(folder), code(tmp_path / "a.png"), code(tmp_path / "a.png")] == [2, 2, 0, 0]
    assert mine.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "folder.png", "mine.png"]
    err = capfd.readouterr().err
    assert "only an earlier export can be replaced, got a file that is no plot of a comparison" in err


def test_trials_that_share_their_seeds_are_compared_in_pairs() -> None:
    a, b = [1.0, 2.0, 3.0, 4.2], [1.1, 2.1, 3.2, 4.3]
    (difference,) = differences.compared([row("a", {FD: [a]}), row("b", {FD: [b]})], 100, 4).differences
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))
    assert difference.verdict == "a is better"  # by 0.125 of values that spread over 3
    assert difference.test == "paired t over 4 trials"
    equal = differences._difference(row("a", {FD: [a]}), row("c", {FD: [[*a[:3], 4.0]]}), FD)
    assert equal.verdict == "no difference shown"


def test_runs_are_compared_by_their_means_and_one_run_with_several_not_at_all() -> None:
    a, b = row("a x 3", {FD: [[1.0, 1.2], [1.1, 1.1], [0.9, 1.1]]}), row("b x 2", {FD: [[1.0, 3.0], [1.9, 2.3]]})
    difference = differences._difference(a, b, FD)
    expected = stats.ttest_ind([1.1, 1.1, 1.0], [2.0, 2.1], equal_var=False).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))
    assert (a.std(FD), difference.verdict) == (pytest.approx(0.0577, abs=1e-4), "a x 3 is better")
    single = differences._difference(a, row("c", {FD: [[1.0, 2.0]]}), FD)
    assert (
        single.verdict
        == "no interval: one is of a single run, the other of several: compare single ones, or several of both"
    )
    one = differences._difference(row("c", {FD: [[1.0]]}), row("d", {FD: [[2.0]]}), FD)
    assert one.verdict == "no interval: more trials are needed"
    folder = dataclasses.replace(row("folder", {FD: [[1.0]]}), evaluations=None)
    fixed = differences._difference(row("c", {FD: [[1.0, 2.0]]}), folder, FD)
    assert fixed.verdict == "no interval: folder is of fixed images, which have no trials"


def test_numbers_of_a_kind_stand_beside_each_other_and_one_that_some_lack_comes_too() -> None:
    values = {FD: [[1.0]], "precision a": [[0.5]], BLIND: [[2.0]], "precision b": [[0.4]]}
    rows = [row("a", values), row("b", {**values, "pair ratio": [[0.3]]})]
    metrics, detectors = ("fid", "prec-recall", "pairs"), ("tiny-digits-ssl", "tiny-digits")
    found = differences.compared(rows, 100, 1, metrics=metrics, detectors=detectors)
    assert found.numbers == [BLIND, FD, "precision a", "precision b", "pair ratio"]
    other = differences.compared(rows, 100, 1, metrics=("prec-recall", "fid"), detectors=detectors)
    assert other.numbers == ["precision a", "precision b", BLIND, FD, "pair ratio"]
    assert (other.ordered_by, other.rows[0].name) == ("precision a", "a")
    assert {d.number for d in other.differences} == set(other.numbers) - {"pair ratio"}
    table = _csv(found)
    assert (table["a"]["pair ratio"], table["b"]["pair ratio"]) == ("", "0.3")
    assert "pair ratio" not in found.to_json()["rows"][0]["scores"]


def _csv(found: differences.Comparison) -> dict[str, dict[str, str]]:
    return {each["name"]: each for each in csv.DictReader(io.StringIO(cli_compare._as_csv(found)))}


@pytest.mark.parametrize(
    ("mode", "overrides", "nimg", "generator_nimg", "updates"),
    [
        ("sida", {"generator_from_nimg": 4000}, 70_016, 70_016 - 4096, 547),
        ("sida", {"generator_from_nimg": None}, 1280, 1280, 10),
        ("dmd2", {"generator_from_nimg": None}, 1280, 2 * 128, 10),
        ("dmd2", {"generator_from_nimg": 128}, 1280, 128, 10),  # steps 1 to 9, of which the fifth is one
        ("dmd2-fastgen", {"generator_from_nimg": None}, 1280, 2 * 128, 8),
        ("sida", {"generator_from_nimg": 70_000}, 1280, 0, 10),
    ],
)
def test_images_are_those_that_the_generator_was_stepped_with(
    mode: str, overrides: dict[str, int | None], nimg: int, generator_nimg: int, updates: int
) -> None:
    recipe: Any = dataclasses.replace(catalog.recipe_for("tiny-digits", mode), **overrides)  # type: ignore[arg-type]
    assert (recipe.generator_nimg(nimg), recipe.fake_score_updates(nimg)) == (generator_nimg, updates)


def test_pairs_are_left_out_of_what_has_no_teacher_and_refused_where_nothing_has(
    finished: Finished, forbidden: Forbid
) -> None:
    found = compare(["generator/best", "tiny-digits"], metrics="fid,pairs", num=20, trials=2, run=finished.root)
    assert found
    assert (found.ordered_by, found.is_blind) == (BLIND, True)  # as without pairs
    assert {each.name: "pair ratio" in each.values for each in found.rows} == {
        "generator/best": True,
        "tiny-digits": False,
    }
    alone = compare(["generator/best", "tiny-digits"], metrics="pairs", num=20, trials=2, run=finished.root)
    assert alone
    assert [(each.name, list(each.values)) for each in alone.rows] == [
        ("generator/best", ["pair distance", "pair ratio"]),
        ("tiny-digits", []),
    ]
    assert (alone.numbers[0], alone.reference) == ("pair distance", "")
    from sidactl.commands import score as commands_score

    with forbidden(commands_score._measure), pytest.raises(SidaError, match=r"^pairs are of a generator"):
        compare(["tiny-digits"], metrics="pairs", num=20, trials=2, run=finished.root)


def test_all_are_scored_against_what_the_first_is(finished: Finished, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.root, tmp_path / "run"))
    (few := tmp_path / "few").mkdir()
    sidactl.export("dataset/tiny-digits", few / "digits", run=run)
    short = SHORT | {"duration_nimg": 32, "evaluate_every_nimg": 32}
    made = sidactl.distill(
        teacher="tiny-digits",
        mode="sid",
        reference=few / "digits",
        teacher_score="none",
        run=run,
        say=None,
        **{k: v for k, v in short.items() if k != "adversarial_from_nimg"},
    )
    found = compare(["generator/best", made], num=40, trials=1, run=run, say=None)
    assert found
    assert found.reference == "dataset tiny-digits"
    (other,) = (each for each in found.rows if each.oids == [made.oid])
    reference = "dataset/tiny-digits"
    alone = sidactl.fid(made, num=40, detector="tiny-digits", reference=reference, run=run)
    assert other.values[FD] == [list(alone.values[FD])]


def test_warnings_of_scores_are_those_of_the_comparison(finished: Finished, capfd: pytest.CaptureFixture[str]) -> None:
    found = compare(["generator/best"], num=40, trials=1, run=finished.root)
    assert found
    assert any("40 images are few for 64 features" in warning for warning in found.warnings)
    with pytest.raises(SystemExit) as error:
        cli.main(["compare", "generator/best", "--num", "40", "--trials", "1", "--run", str(finished.root)])
    assert error.value.code == 0
    assert "warning: generator/best: 40 images are few for 64 features" in capfd.readouterr().err


def test_what_is_named_twice_is_compared_once(finished: Finished) -> None:
    lines: list[str] = []
    oid = finished.best.oid
    found = compare(["generator/best", oid], num=40, trials=1, run=finished.root, say=lines.append)
    assert found
    assert [each.oids for each in found.rows] == [[oid]]
    assert lines == [f"{oid} is generator/best: it is compared once"]


@pytest.mark.usefixtures("short_recipes")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refs": ["nothere"]}, "nothere"),
        ({"metrics": "bogus"}, "unknown metric 'bogus'"),
        ({"metrics": ""}, "a comparison needs metrics, got none"),
        ({"metrics": "fd-dinov2"}, "fd-dinov2 is by a detector of its own"),
        ({"metrics": "fdr"}, "fdr needs real images that were not trained on, got none"),
        ({"held_out": "dataset/tiny-digits"}, "no metric here needs them"),
        ({"metrics": "pairs", "detectors": "tiny-digits"}, "compares with the teacher by pixels"),
        ({"detectors": "nope"}, "unknown detector 'nope'"),
        ({"detectors": ""}, "detectors are needed where they are asked for, got none"),
        ({"num": "1"}, "images per trial must be >= 2"),
        ({"trials": 0}, "trials >= 1, got 10000 and 0"),
        ({"refs": ["generator/best"], "reference": "nowhere"}, "nowhere"),
    ],
)
def test_bad_words_are_refused_before_anything_is_trained(
    options: dict[str, Any], message: str, finished: Finished, forbidden: Forbid
) -> None:
    from sidactl.training import loop

    training = Training(["sid"], "tiny-digits")
    with forbidden(loop.run), pytest.raises(SidaError) as error:
        compare(options.pop("refs", ()), training=training, run=finished.root, **options)
    assert message in str(error.value)


def test_images_that_a_tiny_detector_does_not_take_are_refused_before_others_are_scored(
    finished: Finished, tmp_path: Path, forbidden: Forbid
) -> None:
    from sidactl.commands import score as commands_score

    (folder := tmp_path / "large").mkdir()
    for index in range(3):
        Image.new("RGB", (16, 16), (index, 9, 9)).save(folder / f"{index}.png")
    with forbidden(commands_score._measure), pytest.raises(SidaError, match=r"takes images of 8x8 pixels"):
        compare(["generator/best", folder], num=40, trials=1, run=finished.root)


def test_a_picture_of_pairs_needs_a_generator_before_anything_is_scored(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["compare", "tiny-digits", "--pairs", str(tmp_path / "a.png"), "--run", str(finished.root)])
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("error: a picture of pairs needs a generator")


def test_an_interruption_is_no_time_that_a_run_took(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    artifact = store.put("generator", {}, params={})
    (tmp_path / "log.jsonl").write_text(json.dumps({"oid": artifact.oid, "key": "f" * 64}) + "\n")
    (logs := tmp_path / "logs" / ("f" * 16)).mkdir(parents=True)
    told = [("progress", 10, 0), ("progress", 20, 5), ("resumed", 10, 100), ("progress", 20, 104), ("progress", 5, 300)]
    told += [("progress", 10, 303)]
    lines = [
        json.dumps({"event": event, "nimg": nimg, "time": f"2026-01-01T00:{at // 60:02}:{at % 60:02}+00:00"})
        for event, nimg, at in told
    ]
    (logs / "events.jsonl").write_text("\n".join(lines))
    assert commands_compare.seconds_of(store, artifact) == 5 + 4 + 3


def test_numbers_without_a_detector_in_their_name_get_it_where_there_are_several(finished: Finished) -> None:
    found = compare(["generator/best"], metrics="fid,prec-recall", num=40, trials=1, run=finished.root)
    assert found
    assert "precision tiny-digits" in found.numbers
    assert "precision" not in found.numbers


def test_what_has_no_number_in_common_is_refused() -> None:
    with pytest.raises(SidaError, match=r"^these have no number in common"):
        differences.compared([row("a", {FD: [[1.0]]}), row("b", {BLIND: [[0.5]]})], 100, 1)


def test_a_generator_beside_its_teacher_draws_the_same_seeds_under_a_blind_detector(finished: Finished) -> None:
    found = compare(["generator/best", "tiny-digits"], num=40, trials=3, run=finished.root)
    assert found
    assert (found.ordered_by, found.is_blind) == (BLIND, True)
    by_name = {each.name: each for each in found.rows}
    generator, teacher = by_name["generator/best"], by_name["tiny-digits"]
    assert (generator.evaluations, teacher.evaluations, generator.needs) == (1, 35, "images")
    assert generator.updates == finished.best.results["images_seen"] // SHORT["batch_size"]
    assert generator.seconds is not None
    assert FD in generator.seen
    alone = sidactl.fid("generator/best", num=40, trials=3, detector="tiny-digits-ssl", run=finished.root)
    assert generator.values[BLIND][0] == pytest.approx(list(alone.values[BLIND]), rel=1e-9)
    told = found.to_json()
    assert json.loads(json.dumps(told)) == told
    assert {each["name"] for each in told["rows"]} == {"generator/best", "tiny-digits"}


def shortened(entry: catalog.Teacher) -> catalog.Teacher:
    """The built-in teacher with recipes of a second each."""
    adversarial_nimg = SHORT["adversarial_from_nimg"]
    recipes = {}
    for mode, recipe in entry.recipes.items():
        short = {name: value for name, value in SHORT.items() if name != "adversarial_from_nimg"}
        part = recipe.adversarial and dataclasses.replace(recipe.adversarial, adversarial_from_nimg=adversarial_nimg)
        recipes[mode] = dataclasses.replace(recipe, **short, adversarial=part)
    return dataclasses.replace(entry, recipes=recipes)


@pytest.fixture
def short_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalog with a teacher that is distilled in a second."""
    monkeypatch.setitem(catalog.TEACHERS, "tiny-digits", shortened(catalog.TEACHERS["tiny-digits"]))  # type: ignore[arg-type]


IN_SHORT = """
import sys

from sidactl import catalog, cli
from tests.commands.test_compare import shortened

catalog.TEACHERS["tiny-digits"] = shortened(catalog.TEACHERS["tiny-digits"])
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_processes_train_a_share_of_the_runs_each_and_compare_them_together(fresh_run: Path, tmp_path: Path) -> None:
    script, root = tmp_path / "in_short.py", str(fresh_run)
    script.write_text(IN_SHORT)
    words = ["compare", "--methods", "sid,sida", "--teacher", "tiny-digits", "--run", root, "--device", "cpu"]
    words += ["--num", "40", "--trials", "2"]
    # tiny-digits' two micro-batches would refuse three processes that work on one run together; one has none to train.
    dones = processes.run(
        3, [*words, "--json", "--plot", str(tmp_path / "plot.png")], {"OMP_NUM_THREADS": "1"}, str(script)
    )
    assert {done.code for done in dones} == {0}, "\n".join(done.err for done in dones)
    assert not any(done.out for done in dones[1:])
    found = json.loads(dones[0].out)
    assert {row["name"] for row in found["rows"]} == {"sid", "sida"}
    assert (tmp_path / "plot.png").exists()
    logged = [json.loads(line) for line in (fresh_run / "log.jsonl").read_text().splitlines()]
    assert len({oid for row in found["rows"] for oid in row["oids"]}) == 2
    # Each run was trained once, which answers two questions (the best and the last generator), and not again.
    assert sum(line["command"] == "distill" for line in logged) == 2 * 2
    # One process by itself comes to the same generators, and to the same scores.
    (again,) = processes.run(1, [*words, "--json", "--run", str(tmp_path / "other")], {}, str(script))
    assert again.code == 0, again.err
    for ours, theirs in zip(found["rows"], json.loads(again.out)["rows"], strict=True):
        assert {**ours, "seconds": None} == {**theirs, "seconds": None}


@pytest.mark.usefixtures("short_recipes")
def test_methods_are_trained_first_by_seed_and_answered_the_next_time(fresh_run: Path, forbidden: Forbid) -> None:
    training = Training(["sid", "sid2a"], "tiny-digits", runs=2)
    store = Store.open(fresh_run)
    assert [made for *_, made in commands_runs.planned(store, training)] == [None] * 4
    assert compare(training=training, part=(2, 2), run=fresh_run) is None  # the runs of seed 1
    states = [(method, seed, bool(made)) for method, seed, made in commands_runs.planned(store, training)]
    assert states == [("sid", 0, False), ("sid2a", 0, False), ("sid", 1, True), ("sid2a", 1, True)]
    found = compare(training=training, num=40, trials=2, run=fresh_run)
    assert found
    assert {each.name for each in found.rows} == {"sid x 2", "sid2a x 2"}
    assert all(len(set(each.oids)) == 2 for each in found.rows)
    assert [d.number for d in found.differences] == list(found.numbers)
    from sidactl.training import loop

    with forbidden(loop.run):
        again = compare(training=training, num=40, trials=2, run=fresh_run)
    assert again == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a comparison needs something to compare, got nothing"),
        (["--methods", "sid"], "--methods needs a teacher, got none"),
        (["--runs", "3"], "--teacher, --duration, --runs and --part need --methods, got none"),
        (["--methods", "sid,dmd9", "--teacher", "tiny-digits"], "methods must be of sid, sida, sid2a"),
        (["--methods", "sid", "--teacher", "tiny-digits", "--duration", "1k"], "sid: the generator trains from 4,000"),
        (["--methods", "sid", "--teacher", "tiny-digits", "--part", "9/8"], "--part must be such as 2/8, got 9/8"),
        (
            ["--methods", "sid,sid", "--teacher", "tiny-digits"],
            "each method is trained once for each seed, got sid,sid",
        ),
        (["nothere", "--dry-run"], "no ref 'nothere'"),
        (["--methods", "sid", "--teacher", "tiny-digits", "--runs", "0"], "the number of runs must be >= 1, got 0"),
        (["tiny-digits", "--plot", "a.svg"], "a plot must be a PNG, got a.svg"),
        (["tiny-digits", "--detectors", "nobody"], "unknown detector 'nobody'"),
    ],
)
def test_bad_words_are_refused_in_a_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["compare", *words, "--run", str(tmp_path)])
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_the_command_prints_a_table_csv_and_markdown_and_draws(
    finished: Finished, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "generator/best", "tiny-digits", "--num", "40", "--trials", "2", "--run", str(finished.root)]

    def printed(*more: str) -> str:
        with pytest.raises(SystemExit) as error:
            cli.main([*words, *more])
        assert error.value.code == 0
        return capfd.readouterr().out

    lines = printed("--plot", str(tmp_path / "a.png")).splitlines()
    assert lines[0].startswith("name")
    assert sum("*" in line for line in lines[1:3]) == 1
    assert lines[3].split()[:3] == ["name", "images", "updates"]
    assert lines[-1].startswith(f"{BLIND}, ")
    assert "paired t over 2 trials" in lines[-1]
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[0] == 900
    table = list(csv.DictReader(io.StringIO(printed("--csv"))))
    assert {each["name"]: each[f"{FD} blind"] for each in table} == {"generator/best": "False", "tiny-digits": "True"}
    text = printed("--markdown").splitlines()
    assert text[1].count("---") == 10
    assert text[-1].startswith("- ")
    assert "paired t over 2 trials" in text[-1]
    assert json.loads(printed("--json"))["ordered_by"] == BLIND


def test_dots_say_in_words_what_an_axis_cannot_show() -> None:
    marks = [
        report.Mark("a", 1.0, 0.1, True),
        report.Mark("b", 2.0, None, True),
        report.Mark("c", float("nan"), None, True),
    ]
    drawn = report.dots([("t", marks), ("u", marks[:1])])
    assert drawn == report.dots([("t", marks), ("u", marks[:1])])
    assert Image.open(io.BytesIO(drawn)).size == (900, 34 + (58 + 3 * 34 + 50) + (58 + 34 + 50))


def test_dots_of_numbers_that_are_not_blind_have_another_colour() -> None:
    def colours(is_blind: bool) -> set[object]:
        drawn = Image.open(io.BytesIO(report.dots([("t", [report.Mark("a", 1.0, 0.1, is_blind)])])))
        return {colour for _, colour in drawn.crop((300, 34, 900, 120)).convert("RGB").getcolors(1 << 20) or ()}

    assert (0, 0x72, 0xB2) in colours(True) - colours(False)
    assert (0xD5, 0x5E, 0) in colours(False) - colours(True)


def test_a_copy_of_training_data_or_samples_can_be_compared_too(finished: Finished) -> None:
    found = compare(["generator/best", "dataset/tiny-digits"], num=40, trials=2, run=finished.root)
    assert found
    assert found.rows[0].name == "dataset/tiny-digits"  # it is the reference itself
    assert found.differences[0].low is None


def test_fixed_images_are_as_many_as_those_of_networks_or_said_to_be_fewer(finished: Finished) -> None:
    data = sidactl.prepare_data("tiny-digits", run=finished.root)
    few = sidactl.sample(finished.best, num=30, run=finished.root)
    found = compare([finished.best, data, few], num=40, trials=1, run=finished.root)
    assert found
    alone = sidactl.evaluate(data, ["fid"], num=40, reference=data, run=finished.root)
    (row,) = (row for row in found.rows if data.oid in row.oids)
    assert row.values["FD tiny-digits"] == [list(alone.values["FD tiny-digits"])]
    assert any("holds 30 images, fewer than the 40 of the others" in line for line in found.warnings)
