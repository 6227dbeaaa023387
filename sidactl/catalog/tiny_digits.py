"""The built-in setting tiny-digits: its teacher, its recipes, and small networks of every form."""

from collections.abc import Mapping
from dataclasses import replace

from sidactl.catalog.entries import Teacher
from sidactl.recipes import Adversarial, HeunSpec, NetSpec, SidRecipe

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


def tiny_digits() -> Teacher:
    sid = SidRecipe(
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


def tiny_digits_guide() -> Teacher:
    """A weaker teacher, which guides the other."""
    return Teacher(
        name="tiny-digits-guide",
        about="weaker teacher of 8x8 digits, 48,073 parameters, trained on 20k images; guides tiny-digits",
        licence="Apache-2.0",
        dataset="tiny-digits",
        net=replace(_SMALL, model_channels=8),
        sampler=HeunSpec(num_steps=18),
        recipes={},
        asset="tiny-digits-guide.safetensors",
    )
