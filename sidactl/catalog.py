"""What has a name: teachers, generators, datasets, detectors, statistics; sources, recipes, scores. Data only."""

import dataclasses
import difflib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from sidactl.errors import SidaError
from sidactl.recipe import Adversarial, HeunSpec, Mode, NetSpec, OneStepSpec, Recipe

CC_BY_NC_SA = "CC BY-NC-SA 4.0"
SEE_PUBLISHER = "see the publisher's page"


@dataclass(frozen=True, kw_only=True)
class Download:
    """Where a file is published; a digest or size that is not known beforehand is None."""

    url: str
    sha256: str | None = None
    size_bytes: int | None = None
    is_certain: bool = True
    """False: the digest comes from one third party, so that a file with another one is not refused"""


class Published(NamedTuple):
    """A published number: its mean, and its standard deviation where it is given."""

    value: float
    std: float | None = None
    source: Literal["paper", "page"] = "paper"
    """the paper, or the publisher's page, whose numbers came later"""


ASSETS = Path(__file__).parent / "assets"
"""where the files of the built-in entries are"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What all entries have. `source`: None for what ships with the package or what everybody must get themselves."""

    name: str
    about: str
    licence: str
    source: Download | None = None
    scores: Mapping[str, Published] = dataclasses.field(default_factory=dict)
    """published ones of 50,000 images, by the name of the number: FID, IS, FD-DINOv2, precision, recall"""


@dataclass(frozen=True, kw_only=True)
class Dataset(Entry):
    """A dataset that prepare-data knows by name, or has a preset for, and the detector that scores against it."""

    detector: str = "inception"
    builtin: bool = False
    shape: tuple[int | None, int | None, int] | None = None
    """resolution, channels and classes of one that is built in or downloaded"""
    labels_of: str | None = None
    """the dataset whose classes these are, without images"""
    is_latent: bool = False
    """whether its networks see latents"""
    num_images: int | None = None
    """what a source of it holds, as far as it is known"""
    where: str | None = None
    """the page to get it from"""


@dataclass(frozen=True, kw_only=True)
class Teacher(Entry):
    """A pretrained diffusion model: where it comes from, what it is, how it is sampled and distilled."""

    dataset: str
    net: NetSpec
    sampler: HeunSpec
    recipes: Mapping[Mode, Recipe]
    """none for a net that guides the sampling of another, or is guided"""
    asset: str | None = None
    """file of the package that holds its weights, for a built-in one"""


@dataclass(frozen=True, kw_only=True)
class Generator(Entry):
    """A one-step generator of the paper: the teacher it was distilled from, by which mode, and its network.

    Without a `source` its scores alone are published.
    """

    teacher: str
    dataset: str
    mode: Mode
    alpha: float
    net: NetSpec
    sampler: OneStepSpec


@dataclass(frozen=True, kw_only=True)
class Comparison(Entry):
    """A generator by a method that is not ours: its published scores alone, in one step where they say nothing else."""

    dataset: str


@dataclass(frozen=True, kw_only=True)
class Detector(Entry):
    """The weights of a feature detector."""

    asset: str | None = None
    """file of the package, for a built-in one; with neither this nor a source, the weights are drawn from a seed"""


@dataclass(frozen=True, kw_only=True)
class Reference(Entry):
    """Published statistics, or images, of a dataset, and the detectors that it has features of."""

    dataset: str
    detectors: Sequence[str]
    holds: Literal["statistics", "images"] = "statistics"


_Numbers: TypeAlias = Mapping[str, float | tuple[float, float | None] | Published]


def _published(numbers: _Numbers) -> Mapping[str, Published]:
    return {k: Published(*v) if isinstance(v, tuple) else Published(v) for k, v in numbers.items()}


def _on_page(value: float) -> Published:
    return Published(value, source="page")


_SMALL = NetSpec(
    architecture="SongUNet",
    img_resolution=8,
    img_channels=1,
    label_dim=10,
    model_channels=16,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
)
SMALL_NETS: Mapping[str, NetSpec] = {
    "ddpmpp": _SMALL,
    "ncsnpp": replace(
        _SMALL, embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=(1, 3, 3, 1)
    ),
    "adm": replace(_SMALL, architecture="DhariwalUNet", channels_per_head=16),
    "edm2": replace(
        _SMALL,
        architecture="EDM2",
        channel_mult_emb=None,
        channel_mult_noise=None,
        channels_per_head=16,
        logvar_channels=16,
    ),
}
"""what train-teacher starts from, by the name of the form; shaped to the dataset"""


# Recipes. Source: the published run scripts; where the paper differs, they made the published generators. A duration
# that ends before the published best snapshot is longer than the script's: up to the next 10 million images.

_M = 1_000_000
_FP16: Mapping[str, Any] = {"precision": "fp16", "adam_eps": 1e-6}
"""how all published runs but those on CIFAR-10 were made"""


def _modes(sid: Recipe, mimg: Sequence[int], adversarial: Adversarial) -> dict[Mode, Recipe]:
    """The three recipes of a teacher, from that of SiD and the durations of sida and sid2a."""
    sida = replace(
        sid,
        mode="sida",
        alpha=1.0,
        duration_nimg=mimg[1] * _M,
        generator_beta1=0.0,
        generator_from_nimg=100_000,
        adversarial=adversarial,
    )
    return {"sid": sid, "sida": sida, "sid2a": replace(sida, mode="sid2a", duration_nimg=mimg[2] * _M)}


def _tiny_digits() -> Teacher:
    sid = Recipe(
        teacher="tiny-digits",
        mode="sid",
        dataset="tiny-digits",
        alpha=1.2,
        batch_size=128,
        num_accumulation_rounds=2,  # which two cores share
        duration_nimg=70_000,
        fake_score_lr=5e-4,
        generator_lr=5e-4,
        ema_halflife_nimg=20_000,
        ema_rampup_ratio=0.2,
        generator_from_nimg=4_000,
        adversarial=None,
        evaluate_every_nimg=10_000,
        evaluate_num=10_000,
        checkpoint_every_nimg=10_000,
    )
    # Ten times the published scales: with those the discriminator barely moves in so few steps.
    adversarial = Adversarial(lambda_adv=0.1, discriminator_scale=10.0, adversarial_from_nimg=10_000)
    sida = replace(sid, mode="sida", alpha=1.0, adversarial=adversarial)
    # At SiD's own rate the generator first loses what it starts with, and ends no better than SiDA.
    sid2a = replace(
        sida,
        mode="sid2a",
        duration_nimg=60_000,
        fake_score_lr=2e-4,
        generator_lr=2e-4,
        adversarial=replace(adversarial, adversarial_from_nimg=4_000),
    )
    return Teacher(
        name="tiny-digits",
        about="class-conditional EDM teacher of 8x8 digits, 188,945 parameters, trained on 50k images by train-teacher",
        licence="Apache-2.0",
        dataset="tiny-digits",
        net=SMALL_NETS["ddpmpp"],
        sampler=HeunSpec(num_steps=18),
        recipes={"sid": sid, "sida": sida, "sid2a": sid2a},
        asset="tiny-digits-teacher.safetensors",
    )


# EDM teachers. Source: EDM (2206.00364), tables 2 and 7; SiDA (2410.14919), appendix.

_EDM_ROOT = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"


def _ddpmpp(resolution: int, dropout: float, label_dim: int = 0) -> NetSpec:
    return NetSpec(
        architecture="SongUNet",
        img_resolution=resolution,
        img_channels=3,
        label_dim=label_dim,
        model_channels=128,
        channel_mult=(2, 2, 2) if resolution == 32 else (1, 2, 2, 2),
        num_blocks=4,
        attn_resolutions=(16,),
        dropout=dropout,
        augment_dim=9,
    )


_ADM = NetSpec(
    architecture="DhariwalUNet",
    img_resolution=64,
    img_channels=3,
    label_dim=1000,
    model_channels=192,
    channel_mult=(1, 2, 3, 4),
    num_blocks=3,
    attn_resolutions=(32, 16, 8),
    dropout=0.10,
)


class _EdmRun(NamedTuple):
    batch_size: int
    batch_per_gpu: int
    lr: float
    sid_alpha: float
    mimg: tuple[int, int, int]
    """millions of images of sid, sida, sid2a"""
    dropout: float
    augment_p: float


# file, dataset, network, Heun steps, scores
_EDM_TEACHERS: Mapping[str, tuple[str, str, NetSpec, int, _Numbers]] = {
    "edm-cifar10-uncond": ("cifar10-32x32-uncond-vp", "cifar10", _ddpmpp(32, 0.13), 18, {"FID": 1.97, "IS": 9.68}),
    "edm-cifar10-cond": ("cifar10-32x32-cond-vp", "cifar10", _ddpmpp(32, 0.13, label_dim=10), 18, {"FID": 1.79}),
    "edm-imagenet64": (
        "imagenet-64x64-cond-adm",
        "imagenet64",
        _ADM,
        256,
        {
            "FID": 1.36,
            "FID at 79 evaluations": 2.64,
            "precision at 79 evaluations": 0.71,
            "recall at 79 evaluations": 0.67,
        },
    ),
    "edm-ffhq64": ("ffhq-64x64-uncond-vp", "ffhq64", _ddpmpp(64, 0.05), 40, {"FID": 2.39}),
    "edm-afhqv2": ("afhqv2-64x64-uncond-vp", "afhqv2-64", _ddpmpp(64, 0.25), 40, {"FID": 1.96}),
}
_EDM_RUNS = {
    "edm-cifar10-uncond": _EdmRun(256, 32, 1e-5, 1.2, (500, 300, 100), 0.13, 0.12),
    "edm-cifar10-cond": _EdmRun(256, 32, 1e-5, 1.2, (800, 300, 100), 0.13, 0.12),
    "edm-imagenet64": _EdmRun(8192, 32, 4e-6, 1.2, (1000, 300, 100), 0.10, 0.0),
    "edm-ffhq64": _EdmRun(512, 64, 1e-5, 1.2, (500, 200, 170), 0.05, 0.15),
    "edm-afhqv2": _EdmRun(512, 64, 5e-6, 1.0, (500, 200, 180), 0.05, 0.15),
}
_EDM_DIGESTS = {"edm-cifar10-uncond": "4d5dcc1f1d0d41c8934ad21626eeddbdc0460182becf9fc059a0631b1eedb4da"}


def _line_nimg(least_nimg: int, batch_size: int) -> int:
    """Images from one status line of the published runs to the next: whole batches, and no fewer than so many.

    Every 50 lines the generator was scored, and early at some lines more.
    """
    return -(-least_nimg // batch_size) * batch_size


def _edm_teachers() -> Iterator[Teacher]:
    for name, (file, dataset, net, num_steps, numbers) in _EDM_TEACHERS.items():
        run = _EDM_RUNS[name]
        is_imagenet = name == "edm-imagenet64"
        line_nimg = _line_nimg(20_000 if is_imagenet else 10_000, run.batch_size)
        sid = Recipe(
            teacher=name,
            mode="sid",
            dataset=dataset,
            alpha=run.sid_alpha,
            batch_size=run.batch_size,
            num_accumulation_rounds=run.batch_size // run.batch_per_gpu,
            duration_nimg=run.mimg[0] * _M,
            fake_score_lr=run.lr,
            generator_lr=run.lr,
            generator_beta1=0.9 if name == "edm-ffhq64" else 0.0,
            ema_halflife_nimg=2 * _M if is_imagenet else _M // 2,
            generator_from_nimg=None,
            adversarial=None,
            augment_p=run.augment_p,
            dropout=run.dropout,
            **(_FP16 if dataset != "cifar10" else {}),
            evaluate_every_nimg=50 * line_nimg,
            evaluate_early_nimg=tuple(count * line_nimg for count in range(10, 101, 10)),
            evaluate_labels="dataset" if net.label_dim else "uniform",
            evaluate_also=("inception-score",) if name == "edm-cifar10-uncond" else (),
            checkpoint_every_nimg=50 * line_nimg,
        )
        churn = HeunSpec(num_steps=num_steps, S_churn=40, S_min=0.05, S_max=50, S_noise=1.003)
        yield Teacher(
            name=name,
            about=f"EDM of {dataset}, {'conditional' if net.label_dim else 'unconditional'}",
            licence=CC_BY_NC_SA,
            source=Download(url=f"{_EDM_ROOT}/edm-{file}.pkl", sha256=_EDM_DIGESTS.get(name), is_certain=False),
            scores=_published(numbers),
            dataset=dataset,
            net=net,
            sampler=churn if is_imagenet else HeunSpec(num_steps=num_steps),
            recipes=_modes(sid, run.mimg, Adversarial()),
        )


# EDM2 teachers. Source: EDM2 (2312.02696), tables 2 and 6; SiDA (2410.14919), appendix.

_EDM2_ROOT = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions"


class _Edm2Size(NamedTuple):
    channels: int
    params: str
    dropout: float
    snapshot: str
    ema_fid: str
    """length of the post-hoc EMA that minimises FID; of the next one, FD-DINOv2"""
    ema_dino: str
    fid: tuple[float, float]
    """without and with guidance; of the next one, FD-DINOv2"""
    fd_dinov2: tuple[float, float]
    batch_per_gpu: int
    mimg: tuple[int, int, int]


_EDM2_SIZES = {
    "xs": _Edm2Size(128, "125M", 0.0, "2147483", "0.135", "0.200", (3.53, 2.91), (103.39, 79.94), 64, (250, 200, 30)),
    "s": _Edm2Size(192, "280M", 0.0, "2147483", "0.130", "0.190", (2.56, 2.23), (68.64, 52.32), 64, (200, 200, 80)),
    "m": _Edm2Size(256, "498M", 0.1, "2147483", "0.100", "0.155", (2.25, 2.01), (58.44, 41.98), 32, (230, 200, 200)),
    "l": _Edm2Size(320, "777M", 0.1, "1879048", "0.085", "0.155", (2.06, 1.88), (52.25, 38.20), 32, (210, 200, 55)),
    "xl": _Edm2Size(384, "1.1B", 0.1, "1342177", "0.085", "0.155", (1.96, 1.85), (45.96, 35.67), 16, (240, 200, 80)),
    "xxl": _Edm2Size(448, "1.5B", 0.1, "0939524", "0.070", "0.150", (1.91, 1.81), (42.84, 33.09), 2, (100, 100, 30)),
}
_EDM2_IMG64 = {
    "s": ("1073741-0.075", 1.58),
    "m": ("2147483-0.060", 1.43),
    "l": ("1073741-0.040", 1.33),
    "xl": ("0671088-0.040", 1.33),
}


def _edm2_net(size: str, img_channels: int, label_dim: int = 1000) -> NetSpec:
    return NetSpec(
        architecture="EDM2",
        img_resolution=64,
        img_channels=img_channels,
        label_dim=label_dim,
        model_channels=_EDM2_SIZES[size].channels,
        channel_mult=(1, 2, 3, 4),
        channel_mult_emb=None,
        channel_mult_noise=None,
        num_blocks=3,
        attn_resolutions=(16, 8),
        dropout=_EDM2_SIZES[size].dropout,
        logvar_channels=128,
    )


def _edm2_recipes(teacher: str, size: str, dataset: str, P_mean: float, P_std: float) -> dict[Mode, Recipe]:
    chosen, line_nimg = _EDM2_SIZES[size], _line_nimg(10_000, 2048)
    sid = Recipe(
        teacher=teacher,
        mode="sid",
        dataset=dataset,
        alpha=1.0,
        batch_size=2048,
        num_accumulation_rounds=2048 // chosen.batch_per_gpu,
        duration_nimg=chosen.mimg[0] * _M,
        fake_score_lr=5e-5,
        generator_lr=5e-5,
        ema_halflife_nimg=2 * _M,
        generator_from_nimg=None,
        adversarial=None,
        P_mean=P_mean,
        P_std=P_std,
        dropout=chosen.dropout,
        forced_normalization="published",
        evaluate_every_nimg=50 * line_nimg,
        evaluate_early_nimg=tuple(count * line_nimg for count in (20, 50, 100)),
        evaluate_labels="dataset",
        checkpoint_every_nimg=50 * line_nimg,
        **_FP16,
    )
    recipes = _modes(sid, chosen.mimg, Adversarial(discriminator_scale=100.0, clip_gradient_value=None))
    if size == "s":
        for mode in ("sida", "sid2a"):
            recipes[mode] = replace(recipes[mode], forced_normalization="off", logvar=False)
    if size == "m":
        recipes["sid2a"] = replace(recipes["sid2a"], lambda_sid=50.0)
    return recipes


def _edm2(
    name: str,
    about: str,
    file: str,
    net: NetSpec,
    scores: Mapping[str, float],
    dataset: str,
    recipes: Mapping[Mode, Recipe],
) -> Teacher:
    return Teacher(
        name=name,
        about=about,
        licence=CC_BY_NC_SA,
        source=Download(url=f"{_EDM2_ROOT}/{file}.pkl"),
        scores=_published(scores),
        dataset=dataset,
        net=net,
        sampler=HeunSpec(num_steps=32, convention="edm2"),
        recipes=recipes,
    )


def _edm2_teachers() -> Iterator[Teacher]:
    for size, of in _EDM2_SIZES.items():
        for suffix, ema, number, score in (
            ("", of.ema_fid, "FID", of.fid),
            ("-dino", of.ema_dino, "FD-DINOv2", of.fd_dinov2),
        ):
            name = f"edm2-{size}{suffix}"
            yield _edm2(
                name,
                f"EDM2-{size.upper()}, {of.params} parameters, ImageNet 512 in latents, EMA for the best {number}",
                f"edm2-img512-{size}-{of.snapshot}-{ema}",
                _edm2_net(size, 4),
                {number: score[0]} if name == "edm2-s" else {number: score[0], f"{number} guided": score[1]},
                "imagenet512",
                _edm2_recipes(name, size, "imagenet512", -0.4, 1.0),
            )
    # The only known snapshot of those sampled with guidance; of the others the numbers alone, beside theirs without.
    yield _edm2(
        "edm2-s-guided",
        "EDM2-S, 280M parameters, ImageNet 512 in latents, EMA for guidance: sample with --guide edm2-xs-uncond "
        "--guidance 1.4",
        "edm2-img512-s-2147483-0.025",
        _edm2_net("s", 4),
        {"FID guided": _EDM2_SIZES["s"].fid[1]},
        "imagenet512",
        {},
    )
    yield _edm2(
        "edm2-xs-uncond",
        "EDM2-XS, unconditional: guides the sampling of other EDM2 teachers (edm2-s-guided at guidance 1.4)",
        "edm2-img512-xs-uncond-2147483-0.025",
        _edm2_net("xs", 4, label_dim=0),
        {},
        "imagenet512",
        {},
    )
    for size, (snapshot, fid) in _EDM2_IMG64.items():
        name = f"edm2-img64-{size}"
        # No runs of these are published: the recipe is that of the same size in latents, with the teacher's own sigmas.
        yield _edm2(
            name,
            f"EDM2-{size.upper()}, {_EDM2_SIZES[size].params} parameters, ImageNet 64 in pixels",
            f"edm2-img64-{size}-{snapshot}",
            _edm2_net(size, 3),
            {"FID": fid},
            "imagenet64",
            _edm2_recipes(name, size, "imagenet64", -0.8, 1.6),
        )


TEACHERS: Mapping[str, Teacher] = {entry.name: entry for entry in (_tiny_digits(), *_edm_teachers(), *_edm2_teachers())}


# The paper's generators. Source of the scores: SiDA (2410.14919), and for later ones the publisher's page.

_SID_ROOT = "https://huggingface.co/UT-Austin-PML/SiD/resolve/main"
_SIDA_ROOT = "https://huggingface.co/UT-Austin-PML/SiDA/resolve/main"
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
_GENERATORS: tuple[tuple[str, Mode, float, int | None, _Numbers], ...] = (
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
        {"FID": _on_page(1.413), "FID in the paper": (1.465, 0.028), "FD-DINOv2": (45.92, 0.33)},
    ),
    ("edm2-xl", "sid", 1.0, 234004, {"FID": (2.005, 0.024), "FD-DINOv2": (55.87, 0.21)}),
    ("edm2-xl", "sida", 1.0, 24578, {"FID": (1.449, 0.033), "FD-DINOv2": (46.47, 0.27)}),
    ("edm2-xl", "sid2a", 1.0, 79495, {"FID": _on_page(1.379)}),
    ("edm2-xxl", "sid", 1.0, 77932, {}),
    ("edm2-xxl", "sida", 1.0, 89816, {}),
    ("edm2-xxl", "sid2a", 1.0, 29812, {"FID": _on_page(1.366)}),
)


def _generator(teacher: Teacher, mode: Mode, alpha: float, kimg: int | None, numbers: _Numbers) -> Generator:
    recipe = teacher.recipes[mode]
    suffix = "" if alpha == recipe.alpha else f"-alpha{alpha:g}"
    made = f"{kimg / 1000:.3g}M images" if kimg else "no file is published"
    return Generator(
        name=f"{mode}/{teacher.name.removeprefix('edm-')}{suffix}",
        about=f"{_MODE_NAMES[mode]} of {teacher.name}, alpha {alpha:g}, {made}",
        licence=SEE_PUBLISHER,
        source=Download(url=_url_of_generator(teacher.name, mode, alpha, kimg)) if kimg else None,
        scores=_published(numbers),
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
        return f"{_SIDA_ROOT}/EDM2_distillation/edm2_img512_{size}_{filed_as}_alpha{alpha:g}-{kimg:06d}.pkl"
    folder, prefix = _EDM_FILES[teacher]
    if mode == "sid":
        return f"{_SID_ROOT}/{folder}/alpha{alpha:g}/network-snapshot-{alpha:.6f}-{kimg:06d}.pkl"
    return f"{_SIDA_ROOT}/EDM_distillation/{prefix}_{mode}_alpha{alpha:g}-{kimg:06d}.pkl"


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
_COMPARED: tuple[tuple[str, str, str, _Numbers], ...] = (
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
    ("DMD2-FastGen", "cifar10-cond", "FastGen's run", {"FID": _on_page(1.99)}),
    ("DMD2-FastGen", "imagenet64", "FastGen's run", {"FID": _on_page(1.12)}),
    ("f-distill-FastGen", "cifar10-cond", "FastGen's run", {"FID": _on_page(1.85)}),
    ("f-distill-FastGen", "imagenet64", "FastGen's run", {"FID": _on_page(1.11)}),
)


def _comparisons() -> Iterator[Comparison]:
    for method, fids in _CM_FIDS.items():
        for (size, params), (one, two) in zip(_CM_SIZES.items(), fids, strict=True):
            what = f"ImageNet 512, size of EDM2-{size.upper()} ({params} parameters), with guidance"
            scores = _published({"FID": one, _TWO_STEPS: two})
            yield _comparison(f"{method.lower()}/edm2-{size}", f"{method}: {what}", "table 4", "imagenet512", scores)
    for method, data, where, numbers in _COMPARED:
        name, dataset = f"{method.lower()}/{data}", data.partition("-")[0]
        yield _comparison(name, f"{method.removesuffix('-FastGen')}: {data}", where, dataset, _published(numbers))


def _comparison(name: str, what: str, where: str, dataset: str, scores: Mapping[str, Published]) -> Comparison:
    where = f"SiDA (2410.14919), {where}" if where.startswith("table") else where
    about = f"{what}; to compare with, numbers from {where}, no file"
    return Comparison(name=name, about=about, licence=SEE_PUBLISHER, dataset=dataset, scores=scores)


COMPARISONS: Mapping[str, Comparison] = {entry.name: entry for entry in _comparisons()}

DATASETS: Mapping[str, Dataset] = {
    entry.name: entry
    for entry in (
        Dataset(
            name="tiny-digits",
            about="1,797 handwritten digits of 8x8 pixels (UCI optdigits, test part)",
            licence="CC BY 4.0: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998)",
            detector="tiny-digits",
            builtin=True,
            shape=(8, 1, 10),
        ),
        Dataset(
            name="cifar10",
            about="50,000 images of 32x32 pixels in 10 classes: cifar-10-python.tar.gz",
            num_images=50_000,
            shape=(32, 3, 10),
            licence="none stated: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009)",
            source=Download(
                url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
                size_bytes=170_498_071,
            ),
            where="https://www.cs.toronto.edu/~kriz/cifar.html",
        ),
        Dataset(
            name="imagenet64",
            about="1,281,167 images in 1,000 classes, cut to 64x64: ILSVRC/Data/CLS-LOC/train",
            num_images=1_281_167,
            licence="for research and teaching, on the terms of image-net.org",
            where="https://image-net.org/download.php",
        ),
        Dataset(
            name="ffhq64",
            about="70,000 faces, scaled to 64x64: images1024x1024",
            num_images=70_000,
            licence="CC BY-NC-SA 4.0, single images under their own",
            where="https://github.com/NVlabs/ffhq-dataset",
        ),
        Dataset(
            name="afhqv2-64",
            about="15,803 faces of animals, scaled to 64x64: afhqv2",
            num_images=15_803,
            licence="CC BY-NC 4.0",
            where="https://github.com/clovaai/stargan-v2",
        ),
        Dataset(
            name="imagenet512",
            about="1,281,167 images in 1,000 classes, cut to 512x512: ILSVRC/Data/CLS-LOC/train",
            num_images=1_281_167,
            is_latent=True,
            licence="for research and teaching, on the terms of image-net.org",
            where="https://image-net.org/download.php",
        ),
        Dataset(
            name="imagenet512-labels",
            about="the classes of the 1,281,167 images of imagenet512, without images: all that mode sid needs",
            licence=SEE_PUBLISHER,
            source=Download(url=f"{_SIDA_ROOT}/EDM2_distillation/dataset.json"),
            num_images=1_281_167,
            shape=(None, None, 1000),
            labels_of="imagenet512",
            where="https://huggingface.co/UT-Austin-PML/SiDA",
        ),
        Dataset(
            name="fashion32",
            about="60,000 grey images of clothing in 10 classes, padded to 32x32: Fashion-MNIST, training part",
            num_images=60_000,
            licence="MIT",
            where="https://github.com/zalandoresearch/fashion-mnist",
        ),
    )
}

DETECTORS: Mapping[str, Detector] = {
    entry.name: entry
    for entry in (
        Detector(
            name="tiny-digits",
            about="classifier of 8x8 digits, 64 features",
            licence="Apache-2.0",
            asset="tiny-digits-detector.safetensors",
        ),
        Detector(
            name="random-features",
            about="convolutions with seeded weights, for images of any size, 128 features; built in",
            licence="Apache-2.0",
        ),
        Detector(
            name="inception",
            about="Inception v3 of 2015-12-05, for FID",
            licence=SEE_PUBLISHER,
            source=Download(
                url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
                sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
                size_bytes=95_628_359,
            ),
        ),
        Detector(
            name="inception-torchscript",
            about="the same network in TorchScript, behind the published FIDs; give the file as --detector FILE",
            licence=SEE_PUBLISHER,
            source=Download(
                url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
                sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
                size_bytes=95_607_719,
            ),
        ),
        Detector(
            name="dinov2",
            about="DINOv2 ViT-L/14, for FD-DINOv2",
            licence="Apache-2.0",
            source=Download(
                url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
                sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
                size_bytes=1_217_586_395,
            ),
        ),
    )
}


def _references() -> Iterator[Reference]:
    nvidia = "https://nvlabs-fi-cdn.nvidia.com"
    for dataset, file in (
        ("cifar10", "cifar10-32x32"),
        ("imagenet64", "imagenet-64x64"),
        ("ffhq64", "ffhq-64x64"),
        ("afhqv2-64", "afhqv2-64x64"),
    ):
        yield Reference(
            name=dataset,
            about=f"Inception statistics of {dataset}, as EDM's FIDs use them",
            licence=SEE_PUBLISHER,
            source=Download(url=f"{nvidia}/edm/fid-refs/{file}.npz"),
            dataset=dataset,
            detectors=("inception",),
        )
    for name, dataset, file in (
        ("imagenet512", "imagenet512", "img512"),
        ("imagenet64-edm2", "imagenet64", "img64"),
    ):
        yield Reference(
            name=name,
            about=f"Inception and DINOv2 statistics of {dataset}, as EDM2's scores use them",
            licence=SEE_PUBLISHER,
            source=Download(url=f"{nvidia}/edm2/dataset-refs/{file}.pkl"),
            dataset=dataset,
            detectors=("inception", "dinov2"),
        )
    yield Reference(
        name="imagenet64-images",
        about="images of imagenet64, for precision and recall alone",
        licence=SEE_PUBLISHER,
        source=Download(
            url="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/64/VIRTUAL_imagenet64_labeled.npz"
        ),
        dataset="imagenet64",
        detectors=("inception",),
        holds="images",
    )


REFERENCES: Mapping[str, Reference] = {entry.name: entry for entry in _references()}

VAE_NAME = "stabilityai/sd-vae-ft-mse"
"""the VAE that latents are encoded and decoded with unless another is named; of all in the hub by OWNER/NAME"""
VAE_CONFIG, VAE_WEIGHTS = VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
LATENT_CHANNELS, LATENT_SCALE = 4, 8
"""channels of a latent, and pixels a side of which one of its values stands"""


def vae_url(name: str, file: str) -> str:
    """Where the hub has a file of the VAE OWNER/NAME."""
    return f"https://huggingface.co/{name}/resolve/main/{file}"


VAES: Mapping[str, Entry] = {
    VAE_NAME: Entry(
        name=VAE_NAME,
        about="the VAE of Stable Diffusion, about 335 MB, for the latents of ImageNet 512; --vae takes others",
        licence="MIT",
        source=Download(url=vae_url(VAE_NAME, VAE_WEIGHTS)),
    )
}

_KINDS: Mapping[str, Mapping[str, Entry]] = {
    "teacher": TEACHERS,
    "generator": GENERATORS,
    "comparison": COMPARISONS,
    "dataset": DATASETS,
    "detector": DETECTORS,
    "reference": REFERENCES,
    "vae": VAES,
}


class Row(NamedTuple):
    """An entry as `sidactl ls --catalog` shows it."""

    name: str
    kind: str
    about: str
    size_bytes: int | None
    licence: str
    scores: Mapping[str, Published]
    url: str | None
    """of the file, or of the page to get it from; None for what ships with the package or has no published file"""


def rows() -> list[Row]:
    """Every entry, by kind."""
    return [
        Row(
            e.name,
            kind,
            e.about,
            e.source.size_bytes if e.source else None,
            e.licence,
            e.scores,
            e.source.url if e.source else getattr(e, "where", None),
        )
        for kind, group in _KINDS.items()
        for e in group.values()
    ]


NUM_PARAMETERS: Mapping[str, int] = {
    "tiny-digits": 188_945,
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


OWN_DURATIONS: Mapping[Mode, int] = {"sid": 20 * _M, "sida": 20 * _M, "sid2a": 10 * _M}
"""images that a teacher of one's own of a published one's size is distilled on, unless asked otherwise"""
COSTS: Mapping[tuple[str, Mode], Cost] = dict(_costs())
"""by teacher and mode; a step of sid2a is one of sida. Source: SiDA (2410.14919), table 8."""


def teacher(name: str) -> Teacher:
    """The catalog's entry. Raises SidaError with the nearest name."""
    if name not in TEACHERS:
        raise SidaError(f"unknown teacher {name!r}", did_you_mean(name, TEACHERS, "See sidactl ls --catalog."))
    return TEACHERS[name]


def digest_of_code(path: Path | str, trust_code: bool = False) -> str:
    """SHA-256 of a TorchScript file. Raises SidaError for another than the published one that nobody trusts."""
    try:
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SidaError(f"{path}: cannot be read ({error.strerror})", "Check the path.") from error
    published = DETECTORS["inception-torchscript"].source
    if not trust_code and not (published and digest == published.sha256):
        raise SidaError(
            f"{path} is a program in TorchScript, and not the published one: it could write and delete files of yours",
            "If you trust whoever made it, score with --trust-code; a state dict (.safetensors, .pth) is never run.",
        )
    return digest


def detector(name: str) -> Detector:
    """The catalog's entry. Raises SidaError with the nearest name."""
    if name not in DETECTORS:
        near = did_you_mean(name, DETECTORS, "See sidactl ls --catalog, or give a file.")
        raise SidaError(f"unknown detector {name!r}", near)
    return DETECTORS[name]


def did_you_mean(name: str, known: Mapping[str, object], otherwise: str) -> str:
    """A hint with the known name that is nearest to `name`, or `otherwise` where none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else otherwise


def recipe_for(teacher_name: str, mode: Mode, net: NetSpec | None = None, num_parameters: int | None = None) -> Recipe:
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
            raise SidaError(
                f"{teacher_name} is for guided sampling and has no recipe", "Distill another, such as edm2-xs."
            )
        return recipes[mode]
    assert net
    assert num_parameters
    is_edm2 = net.architecture == "EDM2"
    small, near = TEACHERS["tiny-digits"].recipes[mode], "edm2-xs" if is_edm2 else "edm-cifar10-uncond"
    large = TEACHERS[near].recipes[mode]
    if is_edm2:
        part = small.adversarial and replace(small.adversarial, discriminator_scale=100.0)
        lrs = 10 * small.fake_score_lr, 10 * small.generator_lr
        small = replace(small, adversarial=part, fake_score_lr=lrs[0], generator_lr=lrs[1])
    smallest, largest = NUM_PARAMETERS["tiny-digits"], NUM_PARAMETERS[near]
    share = min(max(math.log(num_parameters / smallest) / math.log(largest / smallest), 0.0), 1.0)

    def between(low: float, high: float) -> float:
        return float(f"{low ** (1 - share) * high**share:.2g}")

    def images(low: int, high: int) -> int:
        return round(between(low, high))

    batch_size = 1 << round(math.log2(between(small.batch_size, large.batch_size)))
    part = small.adversarial
    if part and large.adversarial:
        low, high = part, large.adversarial
        part = replace(
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
        adversarial=part,
        augment_p=0.0,
        dropout=0.0,
        precision=large.precision if share >= 0.5 else "fp32",
        adam_eps=large.adam_eps if share >= 0.5 else small.adam_eps,
        evaluate_every_nimg=images(small.evaluate_every_nimg, _M // 2),
        evaluate_num=small.evaluate_num,
        evaluate_early_nimg=(),
        evaluate_also=(),
        evaluate_labels="uniform",
        checkpoint_every_nimg=images(small.checkpoint_every_nimg, _M // 2),
    )


def _images_at_once(net: NetSpec, num_parameters: int, *, is_small: bool) -> int:
    """Images of a micro-batch of a teacher of one's own; see `recipe_for`."""
    if is_small:
        return 64 if net.img_resolution <= 32 else 32
    if net.architecture != "EDM2":
        return 32
    fitting = (
        of.batch_per_gpu
        for size, of in _EDM2_SIZES.items()
        if num_parameters <= 1.05 * NUM_PARAMETERS[f"edm2-{size}"]  # more classes are a few more parameters
    )
    of_family = next(fitting, _EDM2_SIZES["xxl"].batch_per_gpu)
    return of_family if net.img_resolution <= 64 else min(of_family, 32)
