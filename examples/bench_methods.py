"""Times a step of every method on tiny-digits, in processor time for each image: python examples/bench_methods.py.

Expect two minutes on two cores. All take turns in one run, so that whatever else the machine does slows all of them.
Heads on a detector and generators that must be finished first (add, fd-loss) are left out: their steps are the
detector's.
"""

import statistics
import time
from dataclasses import replace

import torch

from sidactl import catalog
from sidactl.engine import threads
from sidactl.recipes import MODES, Execution
from sidactl.training import made_up

ROUNDS = 10


def main() -> None:
    net = catalog.TEACHERS["tiny-digits"].net
    runs, times = {}, {}
    for mode in (mode for mode in MODES if mode not in ("sid2a", "add", "fd-loss")):
        recipe = replace(catalog.recipe_for("tiny-digits", mode), generator_from_nimg=None)
        runs[mode] = made_up.distillation_of(recipe, Execution(), net, torch.device("cpu"))
        runs[mode].nimg, times[mode] = 10_000_000, []
    with threads.one_thread_if(True):
        for round in range(ROUNDS + 1):
            for mode, run in runs.items():
                num_steps = 2 * round_of_updates(run.recipe.generator_nimg_share)
                began = time.process_time()
                for _ in range(num_steps):
                    run.step()
                if round:  # the first one warms up
                    times[mode].append((time.process_time() - began) / num_steps / run.recipe.batch_size)
    beside = statistics.median(times["sid"])
    for mode, found in times.items():
        seconds = statistics.median(found)
        through_generator = seconds / runs[mode].recipe.generator_nimg_share
        print(
            f"{mode:14} {1e6 * seconds:6.0f} us per image of a step, {beside / seconds:.2f} x sid's pace; "
            f"{1e6 * through_generator:6.0f} us per image through the generator"
        )


def round_of_updates(generator_nimg_share: float) -> int:
    """Steps after which every update has come equally often."""
    return round(1 / generator_nimg_share)


if __name__ == "__main__":
    main()
