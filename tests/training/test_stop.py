"""A step that is told to stop between its passes: it is dropped, and made again to the same bits."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sidactl import methods
from sidactl.store import LiveDir, Store
from sidactl.training import checkpoints
from sidactl.training.distillation import Distillation
from sidactl.training.state import History, StoppedError, tensors_of
from tests.engine.test_distributed import SHORT, command, wait_for_checkpoint
from tests.toy import Toy
from tests.worlds import TINY, TINY_EDM2, distillation


def at_call(number: int) -> Callable[[], bool]:
    """What is true from its so-manieth call on."""
    calls = iter(range(1, 1 << 30))
    return lambda: next(calls) >= number


def state(run: Distillation) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors_of(run).items()}


@pytest.mark.parametrize("kind", ["sida", "shared", "edm2", "toy"])
def test_a_step_told_to_stop_after_any_of_its_passes_is_made_again_to_the_same_bits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "toy":  # the generator first, statistics over the batch, images handed on
        monkeypatch.setitem(methods.METHODS, "sida", Toy)
    options: dict[str, Any] = {"num_accumulation_rounds": 4, "generator_from_nimg": None, "dropout": 0.1}
    options |= {"share_fakes": True} if kind == "shared" else {}
    options |= {"forced_normalization": "intended"} if kind == "edm2" else {}
    spec = TINY_EDM2 if kind == "edm2" else TINY
    straight = distillation(spec, **options)
    for _ in range(6):
        straight.step()
    num_stopped = 0
    for number in range(1, 30):
        run = distillation(spec, **options)
        for _ in range(4):
            run.step()
        try:
            run.step(at_call(number))
        except StoppedError:
            num_stopped += 1
            with Store.open(tmp_path).live(f"{number:064}") as live:
                run = resumed(run, distillation(spec, **options), live)
            assert run.nimg == 4 * 8
            run.step()
        run.step()
        expected, found = state(straight), state(run)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        if number > num_stopped:
            break
    # Three gaps between the passes of either update; the toy's second one takes over images that are gone after it.
    assert num_stopped == (3 if kind == "toy" else 6)


def resumed(run: Distillation, fresh: Distillation, live: LiveDir) -> Distillation:
    checkpoints.save_checkpoint(run, History(), live)
    assert checkpoints.resume(fresh, History(), live) == []
    return fresh


SLOW = """
import os, sys, time
from pathlib import Path
from sidactl import cli
from sidactl.training import batches
get = batches.DatasetBatches.get
def slow(self, index, round):
    if list(Path(os.environ["SIDACTL_RUN"]).glob("live/*/checkpoint-*")):
        Path(os.environ["SIDACTL_RUN"], "slow").touch()
        time.sleep(float(os.environ["SECONDS"]))
    return get(self, index, round)
batches.DatasetBatches.get = slow
cli.main()
"""


def slowed(run: Path, seconds: float, settings: dict[str, str]) -> tuple[float, str]:
    """Seconds from SIGTERM, in the middle of a pass that takes so long, to the end of a job; what it told."""
    run.mkdir()
    (run / "slowed.py").write_text(SLOW)
    words = [*command(2, [])[:-3], str(run / "slowed.py"), "distill", *SHORT, "--hang-timeout", "300"]
    settings |= {"SIDACTL_RUN": str(run), "CUDA_VISIBLE_DEVICES": "", "SECONDS": str(seconds)}
    process = subprocess.Popen(words, env=os.environ | settings, stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(process, run)
    while not (run / "slow").exists():
        time.sleep(0.1)
    told_sec = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    return time.monotonic() - told_sec, stderr


def test_a_job_told_to_stop_ends_after_the_pass_that_it_is_in(tmp_path: Path) -> None:
    """Each process has two passes for each of two updates: to the end of the step it would be 4 x 6 seconds."""
    seconds, stderr = slowed(tmp_path / "run", 6.0, {})
    assert "the checkpoint is kept" in stderr
    assert seconds < 15


@pytest.mark.slow
def test_a_pass_of_45_seconds_is_waited_for_where_torchrun_is_told_to(tmp_path: Path) -> None:
    _, stderr = slowed(tmp_path / "run", 45.0, {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "540"})
    assert "the checkpoint is kept" in stderr
