"""No file from outside is executed, ends as a bug, takes over 2 GB or 20 s, or is taken for what it is not.

`python -m tests.hostile.run corpus DOOR -v` shows what is said of each file.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden import golden
from tests.hostile import corpus, doors
from tests.hostile.run import damaged

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory limits and forks are as Linux has them")


def tried(*words: str) -> dict[str, int]:
    golden("networks/sid_v1_gen_edm.pkl")  # skips where it is not
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.hostile.run", *words],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])["of"]
    assert set(counts) <= {"read", "refused"}
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("door", doors.DOORS)
def test_hostile_files_are_refused_or_read_at_little_cost(door: str) -> None:
    tried("corpus", door)


def test_some_hostile_files_are_refused_or_read_at_little_cost() -> None:
    assert sum(tried("some").values()) > 80


def test_the_corpus_is_large_and_of_every_kind() -> None:
    found = corpus.corpus()
    assert len(found) >= 400
    assert {door for door, _ in found} == set(doors.DOORS)


def test_sound_files_are_read_at_every_door(tmp_path: Path) -> None:
    """Else the refusals above would say nothing."""
    refused = {"weights.pth", "old.pth", "weights.safetensors"}  # a state dict of one tensor, which is no Inception
    for name, door in doors.DOORS.items():
        if name in refused:
            continue
        if name == "net.pkl":
            golden("networks/sid_v1_gen_edm.pkl")
        place = tmp_path / name.replace(".", "-")
        place.mkdir()
        (place / name).write_bytes(door.sound())
        door.enter(place / name, place / "run")


def test_damage_is_seeded() -> None:
    sound = bytes(range(200))
    one, other = ([damaged(sound, random.Random(f"{seed}-{n}")) for n in range(20)] for seed in (0, 1))
    assert one == [damaged(sound, random.Random(f"0-{n}")) for n in range(20)]
    assert one != other
    assert sum(made != sound for made in one) >= 18


def test_damaged_files_are_refused_or_read_at_little_cost() -> None:
    assert sum(tried("fuzz", "500").values()) == 500


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 41))
def test_many_damaged_files_are_refused_or_read_at_little_cost(seed: int) -> None:
    assert sum(tried("fuzz", "500", str(seed)).values()) == 500
