"""What has a name: teachers, datasets and detectors, with their sources, licences, networks, recipes. Data only."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from sidactl.errors import SidaError
from sidactl.recipe import Adversarial, HeunSpec, Mode, NetSpec, Recipe


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset that prepare-data knows by name, and the detector that scores against it."""

    name: str
    about: str
    licence: str
    detector: str
    builtin: bool = False


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A pretrained diffusion model: where it comes from, what it is, how it is sampled and distilled."""

    name: str
    about: str
    licence: str
    dataset: str
    net: NetSpec
    sampler: HeunSpec
    recipes: Mapping[Mode, Recipe]
    asset: str | None = None
    """file of the package that holds its weights, for a built-in one"""


def _tiny_digits() -> Teacher:
    sid = Recipe(
        teacher="tiny-digits",
        mode="sid",
        dataset="tiny-digits",
        alpha=1.2,
        batch_size=128,
        duration_nimg=60_000,
        fake_score_lr=5e-4,
        generator_lr=5e-4,
        ema_halflife_nimg=10_000,
        ema_rampup_ratio=0.2,
        generator_from_nimg=4_000,
        adversarial=None,
        evaluate_every_nimg=6_000,
        evaluate_num=10_000,
        checkpoint_every_nimg=6_000,
    )
    # Ten times the published scales: with those the discriminator barely moves in so few steps.
    adversarial = Adversarial(lambda_adv=0.1, discriminator_scale=10.0, adversarial_from_nimg=10_000)
    sida = dataclasses.replace(sid, mode="sida", alpha=1.0, adversarial=adversarial)
    sid2a = dataclasses.replace(
        sida,
        mode="sid2a",
        duration_nimg=40_000,
        adversarial=dataclasses.replace(adversarial, adversarial_from_nimg=4_000),
    )
    return Teacher(
        name="tiny-digits",
        about="class-conditional EDM teacher of 8x8 digits, 188,945 parameters, trained on 50k images by train-teacher",
        licence="Apache-2.0",
        dataset="tiny-digits",
        net=NetSpec(
            architecture="SongUNet",
            img_resolution=8,
            img_channels=1,
            label_dim=10,
            model_channels=16,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(4,),
        ),
        sampler=HeunSpec(num_steps=18),
        recipes={"sid": sid, "sida": sida, "sid2a": sid2a},
        asset="tiny-digits-teacher.safetensors",
    )


TEACHERS: Mapping[str, Teacher] = {entry.name: entry for entry in (_tiny_digits(),)}

DATASETS: Mapping[str, Dataset] = {
    entry.name: entry
    for entry in (
        Dataset(
            name="tiny-digits",
            about="1,797 handwritten digits of 8x8 pixels (UCI optdigits, test part)",
            licence="CC BY 4.0: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998)",
            detector="tiny-digits",
            builtin=True,
        ),
    )
}


def teacher(name: str) -> Teacher:
    """The catalog's entry. Raises SidaError with the nearest name."""
    if name not in TEACHERS:
        raise SidaError(f"unknown teacher {name!r}", did_you_mean(name, TEACHERS, "See sidactl ls --catalog."))
    return TEACHERS[name]


def did_you_mean(name: str, known: Mapping[str, object], otherwise: str) -> str:
    """A hint with the known name that is nearest to `name`, or `otherwise` where none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else otherwise


def recipe_for(teacher_name: str, mode: Mode) -> Recipe:
    """The recipe of a catalog teacher in this mode; for a teacher of your own, that of the published CIFAR-10 runs."""
    if teacher_name in TEACHERS:
        return TEACHERS[teacher_name].recipes[mode]
    sid = Recipe(
        teacher=teacher_name,
        mode="sid",
        dataset="",
        alpha=1.2,
        batch_size=256,
        duration_nimg=500_000_000,
        fake_score_lr=1e-5,
        generator_lr=1e-5,
        ema_halflife_nimg=500_000,
        generator_from_nimg=None,
        adversarial=None,
    )
    if mode == "sid":
        return sid
    duration_nimg = 300_000_000 if mode == "sida" else 100_000_000
    return dataclasses.replace(
        sid,
        mode=mode,
        alpha=1.0,
        duration_nimg=duration_nimg,
        generator_from_nimg=100_000,
        adversarial=Adversarial(),
    )
