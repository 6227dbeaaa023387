"""Unfinished work: what ls --live and gc --live say and do, and what is said where a command does not go on with it."""

import fcntl
import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sidactl
from sidactl import cli
from sidactl.commands import inventory, tasks
from sidactl.errors import SidaError
from sidactl.recipes import Adversarial, SidRecipe
from sidactl.store import QUESTION, Store, collect_garbage
from sidactl.training import state
from tests.conftest import Finished, short_distill


def interrupted_at(nimg: int) -> Callable[[state.Event], None]:
    def watch(event: state.Event) -> None:
        if (event.kind, event.nimg) == ("checkpoint", nimg):
            os.kill(os.getpid(), signal.SIGINT)

    return watch


@pytest.fixture(scope="module")
def interrupted(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a distillation that was interrupted at 32 images; to be copied."""
    root = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("interrupted") / "run"))
    with pytest.raises(SidaError):
        short_distill(root, interrupted_at(32))
    return root


@pytest.fixture
def run(interrupted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(interrupted, tmp_path / "copy"))


def command_line(*words: str) -> None:
    cli.app(list(words), standalone_mode=False)


def test_unfinished_work_is_listed_with_the_command_that_goes_on(
    run: Path, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    (key,) = os.listdir(run / "live")
    command_line("ls", "--live", "--run", str(run), "--json")
    (told,) = json.loads(capsys.readouterr().out)
    size_bytes = sum(path.stat().st_size for path in (run / "live").rglob("*") if path.is_file())
    assert {name: value for name, value in told.items() if name not in ("touched", "go_on")} == {
        "key": key,
        "command": "distill",
        "title": "distill tiny-digits sida",
        "nimg": 32,
        "total_nimg": 96,
        "checkpoint_nimg": 32,
        "size_bytes": size_bytes,
        "is_worked_on": False,
        "process": None,
    }
    command_line("ls", "--live", "--run", str(run))
    table = capsys.readouterr().out
    assert "distill tiny-digits sida  32 / 96  32" in table
    assert told["go_on"] in table
    name, *words = shlex.split(told["go_on"])
    assert name == "sidactl"
    command_line(*words)
    out, err = capsys.readouterr()
    assert out.strip() == finished.best.oid
    assert "going on from the checkpoint at 32 images" in err
    command_line("ls", "--live", "--run", str(run))
    assert capsys.readouterr() == ("", "no unfinished work\n")


def test_what_a_process_works_on_is_listed_as_such_and_not_removed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (key,) = os.listdir(run / "live")
    with Store.open(run).live(key):
        command_line("ls", "--live", "--run", str(run))
        assert f"process {os.getpid()} works on it" in capsys.readouterr().out
        for options in ([], ["--dry-run"]):
            with pytest.raises(SidaError) as caught:
                command_line("gc", "--live", key[:8], "--run", str(run), *options)
            assert str(caught.value) == (
                f"unfinished work {key[:12]} is being worked on by process {os.getpid()}. "
                "Wait for it, or stop it first."
            )
            assert caught.value.exit_code == 1
    assert (run / "live" / key / QUESTION).exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_verify_knows_the_best_generator_so_far(run: Path, is_there: bool) -> None:
    assert sidactl.verify(run=run) == []
    (best,) = run.glob("live/*/best-*.safetensors")
    best.write_bytes(best.read_bytes()[:-1] + b"?") if is_there else best.unlink()
    key = best.parent.name[:12]
    told = f"is {'damaged' if is_there else 'missing'}, and the run could not end with it. Put it back, or begin anew"
    assert sidactl.verify(run=run) == [(f"live/{key}/{best.name}", f"{told} after: sidactl gc --live {key}")]
    command_line("gc", "--live", key, "--run", str(run))
    assert sidactl.verify(run=run) == []


def test_gc_live_removes_that_work_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (key,) = os.listdir(run / "live")
    other = run / "live" / ("ab" * 32)
    shutil.copytree(run / "live" / key, other)
    objects = sorted((run / "objects").rglob("*"))
    before = sorted((run / "live").rglob("*"))
    command_line("gc", "--live", key[:12], "--dry-run", "--run", str(run))
    out, err = capsys.readouterr()
    assert out == f"live/{key}\n"
    assert err.startswith("1 unfinished, ")
    assert err.endswith(" would be removed\n")
    assert sorted((run / "live").rglob("*")) == before
    command_line("gc", "--live", key[:12], "--run", str(run))
    assert capsys.readouterr().err.endswith(" removed\n")
    assert [path.name for path in (run / "live").iterdir()] == [other.name]
    assert sorted((run / "objects").rglob("*")) == objects
    assert not (run / "logs").exists()
    with pytest.raises(SidaError) as caught:
        sidactl.gc(unfinished=[key[:12]], run=run)
    assert caught.value.message == f"no unfinished work in {run} has a key that starts with '{key[:12]}'"
    shutil.copytree(other, other.with_name("abcd" + "0" * 60))
    with pytest.raises(SidaError, match=r"^'ab' fits 2 pieces of unfinished work: ab"):
        sidactl.gc(unfinished=["ab"], run=run)


def test_a_changed_option_begins_anew_and_says_what_differs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(event: state.Event) -> None:
        raise KeyboardInterrupt

    for changed, told in (
        ({"generator_lr": 2e-5}, "--generator-lr 0.0005 there, 2e-05 now"),
        ({"lambda_adv": 0.5, "seed": 7}, "--seed 0 there, 7 now; --lambda-adv 0.1 there, 0.5 now"),
        ({"score": False}, "--no-score default there, true now"),
    ):
        with pytest.raises(KeyboardInterrupt):
            short_distill(run, stop, **changed)
        line = f"this begins anew: an unfinished distill tiny-digits sida differs in {told} "
        line += "(sidactl ls --live lists it)"
        assert line in capsys.readouterr().err.splitlines()
    with pytest.raises(KeyboardInterrupt):
        short_distill(run, stop)  # goes on, so there is nothing to say
    assert "begins anew" not in capsys.readouterr().err
    assert len(os.listdir(run / "live")) == 1


def test_work_of_an_older_version_is_listed_and_named_where_it_does_not_go_on(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (key,) = os.listdir(run / "live")
    (run / "live" / key / QUESTION).unlink()
    command_line("ls", "--live", "--run", str(run))
    table = capsys.readouterr().out
    assert f"{key[:12]}  unknown, of an older version  32      32" in table
    assert "repeat its command, which says whether it goes on" in table
    with pytest.raises(SidaError, match=r"^interrupted at 16 of 96 images"):
        short_distill(run, interrupted_at(16), seed=1, batch_size=16, checkpoint_every_nimg=16)
    told = f"unfinished work of an older version does not go on: {key[:12]} (sidactl gc --live {key[:12]} removes it)"
    assert told in capsys.readouterr().err.splitlines()


BAD_QUESTIONS = ["", "{", "[]", "5", "null", "{}", '{"command": 5}', "[" * 5000]


def test_foreign_files_in_live_are_no_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (key,) = os.listdir(run / "live")
    (run / "live" / "notes.txt").write_text("mine")
    for index, text in enumerate(BAD_QUESTIONS):
        folder = run / "live" / f"odd{index}"
        folder.mkdir()
        for name in (QUESTION, "state.json", "events.jsonl"):
            (folder / name).write_text(text)
        (folder / "checkpoint-odd").mkdir()
        (folder / "lock").mkdir()
    whole = json.loads((run / "live" / key / QUESTION).read_bytes())
    for field in whole:
        folder = run / "live" / f"odd-{field}"
        folder.mkdir()
        (folder / QUESTION).write_text(json.dumps(whole | {field: 5}))
        (folder / "events.jsonl").mkdir()
    found = inventory.unfinished(run=run)
    assert {each.key for each in found} == set(os.listdir(run / "live")) - {"notes.txt"}
    assert {each.nimg for each in found} == {32, None}
    command_line("ls", "--live", "--run", str(run))
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(found)
    shutil.rmtree(run / "live" / "odd0" / "lock")
    sidactl.gc(unfinished=["odd0", "odd-params"], run=run)
    assert {each.key for each in found} - {each.key for each in inventory.unfinished(run=run)} == {"odd0", "odd-params"}


def test_without_live_work_or_run_directory_the_list_is_empty_and_nothing_is_made(tmp_path: Path) -> None:
    assert inventory.unfinished(run=tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_an_unfinished_preparation_is_listed_with_its_options(tmp_path: Path) -> None:
    source, root = tmp_path / "my pictures", tmp_path / "run"
    source.mkdir()
    from PIL import Image

    for index in range(4):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(source / f"{index}.png")

    def tick(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sidactl.prepare_data(str(source), resolution=(8, 8), transform="center-crop", name="mine", run=root, tick=tick)
    (each,) = inventory.unfinished(run=root)
    assert each.task
    assert (each.task.title, each.nimg) == (f"prepare-data {source}", 3)
    command = each.go_on()
    assert command
    words = shlex.split(command)[1:]
    assert words == [
        "prepare-data",
        str(source),
        "--transform",
        "center-crop",
        "--resolution",
        "8x8",
        "--name",
        "mine",
    ]
    command_line(*words, "--run", str(root))
    assert os.listdir(root / "live") == []


def test_an_unfinished_teacher_is_listed_with_its_options(fresh_run: Path) -> None:
    told: list[object] = []

    def watch(event: state.Event) -> None:
        told.append(event.values.get("message"))
        interrupted_at(32)(event)

    with pytest.raises(SidaError, match=r"^interrupted at 64 of 96 images"):
        sidactl.train_teacher(
            "tiny-digits",
            name="mine",
            duration_nimg=96,
            batch_size=32,
            dropout=0.1,
            run=fresh_run,
            device="cpu",
            watch=watch,
        )
    assert "1,797 images of 8x8x1, 10 classes" in told
    (each,) = inventory.unfinished(run=fresh_run)
    assert each.task
    assert each.task.title == "train-teacher tiny-digits"
    assert (each.nimg, each.total_nimg, each.checkpoint_nimg) == (64, 96, 64)
    assert each.go_on() == ("sidactl train-teacher tiny-digits --name mine --duration 96 --batch-size 32 --dropout 0.1")


def test_a_forced_repetition_is_listed_with_force(run: Path, finished: Finished) -> None:
    shutil.copytree(finished.root, run, dirs_exist_ok=True)
    shutil.rmtree(run / "live")
    with pytest.raises(SidaError):
        short_distill(run, interrupted_at(32), force=True)
    (each,) = inventory.unfinished(run=run)
    assert (each.go_on() or "").endswith(" --force")


def test_work_that_has_left_nothing_to_go_on_from_leaves_no_directory(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    task = tasks.Task("distill", "a b", ["distill"], {})
    for name, left in ((None, []), ("batch-per-device.json", ["key"])):
        with store.live("key") as place:
            assert tasks.begin(store, place, task) == []
            if name:
                place.write(name, b"{}")
        assert os.listdir(tmp_path / "live") == left


def test_options_in_python_become_the_words_of_the_command() -> None:
    options: dict[str, Any] = {"name": None, "no_score": False, "allow_untrained": True, "dataset": "a b"}
    assert tasks.option_words(options) == ["--allow-untrained", "--dataset", "a b"]
    fields: dict[str, Any] = {
        "duration_nimg": 200_000,
        "generator_from_nimg": None,
        "share_fakes": True,
        "logvar": False,
        "clip_gradient_value": None,
        "P_mean": -0.4,
    }
    words = tasks.option_words(fields, SidRecipe, Adversarial)
    assert " ".join(words) == (
        "--duration 200000 --generator-from none --share-fakes --logvar false --clip-gradient-value none --p-mean -0.4"
    )


def test_whoever_looks_at_a_lock_for_a_moment_makes_no_command_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(tmp_path)
    with store.live("key") as place:
        place.write("events.jsonl", b"")
    with (tmp_path / "live" / "key" / "lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        monkeypatch.setattr("time.sleep", lambda seconds: fcntl.flock(file, fcntl.LOCK_UN))
        with store.live("key") as place:
            assert place.path.name == "key"


def test_clearing_copes_with_links_and_a_folder_in_the_place_of_the_events(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").write_text("kept")
    with Store.open(tmp_path / "run").live("key") as place:
        (place.path / "link").symlink_to(tmp_path / "mine")
        (place.path / "events.jsonl").mkdir()
        place.clear()
        assert os.listdir(place.path) == ["lock"]
    assert (tmp_path / "mine" / "kept").read_text() == "kept"


def test_gc_tells_how_many_young_objects_it_spares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store.open(tmp_path)
    store.put("run", {"a": b"a", "b": b"b"})
    kept = store.put("dataset", {"c": b"c"})
    store.set_ref("dataset", "kept", kept.oid)
    for options in (["--dry-run"], []):
        command_line("gc", "--run", str(tmp_path), *options)
        assert capsys.readouterr().err.splitlines()[1:] == [
            "3 objects that no ref reaches are spared: within the last hour a process made them"
        ]
    report = collect_garbage(store, grace_sec=-1)
    assert (report.num_objects, report.num_young) == (3, 0)


def test_ls_lists_a_thousand_at_a_time_those_with_names_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store.open(tmp_path)
    oids = [store.put("score", {}, params={"number": n}).oid for n in range(1002)]
    last = max(oids)
    store.set_ref("score", "the-last", last)
    parts = list(inventory.ls_in_parts(run=tmp_path))
    assert [len(part) for part in parts] == [1000, 2]
    assert (parts[0][0][0].oid, parts[0][0][1]) == (last, ["score/the-last"])
    assert sorted(artifact.oid for part in parts for artifact, _ in part) == sorted(oids)
    assert [artifact.oid for artifact, _ in sidactl.ls(run=tmp_path)] == [last, *sorted(set(oids) - {last})]
    command_line("ls", "--run", str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1002 + 2 * len(["kind"])
    command_line("ls", "teacher", "--run", str(tmp_path))
    assert capsys.readouterr().out.split() == ["kind", "oid", "names", "size"]
