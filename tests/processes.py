"""Commands in processes of their own, one or several that work together, which have nothing left to import.

They are forked from a process that has imported all of it and does nothing: to import torch in each of them would take
longer than what they do. How torchrun starts and ends them is for tests/engine/test_distributed.py.
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "pytest",
        "PIL.Image",
        "sidactl.cli.train",
        "sidactl.detectors",
        "sidactl.training.distillation",
        "sidactl.training.checkpoints",
        "torch._dynamo",
        "tests.conftest",
    ]
)


@dataclass(frozen=True)
class Done:
    """How a process ended, and what it wrote."""

    code: int | None
    out: str
    err: str


def run(
    num_processes: int, words: Sequence[str], settings: Mapping[str, str], module: str = "sidactl"
) -> tuple[Done, ...]:
    """Runs `python -m module words`, or a script.py, in so many processes; settings are added to the environment."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(rank) for rank in range(num_processes)]
        processes = [
            FORKS.Process(target=_run_module, args=(module, list(words), dict(os.environ | settings | where), place))
            for place, where in zip(places, _where(num_processes), strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=300)
        for process in processes:
            process.kill()
            process.join()
        return tuple(
            Done(process.exitcode, place.with_suffix(".out").read_text(), place.with_suffix(".err").read_text())
            for process, place in zip(processes, places, strict=True)
        )


def _where(num_processes: int) -> list[dict[str, str]]:
    """What a launcher says in the environment of each process, of several."""
    if num_processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]


def _run_module(module: str, words: list[str], environment: dict[str, str], place: Path) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(place.with_suffix(suffix), os.O_CREAT | os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *words]
    try:
        if module.endswith(".py"):
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which a fork would leave out
        sys.stdout.flush()
        sys.stderr.flush()


def told(num_processes: int, root: Path, *arguments: str, module: str = "sidactl") -> str:
    """What a command prints that so many processes run together on a run directory; all of them must end well."""
    settings = {"SIDACTL_RUN": str(root), "CUDA_VISIBLE_DEVICES": ""}
    first, *others = run(num_processes, arguments, settings, module)
    assert {done.code for done in (first, *others)} == {0}, "\n".join(done.err for done in (first, *others))
    assert not any(done.out for done in others)
    return first.out.strip()
