"""Checks a GPU against golden numbers, a CPU, float32 and itself: training, sampling's detectors, memory, processes.

Run it from a checkout, with the extra `test` installed:
python examples/gpu_check.py [--device cuda] [--only CHECK] [--json FILE]
Expect: a line per check that begins with "ok:", "NOT as expected:" or "skipped:", with what was expected and what was
found, in about half an hour on one GPU (README, "Speed", splits it); exit code 1 if a check was not as expected. Golden
checks are skipped where the reference numbers (../shared/golden) are not there. `--device cpu` tries what needs no GPU;
memory is then that of the process.
"""

import dataclasses
import gc
import importlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from gpu_probe import Figures, NotAsExpectedError, Parts, SkippedError, needs_gpu, recipe_of, run_command, small

import sidactl
from sidactl import catalog, detectors
from sidactl.data.codec import LatentCodec
from sidactl.engine import devices, meter
from sidactl.foreign import networks
from sidactl.metrics import FeatureStats, frechet_distance
from sidactl.nets.inception import FIDInception
from sidactl.nets.vit import VisionTransformer
from sidactl.noise import Draws
from sidactl.recipes import BASE_BYTES, PRECISIONS, Execution, Memory, override
from sidactl.training import made_up
from sidactl.training.batches import MicroBatch
from sidactl.training.distillation import Distillation

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
TRAJECTORIES = (
    "edm_sid_fresh_start",
    "edm_sida_above_200k",
    "edm_sida_gate_200k",
    "edm2_sid_logvar_from_states",
    "edm2_sida_logvar_forcenorm",
)
SHORT: dict[str, Any] = {
    "duration_nimg": 5_120,
    "generator_from_nimg": 512,
    "adversarial_from_nimg": 1_024,
    "evaluate_every_nimg": 5_120,
    "evaluate_num": 2_000,
    "num_accumulation_rounds": 2,
}
FLAGS = (
    "distill --teacher tiny-digits --mode sida --generator-from none --adversarial-from 128 --batch-size 64 "
    "--num-accumulation-rounds 2 --evaluate-every 1024 --evaluate-num 256 --checkpoint-every 64 --teacher-score none "
    "--json"
)
"""of a run in a process of its own, but for its duration"""
MEMORY_CASES: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("edm-cifar10-uncond", 8, {}, {}),
    ("edm-cifar10-uncond", 8, {}, {"checkpoint_activations": True}),
    ("edm-cifar10-uncond", 32, {}, {}),
    ("edm-cifar10-uncond", 32, {"precision": "bf16"}, {}),
    ("edm-imagenet64", 8, {"precision": "fp16"}, {}),
    ("edm2-xs", 4, {"precision": "bf16"}, {}),
    ("edm2-s", 8, {"precision": "bf16"}, {"checkpoint_activations": True}),
]
FORMS: Mapping[str, dict[str, bool]] = {
    "channels-last": {"channels_last": True},
    "checkpointed": {"checkpoint_activations": True},
    "compiled": {"compile": True},
    "all three": {"channels_last": True, "checkpoint_activations": True, "compile": True},
}
PACES: Mapping[str, tuple[int, float, str]] = {
    "edm-cifar10-uncond": (32, 35.0, "published on V100, 278 by eight"),
    "edm-imagenet64": (32, 36.0, "published on H100, 286 by eight"),
    "edm-ffhq64": (64, 104.0, "published on H100, 833 by eight"),
    "edm2-xs": (64, 65.0, "an estimate for H100, 94 less 30%; nothing was published"),
    "edm2-xl": (4, 0.0, "nothing was published"),
}
"""images at a time, and least images per second of one GPU, in the recipe's precision"""
TOLERANCE = 1e-4
"""of outputs beside the golden ones of a CPU, relative to their largest; cuDNN sums in other orders"""
GRADIENT_TOLERANCE = 1e-3
"""of gradients, relative to their norm: many sums of both signs, in other orders"""
LEAST_COSINE = 0.95
"""of float16's gradients to float32's; 0.98 was measured on a CPU of the generator's, whose fake score has stepped"""


# Golden numbers


def golden(name: str) -> Path:
    if not GOLDEN.is_dir():
        raise SkippedError(f"needs {GOLDEN}")
    return GOLDEN / name


def golden_networks(device: torch.device) -> tuple[str, Figures]:
    """Images of every golden network, and their gradients at its input, in float32, beside the published code's."""
    outputs, gradients = dict[str, float](), dict[str, float]()
    for path in sorted(golden("networks").glob("*.pkl")):
        arrays_path = path.with_suffix(".npz")
        arrays = np.load(arrays_path) if arrays_path.exists() else {}
        if not {"x", "sigma", "denoised", "vjp_x"} <= set(arrays):
            continue
        net = networks.read_network(path).to(device).eval().requires_grad_(False)
        labels = torch.from_numpy(arrays["class_labels"]).to(device) if "class_labels" in arrays else None
        x, sigma, cotangent = (torch.from_numpy(arrays[name]).to(device) for name in ("x", "sigma", "vjp_cotangent"))
        got = net(x.requires_grad_(), sigma, labels)
        (gradient,) = torch.autograd.grad(got, x, cotangent)
        outputs[path.stem] = _deviation(got.detach(), arrays["denoised"])
        gradients[path.stem] = _deviation(gradient, arrays["vjp_x"])
    figures: Figures = {"images": max(outputs.values()), "gradients": max(gradients.values())}
    wrong = [name for name in outputs if outputs[name] > TOLERANCE or gradients[name] > GRADIENT_TOLERANCE]
    if wrong:
        raise NotAsExpectedError(f"{', '.join(wrong)} deviate by {max(outputs[n] for n in wrong):.1e} or so", figures)
    largest = f"{max(outputs.values()):.1e}, of their gradients {max(gradients.values()):.1e}"
    return f"largest deviation of {len(outputs)} networks' images {largest}", figures


def _deviation(got: Tensor, wanted: np.ndarray[Any, Any]) -> float:
    """The largest difference, of the largest number."""
    expected = torch.from_numpy(wanted)
    return float((got.cpu() - expected).abs().max() / expected.abs().max())


class _Moved:
    """Recorded draws, on this device. Implements `Draws`."""

    def __init__(self, draws: Draws, device: torch.device) -> None:
        self._draws, self._device = draws, device

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self._draws.normal(shape).to(self._device)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return self._draws.uniform(shape).to(self._device)

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        return self._draws.integers(high, shape).to(self._device)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Within the block a CPU's convolutions are torch's own: oneDNN's are coarser on some processors."""
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]


def golden_trajectory(device: torch.device, tag: str) -> tuple[str, Figures]:
    """A few steps of training with recorded draws: the norms of all gradients of every update, and how weights went.

    What is compared is as in the tests, but for the device. Adam without momentum steps by the sign of a gradient, so
    that an element whose gradient is rounding noise may go the other way; of these there must be few.
    """
    golden("trajectory")
    (path,) = (ROOT / "tests").rglob("test_trajectory.py")
    recorded = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    read, get = networks.read_network, recorded.GoldenBatches.get

    def moved(batches: Any, index: int, round: int) -> MicroBatch:
        batch: MicroBatch = get(batches, index, round)
        draws = _Moved(batch.latent, device)
        labels, reals = batch.labels.to(device), lambda: batch.reals().to(device)
        return dataclasses.replace(batch, labels=labels, latent=draws, diffusion=draws, augment=draws, reals=reals)

    worst = dict[str, float]()
    with (
        mock.patch.object(networks, "read_network", lambda path: read(path).to(device)),
        mock.patch.object(recorded.GoldenBatches, "get", moved),
        _plain_kernels(),
    ):
        training, arrays, settings, _ = recorded.golden_distillation(tag)
        start = {
            net: {k: v.clone() for k, v in each.state_dict().items()}
            for net, each in recorded.nets_of(training).items()
        }
        seen = {"psi": recorded.recorded_gradients(training, "fake_score")}
        seen["g"] = recorded.recorded_gradients(training, "generator")
        for index in range(settings["iters"]):
            training.step()
            for turn, norms in seen.items():
                if (name := f"it{index}_{turn}_gradnorm") not in arrays:
                    continue
                keeps = [not key.endswith("qkv.bias") for key in norms]  # of keys they are rounding noise
                got = torch.stack([norm.cpu() for norm in norms.values()])[torch.tensor(keeps)]
                worst[f"gradients {index} {turn}"] = _deviation(got, arrays[name].astype(np.float32)[keeps])
                norms.clear()
    for name, net in recorded.nets_of(training).items():
        worst[f"weights {name}"] = _update_error(recorded, name, net, start[name], arrays, settings)
    figures: Figures = {name: float(f"{value:.2g}") for name, value in worst.items()}
    if wrong := [name for name, value in worst.items() if value > 10 * GRADIENT_TOLERANCE]:
        raise NotAsExpectedError(f"{wrong[0]} deviate by {worst[wrong[0]]:.1e}", figures)
    return f"{settings['iters']} steps deviate by {max(worst.values()):.1e} at most", figures


def _update_error(
    recorded: Any, name: str, net: torch.nn.Module, start: Mapping[str, Tensor], arrays: Any, settings: Figures
) -> float:
    """How far the way of the weights is from the recorded one, of its length; 0 where the net was not recorded."""
    lr = settings["lr"] if name == "psi" else settings["glr"]
    ours, theirs = list[Tensor](), list[Tensor]()
    for key, value in net.state_dict().items():
        if f"final_{name}/{key}" in arrays:
            final, before = torch.from_numpy(arrays[f"final_{name}/{key}"]), start[key].cpu()
            keeps = ~recorded.is_key_bias(key, final)
            ours.append((value.cpu() - before)[keeps].flatten())
            theirs.append((final - before)[keeps].flatten())
    if not ours:
        return 0.0
    went, wanted = torch.cat(ours), torch.cat(theirs)
    jumped = (went - wanted).abs() > lr / 2
    if float(jumped.float().mean()) > 1e-2:
        return float(jumped.float().mean())
    return float((went - wanted)[~jumped].norm() / wanted.norm())


# Gradients of this device against each other


def adam_gradients(training: Distillation) -> dict[str, Tensor]:
    """What Adam gets of either update in a step of SiDA, [num_parameters] float64 on the CPU."""
    found = dict[str, Tensor]()

    def record(turn: str, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parts = [(p.grad, p) for group in optimizer.param_groups for p in group["params"]]
        whole = [torch.zeros_like(p) if g is None else g for g, p in parts]
        found[turn] = torch.cat([part.detach().flatten().cpu() for part in whole]).double()

    for turn, side in training.sides.items():
        side.optimizer.register_step_pre_hook(partial(record, turn))
    made_up.step(training, "SiDA")
    return found


def form(device: torch.device, teacher: str, **settings: bool) -> tuple[str, Figures]:
    """That a form of execution moves no gradient of either update by more than sums in other orders do, in float32."""
    found = list[dict[str, Tensor]]()
    for execution in (Execution(), Execution(**settings)):
        torch.manual_seed(0)  # the same weights
        recipe = recipe_of(teacher, 4, precision="fp32", dropout=0.0)
        found.append(adam_gradients(made_up.distillation_of(recipe, execution, small(teacher), device)))
    eager, other = found
    figures: Figures = {turn: float((other[turn] - g).norm() / g.norm()) for turn, g in eager.items()}
    if max(figures.values()) > GRADIENT_TOLERANCE:
        raise NotAsExpectedError(f"gradients are {max(figures.values()):.1e} away", figures)
    return f"gradients of both updates are within {max(figures.values()):.1e}", figures


def half_precision(device: torch.device) -> tuple[str, Figures]:
    """The cosine of ImageNet 64's gradients in float16 to those in float32, at the recipe's batch of 8,192 images.

    Losses are divided by the batch, so that of a small one nothing could underflow; one pass of 4 images is made. The
    whole published net on a GPU, a small one like it on a CPU; both updates at the recipe's loss scale.
    """
    teacher = "edm-imagenet64"
    batch_size = catalog.recipe_for(teacher, "sida").batch_size
    spec = catalog.teacher(teacher).net if device.type == "cuda" else small(teacher)
    found = dict[str, dict[str, Tensor]]()
    for precision in ("fp32", "fp16"):
        torch.manual_seed(0)  # the same weights
        recipe = recipe_of(teacher, 4, precision=precision, dropout=0.0)
        recipe = override(recipe, {"batch_size": batch_size, "num_accumulation_rounds": batch_size // 4})
        training = made_up.distillation_of(recipe, Execution(), spec, device)
        training.passes = training.passes[:1]
        found[precision] = adam_gradients(training)
        del training
        _free(device)
    half = found["fp16"]
    figures: Figures = {
        turn: round(float(F.cosine_similarity(g, half[turn], 0)), 5) for turn, g in found["fp32"].items()
    }
    if min(figures.values()) < LEAST_COSINE:
        raise NotAsExpectedError(f"the cosine is {min(figures.values())}", figures)
    return f"cosines of both updates are {min(figures.values())} or more", figures


# Runs


def short_run(device: torch.device, execution: Execution, **overrides: Any) -> tuple[str, Figures]:
    """A short distillation of tiny-digits, to its end: its score, and how many updates had to be skipped."""
    with tempfile.TemporaryDirectory() as folder:
        made = sidactl.distill(
            teacher="tiny-digits",
            mode="sida",
            run=folder,
            device=str(device),
            execution=execution,
            **SHORT,
            **overrides,
        )
    results = dict(made.results)
    figures = {name: results[name] for name in ("selection_score", "teacher_score", "skipped_updates")}
    if figures["skipped_updates"] != 0 or not isinstance(figures["selection_score"], float):
        raise NotAsExpectedError(f"{figures['skipped_updates']} updates were skipped", figures)
    return f"the generator scores {figures['selection_score']:.3g}, no update was skipped", figures


def _command(folder: Path, device: torch.device, duration: int, num_processes: int = 1) -> list[str]:
    launched = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}", "-m", "--", "sidactl"]
    words = ["sidactl"] if num_processes == 1 else launched
    where = ["--run", str(folder), "--device", str(device) if num_processes == 1 else device.type]
    return [sys.executable, "-m", *words, *FLAGS.split(), "--duration", str(duration), *where]


@contextmanager
def _started(words: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
    """A process, from this checkout; at the end it is gone, with those that it has started."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM if process.poll() is None else signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=40)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _ended(words: Sequence[str], within_sec: float) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; NotAsExpectedError where that takes longer."""
    with _started(words) as process:
        try:
            out, err = process.communicate(timeout=within_sec)
        except subprocess.TimeoutExpired:
            raise NotAsExpectedError(f"a process had not ended after {within_sec:g} s", {}) from None
    return process.returncode, out, err


def _of_run(words: Sequence[str], within_sec: float = 300.0) -> tuple[str, float]:
    """Oid and score of the generator that a run prints."""
    code, out, err = _ended(words, within_sec)
    if code:
        raise NotAsExpectedError(f"a run ended with code {code}: {(err.splitlines() or [''])[-1]}", {})
    made = json.loads(out)
    return made["oid"], made["results"]["selection_score"]


def _same(first: tuple[str, float], second: tuple[str, float], device: torch.device, what: str) -> tuple[str, Figures]:
    """The verdict on two runs: on a CPU the same generator, on a GPU, where sums have no fixed order, a like score."""
    figures: Figures = {"same bits": first[0] == second[0], "scores": [first[1], second[1]]}
    allowed = 0.2 * max(first[1], second[1])
    if (device.type == "cpu" and first[0] != second[0]) or abs(first[1] - second[1]) > allowed:
        raise NotAsExpectedError(f"{what} scores {first[1]:.4g}, beside {second[1]:.4g}", figures)
    bits = "with the same bits" if figures["same bits"] else "with other bits"
    return f"{what} scores {first[1]:.4g}, beside {second[1]:.4g}, {bits}", figures


def stopped(device: torch.device, duration: int = 1024) -> tuple[str, Figures]:
    """That a run which gets SIGTERM, twice as under srun, keeps its last step, and goes on as if nothing had been."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        words = _command(root / "stopped", device, duration)
        with _started(words) as process:
            deadline = time.monotonic() + 120
            while not any((root / "stopped").glob("live/*/events.jsonl")) and process.poll() is None:
                if time.monotonic() > deadline:
                    raise NotAsExpectedError("training had not begun after 120 s", {})
                time.sleep(0.05)
            for _ in range(2):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.05)
            _, err = process.communicate(timeout=120)
        if process.returncode != 130:
            last = (err.splitlines() or [""])[-1]
            raise NotAsExpectedError(f"it ended with code {process.returncode} instead of 130: {last}", {})
        code, out, err = _ended(words, 300)
        if code or "going on from the checkpoint" not in err:
            raise NotAsExpectedError(f"the same command ended with code {code}, or began anew", {})
        again = json.loads(out)
        whole = _of_run(_command(root / "whole", device, duration))
    return _same((again["oid"], again["results"]["selection_score"]), whole, device, "the stopped run")


RAISING = """
import sys, torch
from sidactl.engine import devices, ranks
rank, _ = ranks.rank_and_size()
values = torch.ones(1 << 20, dtype=torch.float64, device=devices.pick_device(sys.argv[1]))
for step in range(3):
    if rank == 1 and step == 2:
        raise OSError("a damaged image")
    ranks.all_reduce_sum(values)
print("sums came:", float(values[0]))
"""
"""a step of which one process fails while the others add up"""


def _num_processes(device: torch.device) -> int:
    count = torch.cuda.device_count() if device.type == "cuda" else 2
    if count < 2:
        raise SkippedError("needs two GPUs")
    return count


def one_raises(device: torch.device) -> tuple[str, Figures]:
    """That a job ends within a minute where one process fails in a step that the others wait for it in."""
    count = _num_processes(device)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "raising.py"
        script.write_text(RAISING)
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        started = time.monotonic()
        code, out, err = _ended([*words, str(script), device.type], 60)
    figures: Figures = {"seconds": round(time.monotonic() - started, 1), "code": code, "processes": count}
    if code == 0 or "a damaged image" not in err or "sums came" in out:
        raise NotAsExpectedError(f"the job ended with code {code}", figures)
    return f"{count} processes ended after {figures['seconds']} s, with code {code}", figures


def many_processes(device: torch.device, duration: int = 1024) -> tuple[str, Figures]:
    """That two processes train what one does."""
    _num_processes(device)
    with tempfile.TemporaryDirectory() as folder:
        two = _of_run(_command(Path(folder) / "two", device, duration, 2))
        one = _of_run(_command(Path(folder) / "one", device, duration))
    return _same(two, one, device, "the run of two")


# Detectors, FID and VAE


def detector(device: torch.device, name: str) -> tuple[str, Figures]:
    """Features on the device beside the CPU's, and the Fréchet distance that either gives to the same other images.

    inception and dinov2 with random weights: their arithmetic is what is looked at, and nothing is downloaded.
    """
    if name == "dinov2":
        needs_gpu(device)  # 300 million parameters
    state = None
    if name not in detectors.SMALL:
        torch.manual_seed(0)
        net: torch.nn.Module = FIDInception() if name == "inception" else VisionTransformer()
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):  # else features of all images are alike
                torch.nn.init.kaiming_normal_(module.weight)
        state = net.state_dict()
    shape = (1, 8, 8) if name == "tiny-digits" else (3, 64, 64)
    generator = torch.Generator().manual_seed(0)
    num = 64 if name in detectors.SMALL else 16
    images = torch.randint(256, (2, num, *shape), dtype=torch.uint8, generator=generator)
    images[1] //= 2  # others, and darker
    features = [[detectors.load(name, state, device=d)(each) for each in images] for d in ("cpu", device)]
    scale = float(features[0][0].std())
    deviation = max(float((a - b).abs().max()) / scale for a, b in zip(*features, strict=True))
    distances = list[float]()
    for pair in features:
        stats = FeatureStats(), FeatureStats()
        for each, rows in zip(stats, pair, strict=True):
            each.add(rows)
        distances.append(frechet_distance(*(a for each in stats for a in (each.mean, each.covariance()))))
    figures: Figures = {"deviation": deviation, "distances": distances}
    if deviation > 1e-3 or abs(distances[1] / distances[0] - 1) > 1e-3:
        raise NotAsExpectedError(f"features are {deviation:.1e} of their spread away", figures)
    away = abs(distances[1] / distances[0] - 1)
    return f"features are within {deviation:.1e} of their spread, the distance within {away:.1e}", figures


def vae(device: torch.device) -> tuple[str, Figures]:
    """Pixels that a VAE of random weights decodes of latents on the device, beside the CPU's."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise SkippedError("needs the extra `vae`") from None
    torch.manual_seed(0)
    num = 4
    made: Any = AutoencoderKL(
        block_out_channels=(32,) * num,
        down_block_types=("DownEncoderBlock2D",) * num,
        up_block_types=("UpDecoderBlock2D",) * num,
        latent_channels=4,
    )
    made = made.eval().requires_grad_(False)
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    codec = LatentCodec(lambda: made)
    on_cpu, there = codec.decode(latents).int(), codec.decode(latents.to(device)).cpu().int()
    differing = (on_cpu - there).abs()
    figures: Figures = {"largest": int(differing.max()), "share": float((differing > 0).float().mean())}
    if figures["largest"] > 1 or figures["share"] > 0.01:
        raise NotAsExpectedError(f"{figures['share']:.1%} of pixels differ, by up to {figures['largest']}", figures)
    return f"{figures['share']:.2%} of pixels differ, by {figures['largest']} of 255 at most", figures


# Speed and memory


def throughput(device: torch.device, teacher: str) -> tuple[str, Figures]:
    """Images per second of whole SiDA steps in the recipe's precision, in the form that is there by default."""
    needs_gpu(device)
    batch_size, least, source = PACES[teacher]
    recipe = recipe_of(teacher, batch_size)
    training = made_up.distillation_of(recipe, Execution(), catalog.teacher(teacher).net, device)
    clock = partial(meter.when_done, time.perf_counter, device)
    seconds = [meter.seconds_of(partial(made_up.step, training, "SiDA"), clock) for _ in range(8)][3:]
    figures: Figures = {"images_per_sec": round(batch_size / statistics.median(seconds), 1), "of": recipe.precision}
    figures |= {"spread": [round(batch_size / s, 1) for s in (max(seconds), min(seconds))]}
    figures |= {"peak_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 1)}
    del training
    _free(device)
    if figures["images_per_sec"] < least:
        raise NotAsExpectedError(f"a GPU takes {figures['images_per_sec']} images/s ({source})", figures)
    return f"{figures['images_per_sec']} images/s", figures


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory(
    device: torch.device, name: str, batch_size: int, overrides: dict[str, Any], settings: dict[str, Any]
) -> tuple[str, Figures]:
    """The most memory that two steps hold, beside the estimate of `distill --dry-run`."""
    _free(device)
    recipe, spec = recipe_of(name, batch_size, **overrides), catalog.teacher(name).net
    execution = Execution(**settings)
    training = made_up.distillation_of(recipe, execution, spec, device)
    num_parameters = sum(p.numel() for p in training.teacher.parameters())
    devices.keep_memory()  # as the loop does
    for _ in range(2):
        made_up.step(training, "SiDA")
    estimate = Memory.of(recipe, spec, num_parameters, execution)
    if device.type == "cuda":
        measured, estimated = torch.cuda.max_memory_allocated(device), estimate.total_bytes - BASE_BYTES
    else:
        measured, estimated = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, estimate.total_bytes
    del training
    _free(device)
    ratio, words = estimated / measured, f"estimated {estimated / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB"
    figures: Figures = {"measured_gb": measured / 1e9, "estimated_gb": estimated / 1e9, "ratio": round(ratio, 3)}
    if not 0.85 < ratio < 1.15:
        raise NotAsExpectedError(words, figures)
    return words, figures


def nearly_full(device: torch.device) -> tuple[str, Figures]:
    """That the images at a time which are found by trying fit in earnest, where a net leaves little of the memory.

    All but 8 GB are taken beforehand. A net of CIFAR-10's kind without dropout and augmentation may take any number of
    micro-batches at a time; as many as are found are then trained with, three steps of each update.
    """
    needs_gpu(device)
    _free(device)
    ballast = torch.empty(max(torch.cuda.mem_get_info(device)[0] - 8 * 10**9, 0), dtype=torch.uint8, device=device)
    base = recipe_of("edm-cifar10-uncond", 8, dropout=0.0, augment_p=0.0)
    recipe = override(base, {"batch_size": 1024, "num_accumulation_rounds": 128})
    training: Distillation = made_up.distillation_of(
        recipe, Execution(), catalog.teacher("edm-cifar10-uncond").net, device
    )
    clock = partial(meter.when_done, time.perf_counter, device)
    images, _ = training.fit_batch_per_device(partial(devices.free_and_total, device), clock)
    found = f"{images} images at a time"
    try:
        for _ in range(3):
            made_up.step(training, "SiDA")
        devices_left = torch.cuda.mem_get_info(device)[0] / 1e9
    except torch.OutOfMemoryError:
        raise NotAsExpectedError(f"{found} were found, and did not fit", {"images": images}) from None
    finally:
        del training, ballast
        _free(device)
    figures: Figures = {"images": images, "left_gb": round(devices_left, 2)}
    if not 8 <= images < recipe.batch_size:
        raise NotAsExpectedError(f"{found} were found, which is no limit", figures)
    return f"{found} fit, and {figures['left_gb']} GB were left", figures


def checks_of(device: torch.device) -> Parts:
    """Every check by its name, with what is expected of it."""
    checks: dict[str, tuple[str, Callable[[], tuple[str, Figures]]]] = {}
    within = f"images within {TOLERANCE:g} of the largest, gradients within {GRADIENT_TOLERANCE:g}"
    checks["golden networks"] = (within, partial(golden_networks, device))
    for tag in TRAJECTORIES:
        expected = f"gradients and ways of weights within {10 * GRADIENT_TOLERANCE:g}"
        checks[f"golden trajectory, {tag}"] = (expected, partial(golden_trajectory, device, tag))
    for precision in PRECISIONS:
        run = partial(short_run, device, Execution(), precision=precision)
        checks[f"short run, {precision}"] = ("a score, and no update skipped", run)
    run = partial(short_run, device, Execution(shard=True))
    checks["short run, FSDP2"] = ("a score, and no update skipped", run)
    checks["half precision"] = (
        f"cosines of gradients to float32 of {LEAST_COSINE} or more",
        partial(half_precision, device),
    )
    for name, settings in FORMS.items():
        for teacher in ("edm-imagenet64", "edm2-xs"):
            expected = f"gradients within {GRADIENT_TOLERANCE:g} of eager ones"
            checks[f"form, {name}, {teacher}"] = (expected, partial(form, device, teacher, **settings))
    alike = "the same generator" if device.type == "cpu" else "a score within 20%"
    checks["stopped and continued"] = (f"code 130, and then {alike} as without a stop", partial(stopped, device))
    for name in detectors.NAMES:
        expected = "features and distance within 0.001 of a CPU's"
        checks[f"detector, {name}"] = (expected, partial(detector, device, name))
    checks["vae"] = ("a hundredth of pixels differ at most, by 1 of 255", partial(vae, device))
    for teacher, (batch_size, least, source) in PACES.items():
        expected = f"{least:g} images/s or more, {batch_size} at a time ({source})" if least else source
        checks[f"throughput, {teacher}"] = (expected, partial(throughput, device, teacher))
    for name, batch_size, overrides, settings in MEMORY_CASES:
        what = " ".join([*map(str, overrides.values()), *settings])
        case = f"memory, {name} {batch_size} {what}".rstrip()
        checks[case] = ("within 15% of the estimate", partial(memory, device, name, batch_size, overrides, settings))
    checks["memory, nearly full"] = ("what is found to fit fits, and is a limit", partial(nearly_full, device))
    checks["processes, one raises"] = ("an end with an error within 60 s", partial(one_raises, device))
    checks["processes, two"] = (f"{alike} as of one", partial(many_processes, device))
    return checks


def main() -> int:
    """Runs the checks; see `run_command`."""
    return run_command(__doc__, checks_of, "--device")


if __name__ == "__main__":
    sys.exit(main())
