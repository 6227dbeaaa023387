"""Recipes and other plain descriptions: there and back through JSON, overrides, and what they refuse."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import typer

from sidactl import catalog
from sidactl.cli import app
from sidactl.errors import SidaError
from sidactl.recipes import (
    SID_MODES,
    Adversarial,
    Execution,
    HeunSpec,
    JsonFields,
    NetSpec,
    OneStepSpec,
    Recipe,
    TeacherRecipe,
    override,
)

SID, SIDA = (catalog.TEACHERS["tiny-digits"].recipes[mode] for mode in ("sid", "sida"))
PLAIN: list[JsonFields] = [
    OneStepSpec(num_steps=4),
    HeunSpec(),
    HeunSpec(S_churn=40.0, S_max=50.0, convention="edm2"),
    TeacherRecipe(dataset="mine", net=catalog.TEACHERS["tiny-digits"].net),
    *(teacher.net for teacher in catalog.TEACHERS.values()),
    *(recipe for teacher in catalog.TEACHERS.values() for recipe in teacher.recipes.values()),
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: f"{type(value).__name__}")
def test_there_and_back_through_json_nothing_changes(value: JsonFields) -> None:
    text = json.dumps(value.to_json(), allow_nan=False)
    assert type(value).from_json(json.loads(text)) == value


def test_an_infinite_level_is_null_in_json() -> None:
    assert HeunSpec().to_json()["S_max"] is None
    assert HeunSpec.from_json({"S_max": None}).S_max == math.inf


def test_nested_parts_are_objects_in_json() -> None:
    told = SIDA.to_json()
    assert told["adversarial"]["lambda_adv"] == SIDA.adversarial.lambda_adv if SIDA.adversarial else False
    assert SID.to_json()["adversarial"] is None
    assert TeacherRecipe(dataset="mine", net=catalog.TEACHERS["tiny-digits"].net).to_json()["net"]["channel_mult"] == [
        1,
        2,
    ]


@pytest.mark.parametrize(
    ("cls", "fields"), [(OneStepSpec, "levels, noise, num_steps, sigma_init"), (Adversarial, "adversarial_from_nimg")]
)
def test_an_unknown_name_in_json_is_refused_with_those_that_there_are(cls: type[JsonFields], fields: str) -> None:
    with pytest.raises(SidaError) as caught:
        cls.from_json({"colour": 1})
    assert str(caught.value).startswith(f"unknown {cls.__name__} field 'colour'. It has {fields}")


def test_overrides_reach_the_recipe_and_its_adversarial_part_and_nothing_else() -> None:
    changed = override(SIDA, {"tmax": 700, "lambda_adv": 0.5, "generator_from_nimg": None})
    assert (changed.tmax, changed.generator_from_nimg) == (700, None)
    assert changed.adversarial is not None
    assert changed.adversarial.lambda_adv == 0.5
    back = {"tmax": SIDA.tmax, "lambda_adv": 0.1, "generator_from_nimg": SIDA.generator_from_nimg}
    assert override(changed, back) == SIDA
    assert override(SIDA, {}) == SIDA


def test_an_unknown_field_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(SidaError) as caught:
        override(SIDA, {"learning_rate": 1})
    message, _, hint = str(caught.value).partition(". ")
    assert message == "unknown recipe field 'learning_rate'"
    names = hint.removeprefix("Fields of mode sida are ").removesuffix(".").split(", ")
    assert {"generator_lr", "lambda_adv", "duration_nimg"} <= set(names)
    assert "adversarial" not in names
    assert names == sorted(names)


def test_without_the_sid_term_the_adversarial_one_must_train_the_generator() -> None:
    assert override(SIDA, {"lambda_sid": 0.0}).lambda_sid == 0
    for recipe, changes in ((SID, {"lambda_sid": 0.0}), (SIDA, {"lambda_sid": 0.0, "lambda_adv": 0.0})):
        with pytest.raises(SidaError) as caught:
            override(recipe, changes)
        assert str(caught.value) == (
            "lambda_sid must be positive where no adversarial term trains the generator, got 0.0. "
            "Pass another --lambda-sid."
        )


def test_an_adversarial_field_is_refused_in_mode_sid() -> None:
    with pytest.raises(SidaError) as caught:
        override(SID, {"lambda_adv": 0.1})
    assert str(caught.value) == (
        "lambda_adv belongs to the adversarial loss, which mode sid does not have. Use --mode sida, or leave it out."
    )


def flags_of(command: str) -> set[str]:
    group: Any = typer.main.get_command(app)
    return {flag for parameter in group.commands[command].params for flag in parameter.opts}


BAD: list[tuple[str, Any, str, str]] = [
    ("batch_size", 0, "at least 1", "--batch-size"),
    ("duration_nimg", -1, "at least 1", "--duration"),
    ("num_accumulation_rounds", 0, "at least 1", "--num-accumulation-rounds"),
    ("evaluate_every_nimg", 0, "at least 1", "--evaluate-every"),
    ("evaluate_num", 1, "at least 2", "--evaluate-num"),
    ("fake_score_lr", 0.0, "positive and finite", "--fake-score-lr"),
    ("generator_lr", math.inf, "positive and finite", "--generator-lr"),
    ("lambda_sid", math.nan, "at least 0 and finite", "--lambda-sid"),
    ("sigma_init", -2.5, "positive and finite", "--sigma-init"),
    ("P_std", 0.0, "positive and finite", "--p-std"),
    ("fake_score_beta1", 1.0, "in [0, 1)", "--fake-score-beta1"),
    ("generator_beta1", -0.1, "in [0, 1)", "--generator-beta1"),
    ("beta2", 1.0, "in [0, 1)", "--beta2"),
    ("dropout", math.nan, "in [0, 1)", "--dropout"),
    ("augment_p", 1.1, "in [0, 1]", "--augment-p"),
    ("tmax", 1001, "in (0, 1000]", "--tmax"),
    ("alpha", math.nan, "finite", "--alpha"),
    ("seed", -1, "at least 0", "--seed"),
    ("seed", 10**23, "at most 2^63 - 1", "--seed"),
    ("batch_size", 16.5, "a whole number", "--batch-size"),
    ("batch_size", True, "a whole number", "--batch-size"),
    ("generator_from_nimg", -1, "at least 0", "--generator-from"),
    ("adversarial_from_nimg", -1, "at least 0", "--adversarial-from"),
    ("lambda_adv", math.nan, "at least 0 and finite", "--lambda-adv"),
    ("clip_gradient_value", 0.0, "positive or none", "--clip-gradient-value"),
    ("ema_rampup_ratio", math.nan, "at least 0 and finite", "--ema-rampup-ratio"),
    ("P_mean", math.inf, "finite", "--p-mean"),
    ("logvar", 1, "true or false", "--logvar"),
    ("teacher_precision", "tf32", "fp32, fp16 or bf16", "--teacher-precision"),
    ("precision", "fp64", "one of fp32, tf32, fp16, bf16", "--precision"),
]


@pytest.mark.parametrize(("name", "value", "what", "flag"), BAD)
def test_a_value_out_of_range_is_refused_with_the_flag_to_pass(name: str, value: Any, what: str, flag: str) -> None:
    with pytest.raises(SidaError) as caught:
        override(SIDA, {name: value})
    told = repr(value) if isinstance(value, str) else value
    assert str(caught.value) == f"{name} must be {what}, got {told}. Pass another {flag}."
    assert caught.value.exit_code == 2
    assert flag in flags_of("distill")


def test_a_batch_must_split_into_its_rounds() -> None:
    with pytest.raises(SidaError) as caught:
        override(SIDA, {"batch_size": 100, "num_accumulation_rounds": 3})
    assert str(caught.value) == (
        "batch_size must be divisible by num_accumulation_rounds, got 100 and 3. Change one of the two."
    )
    assert override(SIDA, {"batch_size": 99, "num_accumulation_rounds": 3}).num_accumulation_rounds == 3


@pytest.mark.parametrize(
    ("name", "value", "what", "flag"),
    [
        ("batch_size", 0, "at least 1", "--batch-size"),
        ("duration_nimg", 0, "at least 1", "--duration"),
        ("lr", math.nan, "positive and finite", "--lr"),
        ("seed", -1, "at least 0", "--seed"),
        ("lr_rampup_nimg", -1, "at least 0", "--lr-rampup"),
        ("ema_rampup_ratio", math.nan, "at least 0 and finite", "--ema-rampup-ratio"),
        ("beta1", 1.0, "in [0, 1)", "--beta1"),
        ("adam_eps", 0.0, "positive and finite", "--adam-eps"),
        ("augment_p", 2.0, "in [0, 1]", "--augment-p"),
        ("P_std", -1.0, "positive and finite", "--p-std"),
        ("stop_if_nan_steps", 0, "at least 1", "--stop-if-nan-steps"),
    ],
)
def test_a_teacher_recipe_refuses_likewise(name: str, value: Any, what: str, flag: str) -> None:
    with pytest.raises(SidaError) as caught:
        TeacherRecipe(dataset="mine", net=catalog.TEACHERS["tiny-digits"].net, **{name: value})
    assert str(caught.value) == f"{name} must be {what}, got {value}. Pass another {flag}."
    assert flag in flags_of("train-teacher")


def net(**changed: Any) -> NetSpec:
    base = {
        "architecture": "SongUNet",
        "img_resolution": 32,
        "img_channels": 3,
        "model_channels": 32,
        "channel_mult": (1, 2),
        "num_blocks": 1,
        "attn_resolutions": (),
    }
    return NetSpec(**(base | changed))


def test_a_network_must_halve_evenly_and_have_channels_for_its_group_norm() -> None:
    with pytest.raises(SidaError) as caught:
        net(img_resolution=30, channel_mult=(1, 2, 2))
    assert str(caught.value) == "img_resolution must be divisible by 4, got 30. Use fewer entries in channel_mult."
    with pytest.raises(SidaError) as caught:
        net(model_channels=130, channel_mult=(1,))
    assert str(caught.value) == (
        "channel counts must be divisible by their GroupNorm groups, got 130 channels. "
        "Choose model_channels such as 16, 32, 64 or 128."
    )


@pytest.mark.parametrize("form", catalog.SMALL_NETS)
@pytest.mark.parametrize(
    ("name", "value", "what", "told"),
    [
        ("model_channels", -16, "at least 1", "-16"),
        ("channel_mult", (1, -1), "at least 1", "[1, -1]"),
        ("channel_mult", (), "one number or more", "[]"),
        ("num_blocks", 0, "at least 1", "0"),
        ("dropout", 1.5, "in [0, 1)", "1.5"),
        ("dropout", math.nan, "in [0, 1)", "nan"),
        ("dropout", "0.1", "a number", "'0.1'"),
        ("sigma_data", 0.0, "positive and finite", "0.0"),
        ("sigma_data", math.nan, "positive and finite", "nan"),
        ("channels_per_head", 0, "at least 1", "0"),
        ("channel_mult_emb", 0, "at least 1", "0"),
        ("logvar_channels", -1, "at least 0", "-1"),
        ("augment_dim", -1, "at least 0", "-1"),
        ("label_dim", -1, "at least 0", "-1"),
        ("label_balance", 1.5, "in [0, 1]", "1.5"),
        ("resample_filter", (1, 2, 1), "an even number of taps with a positive sum", "[1, 2, 1]"),
        ("resample_filter", (1, -1), "an even number of taps with a positive sum", "[1, -1]"),
        ("encoder_type", "none", "one of standard, skip, residual", "'none'"),
        ("model_channels", 2.5, "a whole number", "2.5"),
        ("channel_mult", (1, 2.5), "whole numbers", "[1, 2.5]"),
    ],
)
def test_a_network_that_cannot_be_is_refused_with_the_flag_to_pass(
    form: str, name: str, value: Any, what: str, told: str
) -> None:
    with pytest.raises(SidaError) as caught:
        dataclasses.replace(catalog.SMALL_NETS[form], **{name: value})
    flag = f"--{name.replace('_', '-')}"
    assert str(caught.value) == f"{name} must be {what}, got {told}. Pass another {flag}."
    assert flag in flags_of("train-teacher")


@pytest.mark.parametrize(
    ("cls", "fields", "told"),
    [
        (HeunSpec, {"num_steps": 2.5}, "num_steps must be a whole number, got 2.5"),
        (HeunSpec, {"sigma_max": "x"}, "sigma_max must be a number, got 'x'"),
        (HeunSpec, {"sigma_min": 0.0}, "sigma_min must be positive and finite, got 0.0"),
        (HeunSpec, {"sigma_min": 90.0}, "sigma_min must be below sigma_max, 80, got 90.0"),
        (HeunSpec, {"S_churn": -1.0}, "S_churn must be at least 0 and finite, got -1.0"),
        (HeunSpec, {"S_max": math.nan}, "S_max must be at least 0, got nan"),
        (HeunSpec, {"convention": "vp"}, "convention must be one of edm, edm2, got 'vp'"),
        (OneStepSpec, {"num_steps": 0}, "num_steps must be at least 1, got 0"),
        (OneStepSpec, {"sigma_init": math.nan}, "sigma_init must be positive and finite, got nan"),
        (Execution, {"batch_per_device": 0}, "batch_per_device must be at least 1, got 0"),
    ],
)
def test_what_else_cannot_be_is_refused(cls: type[JsonFields], fields: dict[str, Any], told: str) -> None:
    with pytest.raises(SidaError) as caught:
        cls.from_json(fields)
    assert caught.value.message == told


def test_what_is_allowed_and_rarely_meant_is_told() -> None:
    assert SIDA.unusual() == SID.unusual() == []
    assert override(SIDA, {"alpha": -3.0, "generator_lr": 1.0}).unusual() == [
        "generator_lr is 1; Adam's rates above 0.1 rarely train anything",
        "alpha is -3; values from 0 to 2 are known, 1.0 and 1.2 the published ones",
    ]
    assert TeacherRecipe(dataset="mine", net=catalog.SMALL_NETS["adm"], lr=0.5).unusual() == [
        "lr is 0.5; Adam's rates above 0.1 rarely train anything"
    ]


@pytest.mark.parametrize(
    ("generator_from", "adversarial_from", "duration", "stages", "untrained"),
    [
        (None, 0, 160, (0, 0, 16), []),
        (None, 0, 16, (0, 0, None), ["adversarial part"]),
        (0, 0, 17, (0, 16, 16), []),
        (16, 16, 33, (0, 32, 32), []),
        (16, 16, 32, (0, None, None), ["generator", "adversarial part"]),
        (15, 31, 32, (0, 16, None), ["adversarial part"]),
        (31, 8, 48, (0, 32, 32), []),
        (10**15, 0, 10**12, (0, None, None), ["generator", "adversarial part"]),
    ],
)
def test_a_stage_begins_with_the_first_step_after_its_number_of_images(
    generator_from: int | None,
    adversarial_from: int,
    duration: int,
    stages: tuple[int | None, ...],
    untrained: list[str],
) -> None:
    recipe = override(
        SIDA,
        {
            "batch_size": 16,
            "generator_from_nimg": generator_from,
            "adversarial_from_nimg": adversarial_from,
            "duration_nimg": duration,
        },
    )
    assert recipe.stages() == dict(zip(("fake score", "generator", "adversarial part"), stages, strict=True))
    assert recipe.untrained() == untrained
    assert recipe.untrained(16) == [stage for stage, start in recipe.stages().items() if start is None or start >= 16]


def test_evaluations_per_image_follow_from_steps() -> None:
    assert [HeunSpec(num_steps=n).nfe for n in (1, 18, 40)] == [1, 35, 79]
    assert [OneStepSpec(num_steps=n).nfe for n in (1, 4)] == [1, 4]


def test_every_mode_of_the_tiny_teacher_has_the_parts_that_it_needs() -> None:
    recipes = catalog.TEACHERS["tiny-digits"].recipes
    assert set(recipes) == set(SID_MODES)
    assert {mode: recipe.adversarial is None for mode, recipe in recipes.items()} == {
        "sid": True,
        "sida": False,
        "sid2a": False,
    }
    assert all(isinstance(recipe, Recipe) and recipe.mode == mode for mode, recipe in recipes.items())


def test_a_number_is_the_same_in_every_type() -> None:
    """Else 1 and 1.0 were two questions, with two runs that answer them."""
    for name, values in {
        "lambda_sid": (100, 100.0, np.float32(100), np.int64(100)),
        "tmax": (800, np.int16(800)),
        "dropout": (0, -0.0),
    }.items():
        assert len({json.dumps(override(SIDA, {name: value}).to_json()) for value in values}) == 1
    with pytest.raises(SidaError, match="lambda_sid must be at least 0 and finite, got inf"):
        override(SIDA, {"lambda_sid": 10**400})
