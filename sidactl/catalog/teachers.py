"""All teachers by name, their sizes and costs, and the recipe of a teacher of one's own."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from sidactl.catalog import methods
from sidactl.catalog.edm import MIMG, edm_teachers
from sidactl.catalog.edm2 import EDM2_SIZES, edm2_teachers
from sidactl.catalog.entries import Teacher, did_you_mean
from sidactl.catalog.tiny_digits import tiny_digits, tiny_digits_guide
from sidactl.errors import SidaError
from sidactl.recipes import SID_MODES, Mode, NetSpec, Recipe, SidRecipe

TEACHERS: Mapping[str, Teacher] = {
    entry.name: entry for entry in (tiny_digits(), tiny_digits_guide(), *edm_teachers(), *edm2_teachers())
}

NUM_PARAMETERS: Mapping[str, int] = {
    "tiny-digits": 188_945,
    "tiny-digits-guide": 48_073,
    "edm-cifar10-uncond": 55_733_891,
    "edm-cifar10-cond": 55_735_299,
    "edm-imagenet64": 295_899_267,
    "edm-ffhq64": 61_805_571,
    "edm-afhqv2": 61_805_571,
    **dict.fromkeys(("edm2-xs", "edm2-xs-dino"), 124_713_253),
    **dict.fromkeys(("edm2-s", "edm2-s-dino", "edm2-s-guided"), 280_212_837),
    **dict.fromkeys(("edm2-m", "edm2-m-dino"), 497_807_781),
    **dict.fromkeys(("edm2-l", "edm2-l-dino"), 777_498_085),
    **dict.fromkeys(("edm2-xl", "edm2-xl-dino"), 1_119_283_749),
    **dict.fromkeys(("edm2-xxl", "edm2-xxl-dino"), 1_523_164_773),
    "edm2-xs-uncond": 124_201_253,
    "edm2-img64-s": 280_209_381,
    "edm2-img64-m": 497_803_173,
    "edm2-img64-l": 777_492_325,
    "edm2-img64-xl": 1_119_276_837,
}


class Cost(NamedTuple):
    """Seconds per 1,000 images of a published run, and the machine."""

    sec_per_kimg: float
    machine: str


def _costs() -> Iterator[tuple[tuple[str, Mode], Cost]]:
    for names, machine, sid, sida in (
        (("edm-cifar10-uncond", "edm-cifar10-cond"), "8 V100 (16 GB)", 3.3, 3.6),
        (("edm-imagenet64",), "8 H100 (80 GB)", 3.1, 3.5),
        (("edm-ffhq64", "edm-afhqv2"), "8 H100 (80 GB)", 1.1, 1.2),
    ):
        for name in names:
            yield from (((name, "sid"), Cost(sid, machine)), ((name, "sida"), Cost(sida, machine)))
            yield (name, "sid2a"), Cost(sida, machine)


OWN_DURATIONS: Mapping[Mode, int] = {"sid": 20 * MIMG, "sida": 20 * MIMG, "sid2a": 10 * MIMG}
"""images that a teacher of one's own of a published one's size is distilled on, unless asked otherwise"""

COSTS: Mapping[tuple[str, Mode], Cost] = dict(_costs())
"""by teacher and mode; a step of sid2a is one of sida. Source: SiDA (2410.14919), table 8."""


def teacher(name: str) -> Teacher:
    """The catalog's entry. Raises SidaError with the nearest name."""
    if name not in TEACHERS:
        raise SidaError(f"unknown teacher {name!r}", did_you_mean(name, TEACHERS, "See sidactl ls --catalog."))
    return TEACHERS[name]


GUIDES: Mapping[str, tuple[str, float]] = {"edm2-s-guided": ("edm2-xs-uncond", 1.4)}
"""by teacher: the guide, and the guidance, that its published sampling has"""


def recipe_for(teacher_name: str, mode: Mode, net: NetSpec | None = None, num_parameters: int | None = None) -> Recipe:
    """The recipe of a teacher in this mode, the catalog's or made for its network; see `sid_recipe_for`.

    Those beside the SiD family are made of SiDA's and of the method's own numbers; see methods.py.
    """
    if mode in SID_MODES:
        return sid_recipe_for(teacher_name, mode, net, num_parameters)
    return methods.recipe_of(mode, sid_recipe_for(teacher_name, "sida", net, num_parameters))


def sid_recipe_for(
    teacher_name: str, mode: Mode, net: NetSpec | None = None, num_parameters: int | None = None
) -> SidRecipe:
    """The recipe of a catalog teacher in this mode; for a teacher of your own, one made by the size of its network.

    Its numbers lie between those of two known runs, geometrically, by the network's parameters: at one end tiny-digits
    (189 thousand parameters, 70,000 images, minutes on a CPU; an EDM2 network learns at ten times the rate), at the
    other the published run of edm-cifar10-uncond (56 million) or of edm2-xs (125 million), of which it takes all but
        duration: OWN_DURATIONS, a tenth and less of theirs, for they trained until nothing improved any more. Batches
    go through in parts of 64 images, of 32 from half way on or above 32 pixels; those of an EDM2 network from half way
    on in parts as those of the published one of its size, 64 to 2. No dropout and no augmentation. What
    another duration makes of it says `Recipe.lasting`.

    net, num_parameters: of the teacher of your own. Raises SidaError for a catalog teacher that has no recipe.
    """
    if teacher_name in TEACHERS:
        recipes = TEACHERS[teacher_name].recipes
        if mode not in recipes:
            raise SidaError(f"{teacher_name} guides others and has no recipe", "Distill another, such as edm2-xs.")
        return recipes[mode]
    assert net
    assert num_parameters
    is_edm2 = net.architecture == "EDM2"
    small, near = TEACHERS["tiny-digits"].recipes[mode], "edm2-xs" if is_edm2 else "edm-cifar10-uncond"
    large = TEACHERS[near].recipes[mode]
    if is_edm2:
        adversarial = small.adversarial and replace(small.adversarial, discriminator_scale=100.0)
        lrs = 10 * small.fake_score_lr, 10 * small.generator_lr
        small = replace(small, adversarial=adversarial, fake_score_lr=lrs[0], generator_lr=lrs[1])
    smallest, largest = NUM_PARAMETERS["tiny-digits"], NUM_PARAMETERS[near]
    share = min(max(math.log(num_parameters / smallest) / math.log(largest / smallest), 0.0), 1.0)

    def between(low: float, high: float) -> float:
        return float(f"{low ** (1 - share) * high**share:.2g}")

    def images(low: int, high: int) -> int:
        return round(between(low, high))

    batch_size = 1 << round(math.log2(between(small.batch_size, large.batch_size)))
    adversarial = small.adversarial
    if adversarial and large.adversarial:
        low, high = adversarial, large.adversarial
        adversarial = replace(
            high,
            lambda_adv=between(low.lambda_adv, high.lambda_adv),
            discriminator_scale=between(low.discriminator_scale, high.discriminator_scale),
            adversarial_from_nimg=images(low.adversarial_from_nimg, high.adversarial_from_nimg),
        )
    return replace(
        large,
        teacher=teacher_name,
        dataset="",
        batch_size=batch_size,
        num_accumulation_rounds=batch_size // _images_at_once(net, num_parameters, is_small=share < 0.5),
        duration_nimg=images(small.duration_nimg, OWN_DURATIONS[mode]),
        fake_score_lr=between(small.fake_score_lr, large.fake_score_lr),
        generator_lr=between(small.generator_lr, large.generator_lr),
        ema_halflife_nimg=images(small.ema_halflife_nimg, large.ema_halflife_nimg),
        ema_rampup_ratio=between(small.ema_rampup_ratio or 1.0, large.ema_rampup_ratio or 1.0),
        generator_from_nimg=images(small.generator_from_nimg or 1, large.generator_from_nimg or 100_000),
        adversarial=adversarial,
        augment_p=0.0,
        dropout=0.0,
        precision=large.precision if share >= 0.5 else "fp32",
        adam_eps=large.adam_eps if share >= 0.5 else small.adam_eps,
        evaluate_every_nimg=images(small.evaluate_every_nimg, MIMG // 2),
        evaluate_num=small.evaluate_num,
        evaluate_early_nimg=(),
        evaluate_also=(),
        evaluate_labels="uniform",
        checkpoint_every_nimg=images(small.checkpoint_every_nimg, MIMG // 2),
    )


def _images_at_once(net: NetSpec, num_parameters: int, *, is_small: bool) -> int:
    """Images of a micro-batch of a teacher of one's own; see `recipe_for`."""
    if is_small:
        return 64 if net.img_resolution <= 32 else 32
    if net.architecture != "EDM2":
        return 32
    fitting = (
        of.batch_per_gpu
        for size, of in EDM2_SIZES.items()
        if num_parameters <= 1.05 * NUM_PARAMETERS[f"edm2-{size}"]  # more classes are a few more parameters
    )
    of_family = next(fitting, EDM2_SIZES["xxl"].batch_per_gpu)
    return of_family if net.img_resolution <= 64 else min(of_family, 32)
