"""Features are collected once, whatever happens meanwhile: what goes on after an interruption ends in the same bits."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sidactl
from sidactl import detectors
from sidactl.commands import dataset_stats, features, moments, tasks
from sidactl.commands.question import Question
from sidactl.engine import ranks
from sidactl.errors import SidaError
from sidactl.store import Artifact, LiveDir, Store, UnwritableError, rehash, sealed, unsealed
from tests.conftest import Forbid, instead_of


@pytest.fixture(autouse=True)
def _save_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "SAVE_EVERY_SEC", 0.0)


def batches(num: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (5, 1, 8, 8), generator=generator).to(torch.uint8) for _ in range(num)]


def work(stop_at: int | None = None, first_seen: list[int] | None = None, num: int = 7) -> features.Work:
    """Of all batches, by two detectors; the processor is switched off at one of them."""

    def shared(first: int) -> Iterator[Tensor]:
        if first_seen is not None:
            first_seen.append(first)
        for index, images in enumerate(batches(num)[first:], first):
            if index == stop_at:
                raise KeyboardInterrupt
            yield images

    both = {name: detectors.load(name) for name in ("tiny-digits",)}
    return features.Work(num, shared, {"b": both["tiny-digits"], "a": both["tiny-digits"]}, ["a"])


def bits(collected: features.Collected) -> list[bytes]:
    arrays = [a for name in sorted(collected.stats) for a in collected.stats[name].arrays().values()]
    kept = [t.numpy() for f in collected.features.values() for t in (f.rows, f.digests)]
    return [array.tobytes() for array in (*arrays, *kept)]


@pytest.mark.parametrize("stops", [[0], [1], [6], [3, 5]])
def test_what_goes_on_after_an_interruption_has_the_bits_of_what_was_never_interrupted(
    tmp_path: Path, stops: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            features.collect(work(stop, seen), LiveDir(tmp_path))
    done = list[int]()
    found = features.collect(work(None, seen), LiveDir(tmp_path), before=100, tick=done.append)
    assert seen == [0, *stops]
    assert bits(found) == bits(features.collect(work()))
    assert done == [5 * batch for batch in range(stops[-1], 8)]
    told = [f"going on after {5 * stop} images, which were measured before" for stop in stops if stop]
    told[-1:] = [f"going on after {100 + 5 * stop} images, which were measured before" for stop in stops[-1:] if stop]
    assert capfd.readouterr().err.splitlines() == told
    assert json.loads((tmp_path / "state.json").read_bytes()) == {"state": {"done": 135}}
    assert len(list(tmp_path.glob("*-moments-*"))) == 1


@pytest.mark.parametrize(
    "harm", ["flip", "remove", "others", "nonsense", "list", "count", "resealed", "folder", "moments folder"]
)
def test_what_is_not_as_it_was_saved_is_begun_anew_and_said(
    tmp_path: Path, harm: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        features.collect(work(4), LiveDir(tmp_path))
    state, rows = tmp_path / "features-collected.json", next(tmp_path.glob("features-rows-*"))
    seen, num = list[int](), 7
    if harm == "flip":
        data = bytearray(rows.read_bytes())
        data[-1] ^= 1
        rows.write_bytes(data)
    elif harm == "remove":
        rows.unlink()
    elif harm == "others":
        num = 8
    elif harm == "count":
        state.write_text(state.read_text().replace('"batches": 4', '"batches": 5'))
    elif harm == "resealed":
        state.write_bytes(sealed(unsealed(state.read_bytes()) | {"files": {}}))
    elif harm.endswith("folder"):
        path = state if harm == "folder" else next(tmp_path.glob("features-moments-*"))
        path.unlink()
        path.mkdir()
    else:
        state.write_text("[1]" if harm == "list" else "{")
    found = features.collect(work(None, seen, num), LiveDir(tmp_path))
    assert seen == [0]
    assert capfd.readouterr().err.startswith("what an interrupted score left is not as it was saved (")
    assert bits(found) == bits(features.collect(work(num=num)))


def test_a_save_that_fails_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(self: LiveDir, name: str, data: bytes) -> None:
        raise UnwritableError("the disk is full", "Free some.")

    monkeypatch.setattr(LiveDir, "write", full)
    assert bits(features.collect(work(), LiveDir(tmp_path))) == bits(features.collect(work()))
    told = "warning: the disk is full: an interruption would lose what is measured from here on\n"
    assert capfd.readouterr().err == told


@pytest.fixture
def net_of_digits(tmp_path: Path) -> Store:
    sidactl.fetch_teacher("tiny-digits", run=tmp_path / "run")
    return Store.open(tmp_path / "run")


def interrupt_after(num_batches: int, patch: pytest.MonkeyPatch) -> None:
    """Ends a score where so many batches are done."""
    joined = ranks.gather_in_order

    def some(*of_all: Any, **options: Any) -> Iterator[Any]:
        nonlocal num_batches
        for made in joined(*of_all, **options):
            if num_batches == 0:
                raise KeyboardInterrupt
            num_batches -= 1
            yield made

    instead_of(ranks.gather_in_order, some, patch)


def test_a_score_goes_on_where_it_was_interrupted(
    net_of_digits: Store, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options: Any = {"num": 40, "trials": 2, "steps": 2, "run": net_of_digits.root, "reference": "dataset/tiny-digits"}
    monkeypatch.setattr(features, "MAX_BATCH_SIZE", 16)
    references_batches = -(-1797 // 16)
    with monkeypatch.context() as patch:
        interrupt_after(references_batches + 4, patch)  # one batch into the second trial
        with pytest.raises(KeyboardInterrupt):
            sidactl.fid("tiny-digits", **options)
    (unfinished,) = tasks.unfinished(net_of_digits)
    assert unfinished.nimg == 56
    expected = "sidactl fid tiny-digits --ref dataset/tiny-digits --num 40 --trials 2 --steps 2"
    assert unfinished.go_on() == expected
    capfd.readouterr()
    again = sidactl.fid("tiny-digits", **options)
    assert capfd.readouterr().err.splitlines() == ["going on after 56 images, which were measured before"]
    assert tasks.unfinished(net_of_digits) == []
    assert sidactl.fid("tiny-digits", **options, force=True) == again


def test_the_numbers_of_a_finished_trial_are_not_computed_again_and_damage_is_seen(
    net_of_digits: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {"num": 40, "trials": 2, "steps": 2, "run": net_of_digits.root, "reference": "dataset/tiny-digits"}
    with monkeypatch.context() as patch:
        interrupt_after(-(-1797 // 250) + 1, patch)
        with pytest.raises(KeyboardInterrupt):
            sidactl.prec_recall("tiny-digits", **options)
    assert list(rehash(net_of_digits)) == []
    (key,) = net_of_digits.live_names()
    rows = next((net_of_digits.root / "live" / key).glob("trial-0-rows-*"))
    sound = rows.read_bytes()
    rows.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    ((name, problem),) = rehash(net_of_digits)
    assert name.endswith("trial-0-collected.json")
    assert problem.startswith(f"counts on {rows.name}, which is damaged. Remove it, and the score begins anew: rm -rf ")
    seen = list[str]()
    with monkeypatch.context() as patch:
        collect = features.collect
        instead_of(features.collect, lambda *a, **o: seen.append(o["name"]) or collect(*a, **o), patch)
        score = sidactl.prec_recall("tiny-digits", **options)
    assert seen == ["trial-1"]
    assert sidactl.prec_recall("tiny-digits", **options, force=True) == score


def test_features_of_a_reference_go_on_and_answer_the_next_score(
    net_of_digits: Store, monkeypatch: pytest.MonkeyPatch, forbidden: Forbid
) -> None:
    data, detector = sidactl.prepare_data("tiny-digits", run=net_of_digits.root), detectors.load("tiny-digits")
    monkeypatch.setattr(features, "MAX_BATCH_SIZE", 200)
    for ask in (features.stats_of, features.real_features):
        done: list[tuple[int, int]] = []
        with monkeypatch.context() as patch:
            interrupt_after(5, patch)
            with pytest.raises(KeyboardInterrupt):
                ask(net_of_digits, data, detector)
        ask(net_of_digits, data, detector, lambda *tick, done=done: done.append(tick))
        assert done[0] == (1000, 1797)
        with forbidden(ranks.gather_in_order):
            ask(net_of_digits, data, detector)
    assert tasks.unfinished(net_of_digits) == []


def test_of_two_processes_that_ask_the_same_the_second_waits_and_has_the_answer(
    net_of_digits: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    task = tasks.Task("fid", "tiny-digits", [], {})
    question = Question(store=net_of_digits, command="score", params={}, task=task)
    made = net_of_digits.resolve("teacher/tiny-digits")
    begun, found = threading.Event(), list[object]()

    def second() -> None:
        begun.wait()
        with question.known_or_working_together() as place:
            found.append(place)

    other = threading.Thread(target=second)
    other.start()
    with question.known_or_working_together() as place:
        assert isinstance(place, LiveDir)
        begun.set()
        while "waiting for another process" not in (told := capfd.readouterr().err):
            assert not told
        question.record(made)
    other.join()
    assert isinstance(found[0], Artifact)
    assert found[0].oid == made.oid


def test_a_run_directory_that_takes_nothing_has_no_place(net_of_digits: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    data = sidactl.prepare_data("tiny-digits", run=net_of_digits.root)

    def full(self: Store) -> None:
        raise UnwritableError("the disk is full", "Free some.")

    monkeypatch.setattr(Store, "check_writable", full)
    monkeypatch.setattr(Store, "put", lambda *a, **k: full(net_of_digits))
    detector = detectors.load("tiny-digits")
    stats, kept = features.stats_of(net_of_digits, data, detector)
    assert (stats.num_items, kept) == (1797, None)
    assert moments.moments(net_of_digits, data, detector)
    with pytest.raises(SidaError, match="the disk is full"):
        dataset_stats.dataset_stats(data.oid, run=net_of_digits.root)
