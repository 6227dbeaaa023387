"""EDM's teachers and how the published generators were distilled from them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sidactl.catalog.entries import CC_BY_NC_SA, Download, Numbers, Teacher, published
from sidactl.recipes import Adversarial, HeunSpec, Mode, NetSpec, SidRecipe

# Recipes. Source: the published run scripts; where the paper differs, they made the published generators. A duration
# that ends before the published best snapshot is longer than the script's: up to the next 10 million images.
MIMG = 1_000_000

FP16: Mapping[str, Any] = {"precision": "fp16", "adam_eps": 1e-6}
"""how all published runs but those on CIFAR-10 were made"""


def modes_of(sid: SidRecipe, mimg: Sequence[int], adversarial: Adversarial) -> dict[Mode, SidRecipe]:
    """The three recipes of a teacher, from that of SiD and the durations of sida and sid2a."""
    sida = replace(
        sid,
        mode="sida",
        alpha=1.0,
        duration_nimg=mimg[1] * MIMG,
        generator_beta1=0.0,
        generator_from_nimg=100_000,
        adversarial=adversarial,
    )
    return {"sid": sid, "sida": sida, "sid2a": replace(sida, mode="sid2a", duration_nimg=mimg[2] * MIMG)}


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
_EDM_TEACHERS: Mapping[str, tuple[str, str, NetSpec, int, Numbers]] = {
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


def script_line_nimg(least_nimg: int, batch_size: int) -> int:
    """Images from one status line of the published runs to the next: whole batches, and no fewer than so many.

    Every 50 lines the generator was scored, and early at some lines more.
    """
    return -(-least_nimg // batch_size) * batch_size


def edm_teachers() -> Iterator[Teacher]:
    for name, (file, dataset, net, num_steps, numbers) in _EDM_TEACHERS.items():
        run = _EDM_RUNS[name]
        is_imagenet = name == "edm-imagenet64"
        line_nimg = script_line_nimg(20_000 if is_imagenet else 10_000, run.batch_size)
        sid = SidRecipe(
            teacher=name,
            mode="sid",
            dataset=dataset,
            alpha=run.sid_alpha,
            batch_size=run.batch_size,
            num_accumulation_rounds=run.batch_size // run.batch_per_gpu,
            duration_nimg=run.mimg[0] * MIMG,
            fake_score_lr=run.lr,
            generator_lr=run.lr,
            generator_beta1=0.9 if name == "edm-ffhq64" else 0.0,
            ema_halflife_nimg=2 * MIMG if is_imagenet else MIMG // 2,
            generator_from_nimg=None,
            adversarial=None,
            augment_p=run.augment_p,
            dropout=run.dropout,
            **(FP16 if dataset != "cifar10" else {}),
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
            source=Download(
                url=f"{_EDM_ROOT}/edm-{file}.pkl", sha256=_EDM_DIGESTS.get(name), sha256_from_publisher=False
            ),
            scores=published(numbers),
            dataset=dataset,
            net=net,
            sampler=churn if is_imagenet else HeunSpec(num_steps=num_steps),
            recipes=modes_of(sid, run.mimg, Adversarial()),
        )
