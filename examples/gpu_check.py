"""Checks a GPU: golden parity in float32, short runs in each precision, FSDP2, and memory against what is estimated.

Run it from a checkout, with the extra `test` installed: python examples/gpu_check.py [--device cuda] [--json FILE]
Expect: a line per check, "ok" or what is wrong, in about ten minutes on one GPU; exit code 1 if a check failed. The
golden part is left out, with a line, where the reference numbers (../shared/golden) are not there.
`--device cpu` tries the script itself where there is no GPU; memory is then that of the process.
"""

import argparse
import gc
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import sidactl
from sidactl import catalog, nets
from sidactl.engine import devices
from sidactl.foreign import networks
from sidactl.recipes import BASE_BYTES, PRECISIONS, Execution, Memory, NetSpec, Recipe, override
from sidactl.training import batches, distillation

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
SHORT: dict[str, Any] = {
    "duration_nimg": 5_120,
    "generator_from_nimg": 512,
    "adversarial_from_nimg": 1_024,
    "evaluate_every_nimg": 5_120,
    "evaluate_num": 2_000,
    "num_accumulation_rounds": 2,
}
MEMORY_CASES: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("edm-cifar10-uncond", 8, {}, {}),
    ("edm-cifar10-uncond", 8, {}, {"checkpoint_activations": True}),
    ("edm-cifar10-uncond", 32, {}, {}),
    ("edm-cifar10-uncond", 32, {"precision": "bf16"}, {}),
    ("edm-imagenet64", 8, {"precision": "fp16"}, {}),
    ("edm2-xs", 4, {"precision": "bf16"}, {}),
    ("edm2-s", 8, {"precision": "bf16"}, {"checkpoint_activations": True}),
]
TOLERANCE = 1e-4
"""of outputs beside the golden ones of a CPU, relative to their largest; cuDNN sums in other orders"""


class MadeUpBatches(batches.DatasetBatches):
    """Random images or latents: what they show costs nothing, and nothing is downloaded."""

    def __init__(self, recipe: Recipe, net: NetSpec, device: torch.device) -> None:
        classes = batches.ClassesAlone(net.label_dim)
        super().__init__(
            classes,
            _InOrder(classes.num_images),
            batch_size=recipe.batch_size,
            num_rounds=recipe.num_accumulation_rounds,
            seed=0,
            device=device,
        )
        size = recipe.batch_size // recipe.num_accumulation_rounds
        self._shape = (size, net.img_channels, net.img_resolution, net.img_resolution)
        self._place = device

    def images(self, batch: int, round: int) -> torch.Tensor:
        return torch.randn(self._shape, device=self._place).clamp(-1, 1)


class _InOrder:
    def __init__(self, num_images: int) -> None:
        self._num_images = num_images

    def indices(self, start: int, count: int) -> list[int]:
        return [(start + i) % self._num_images for i in range(count)]


def golden_parity(device: torch.device) -> dict[str, Any]:
    """The largest deviation of every golden network's images, in float32, relative to its largest pixel."""
    import numpy as np

    worst = {}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for path in sorted((GOLDEN / "networks").glob("*.pkl")):
        arrays_path = path.with_suffix(".npz")
        if not arrays_path.exists():
            continue
        arrays = np.load(arrays_path)
        if not {"x", "sigma", "denoised"} <= set(arrays.files):
            continue
        net = networks.read_network(path).to(device).eval()
        labels = torch.from_numpy(arrays["class_labels"]).to(device) if "class_labels" in arrays.files else None
        x, sigma = (torch.from_numpy(arrays[name]).to(device) for name in ("x", "sigma"))
        with torch.no_grad():
            got = net(x, sigma, labels).cpu()
        wanted = torch.from_numpy(arrays["denoised"])
        worst[path.stem] = float((got - wanted).abs().max() / wanted.abs().max())
    assert worst, f"no golden network in {GOLDEN / 'networks'}"
    assert max(worst.values()) < TOLERANCE, worst
    return {"networks": len(worst), "largest_deviation": max(worst.values())}


def short_run(device: torch.device, execution: Execution, **overrides: Any) -> dict[str, Any]:
    """A short distillation of tiny-digits, to its end: its score, and how many updates had to be skipped."""
    started = time.perf_counter()
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
    assert results["skipped_updates"] == 0, results
    assert isinstance(results["selection_score"], float), results
    seconds = round(time.perf_counter() - started, 1)
    return {"score": results["selection_score"], "teacher": results["teacher_score"], "seconds": seconds}


def memory(
    device: torch.device, name: str, batch_size: int, overrides: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """The most memory that two steps hold, beside the estimate of `distill --dry-run`."""
    stages = {"num_accumulation_rounds": 1, "generator_from_nimg": None, "adversarial_from_nimg": 0}
    recipe = override(catalog.recipe_for(name, "sida"), {"batch_size": batch_size, **stages, **overrides})
    spec, execution = catalog.teacher(name).net, Execution(**settings)
    torch.cuda.reset_peak_memory_stats() if device.type == "cuda" else None
    with torch.device(device):
        teacher = nets.build(spec)
    num_parameters = sum(p.numel() for p in teacher.parameters())
    training = distillation.Distillation(recipe, teacher, None, MadeUpBatches(recipe, spec, device), execution)
    devices.keep_memory()  # as the loop does
    for _ in range(2):
        training.step()
    estimate = Memory.of(recipe, spec, num_parameters, execution)
    if device.type == "cuda":
        measured, estimated = torch.cuda.max_memory_allocated(), estimate.total_bytes - BASE_BYTES
    else:
        measured, estimated = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, estimate.total_bytes
    ratio = estimated / measured
    del training, teacher
    gc.collect()
    torch.cuda.empty_cache() if device.type == "cuda" else None
    assert 0.85 < ratio < 1.15, f"estimated {estimated / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB"
    return {
        "measured_gb": round(measured / 1e9, 2),
        "estimated_gb": round(estimated / 1e9, 2),
        "ratio": round(ratio, 3),
    }


def main() -> int:
    """Runs the checks, prints a line for each, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    parser.add_argument("--only", default="", help="the check of this name, or those whose names contain it")
    arguments = parser.parse_args()
    device = devices.pick_device(arguments.device)
    checks: dict[str, Callable[[], dict[str, Any]]] = {}
    if (GOLDEN / "networks").is_dir():
        checks["golden parity, fp32"] = partial(golden_parity, device)
    else:
        print(f"left out: golden parity, since {GOLDEN} is not there", flush=True)
    for precision in PRECISIONS:
        checks[f"short run, {precision}"] = partial(short_run, device, Execution(), precision=precision)
    checks["short run, FSDP2"] = partial(short_run, device, Execution(shard=True))
    for name, batch_size, overrides, settings in MEMORY_CASES:
        what = " ".join([*map(str, overrides.values()), *settings])
        case = f"memory, {name} {batch_size} {what}".rstrip()
        checks[case] = partial(memory, device, name, batch_size, overrides, settings)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    failed = 0
    chosen = [arguments.only] if arguments.only in checks else [n for n in checks if arguments.only in n]
    if not chosen:
        parser.error(f"--only names no check, got {arguments.only!r}; there are {', '.join(checks)}")
    for name in chosen:
        try:
            found[name] = checks[name]()
            print(f"ok      {name}: {json.dumps(found[name])}", flush=True)
        except Exception as error:  # the next check may tell more
            failed += 1
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"FAILED  {name}: {found[name]['error']}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    print(f"{failed} of {len(found) - 1} checks failed" if failed else f"all {len(found) - 1} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
