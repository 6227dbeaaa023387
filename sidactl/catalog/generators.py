"""Published generators, and the scores of methods that they are compared with."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from sidactl.catalog.entries import (
    SEE_PUBLISHER,
    Comparison,
    Download,
    Generator,
    Numbers,
    Published,
    Teacher,
    on_page,
    published,
)
from sidactl.catalog.teachers import TEACHERS
from sidactl.recipes import Mode, OneStepSpec

# The paper's generators. Source of the scores: SiDA (2410.14919), and for later ones the publisher's page.
_SID_ROOT = "https://huggingface.co/UT-Austin-PML/SiD/resolve/main"

SIDA_ROOT = "https://huggingface.co/UT-Austin-PML/SiDA/resolve/main"

# how the SiD and the SiDA files name the EDM teachers
_EDM_FILES = {
    "edm-cifar10-uncond": ("cifar10-uncond", "cifar10_uncond"),
    "edm-cifar10-cond": ("cifar10-cond", "cifar10_cond"),
    "edm-imagenet64": ("imagenet64", "imgnet64"),
    "edm-ffhq64": ("ffhq64", "ffhq64"),
    "edm-afhqv2": ("afhq64", "afhq64-v2"),
}

# These two files have another mode in their name than the one that the publisher lists them under.
_FILED_AS = {("edm2-xl", "sida"): "sid2a", ("edm2-xxl", "sid"): "sida"}

_MODE_NAMES: Mapping[Mode, str] = {"sid": "SiD", "sida": "SiDA", "sid2a": "SiD2A"}

# teacher, mode, alpha, thousands of images trained (None: no file is published), scores
_GENERATORS: tuple[tuple[str, Mode, float, int | None, Numbers], ...] = (
    ("edm-cifar10-uncond", "sid", 1.2, 403968, {"FID": (1.923, 0.017), "IS": (9.980, 0.042)}),
    ("edm-cifar10-uncond", "sid", 1.0, None, {"FID": (2.028, 0.020), "IS": (10.017, 0.047)}),
    ("edm-cifar10-uncond", "sida", 1.0, 217920, {"FID": (1.516, 0.010), "IS": (10.323, 0.048)}),
    ("edm-cifar10-uncond", "sid2a", 1.0, 28160, {"FID": (1.499, 0.012), "IS": (10.188, 0.035)}),
    ("edm-cifar10-uncond", "sid2a", 1.2, 22528, {"FID": (1.519, 0.009), "IS": (10.252, 0.027)}),
    ("edm-cifar10-cond", "sid", 1.2, 713312, {"FID": (1.710, 0.011)}),
    ("edm-cifar10-cond", "sid", 1.0, None, {"FID": (1.932, 0.019)}),
    ("edm-cifar10-cond", "sida", 1.0, 293184, {"FID": (1.436, 0.009)}),
    ("edm-cifar10-cond", "sid2a", 1.0, 38912, {"FID": (1.403, 0.010)}),
    ("edm-cifar10-cond", "sid2a", 1.2, 53760, {"FID": (1.396, 0.014)}),
    ("edm-imagenet64", "sid", 1.2, 939176, {"FID": (1.524, 0.009), "precision": 0.74, "recall": 0.63}),
    ("edm-imagenet64", "sid", 1.0, None, {"FID": (2.022, 0.031), "precision": 0.73, "recall": 0.63}),
    ("edm-imagenet64", "sida", 1.0, 249167, {"FID": (1.353, 0.025), "precision": 0.74, "recall": 0.63}),
    ("edm-imagenet64", "sid2a", 1.0, 29499, {"FID": (1.114, 0.019), "precision": 0.75, "recall": 0.62}),
    ("edm-imagenet64", "sid2a", 1.2, 21471, {"FID": (1.110, 0.018), "precision": 0.75, "recall": 0.62}),
    ("edm-ffhq64", "sid", 1.2, 498176, {"FID": (1.550, 0.017)}),
    ("edm-ffhq64", "sid", 1.0, None, {"FID": (1.710, 0.018)}),
    ("edm-ffhq64", "sida", 1.0, 185856, {"FID": (1.134, 0.012)}),
    ("edm-ffhq64", "sid2a", 1.0, 168960, {"FID": (1.040, 0.011)}),
    ("edm-ffhq64", "sid2a", 1.2, 80896, {"FID": (1.109, 0.015)}),
    ("edm-afhqv2", "sid", 1.0, 371712, {"FID": (1.628, 0.017)}),
    ("edm-afhqv2", "sid", 1.2, None, {"FID": (1.711, 0.020)}),
    ("edm-afhqv2", "sida", 1.0, 127488, {"FID": (1.345, 0.015)}),
    ("edm-afhqv2", "sid2a", 1.0, 175104, {"FID": (1.276, 0.010)}),
    ("edm-afhqv2", "sid2a", 1.2, 175104, {"FID": (1.366, 0.018)}),
    ("edm2-xs", "sid", 1.0, 249360, {"FID": (3.353, 0.041), "FD-DINOv2": (91.75, 0.55)}),
    ("edm2-xs", "sida", 1.0, 166410, {"FID": (2.228, 0.037), "FD-DINOv2": (93.67, 0.40)}),
    ("edm2-xs", "sid2a", 1.0, 28674, {"FID": (2.156, 0.028), "FD-DINOv2": (86.96, 0.32)}),
    ("edm2-s", "sid", 1.0, 192010, {"FID": (2.707, 0.054), "FD-DINOv2": (65.08, 0.32)}),
    ("edm2-s", "sida", 1.0, 117764, {"FID": (1.756, 0.023), "FD-DINOv2": (68.76, 0.45)}),
    ("edm2-s", "sid2a", 1.0, 75268, {"FID": (1.669, 0.019), "FD-DINOv2": (62.19, 0.36)}),
    ("edm2-m", "sid", 1.0, 226830, {"FID": (2.060, 0.038), "FD-DINOv2": (55.92, 0.25)}),
    ("edm2-m", "sida", 1.0, 115716, {"FID": (1.546, 0.023), "FD-DINOv2": (53.40, 0.60)}),
    ("edm2-m", "sid2a", 1.0, 44036, {"FID": (1.488, 0.038), "FD-DINOv2": (49.01, 0.54)}),
    ("edm2-l", "sid", 1.0, 203788, {"FID": (1.907, 0.016), "FD-DINOv2": (56.25, 0.40)}),
    ("edm2-l", "sida", 1.0, 166918, {"FID": (1.501, 0.024), "FD-DINOv2": (48.47, 0.45)}),
    (
        "edm2-l",
        "sid2a",
        1.0,
        50182,
        {"FID": on_page(1.413), "FID in the paper": (1.465, 0.028), "FD-DINOv2": (45.92, 0.33)},
    ),
    ("edm2-xl", "sid", 1.0, 234004, {"FID": (2.005, 0.024), "FD-DINOv2": (55.87, 0.21)}),
    ("edm2-xl", "sida", 1.0, 24578, {"FID": (1.449, 0.033), "FD-DINOv2": (46.47, 0.27)}),
    ("edm2-xl", "sid2a", 1.0, 79495, {"FID": on_page(1.379)}),
    ("edm2-xxl", "sid", 1.0, 77932, {}),
    ("edm2-xxl", "sida", 1.0, 89816, {}),
    ("edm2-xxl", "sid2a", 1.0, 29812, {"FID": on_page(1.366)}),
)


def _generator(teacher: Teacher, mode: Mode, alpha: float, kimg: int | None, numbers: Numbers) -> Generator:
    recipe = teacher.recipes[mode]
    suffix = "" if alpha == recipe.alpha else f"-alpha{alpha:g}"
    made = f"{kimg / 1000:.3g}M images" if kimg else "no file is published"
    return Generator(
        name=f"{mode}/{teacher.name.removeprefix('edm-')}{suffix}",
        about=f"{_MODE_NAMES[mode]} of {teacher.name}, alpha {alpha:g}, {made}",
        licence=SEE_PUBLISHER,
        source=Download(url=_url_of_generator(teacher.name, mode, alpha, kimg)) if kimg else None,
        scores=published(numbers),
        teacher=teacher.name,
        dataset=teacher.dataset,
        mode=mode,
        alpha=alpha,
        sampler=OneStepSpec(),
        net=replace(teacher.net, dropout=recipe.dropout, logvar_channels=0),
    )


def _url_of_generator(teacher: str, mode: Mode, alpha: float, kimg: int) -> str:
    if teacher not in _EDM_FILES:
        size, filed_as = teacher.removeprefix("edm2-"), _FILED_AS.get((teacher, mode), mode)
        return f"{SIDA_ROOT}/EDM2_distillation/edm2_img512_{size}_{filed_as}_alpha{alpha:g}-{kimg:06d}.pkl"
    folder, prefix = _EDM_FILES[teacher]
    if mode == "sid":
        return f"{_SID_ROOT}/{folder}/alpha{alpha:g}/network-snapshot-{alpha:.6f}-{kimg:06d}.pkl"
    return f"{SIDA_ROOT}/EDM_distillation/{prefix}_{mode}_alpha{alpha:g}-{kimg:06d}.pkl"


GENERATORS: Mapping[str, Generator] = {
    entry.name: entry for entry in (_generator(TEACHERS[row[0]], *row[1:]) for row in _GENERATORS)
}

# What others' methods reach, to compare with. Source: SiDA (2410.14919), tables 1 to 4, unless a row says otherwise.
_TWO_STEPS = "FID at 2 evaluations"

_CM_SIZES = {"s": "280M", "m": "498M", "l": "777M", "xl": "1.1B", "xxl": "1.5B"}

_CM_FIDS = {
    "sCT": ((10.13, 9.86), (5.84, 5.53), (5.15, 4.65), (4.33, 3.73), (4.29, 3.76)),
    "sCD": ((3.07, 2.50), (2.75, 2.26), (2.55, 2.04), (2.40, 1.93), (2.28, 1.88)),
}
"""of the sizes of EDM2, with guidance, at 1 and at 2 evaluations"""

# method, dataset as generators' names have it, where the number is from, scores
_COMPARED: tuple[tuple[str, str, str, Numbers], ...] = (
    ("Diff-Instruct", "cifar10-uncond", "table 1", {"FID": 4.53, "IS": 9.89}),
    ("Diff-Instruct", "cifar10-cond", "table 2", {"FID": 4.19}),
    ("Diff-Instruct", "imagenet64", "table 3", {"FID": 5.57}),
    ("DMD", "cifar10-uncond", "table 1", {"FID": 3.77}),
    ("DMD", "cifar10-cond", "table 2", {"FID": 2.66}),
    ("DMD", "imagenet64", "table 3", {"FID": 2.62}),
    ("DMD2", "imagenet64", "table 3", {"FID": 1.51, "FID trained longer": 1.28}),
    ("CTM", "cifar10-uncond", "table 1", {"FID": 1.98}),
    ("CTM", "cifar10-cond", "table 2", {"FID": 1.73}),
    ("CTM", "imagenet64", "table 3", {"FID": 1.92, _TWO_STEPS: 1.73}),
    ("GDD-I", "cifar10-uncond", "table 1", {"FID": 1.54, "IS": 10.10}),
    ("GDD-I", "cifar10-cond", "table 2", {"FID": 1.44}),
    ("GDD-I", "imagenet64", "table 3", {"FID": 1.16, "precision": 0.75, "recall": 0.60}),
    ("iCT-deep", "cifar10-uncond", "table 1", {"FID": 2.51, "IS": 9.76}),
    ("iCT-deep", "imagenet64", "table 3", {"FID": 3.25, "precision": 0.72, "recall": 0.63}),
    ("Uni-Instruct", "cifar10-uncond", "its own paper (2505.20755)", {"FID": 1.46}),
    ("Uni-Instruct", "cifar10-cond", "its own paper (2505.20755)", {"FID": 1.38}),
    ("Uni-Instruct", "imagenet64", "its own paper (2505.20755)", {"FID": 1.02}),
    ("sCD", "imagenet64", "its own paper (2410.11081)", {"FID": 2.44, _TWO_STEPS: 1.66}),
    ("D2O-F", "cifar10-uncond", "its publishers, by late 2026", {"FID": 1.56}),
    ("D2O-F", "imagenet64", "its publishers, by late 2026", {"FID": 1.13}),
    ("DMD2-FastGen", "cifar10-cond", "FastGen's run", {"FID": on_page(1.99)}),
    ("DMD2-FastGen", "imagenet64", "FastGen's run", {"FID": on_page(1.12)}),
    ("f-distill-FastGen", "cifar10-cond", "FastGen's run", {"FID": on_page(1.85)}),
    ("f-distill-FastGen", "imagenet64", "FastGen's run", {"FID": on_page(1.11)}),
)


def _comparisons() -> Iterator[Comparison]:
    for method, fids in _CM_FIDS.items():
        for (size, params), (one, two) in zip(_CM_SIZES.items(), fids, strict=True):
            what = f"ImageNet 512, size of EDM2-{size.upper()} ({params} parameters), with guidance"
            scores = published({"FID": one, _TWO_STEPS: two})
            yield _comparison(f"{method.lower()}/edm2-{size}", f"{method}: {what}", "table 4", "imagenet512", scores)
    for method, data, where, numbers in _COMPARED:
        name, dataset = f"{method.lower()}/{data}", data.partition("-")[0]
        yield _comparison(name, f"{method.removesuffix('-FastGen')}: {data}", where, dataset, published(numbers))


def _comparison(name: str, what: str, where: str, dataset: str, scores: Mapping[str, Published]) -> Comparison:
    where = f"SiDA (2410.14919), {where}" if where.startswith("table") else where
    about = f"{what}; to compare with, numbers from {where}, no file"
    return Comparison(name=name, about=about, licence=SEE_PUBLISHER, dataset=dataset, scores=scores)


COMPARISONS: Mapping[str, Comparison] = {entry.name: entry for entry in _comparisons()}
