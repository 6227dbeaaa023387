"""`bench --against FOLDER`, with a script in the place of the published one, which prints lines like its own."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sidactl.cli import app
from sidactl.commands import against
from sidactl.errors import SidaError
from sidactl.recipes import SamplingForm

LINE = "tick {tick:<5d} kimg {kimg:<9.1f} time 3m 05s      sec/tick 12.3    sec/kimg {pace:<7.2f} maintenance 0.4"

SCRIPT = f"""
import sys, time
paces, start, step = eval(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
print("Loading training set...", file=sys.stderr)
for tick, pace in enumerate(paces):
    time.sleep(0.05)
    print({LINE!r}.format(tick=tick, kimg=start + step * tick, pace=pace))
open(sys.argv[4], "a").write("x") if len(sys.argv) > 4 else time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout with a script that prints these paces, of ticks from so many thousand images on, and then waits."""
    (tmp_path / "sida_train.py").write_text(SCRIPT)
    return tmp_path


def command(paces: list[float], start_kimg: float = 300, step_kimg: float = 10, *more: str) -> str:
    return " ".join([sys.executable, "sida_train.py", f"'{paces}'", str(start_kimg), str(step_kimg), *more])


def compared(folder: Path, words: str | None, **options: Any) -> against.Comparison:
    usual: dict[str, Any] = {"batch_size": 2, "num_steps": 1, "device": "cpu", "least_sec": 0.02, "within_sec": 20}
    return against.run(folder, words, "tiny-digits", **(usual | options))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (LINE.format(tick=3, kimg=30.2, pace=22.34), against.Tick(22.34, 30_200)),
        ("sec/kimg 3", against.Tick(3.0, None)),
        ("tick 0 kimg 0.0 sec/kimg 0.00", None),
        ("Loss 3.2 kimg 30.2", None),
        ("sec/kimg nan", None),
    ],
)
def test_a_line_of_progress_tells_pace_and_images(line: str, expected: against.Tick | None) -> None:
    assert against.tick_of(line) == expected


def test_the_first_line_of_a_start_does_not_count_and_ratios_are_of_pairs(folder: Path) -> None:
    found = compared(folder, command([90.0, 4.0]), num_steps=2)
    assert found.theirs == [4.0, 4.0]
    assert found.ratios == [4.0 / ours for ours in found.ours]
    assert (found.stage, found.setting) == ("SiDA", SamplingForm())
    assert min(found.ours) > 0


def test_the_stage_is_that_of_the_images_that_the_lines_tell_of(folder: Path) -> None:
    # tiny-digits trains its generator from 2,000 images on, and the adversarial part from 10,000 on or later
    assert compared(folder, command([9.0, 4.0], 0.2, 0.1)).stage == "fake score"
    assert compared(folder, command([9.0, 4.0], 300), mode="sid").stage == "SiD"


def test_a_line_that_two_stages_share_does_not_count(folder: Path) -> None:
    found = compared(folder, command([9.0, 8.0, 7.0], 0.0, 300))
    assert (found.theirs, found.stage) == ([7.0], "SiDA")


def test_what_was_started_has_ended_afterwards(folder: Path) -> None:
    pids = folder / "pids"
    (folder / "parent.py").write_text(
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, 'sida_train.py', *sys.argv[1:]])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "child.wait()\n"
    )
    compared(folder, command([9.0, 4.0]).replace("sida_train.py", "parent.py"))
    for pid in pids.read_text().split():
        state = Path(f"/proc/{pid}/stat")
        if sys.platform == "linux":
            assert not state.exists() or state.read_text().split()[2] == "Z"
        else:
            with pytest.raises(ProcessLookupError):
                os.kill(int(pid), 0)


@pytest.mark.parametrize(
    ("words", "message", "exit_code"),
    [
        (None, r"^--against FOLDER needs --against-command, since .*\(in it: sida_train\.py\)\.$", 2),
        ("'", r"^--against-command must be a command as a shell takes it, got .* \(No closing quotation\)\.", 2),
        (" ", r"^--against-command must be a command, got nothing\.", 2),
        ("python train.py", r"^no script train\.py in .*\. Name one of that folder .*; it has sida_train\.py\.$", 2),
        ("no-such-program", r"^no-such-program cannot be started \(No such file or directory\)\.", 2),
        (command([9.0, 4.0]).replace("4.0]", "4.0"), r"ended with code 1 before .*; its last line: SyntaxError", 1),
        (
            command([9.0], 300, 10, "done"),
            r"ended with code 0 before it had told its pace twice; its last line: tick",
            1,
        ),
        (command([9.0]), r"printed 1 line with sec/kimg within 4 s, and one is needed after the first", 2),
        (
            command([]),
            r"printed no line with sec/kimg within 4 s, .*; its last line: Loading training set\.\.\.\. Pass a",
            2,
        ),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_line(
    folder: Path, words: str | None, message: str, exit_code: int
) -> None:
    with pytest.raises(SidaError, match=message) as caught:
        compared(folder, words, within_sec=4 if "within 4 s" in message else 60)
    assert caught.value.exit_code == exit_code
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "nowhere"], "--against must be eager or the folder of a checkout, got 'nowhere', which is no "),
        (["--against", ".", "--against-command", "a.py"], "no script a.py in .. Name one of that folder"),
        (["--against", ".", "--sweep"], "--sweep tries settings of ours alone, got --against FOLDER as well."),
        (["--against", ".", "--against-command", "ls", "--against-within", "0"], "--against-within must be above 0"),
        (["--against-command", "python train.py"], "--against-command needs --against FOLDER"),
    ],
)
def test_bad_words_are_refused(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", "tiny-digits", *words])
    assert isinstance(result.exception, SidaError)
    assert str(result.exception).startswith(message)
    assert result.exception.exit_code == 2


def test_a_table_and_json_tell_both_and_the_ratio(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = against.Comparison(
        teacher="edm-imagenet64",
        mode="sida",
        stage="SiDA",
        setting=SamplingForm(precision="fp16"),
        batch_size=32,
        num_rounds=1,
        device="cuda",
        command="python sida_train.py",
        theirs=[30.0, 33.0, 28.0],
        ours=[15.0, 11.0, 14.0],
    )
    asked: dict[str, Any] = {}

    def run(*words: Any, **options: Any) -> against.Comparison:
        asked.update(options, words=words)
        return comparison

    monkeypatch.setattr(against, "run", run)
    words = ["bench", "edm-imagenet64", "--against", str(folder), "--against-command", "x", "--precision", "fp16"]
    lines = CliRunner().invoke(app, words, catch_exceptions=False).stdout.splitlines()
    assert lines[0] == (
        "edm-imagenet64, sida, stage SiDA: theirs by python sida_train.py; ours fp16, 1 x 32 images a step, cuda"
    )
    assert [line.split()[-3:] for line in lines[2:]] == [["30", "28", "33"], ["14", "11", "15"], ["2", "2", "3"]]
    assert (asked["words"], asked["form"]) == ((folder, "x", "edm-imagenet64"), {"precision": "fp16"})
    found = json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout)
    assert (found["ratios"], found["ratio"], found["stage"]) == ([2.0, 3.0, 2.0], 2.0, "SiDA")
