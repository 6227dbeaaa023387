"""Devices by name."""

import pytest
import torch

from sidactl.engine import pick_device
from sidactl.errors import SidaError


def test_without_a_name_it_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert pick_device() == torch.device(kind)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1"])
def test_a_gpu_that_is_there_can_be_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(name) == torch.device(name)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(SidaError) as caught:
        pick_device(name)
    assert str(caught.value) == f"device {name} is not there: torch sees {count} GPUs. Pass --device cpu."
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "mps", "meta", "cpu,cuda"])
def test_what_is_no_device_of_ours_is_refused(name: str) -> None:
    with pytest.raises(SidaError) as caught:
        pick_device(name)
    assert str(caught.value) == f"device must be cpu, cuda or cuda:N, got {name!r}. Pass --device cpu."
