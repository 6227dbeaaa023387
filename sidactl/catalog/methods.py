"""Recipes of the methods beside the SiD family, for every teacher: the published run's numbers where there is one."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from sidactl.recipes import (
    AddRecipe,
    DiffusionGanRecipe,
    FakeScoreRecipe,
    FdLossRecipe,
    MatchingRecipe,
    Mode,
    PairedRecipe,
    Recipe,
    SidRecipe,
)

_MIMG = 1_000_000

_ADAMW: Mapping[str, Any] = {
    "fake_score_beta1": 0.9,
    "generator_beta1": 0.9,
    "weight_decay": 0.01,
    "clip_gradient_norm": 10.0,
}

_DIFF_INSTRUCT: Mapping[str, Any] = {
    "generator_weight": "one",
    "loss_unit": "sum",
    "generator_time": "lognormal:-1.2,1.2",
    "score_time": "lognormal:-1.2,1.2",
    "share": "labels",
    "direction_dropout": True,
}

_DMD2: Mapping[str, Any] = {
    **_ADAMW,
    "augment_p": 0.0,
    "discriminator_features": "fake-score",
    "discriminator_time": "grid:0,999",
    "lambda_adv": 3e-3,
    "discriminator_scale": 1e-2,
    "generator_every": 5,
    "order": "generator-first",
    "share": "images",
    "sigma_init": 80.0,
    "ema_halflife_nimg": 0,
}

_FASTGEN: Mapping[str, Any] = {
    **_ADAMW,
    "augment_p": 0.0,
    "clip_gradient_norm": None,
    "generator_weight": "inverse-eps",
    "score_weight": "x0",
    "generator_time": "grid:2,998",
    "score_time": "grid:2,998",
    "discriminator_features": "teacher",
    "lambda_adv": 1e-3,
    "generator_every": 5,
    "alternate": True,
    "sigma_init": 80.0,
    "ema_rampup_ratio": None,
}

_DMD: Mapping[str, Any] = {
    **_ADAMW,
    "augment_p": 0.0,
    "dropout": 0.0,
    # As the re-implementation has them: its table of levels has a zero before the first.
    "generator_time": "grid:19,978",
    "score_time": "grid:0,998",
    "order": "generator-first",
    "share": "images",
    "sigma_init": 79.56,
    "ema_halflife_nimg": 0,
    "generator_from_nimg": None,
}

_HINGE: Mapping[str, Any] = {
    "discriminator_loss": "hinge",
    "lambda_adv": 1.0,
    "sigma_init": 80.0,
    "generator_from_nimg": None,
    "augment_p": 0.0,
}

_NUMBERS: Mapping[Mode, Mapping[str, Any]] = {
    "diff-instruct": _DIFF_INSTRUCT,
    "dmd": _DMD,
    "dmd2": _DMD2,
    "dmd2-fastgen": _FASTGEN,
    "f-distill": {**_FASTGEN, "f_divergence": "forward-kl"},
    "add": {**_HINGE, "discriminator_features": "detector"},
    "ladd": {
        **_HINGE,
        "discriminator_features": "teacher",
        # ln sigma of a flow's time that is logit-normal (1, 1), with data of standard deviation 0.5
        "discriminator_time": f"lognormal:{1 + math.log(0.5):.3g},1",
        "lambda_distill": 0.0,
    },
    "diffusion-gan": {"generator_from_nimg": None, "augment_p": 0.0},
    "fd-loss": {"generator_from_nimg": None},
}
"""what a method is, whatever the teacher"""


class _Run(NamedTuple):
    """A published run: where its numbers are from, and those that are not the method's own."""

    source: str
    numbers: Mapping[str, Any]


def _iterations(number: float, batch_size: int) -> int:
    return round(number * batch_size)


def _halflife(beta: float, batch_size: int) -> int:
    """In images, of an average that keeps so much of itself with every batch."""
    return round(batch_size * math.log(0.5) / math.log(beta))


_FASTGEN_PASS = 32
"""images at a time: of its passes FastGen's configuration says nothing"""


def _fastgen(batch_size: int, lr: float, iterations: int, **numbers: Any) -> _Run:
    return _Run(
        "FastGen's configuration",
        {
            "batch_size": batch_size,
            "num_accumulation_rounds": batch_size // _FASTGEN_PASS,
            "fake_score_lr": lr,
            "generator_lr": lr,
            "discriminator_lr": lr,
            "duration_nimg": _iterations(iterations, batch_size),
            "ema_halflife_nimg": _halflife(0.9999, batch_size),
            "generator_from_nimg": None,
            **numbers,
        },
    )


_CIFAR: Mapping[str, Any] = {"batch_size": 2048, "lr": 1e-4, "iterations": 100_000}
_IMAGENET: Mapping[str, Any] = {
    "batch_size": 512,
    "lr": 2e-6,
    "iterations": 600_000,
    "lambda_adv": 3e-3,
    "discriminator_maps": 1,
}

_DIFF_INSTRUCT_RUN = _Run(
    "the command of Diff-Instruct's README",
    {
        "batch_size": 128,
        "fake_score_lr": 1e-5,
        "generator_lr": 1e-5,
        "sigma_init": 1.0,
        "duration_nimg": 200 * _MIMG,
        "ema_halflife_nimg": _MIMG // 2,
        "augment_p": 0.12,
        "generator_from_nimg": None,
    },
)

_DMD_RUN = _Run(
    "an unofficial re-implementation's settings for CIFAR-10 (no code of DMD for EDM is published)",
    {
        "batch_size": 392,
        "num_accumulation_rounds": 7,
        "fake_score_lr": 5e-5,
        "generator_lr": 5e-5,
        "num_pairs": 100_000,
    },
)

_RUNS: Mapping[tuple[Mode, str], _Run] = {
    ("diff-instruct", "edm-cifar10-uncond"): _DIFF_INSTRUCT_RUN,
    ("diff-instruct", "edm-cifar10-cond"): _DIFF_INSTRUCT_RUN,
    ("dmd", "edm-cifar10-uncond"): _DMD_RUN,
    ("dmd", "edm-cifar10-cond"): _DMD_RUN,
    ("dmd2", "edm-imagenet64"): _Run(
        "DMD2's script of the run from scratch with a discriminator (FID 1.51)",
        {
            "batch_size": 280,
            "num_accumulation_rounds": 7,
            "fake_score_lr": 2e-6,
            "generator_lr": 2e-6,
            "discriminator_lr": 2e-6,
            "lr_warmup_nimg": _iterations(500, 280),
            "duration_nimg": _iterations(200_000, 280),
            "dropout": 0.0,
            "precision": "bf16",
            "adam_eps": 1e-8,
            "generator_from_nimg": None,
        },
    ),
    ("dmd2-fastgen", "edm-cifar10-cond"): _fastgen(**_CIFAR),
    ("dmd2-fastgen", "edm-imagenet64"): _fastgen(**_IMAGENET),
    ("f-distill", "edm-cifar10-cond"): _fastgen(**_CIFAR),
    ("f-distill", "edm-imagenet64"): _fastgen(**_IMAGENET, f_divergence="jensen-shannon", ratio_rate=0.5),
}

_CLASSES: Mapping[Mode, type[Recipe]] = {
    **dict.fromkeys(("diff-instruct", "dmd2", "dmd2-fastgen", "f-distill"), MatchingRecipe),
    **dict.fromkeys(("add", "ladd"), AddRecipe),
    "diffusion-gan": DiffusionGanRecipe,
    "dmd": PairedRecipe,
    "fd-loss": FdLossRecipe,
}

TINY_DIGITS: Mapping[Mode, Mapping[str, Any]] = {
    # Not the detector that scores: a score by what was trained on is no claim.
    "add": {"discriminator_detector": "tiny-digits-ssl"},
    # The one that scores: that it wins by it is what this method is here to show.
    "fd-loss": {"loss_detector": "tiny-digits"},
}
"""what differs on the built-in setting"""


def recipe_of(mode: Mode, sida: SidRecipe) -> Recipe:
    """The recipe of a method for the teacher of this SiDA recipe: SiDA's numbers, the method's, the published run's."""
    cls = _CLASSES[mode]
    shared = {f.name for f in dataclasses.fields(cls)} & {f.name for f in dataclasses.fields(FakeScoreRecipe)}
    carried = {name: getattr(sida, name) for name in shared}
    carried |= {"mode": mode, "discriminator_lr": sida.fake_score_lr, "logvar": False}
    if sida.forced_normalization != "off":
        carried["forced_normalization"] = "intended"
    known = {f.name for f in dataclasses.fields(cls)}
    run = _RUNS.get((mode, sida.teacher))
    own = TINY_DIGITS.get(mode, {}) if sida.teacher == "tiny-digits" else run.numbers if run else {}
    numbers = {k: v for k, v in {**carried, **_NUMBERS[mode], **own}.items() if k in known}
    rounds = numbers["num_accumulation_rounds"]
    if numbers["batch_size"] % rounds:
        numbers["num_accumulation_rounds"] = 1
    return cls(**numbers)


def published_run(mode: str, teacher: str) -> str | None:
    """Where the numbers of a method's published run on this teacher are from; None where there is none."""
    run = next((run for key, run in _RUNS.items() if key == (mode, teacher)), None)
    return run.source if run else None
