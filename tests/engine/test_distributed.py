"""Several processes (gloo, on the CPU) make what one makes, to the last bit; and what happens where one ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

import sidactl
from sidactl import catalog
from sidactl.engine import configure, heartbeat
from sidactl.engine import ranks as engine_ranks
from sidactl.errors import SidaError
from sidactl.recipes import Execution, override
from sidactl.store import Store, rehash
from tests.conftest import instead_of
from tests.processes import told

# 6 steps of four micro-batches through all three stages; one evaluation, two checkpoints.
SHORT = (
    "--teacher=tiny-digits",
    "--mode=sida",
    "--duration=192",
    "--batch-size=32",
    "--num-accumulation-rounds=4",
    "--generator-from=32",
    "--adversarial-from=96",
    "--evaluate-every=192",
    "--evaluate-num=100",
    "--teacher-score",
    "none",
    "--checkpoint-every=96",
)


def command(num_processes: int, arguments: Sequence[str], module: str = "sidactl") -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), "-m", "--"]
    return [sys.executable, *(torchrun if num_processes > 1 else ["-m"]), module, *arguments]


def start(
    num_processes: int,
    run: Path,
    arguments: Sequence[str],
    settings: Mapping[str, str] | None = None,
    module: str = "sidactl",
) -> "subprocess.Popen[str]":
    environment = os.environ | {"SIDACTL_RUN": str(run), "CUDA_VISIBLE_DEVICES": ""} | (settings or {})
    return subprocess.Popen(
        command(num_processes, arguments, module),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory and the generator of one process."""
    run = tmp_path_factory.mktemp("alone")
    return run, told(1, run, "distill", *SHORT)


@pytest.mark.parametrize(
    ("num_processes", "options"),
    [
        (2, ["--shard"]),
        pytest.param(2, [], marks=pytest.mark.slow),  # as after the kill below
        pytest.param(4, [], marks=pytest.mark.slow),
        pytest.param(4, ["--shard"], marks=pytest.mark.slow),
        pytest.param(1, ["--shard"], marks=pytest.mark.slow),
    ],
)
def test_the_same_generator_and_scores_come_of_any_number_of_processes(
    alone: tuple[Path, str], tmp_path: Path, num_processes: int, options: list[str]
) -> None:
    assert told(num_processes, tmp_path, "distill", *SHORT, *options) == alone[1]


@pytest.mark.slow
def test_over_two_machines_each_holds_a_copy_in_parts_and_the_generator_is_the_same(
    alone: tuple[Path, str], tmp_path: Path
) -> None:
    """Four processes that take themselves for two on each of two machines, by the variable that torchrun sets."""
    (tmp_path / "machines.py").write_text(MACHINES)
    words = [*command(4, [])[:-3], str(tmp_path / "machines.py"), "distill", *SHORT, "--shard"]
    settings = {"SIDACTL_RUN": str(tmp_path / "run"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == alone[1], done.stderr
    assert "parts of 2, copies of 2" in done.stderr


MACHINES = """
import os, sys
os.environ["LOCAL_WORLD_SIZE"] = "2"
from sidactl import cli
from sidactl.engine import sharding
gathered = sharding.gathered
def told(net, device):
    sharded = next(p for p in net.parameters() if sharding.is_sharded(p))
    copies, parts = sharded.device_mesh.shape
    print(f"parts of {parts}, copies of {copies}", file=sys.stderr)
    return gathered(net, device)
sharding.gathered = told
cli.main()
"""


@pytest.mark.slow
def test_memory_levers_change_no_bit(alone: tuple[Path, str], tmp_path: Path) -> None:
    assert told(1, tmp_path, "distill", *SHORT, "--checkpoint-activations", "--ema-on-cpu") == alone[1]


def test_samples_and_scores_of_two_processes_are_those_of_one(alone: tuple[Path, str]) -> None:
    run, generator = alone
    for arguments in (["sample", generator, "--num", "600"], ["fid", generator, "--num", "500"]):
        assert told(2, run, *arguments, "--force") == told(1, run, *arguments, "--force")


def test_two_processes_share_the_images_of_a_reference_to_the_same_bits(tmp_path: Path) -> None:
    words = ["evaluate", "tiny-digits", "--ref", "dataset/tiny-digits", "--detector", "random-features", "--num", "90"]
    made = []
    for num_processes in (1, 2):
        run = tmp_path / str(num_processes)
        told(num_processes, run, *words, "--steps", "2")
        made.append(sorted((a.kind, a.oid) for a in Store.open(run).artifacts() if a.kind != "score"))
        assert not any((run / "live").iterdir())
    assert made[0] == made[1]
    assert {"stats", "features"} <= {kind for kind, _ in made[0]}


def interrupted(num_processes: int, run: Path, options: Sequence[str]) -> None:
    """Distills until a checkpoint is there; then every process is asked to stop, as a cluster does."""
    process = start(num_processes, run, ["distill", *SHORT, *options])
    wait_for_checkpoint(process, run)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert "the checkpoint is kept" in stderr


def wait_for_checkpoint(process: "subprocess.Popen[str]", run: Path) -> None:
    def is_there() -> bool:
        assert process.poll() is None, process.communicate()
        return any(run.glob("live/*/checkpoint-*"))

    wait_until(is_there)


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def child(process: "subprocess.Popen[str]", *, rank: int) -> int:
    """The process id of one of those that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (found,) = [int(pid) for pid in children if f"\0RANK={rank}\0".encode() in environment_of(int(pid))]
    return found


def environment_of(pid: int) -> bytes:
    return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 4])
def test_a_sharded_run_of_two_processes_goes_on_in_any_number(
    alone: tuple[Path, str], tmp_path: Path, num_processes: int
) -> None:
    interrupted(2, tmp_path, ["--shard"])
    options = ["--shard"] if num_processes > 1 else []
    process = start(num_processes, tmp_path, ["distill", *SHORT, *options])
    stdout, stderr = process.communicate(timeout=300)
    assert stdout.strip() == alone[1]
    assert "going on from" in stderr


def test_where_one_process_is_killed_the_others_stop_with_a_line_and_the_run_goes_on(
    alone: tuple[Path, str], tmp_path: Path
) -> None:
    process = start(2, tmp_path, ["distill", *SHORT])
    wait_for_checkpoint(process, tmp_path)
    os.kill(child(process, rank=1), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "error: another process of this run has ended, so this one ends, too. Repeat the same command" in stderr
    assert list(rehash(Store.open(tmp_path))) == []
    assert told(2, tmp_path, "distill", *SHORT) == alone[1]


@pytest.mark.parametrize(
    ("stopped", "is_waited_for"),
    [(1, False), pytest.param(1, True, marks=pytest.mark.slow), pytest.param(0, True, marks=pytest.mark.slow)],
)
def test_where_one_process_hangs_the_run_ends_with_a_line_and_goes_on(
    alone: tuple[Path, str], tmp_path: Path, stopped: int, is_waited_for: bool
) -> None:
    process = start(2, tmp_path, ["distill", *SHORT, "--hang-timeout", "3"])
    wait_for_checkpoint(process, tmp_path)
    ranks = [child(process, rank=rank) for rank in range(2)]
    os.kill(ranks[stopped], signal.SIGSTOP)
    if not is_waited_for:  # torchrun gives it 30 s before it kills it
        wait_until(lambda: not Path(f"/proc/{ranks[1 - stopped]}/exe").exists())
        os.kill(ranks[stopped], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = [line for line in stderr.splitlines() if "error: " in line and "sign" in line]
    assert line == (
        f"{'process 1: ' * (stopped == 0)}error: process {stopped} (host {socket.gethostname()}, pid {ranks[stopped]}) "
        "of 2 has given no sign for 3 s, so this one ends. Repeat the same command, "
        "and training goes on from its last checkpoint; a longer --hang-timeout is more patient."
    )
    assert stderr.count("Traceback") == 1  # torchrun's own
    assert told(2, tmp_path, "distill", *SHORT) == alone[1]


@pytest.mark.slow
def test_where_the_process_that_holds_the_store_hangs_the_others_end_with_a_line(tmp_path: Path) -> None:
    """Started by hand, as by a cluster's own launcher: process 0 is where they meet."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    settings = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "SIDACTL_HANG_TIMEOUT": "2"}
    processes = [start(1, tmp_path, ["distill", *SHORT], settings | {"RANK": str(rank)}) for rank in range(2)]
    wait_for_checkpoint(processes[0], tmp_path)
    processes[0].send_signal(signal.SIGSTOP)
    _, stderr = processes[1].communicate(timeout=20)
    processes[0].kill()
    processes[0].communicate()
    assert processes[1].returncode == 1
    assert stderr.splitlines()[-1].startswith(
        f"process 1: error: process 0, where the processes meet (localhost:{port}), has not answered for 2 s, so this"
    )


PATIENT = """
import os, time
from pathlib import Path
from sidactl.engine import ranks
with ranks.rank0_first():
    if os.environ["RANK"] == "0":
        time.sleep(1.6)  # at work for longer than the time
Path(os.environ["FOLDER"], os.environ["RANK"]).touch()
while not Path(os.environ["FOLDER"], "continued").exists():
    time.sleep(0.1)
ranks.barrier()
if os.environ["RANK"] == "0":
    time.sleep(1.6)  # after the other one has left
"""


def test_a_process_that_others_wait_for_and_a_job_that_is_stopped_as_a_whole_do_not_hang(tmp_path: Path) -> None:
    settings = {"SIDACTL_HANG_TIMEOUT": "1", "FOLDER": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    (tmp_path / "patient.py").write_text(PATIENT)
    words = [*command(2, [])[:-3], str(tmp_path / "patient.py")]
    process = subprocess.Popen(words, env=os.environ | settings, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: all((tmp_path / str(rank)).exists() for rank in range(2)))
    all_of_it = [process.pid, *(child(process, rank=rank) for rank in range(2))]
    for pid in all_of_it:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1.6)
    for pid in reversed(all_of_it):
        os.kill(pid, signal.SIGCONT)
    (tmp_path / "continued").touch()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "error" not in stderr


FAILING = """
import os, sys, time
import torch.distributed as dist
from sidactl import cli
from sidactl.training import batches
dist.destroy_process_group = lambda: time.sleep(600)  # as NCCL, while the others are in a collective
get, calls = batches.DatasetBatches.get, []
def failing(self, index, round):
    calls.append(index)
    if os.environ["RANK"] == "1" and len(calls) > 9:
        raise OSError(5, "Input/output error", "images.zip")
    return get(self, index, round)
batches.DatasetBatches.get = failing
cli.main()
"""


def test_where_one_process_fails_the_run_ends_at_once_though_connections_cannot_be_closed(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    words = [*command(2, [])[:-3], str(tmp_path / "failing.py"), "distill", *SHORT]
    settings = {"SIDACTL_RUN": str(tmp_path / "run"), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(words, env=os.environ | settings, stderr=subprocess.PIPE, text=True)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "process 1: error: " in stderr
    assert "Input/output error" in stderr


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "86401", "soon"])
def test_a_hang_timeout_is_seconds_up_to_a_day(given: str) -> None:
    with pytest.raises(SidaError, match=r"^the hang timeout must be a whole number of seconds from 1 to 86400, got "):
        heartbeat.seconds_of(given)


def test_what_does_not_fit_the_processes_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = override(catalog.recipe_for("tiny-digits", "sida"), {"num_accumulation_rounds": 4})
    with monkeypatch.context() as patch:
        instead_of(engine_ranks.rank_and_size, lambda: (0, 3), patch)
        with pytest.raises(SidaError, match=r"^the 4 micro-batches of a batch must be shared evenly, got 3 processes"):
            configure.passes_of(recipe, Execution())
    instead_of(engine_ranks.rank_and_size, lambda: (1, 2), monkeypatch)
    assert [list(rounds) for rounds in configure.passes_of(recipe, Execution())] == [[1], [3]]
    assert [list(rounds) for rounds in configure.passes_of(recipe, Execution(batch_per_device=64))] == [[1, 3]]
    with pytest.raises(SidaError, match=r"^batch-per-device must be one of 32, 64 \(micro-batches of 32\), got 16"):
        configure.passes_of(recipe, Execution(batch_per_device=16))
    with pytest.raises(SidaError, match=r"^with compiled dropout a pass holds one micro-batch of 32, got --batch-per"):
        configure.passes_of(override(recipe, {"dropout": 0.1}), Execution(batch_per_device=64, compile=True))


def test_a_teacher_is_trained_by_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SidaError, match=r"^train-teacher runs in one process"):
        sidactl.train_teacher("tiny-digits", name="mine", run=tmp_path)


@pytest.mark.slow
def test_losses_are_reported_as_the_sum_over_processes(alone: tuple[Path, str], tmp_path: Path) -> None:
    """The losses of a step are sums over the batch, whoever computed which part of it."""
    told(2, tmp_path, "distill", *SHORT)
    means = []
    for run in (alone[0], tmp_path):
        (events,) = run.glob("logs/*/events.jsonl")
        lines = [json.loads(line) for line in events.read_bytes().splitlines()]
        # Reports come by the clock as well, so each is of as many steps as there was time for.
        reports = [{"nimg": 0}, *(line for line in lines if line["event"] == "progress")]
        parts = [(after["nimg"] - before["nimg"], after) for before, after in pairwise(reports)]
        assert sum(nimg for nimg, _ in parts) == 192
        means.append(sum(nimg * report["fake_score_loss"] for nimg, report in parts) / 192)
    assert means[0] == pytest.approx(means[1], rel=1e-6)


@pytest.mark.slow
def test_the_slurm_script_queues_itself_again_and_goes_on(alone: tuple[Path, str], tmp_path: Path) -> None:
    """With stand-ins for srun, which runs what it is given, and scontrol, which notes what it is asked."""
    (tmp_path / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\n[ $1 = show ] && echo localhost || echo "$@" >> {tmp_path}/asked\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    settings = {"JOB_ID": "17", "JOB_NODELIST": "localhost", "NNODES": "1", "GPUS_ON_NODE": "2"}
    environment = os.environ | {f"SLURM_{name}": value for name, value in settings.items()}
    environment |= {"SIDACTL_RUN": str(tmp_path / "run"), "PORT": "0", "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = f"{tmp_path}:{Path(sys.executable).parent}:{environment['PATH']}"
    script = [str(Path(__file__).parents[2] / "examples" / "slurm.sh"), *SHORT]

    def started() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", *script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    process = started()
    wait_for_checkpoint(process, tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    stdout, stderr = started().communicate(timeout=300)
    assert stdout.strip() == alone[1], stderr
    assert "going on from" in stderr


@pytest.mark.slow
def test_an_edm2_teacher_is_sharded_to_the_same_bits_gains_and_uncertainty_included(tmp_path: Path) -> None:
    train = "train-teacher tiny-digits --name mine --net edm2 --logvar-channels 8 --duration 256 --batch-size 64"
    generators = []
    # Sharded weights are normalised in every pass; gradients that went back through that once are rounded otherwise.
    for num_processes, options, module in (
        (1, [], "sidactl"),
        (2, [], "sidactl"),
        (1, [], "tests.unheld"),
        (2, ["--shard"], "sidactl"),
    ):
        run = tmp_path / f"{num_processes}{options}{module}"
        told(1, run, *train.split())
        more = ["--teacher=mine", "--dataset=tiny-digits", "--forced-normalization=published", *options]
        generators.append(told(num_processes, run, "distill", *SHORT, *more, module=module))
    assert generators[0] == generators[1]
    assert generators[2] == generators[3]
