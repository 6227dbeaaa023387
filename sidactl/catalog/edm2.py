"""EDM2's teachers and how the published generators were distilled from them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from sidactl.catalog.edm import FP16, MIMG, modes_of, script_line_nimg
from sidactl.catalog.entries import CC_BY_NC_SA, Download, Teacher, published
from sidactl.recipes import Adversarial, HeunSpec, Mode, NetSpec, SidRecipe

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


EDM2_SIZES = {
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
        model_channels=EDM2_SIZES[size].channels,
        channel_mult=(1, 2, 3, 4),
        channel_mult_emb=None,
        channel_mult_noise=None,
        num_blocks=3,
        attn_resolutions=(16, 8),
        dropout=EDM2_SIZES[size].dropout,
        logvar_channels=128,
    )


def _edm2_recipes(teacher: str, size: str, dataset: str, P_mean: float, P_std: float) -> dict[Mode, SidRecipe]:
    chosen, line_nimg = EDM2_SIZES[size], script_line_nimg(10_000, 2048)
    sid = SidRecipe(
        teacher=teacher,
        mode="sid",
        dataset=dataset,
        alpha=1.0,
        batch_size=2048,
        num_accumulation_rounds=2048 // chosen.batch_per_gpu,
        duration_nimg=chosen.mimg[0] * MIMG,
        fake_score_lr=5e-5,
        generator_lr=5e-5,
        ema_halflife_nimg=2 * MIMG,
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
        **FP16,
    )
    recipes = modes_of(sid, chosen.mimg, Adversarial(discriminator_scale=100.0, clip_gradient_value=None))
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
    recipes: Mapping[Mode, SidRecipe],
) -> Teacher:
    return Teacher(
        name=name,
        about=about,
        licence=CC_BY_NC_SA,
        source=Download(url=f"{_EDM2_ROOT}/{file}.pkl"),
        scores=published(scores),
        dataset=dataset,
        net=net,
        sampler=HeunSpec(num_steps=32, convention="edm2"),
        recipes=recipes,
    )


def edm2_teachers() -> Iterator[Teacher]:
    for size, of in EDM2_SIZES.items():
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
        {"FID guided": EDM2_SIZES["s"].fid[1]},
        "imagenet512",
        _edm2_recipes("edm2-s-guided", "s", "imagenet512", -0.4, 1.0),
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
            f"EDM2-{size.upper()}, {EDM2_SIZES[size].params} parameters, ImageNet 64 in pixels",
            f"edm2-img64-{size}-{snapshot}",
            _edm2_net(size, 3),
            {"FID": fid},
            "imagenet64",
            _edm2_recipes(name, size, "imagenet64", -0.8, 1.6),
        )
