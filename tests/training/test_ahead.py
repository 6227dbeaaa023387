"""Real images are read in a thread before they are asked for: the same images, and errors where they belong."""

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sidactl.errors import SidaError
from sidactl.training.batches import ReadAhead
from tests.worlds import MadeUp, distillation, weights


class Reading:
    """Images that say which they are; notes who reads them."""

    def __init__(self, *, damaged: tuple[int, int] | None = None) -> None:
        self.here: list[tuple[int, int]] = []
        self.ahead: list[tuple[int, int]] = []
        self.damaged = damaged

    def __call__(self, batch: int, round: int) -> Tensor:
        (self.here if threading.current_thread() is threading.main_thread() else self.ahead).append((batch, round))
        if (batch, round) == self.damaged:
            raise SidaError(f"image {batch}.{round} is damaged", "Make the dataset again.")
        return torch.tensor([batch, round])


def taken(ahead: ReadAhead, places: Sequence[tuple[int, int]]) -> None:
    for batch, round in places:
        assert ahead.get(batch, round).tolist() == [batch, round]


@pytest.mark.parametrize(("step", "rounds"), [(2, [0, 1, 2]), (1, [1, 3]), (2, [0])], ids=["two", "one", "alone"])
def test_after_the_first_steps_everything_is_read_ahead_in_the_order_of_the_step_before(
    step: int, rounds: list[int]
) -> None:
    reading = Reading()
    taken(ReadAhead(reading), [(step * k, round) for k in range(6) for round in rounds])
    learned = [(step * k, round) for k in range(3) for round in rounds]
    assert set(reading.here) <= set(learned)
    assert len(reading.ahead) == len(set(reading.ahead))
    assert {(step * k, round) for k in range(3, 6) for round in rounds} <= set(reading.ahead)


def test_no_more_than_so_many_bytes_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidactl.training.batches._AHEAD_BYTES", 2 * torch.tensor([0, 0]).nbytes)
    ahead = ReadAhead(Reading())
    taken(ahead, [(2 * k, round) for k in range(4) for round in range(4)])
    assert set(ahead._begun) == {(8, 0), (8, 1)}


def test_another_order_gives_the_same_images() -> None:
    ahead = ReadAhead(Reading())
    taken(ahead, [(0, 1), (0, 0), (2, 0), (2, 1), (2, 1), (4, 1), (0, 0), (9, 0), (4, 0), (6, 1)])


def test_an_error_comes_where_its_images_are_asked_for_as_often_as_they_are() -> None:
    ahead = ReadAhead(Reading(damaged=(6, 1)))
    taken(ahead, [(2 * k, round) for k in range(3) for round in range(2)])
    taken(ahead, [(6, 0)])  # by now the damaged one was read, or is being read
    for _ in range(2):
        with pytest.raises(SidaError, match=r"image 6\.1 is damaged"):
            ahead.get(6, 1)
    taken(ahead, [(8, 0)])


def test_steps_have_the_bits_that_they_have_without(monkeypatch: pytest.MonkeyPatch) -> None:
    source = MadeUp()
    ahead, direct = (distillation(source=source, generator_from_nimg=None, num_accumulation_rounds=4) for _ in "ab")
    monkeypatch.setattr(direct._batches._ahead, "get", direct._batches._ahead._read)  # type: ignore[attr-defined]
    for run in (ahead, direct):
        run.nimg = 10**6
        for _ in range(3):
            run.step()
    assert torch.equal(weights(ahead.generator), weights(direct.generator))
    assert torch.equal(weights(ahead.fake_score), weights(direct.fake_score))
