"""Looks into a training step on a GPU: seeds, waits, the attention kernel, what takes the time, gradients in float16.

Run it from a checkout: python examples/gpu_probe.py [cuda|cpu] [--only PART] [--json FILE]
Expect: a line per part that begins with "ok:", "NOT as expected:" or "skipped:", with what was expected and what was
found, in about five minutes on one GPU; exit code 1 if a part was not as expected. With `cpu`, in a minute or two, what
needs no GPU is tried.
"""

import argparse
import dataclasses
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from sidactl import catalog, nets
from sidactl.engine import configure, devices
from sidactl.methods.base import Nets
from sidactl.recipes import Execution, NetSpec, Recipe, override
from sidactl.sampling import SeededNoise
from sidactl.training import made_up
from sidactl.training.batches import SeededDraws
from sidactl.training.updates import LossScale

Figures = dict[str, Any]
"""numbers by name, as JSON has them"""
Parts = Mapping[str, tuple[str, Callable[[], tuple[str, Figures]]]]
"""by name: what is expected, and a function that gives what was found, in words and in figures"""


class NotAsExpectedError(Exception):
    """What a part found instead, in words, with its figures."""

    def __init__(self, because: str, figures: Figures) -> None:
        super().__init__(because)
        self.because, self.figures = because, figures


class SkippedError(Exception):
    """What is missing here for a part."""


def needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise SkippedError("needs a GPU")


def run_parts(parts: Parts, device: torch.device, only: str, json_path: Path | None) -> int:
    """Runs the part called `only`, or those whose names contain it; prints a verdict for each; returns the exit code.

    A part that fails in any other way counts as not as expected: the next one may tell more.
    """
    found: Figures = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    found |= {"torch": torch.__version__, "parts": {}}
    counts: Counter[str] = Counter()
    for name in [only] if only in parts else [name for name in parts if only in name]:
        expected, run = parts[name]
        started, figures = time.perf_counter(), Figures()
        try:
            words, figures = run()
            kind = "ok"
        except SkippedError as missing:
            kind, words = f"{missing}: skipped", ""
        except NotAsExpectedError as other:
            kind, words, figures = "NOT as expected", f"because {other.because}", other.figures
        except Exception as error:
            kind, words = "NOT as expected", f"because it ended with {type(error).__name__}: {error}"
            traceback.print_exc()
        counts[kind.rpartition(": ")[2]] += 1
        verdict = f"{kind}: {name}{words and ': '}{words} (expected: {expected})"
        seconds = round(time.perf_counter() - started, 1)
        found["parts"][name] = {"verdict": verdict, "expected": expected, "figures": figures, "seconds": seconds}
        print(f"{verdict} {json.dumps(figures)} in {seconds} s", flush=True)
        if json_path:  # at once, since a command with a time limit may not come to its end
            json_path.write_text(json.dumps(found, indent=1))
    num_failed, num_made = counts["NOT as expected"], counts.total() - counts["skipped"]
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    passed = f"all {num_made} checks passed"
    print((f"{num_failed} of {num_made} checks failed" if num_failed else passed) + skipped)
    return 1 if num_failed else 0


def small(teacher: str) -> NetSpec:
    """A net like a teacher of the catalog, with attention, small enough for a CPU: 16 x 16 pixels, two levels."""
    spec = catalog.teacher(teacher).net
    sizes: dict[str, Any] = {"img_resolution": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,)}
    sizes |= {"model_channels": 32, "channels_per_head": 32, "label_dim": min(10, spec.label_dim), "dropout": 0.0}
    return dataclasses.replace(spec, **sizes)


def recipe_of(teacher: str, batch_size: int, **overrides: Any) -> Recipe:
    """The catalog's recipe of mode sida, in one pass of so many images, all stages in reach."""
    return override(made_up.recipe_of(teacher, "sida", batch_size, 1, 1, {})[0], overrides)


# Parts


def seeds(device: torch.device) -> tuple[str, Figures]:
    """That what training and sampling draw is what torch's own generator of this device draws from the same seed.

    Published images are defined by it: one generator per image, seeded with the image's number. Which kind it is tells
    whose images they are: a CPU's (mt19937) are not a GPU's (Philox). The digest is of a draw that is larger than a
    grid of some GPUs; models whose digests differ train other generators from the same seed.
    """
    shape, differing = (3, 8, 8), list[str]()
    for seed in (0, 1, 2**32 - 1, 2**32 + 5):
        noise, draws = SeededNoise([seed, 7], device), SeededDraws(seed, device)
        ours = {"latents": noise.normal(shape)[0], "classes": noise.integers(1000)[0], "training": draws.normal(shape)}
        wrapped = torch.Generator(device).manual_seed(seed % 2**32)
        theirs = {"latents": torch.randn(shape, generator=wrapped, device=device)}
        theirs["classes"] = torch.randint(1000, (), generator=wrapped, device=device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)  # the generator that torch takes by itself
            theirs["training"] = torch.randn(shape, device=device)
        differing += [f"{name} of seed {seed}" for name in ours if not torch.equal(ours[name], theirs[name])]
    num_state_bytes = torch.Generator(device).get_state().numel()
    kind = "Philox" if num_state_bytes <= 64 else "mt19937"  # its counter and seed, or 624 words
    first = SeededDraws(0, device).normal((4,)).tolist()
    many = SeededDraws(0, device).normal((1 << 20,)).cpu()
    digest = int(many.view(torch.int32).to(torch.int64).sum()) % 2**32
    figures: Figures = {"generator": kind, "first_of_seed_0": [round(x, 4) for x in first], "digest_of_2^20": digest}
    wanted = "Philox" if device.type == "cuda" else "mt19937"
    if differing:
        raise NotAsExpectedError(f"{', '.join(differing)} are other numbers", figures)
    if kind != wanted:
        raise NotAsExpectedError(f"the generator is {kind}", figures)
    return f"12 draws of 4 seeds have torch's bits; the generator is {kind}", figures


def syncs(device: torch.device, teacher: str) -> tuple[str, Figures]:
    """Where in our source a training step waits for the GPU, by torch's own watch over synchronising operations.

    The augmentation reads one margin back, once a call; nothing else may wait, since a step is then ready to be given
    to the GPU before the one before is done.
    """
    needs_gpu(device)
    training = made_up.distillation_of(recipe_of(teacher, 8), Execution(), small(teacher), device)
    for _ in range(2):
        made_up.step(training, "SiDA")
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        lines = synchronising_lines(partial(made_up.step, training, "SiDA"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wrong = {line: count for line, count in lines.items() if not line.startswith("sidactl/data/augment.py")}
    if wrong:
        raise NotAsExpectedError(f"a step waits at {', '.join(wrong)}", dict(lines))
    if lines.total() > 2:
        raise NotAsExpectedError(f"the augmentation waits {lines.total()} times in its 2 calls", dict(lines))
    return f"a step waits {lines.total() or 'not even once'}", dict(lines)


def synchronising_lines(work: Callable[[], object]) -> Counter[str]:
    """How often torch warns of a synchronising operation while this works, by the innermost line of ours."""
    lines: Counter[str] = Counter()
    root = Path(__file__).parents[1]

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" not in str(message):
            return
        frames = [frame for frame in traceback.extract_stack()[:-1] if Path(frame.filename).is_relative_to(root)]
        inner = next((f for f in reversed(frames) if Path(f.filename) != Path(__file__)), None)
        lines[f"{Path(inner.filename).relative_to(root)}:{inner.lineno}" if inner else "torch"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        work()
    return lines


def attention(device: torch.device, teacher: str) -> tuple[str, Figures]:
    """Which kernel torch chooses for attention, forward and backward, in the usual order of memory and channels-last.

    The plain one ("math") keeps a T x T matrix per head in float32 for the backward pass, and works it off without
    tensor cores; it is chosen where the last dimension of q, k or v does not lie densely in memory.
    """
    spec, ops = small(teacher), Counter[str]()
    with torch.device(device):
        net = nets.build(spec)
    net.compute_dtype = torch.float16 if device.type == "cuda" else torch.float32
    x = torch.randn(2, spec.img_channels, spec.img_resolution, spec.img_resolution, device=device)
    labels = torch.eye(spec.label_dim, device=device)[:2] if spec.label_dim else None
    for turned in (False, True):
        if turned:
            configure.to_channels_last_(net)
        with torch.autograd.profiler.profile() as profile:
            net(x, torch.tensor(1.0, device=device), labels).sum().backward()
        ops.update(e.name for e in profile.function_events or [] if "_attention_" in e.name or "fmha" in e.name)
    return fused_or_not(ops)


def fused_or_not(ops: Mapping[str, int]) -> tuple[str, Figures]:
    """The verdict on the operations of attention that a profiler saw."""
    names = sorted(name.removeprefix("aten::") for name in ops)
    fused = [name for name in names if any(word in name for word in ("flash", "efficient", "cudnn", "fused"))]
    figures: Figures = {name.removeprefix("aten::"): count for name, count in ops.items()}
    if plain := [name for name in names if "math" in name]:
        raise NotAsExpectedError(f"{', '.join(plain)} ran, which is the plain kernel", figures)
    if not fused:
        raise NotAsExpectedError(f"no fused kernel was seen, but {', '.join(names) or 'nothing'}", figures)
    return f"fused kernels alone ({fused[0]})", figures


PRODUCTS = ("conv", "mm", "attention", "linear")
"""in the names of operations whose work is multiplications"""

LEAST_SHARE = 0.4
"""of a step's time; an estimate for a large net: on an H100 elementwise work takes about as long as the products"""


def kernels(device: torch.device) -> tuple[str, Figures]:
    """What takes the time of a step: on a GPU of ImageNet 64 in float16, 8 images; on a CPU of a small net like it.

    Where copies, casts and normalisations take more than products do, compiling and channels-last have more to gain
    than a faster GPU has.
    """
    on_gpu, teacher = device.type == "cuda", "edm-imagenet64"
    spec = catalog.teacher(teacher).net if on_gpu else small(teacher)
    recipe = recipe_of(teacher, 8, precision="fp16" if on_gpu else "fp32")
    training = made_up.distillation_of(recipe, Execution(), spec, device)
    made_up.step(training, "SiDA")
    kinds = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * on_gpu]
    with torch.profiler.profile(activities=kinds) as profile:
        made_up.step(training, "SiDA")
        _wait_for(device)
    rows = [(e.key, e.self_device_time_total if on_gpu else e.self_cpu_time_total, e) for e in profile.key_averages()]
    of_ops = {key: spent for key, spent, e in rows if "CUDA" not in str(e.device_type) and spent}
    of_kernels = {key: spent for key, spent, e in rows if "CUDA" in str(e.device_type) and spent}
    return shares(of_ops, of_kernels)


def _wait_for(device: torch.device) -> None:
    """Waits until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shares(of_ops: Mapping[str, float], of_kernels: Mapping[str, float]) -> tuple[str, Figures]:
    """The verdict on microseconds by operation; the longest kernels go into the figures, in percent."""
    total = sum(of_ops.values())
    products = sum(spent for name, spent in of_ops.items() if any(word in name.lower() for word in PRODUCTS)) / total

    def top(spent: Mapping[str, float]) -> dict[str, float]:
        longest = sorted(spent.items(), key=lambda item: -item[1])[:12]
        return {name[:80]: round(100 * each / sum(spent.values()), 1) for name, each in longest}

    figures: Figures = {"products": round(products, 3), "ops_percent": top(of_ops)}
    figures |= {"kernels_percent": top(of_kernels)} if of_kernels else {}
    if products < LEAST_SHARE:
        others = [name for name in figures["ops_percent"] if not any(word in name.lower() for word in PRODUCTS)]
        raise NotAsExpectedError(f"products take {products:.0%}; the longest others: {', '.join(others[:3])}", figures)
    return f"products take {products:.0%} of a step", figures


SCALES = (1, 8, 64, 512)
LEAST_COSINE = 0.99
"""of float16's gradient to float32's; 0.9964 was measured on a CPU at the recipe's scale"""


def half_precision(device: torch.device, scales: tuple[int, ...] = SCALES) -> tuple[str, Figures]:
    """How far a gradient in float16 points where float32's does: the discriminator's, of a net like ImageNet 64's.

    Its loss is divided by 8,192 images, 64 positions and 768 channels before it goes back through the encoder, so that
    at a loss scale of 1 most of it is less than float16's smallest number. The small net's batch is as much larger as
    it has fewer positions and channels, so that its gradients are as small.
    """
    teacher, num_images = "edm-imagenet64", 4
    spec, published = small(teacher), catalog.recipe_for(teacher, "sida")
    features = 64 * 768 // (8 * 8 * spec.model_channels * spec.channel_mult[-1])
    batch_size = published.batch_size * features
    own = float(LossScale(published.batch_size, device).value)
    rounds = {"batch_size": batch_size, "num_accumulation_rounds": batch_size // num_images}
    recipe = override(recipe_of(teacher, num_images), rounds)
    exact = discriminator_gradient(recipe, spec, device, "fp32", 1)
    found = {}
    for scale in sorted({*scales, int(own)}):
        half = discriminator_gradient(recipe, spec, device, "fp16", scale)
        found[scale] = round(float(F.cosine_similarity(exact, half, dim=0)), 4)
    figures: Figures = {f"x{scale}{', the recipe' * (scale == own)}": value for scale, value in found.items()}
    if found[int(own)] < LEAST_COSINE:
        raise NotAsExpectedError(f"at the recipe's loss scale, x{own:g}, the cosine is {found[int(own)]}", figures)
    return f"at the recipe's loss scale, x{own:g}, the cosine is {found[int(own)]}", figures


def discriminator_gradient(recipe: Recipe, spec: NetSpec, device: torch.device, precision: str, scale: float) -> Tensor:
    """The gradient of the discriminator's loss of a pass at all weights of the fake score, [num_parameters] float64."""
    torch.manual_seed(0)  # the same weights every time
    training = made_up.distillation_of(override(recipe, {"precision": precision}), Execution(), spec, device)
    batch = made_up.batches_of(recipe, spec, device).get(0, 0)
    training.sides["fake_score"].train(True)
    with torch.no_grad():
        images = training.method.generate(training.generator, batch)
    seen = Nets(training.teacher, training.fake_score, lambda x, draws: (x, None), None)
    losses = training.method.score_losses(seen, batch, images, made_up.STAGE_NIMG["SiDA"])
    parameters = [*training.fake_score.parameters()]
    gradients = torch.autograd.grad(losses["discriminator_loss"] * scale, parameters, allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return torch.cat([part.flatten().double() for part in whole]).cpu() / scale


def parts_of(device: torch.device) -> Parts:
    """Every part by its name, with what is expected of it."""
    kind = "Philox" if device.type == "cuda" else "mt19937"
    fused = "a fused kernel forward and backward, no plain one"
    return {
        "seeds": (f"torch's own draws, bit for bit, of a {kind} generator", partial(seeds, device)),
        "syncs, edm-imagenet64": ("none", partial(syncs, device, "edm-imagenet64")),
        "syncs, edm2-xs": ("none", partial(syncs, device, "edm2-xs")),
        "syncs, edm-cifar10-uncond": (
            "one in each of two calls of the augmentation",
            partial(syncs, device, "edm-cifar10-uncond"),
        ),
        "attention, edm-imagenet64": (fused, partial(attention, device, "edm-imagenet64")),
        "attention, edm-cifar10-uncond": (fused, partial(attention, device, "edm-cifar10-uncond")),
        "attention, edm2-xs": (fused, partial(attention, device, "edm2-xs")),
        "kernels": (f"products take {LEAST_SHARE:.0%} or more of a step", partial(kernels, device)),
        "fp16": (
            f"a cosine to float32 of {LEAST_COSINE} or more at the recipe's loss scale, less below",
            partial(half_precision, device),
        ),
    }


def run_command(description: str | None, parts_of: Callable[[torch.device], Parts], *device_flags: str) -> int:
    """Reads the command line, runs the parts, prints a verdict for each, and returns the exit code."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(*device_flags, default="cuda", **({} if "--device" in device_flags else {"nargs": "?"}))
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    parser.add_argument("--only", default="", help="the part of this name, or those whose names contain it")
    arguments = parser.parse_args()
    device = devices.pick_device(arguments.device)
    parts = parts_of(device)
    if not any(arguments.only in name for name in parts):
        parser.error(f"--only names no check, got {arguments.only!r}; there are {', '.join(parts)}")
    return run_parts(parts, device, arguments.only, arguments.json)


def main() -> int:
    """Runs the parts; see `run_command`."""
    return run_command(__doc__, parts_of, "device")


if __name__ == "__main__":
    sys.exit(main())
