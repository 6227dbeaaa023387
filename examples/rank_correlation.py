"""How well cheap scores rank the checkpoints of a run as the Fréchet distance of 50,000 images does.

    python examples/rank_correlation.py --run FOLDER --out scores.jsonl

Expect about a minute and a half for each checkpoint, training included, on two cores that others use, too; an
interrupted one goes on with the lines that are in the file.

Trains one generator of tiny-digits, looks at its average every thousand images, and prints rank correlations: over all
checkpoints, whose scores fall by much, and over the later half, which lie close together and among which one is chosen.
The cheap scores are of other seeds than the 50,000 images.
"""

import argparse
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from sidactl import metrics, sampling
from sidactl.commands import features, moments
from sidactl.commands.assemble import assembled
from sidactl.commands.evaluation import SELECTION_SEED
from sidactl.commands.resolve import load_net
from sidactl.commands.running import batches_for
from sidactl.commands.scorers import load_detector
from sidactl.nets import Preconditioned
from sidactl.recipes import Execution, OneStepSpec
from sidactl.store import Artifact, Store
from sidactl.training.distillation import Distillation

DETECTORS = ("tiny-digits", "tiny-digits-ssl", "random-features")
CHEAP = (("FD", 5_000), ("FD", 10_000), ("MIND", 5_000), ("KID", 5_000))
NUM_TRUE = 50_000


def checkpoints(store: Store, mode: str, duration: int, every: int, seed: int) -> Iterator[tuple[int, Any]]:
    """The averaged generator after each so many images from when it begins to train; trains in between."""
    found = assembled(
        store,
        teacher="tiny-digits",
        mode=mode,
        overrides={"duration_nimg": duration, "seed": seed},
        execution=Execution(),
        device="cpu",
        recheck=False,
        score=True,
        allow_untrained=False,
        **dict.fromkeys(("generator", "dataset", "reference", "detector")),
    )
    recipe, cpu = found.recipe, torch.device("cpu")
    rounds = recipe.num_accumulation_rounds
    batches = batches_for(store, found.inputs["dataset"], recipe.batch_size, rounds, seed, cpu)
    training = Distillation(recipe, load_net(store, found.inputs["teacher"], cpu), None, batches)
    sampler = OneStepSpec(sigma_init=recipe.sigma_init)
    while training.nimg < duration:
        before = training.nimg
        training.step()
        if training.trains_generator and before // every != training.nimg // every:
            yield training.nimg, (copy.deepcopy(training.ema), sampler, found.inputs["dataset"])


def scores(store: Store, net: Preconditioned, sampler: OneStepSpec, data: Artifact) -> Mapping[str, float]:
    """By name, such as "MIND 5000 tiny-digits", under every detector."""
    cpu = torch.device("cpu")
    eyes = {name: load_detector(store, name, cpu) for name in DETECTORS}
    rows: dict[str, dict[int, torch.Tensor]] = {name: {} for name in eyes}
    for first, num in ((0, NUM_TRUE), (SELECTION_SEED, max(n for _, n in CHEAP))):
        samples = sampling.generate(net, range(first, first + num), sampler, device=cpu)
        work = features.Work(len(samples), lambda start, s=samples: (b.images for b in s.shared(start)), eyes, [*eyes])
        for name, kept in features.collect(work).features.items():
            rows[name][num] = kept.rows
    found: dict[str, float] = {}
    for name, eye in eyes.items():
        real = features.real_features(store, data, eye)
        against = moments.moments(store, data, eye)
        assert real
        assert against
        for kind, num in (("FD", NUM_TRUE), *CHEAP):
            fakes = rows[name][num] if num in rows[name] else rows[name][max(n for _, n in CHEAP)][:num]
            if kind == "FD":
                own = metrics.FeatureStats()
                own.add(fakes)
                value = metrics.frechet_distance(own.mean, own.covariance(), *against)
            elif kind == "MIND":
                value = metrics.mind(real.by_content(), fakes, seed=0)
            elif name != DETECTORS[0]:  # which takes as long as all else together
                continue
            else:
                value, _ = metrics.kernel_distance(real.by_content(), fakes, subset_size=1000, seed=0)
            found[f"{kind} {num} {name}"] = value
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the run directory")
    parser.add_argument(
        "--out", type=Path, required=True, help="a line of JSON for each checkpoint; those there are passed over"
    )
    parser.add_argument("--mode", default="sida")
    parser.add_argument("--duration", type=int, default=70_000)
    parser.add_argument("--every", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    store = Store.open(options.run)
    known = options.out.read_text().splitlines() if options.out.exists() else []
    lines: list[Mapping[str, float]] = [json.loads(line) for line in known]
    found = checkpoints(store, options.mode, options.duration, options.every, options.seed)
    for nimg, (net, sampler, data) in found:
        if nimg in {line["nimg"] for line in lines}:
            continue
        lines.append({"nimg": nimg, **scores(store, net, sampler, data)})
        with options.out.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    for title, chosen in (("all", lines), ("the later half", lines[len(lines) // 2 :])):
        print(f"{title}: {len(chosen)} checkpoints; rank correlation with FD of {NUM_TRUE:,}: Spearman, Kendall")
        for name in DETECTORS:
            true = [line[f"FD {NUM_TRUE} {name}"] for line in chosen]
            for kind, num in CHEAP:
                if kind == "KID" and name != DETECTORS[0]:
                    continue
                cheap = [line[f"{kind} {num} {name}"] for line in chosen]
                rho, tau = stats.spearmanr(cheap, true).statistic, stats.kendalltau(cheap, true).statistic
                print(f"  {name}: {kind} of {num:,}: {rho:.3f}, {tau:.3f}")


if __name__ == "__main__":
    main()
