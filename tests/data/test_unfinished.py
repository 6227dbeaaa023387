"""An interrupted preparation keeps what is done, and goes on to the same bytes."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from sidactl.data.prepare import prepare
from tests.worlds import Stop, mixed_folder, refusal, stopping_at


@pytest.mark.parametrize("workers", [1, 3])
def test_interrupted_preparation_goes_on_to_the_same_bytes(workers: int, tmp_path: Path) -> None:
    source, work = mixed_folder(tmp_path / "in"), tmp_path / "work"
    whole = prepare(source, tmp_path / "whole.zip", skip_bad=True)
    assert [name for name, _ in whole.skipped] == [f"{source}/0/04a.png"]
    seen: list[int] = []
    for image in (3, 6, 7, 12):
        with pytest.raises(Stop):
            prepare(
                source,
                tmp_path / "out.zip",
                skip_bad=True,
                workers=workers,
                work=work,
                progress=stopping_at(image, seen),
            )
        assert not (tmp_path / "out.zip").exists()
    done = prepare(source, tmp_path / "out.zip", skip_bad=True, work=work, progress=stopping_at(0, seen))
    assert seen == list(range(1, 14)), "each image is encoded once"
    assert done == whole
    assert (tmp_path / "out.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()
    assert list(work.iterdir()) == []


def test_killed_preparation_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib; from sidactl.data import prepare, unfinished\n"
        "unfinished.SAVE_EVERY_SEC = float(sys.argv[1])\n"
        "kill = lambda done, total: os.kill(os.getpid(), 9) if done == 30 else None\n"
        "folder = pathlib.Path(sys.argv[2])\n"
        "prepare.prepare('tiny-digits', folder / 'out.zip', work=folder / 'work', progress=kill)\n"
    )
    for every_sec, done in (("1e9", None), ("0", 30)):
        assert subprocess.run([sys.executable, "-c", script, every_sec, tmp_path], check=False).returncode == -9
        saved = tmp_path / "work/state.json"
        assert (json.loads(saved.read_text())["state"]["done"] if saved.exists() else None) == done
    seen: list[int] = []
    prepare("tiny-digits", tmp_path / "out.zip", work=tmp_path / "work", progress=stopping_at(0, seen))
    prepare("tiny-digits", tmp_path / "whole.zip")
    assert seen[0] == 31
    assert (tmp_path / "out.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()


def test_kill_between_the_last_image_and_the_end_is_gone_on_from(tmp_path: Path) -> None:
    seen: list[int] = []
    for image in (1797, 0):
        with pytest.raises(Stop) if image else nullcontext():
            prepare("tiny-digits", tmp_path / "o.zip", work=tmp_path / "work", progress=stopping_at(image, seen))
    assert seen == list(range(1, 1798))
    prepare("tiny-digits", tmp_path / "whole.zip")
    assert (tmp_path / "o.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()


@pytest.mark.parametrize("name", ["images.zip", "members"])
def test_work_of_which_part_is_gone_begins_anew(name: str, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        prepare("tiny-digits", tmp_path / "o.zip", work=tmp_path / "work", progress=stopping_at(100, []))
    (tmp_path / "work" / name).unlink()
    prepare("tiny-digits", tmp_path / "o.zip", work=tmp_path / "work")
    prepare("tiny-digits", tmp_path / "whole.zip")
    assert (tmp_path / "o.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()


def test_bad_image_leaves_nothing_to_go_on_from(tmp_path: Path) -> None:
    source, work = mixed_folder(tmp_path / "in"), tmp_path / "work"
    with pytest.raises(Stop):
        prepare(source, tmp_path / "out.zip", work=work, progress=stopping_at(2, []))
    assert (work / "state.json").exists()
    refusal(source, tmp_path / "out.zip", work=work)
    assert list(work.iterdir()) == []
