"""Which kind of random generator draws: a seed's images on a GPU are not a CPU's, so neither answers for both."""

from pathlib import Path

import pytest
import torch

import sidactl
from sidactl.commands import samplers
from tests.conftest import Finished, instead_of


def test_a_device_that_is_named_says_which_generator_draws() -> None:
    assert samplers.drawn_on("cpu") == {}
    assert samplers.drawn_on("cuda") == samplers.drawn_on("cuda:1") == {"rng": "cuda"}


def test_without_a_name_torch_is_asked_only_where_there_is_a_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(samplers, "_GPU_FILES", (str(tmp_path / "driver"),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert samplers.drawn_on(None) == {}
    (tmp_path / "driver").touch()
    assert samplers.drawn_on(None) == {"rng": "cuda"}


def test_what_was_drawn_on_a_cpu_answers_for_no_gpu(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    of_cpu = sidactl.sample("generator/best", seeds=[1, 2], run=finished.root).artifact
    score = sidactl.fid("generator/best", num=30, run=finished.root)
    instead_of(samplers.drawn_on, lambda device: {"rng": "cuda"}, monkeypatch)
    of_gpu = sidactl.sample("generator/best", seeds=[1, 2], run=finished.root).artifact
    assert "rng" not in of_cpu.params
    assert of_gpu.params["rng"] == "cuda"
    again = sidactl.fid("generator/best", num=30, run=finished.root)
    assert (score.settings.get("rng"), again.settings["rng"]) == (None, "cuda")
    assert again.oid != score.oid
