"""The catalog says what the publishers say: networks, recipes, files, scores."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch

from sidactl import catalog, nets
from sidactl.catalog import (
    COMPARISONS,
    DATASETS,
    DETECTORS,
    GENERATORS,
    NUM_PARAMETERS,
    REFERENCES,
    TEACHERS,
    VAES,
    Published,
)
from sidactl.errors import SidaError
from sidactl.foreign import networks
from sidactl.foreign.records import Record
from sidactl.recipes import SID_MODES, Adversarial, Execution, HeunSpec, Memory, Mode, OneStepSpec, Recipe
from tests.golden import golden

EDM2_SIZES = ("xs", "s", "m", "l", "xl", "xxl")
# The file with the names and shapes of each teacher's tensors.
LAYOUTS = {
    "edm-cifar10-uncond": "edm-cifar10-32x32-uncond-vp.json",
    "edm-cifar10-cond": "edm-cifar10-32x32-cond-vp.json",
    "edm-imagenet64": "edm-imagenet-64x64-cond-adm.json",
    "edm-ffhq64": "edm-ffhq-64x64-uncond-vp.json",
    "edm-afhqv2": "edm-afhqv2-64x64-uncond-vp.json",
    "edm2-xs": "edm2-img512-xs.json",
    "edm2-s": "edm2-img512-s.json",
    "edm2-m": "edm2-img512-m.json",
    "edm2-l": "edm2-img512-l.json",
    "edm2-xl": "edm2-img512-xl.json",
    "edm2-xxl": "edm2-img512-xxl.json",
    "edm2-img64-s": "edm2-img64-s.json",
    "edm2-img64-m": "edm2-img64-m.json",
    "edm2-img64-l": "edm2-img64-l.json",
    "edm2-img64-xl": "edm2-img64-xl.json",
}


# ---- networks ----


@pytest.mark.parametrize(("name", "layout_file"), LAYOUTS.items())
def test_teacher_network_has_the_published_names_shapes_and_options(name: str, layout_file: str) -> None:
    layout = json.loads(golden(f"layouts/{layout_file}").read_text())
    spec = TEACHERS[name].net
    with torch.device("meta"):
        net = nets.build(spec)
    assert {key: list(p.shape) for key, p in net.named_parameters()} == layout["parameters"]
    assert {key: list(b.shape) for key, b in net.named_buffers()} == layout["buffers"]
    assert sum(p.numel() for p in net.parameters()) == layout["num_parameters"]
    assert networks.spec_of(Record(layout["class_name"], init_kwargs=layout["init_kwargs"])) == spec


@pytest.mark.parametrize("size", EDM2_SIZES)
def test_edm2_variants_differ_in_weights_alone(size: str) -> None:
    for_fid, for_dino = TEACHERS[f"edm2-{size}"], TEACHERS[f"edm2-{size}-dino"]
    assert for_fid.net == for_dino.net
    assert for_fid.source
    assert for_dino.source
    assert for_fid.source.url != for_dino.source.url
    for mode in SID_MODES:
        assert dataclasses.replace(for_fid.recipes[mode], teacher=for_dino.name) == for_dino.recipes[mode]


def test_generator_has_its_teachers_network_without_the_uncertainty_head() -> None:
    for entry in GENERATORS.values():
        teacher = TEACHERS[entry.teacher]
        assert entry.net == dataclasses.replace(teacher.net, logvar_channels=0, dropout=entry.net.dropout)
        assert entry.net.dropout == teacher.recipes[entry.mode].dropout
        assert entry.dataset == teacher.dataset
        assert entry.sampler == OneStepSpec(num_steps=1, sigma_init=2.5)


@pytest.mark.parametrize(
    ("name", "sampler", "nfe"),
    [
        ("edm-cifar10-uncond", HeunSpec(num_steps=18), 35),
        ("edm-cifar10-cond", HeunSpec(num_steps=18), 35),
        ("edm-imagenet64", HeunSpec(num_steps=256, S_churn=40, S_min=0.05, S_max=50, S_noise=1.003), 511),
        ("edm-ffhq64", HeunSpec(num_steps=40), 79),
        ("edm-afhqv2", HeunSpec(num_steps=40), 79),
        ("edm2-xs", HeunSpec(num_steps=32, convention="edm2"), 63),
        ("edm2-xxl-dino", HeunSpec(num_steps=32, convention="edm2"), 63),
        ("edm2-img64-xl", HeunSpec(num_steps=32, convention="edm2"), 63),
    ],
)
def test_teacher_is_sampled_as_published(name: str, sampler: HeunSpec, nfe: int) -> None:
    assert TEACHERS[name].sampler == sampler
    assert sampler.nfe == nfe


# ---- recipes ----

# batch size, images per GPU and step, learning rate, EMA half-life, millions of images of sid, sida, sid2a: those of
# the published scripts, but where the published best snapshot came later (170, 180, 250, 230, 210, 240 and 80)
RUNS: dict[str, tuple[int, int, float, float, tuple[int, int, int]]] = {
    "edm-cifar10-uncond": (256, 32, 1e-5, 0.5, (500, 300, 100)),
    "edm-cifar10-cond": (256, 32, 1e-5, 0.5, (800, 300, 100)),
    "edm-imagenet64": (8192, 32, 4e-6, 2, (1000, 300, 100)),
    "edm-ffhq64": (512, 64, 1e-5, 0.5, (500, 200, 170)),
    "edm-afhqv2": (512, 64, 5e-6, 0.5, (500, 200, 180)),
    "edm2-xs": (2048, 64, 5e-5, 2, (250, 200, 30)),
    "edm2-s": (2048, 64, 5e-5, 2, (200, 200, 80)),
    "edm2-m": (2048, 32, 5e-5, 2, (230, 200, 200)),
    "edm2-l": (2048, 32, 5e-5, 2, (210, 200, 55)),
    "edm2-xl": (2048, 16, 5e-5, 2, (240, 200, 80)),
    "edm2-xxl": (2048, 2, 5e-5, 2, (100, 100, 30)),
}


@pytest.mark.parametrize("name", RUNS)
def test_recipes_are_those_of_the_published_runs(name: str) -> None:
    batch_size, per_gpu, lr, halflife, mimg = RUNS[name]
    is_edm2 = name.startswith("edm2")
    for mode, duration in zip(SID_MODES, mimg, strict=True):
        recipe = catalog.recipe_for(name, mode)
        assert (recipe.teacher, recipe.mode, recipe.dataset) == (name, mode, TEACHERS[name].dataset)
        assert recipe.batch_size == batch_size
        assert recipe.num_accumulation_rounds == batch_size // per_gpu
        assert recipe.fake_score_lr == recipe.generator_lr == lr
        assert recipe.ema_halflife_nimg == halflife * 1_000_000
        assert recipe.duration_nimg == duration * 1_000_000
        assert recipe.alpha == (1.2 if mode == "sid" and not is_edm2 and name != "edm-afhqv2" else 1.0)
        assert recipe.lambda_sid == (50 if (name, mode) == ("edm2-m", "sid2a") else 100)
        assert recipe.generator_beta1 == (0.9 if (name, mode) == ("edm-ffhq64", "sid") else 0)
        precision, eps = ("fp32", 1e-8) if "cifar10" in name else ("fp16", 1e-6)
        assert (recipe.precision, recipe.teacher_precision, recipe.adam_eps) == (precision, None, eps)
        assert (recipe.fake_score_beta1, recipe.beta2) == (0, 0.999)
        assert (recipe.sigma_init, recipe.tmax, recipe.ema_rampup_ratio) == (2.5, 800, 0.05)
        assert (recipe.P_mean, recipe.P_std) == ((-0.4, 1.0) if is_edm2 else (-1.2, 1.2))
        plain = (name, mode) in (("edm2-s", "sida"), ("edm2-s", "sid2a"))
        assert recipe.forced_normalization == ("published" if is_edm2 and not plain else "off")
        assert recipe.logvar is not plain
        every = 1_228_800 if name == "edm-imagenet64" else 512_000
        assert (recipe.evaluate_every_nimg, recipe.checkpoint_every_nimg) == (every, every)
        early = (20, 50, 100) if is_edm2 else range(10, 101, 10)
        assert recipe.evaluate_early_nimg == tuple(line * every // 50 for line in early)
        is_conditional = is_edm2 or name in ("edm-cifar10-cond", "edm-imagenet64")
        assert recipe.evaluate_labels == ("dataset" if is_conditional else "uniform")
        if mode == "sid":
            assert recipe.adversarial is None
            assert recipe.generator_from_nimg is None
        else:
            assert recipe.generator_from_nimg == 100_000
            assert recipe.adversarial == Adversarial(
                lambda_adv=0.01,
                discriminator_scale=100 if is_edm2 else 1,
                adversarial_from_nimg=200_000,
                joint_weight=0.5,
                clip_gradient_value=None if is_edm2 else 1,
            )


def test_every_recipe_lasts_until_its_published_snapshot() -> None:
    late = {}
    for entry in GENERATORS.values():
        if entry.source:
            nimg = 1000 * int(entry.source.url.removesuffix(".pkl").rpartition("-")[2])
            recipe = TEACHERS[entry.teacher].recipes[entry.mode]
            assert nimg <= recipe.duration_nimg, entry.name
            late[entry.name] = recipe.duration_nimg - nimg
    assert late["sid2a/afhqv2"] == 4_896_000
    assert late["sid/edm2-xs"] == 640_000


@pytest.mark.parametrize(
    ("name", "dropout", "augment_p"),
    [
        ("edm-cifar10-uncond", 0.13, 0.12),
        ("edm-cifar10-cond", 0.13, 0.12),
        ("edm-imagenet64", 0.10, 0.0),
        ("edm-ffhq64", 0.05, 0.15),
        ("edm-afhqv2", 0.05, 0.15),
        ("edm2-xs", 0.0, 0.0),
        ("edm2-s", 0.0, 0.0),
        ("edm2-m", 0.10, 0.0),
        ("edm2-l", 0.10, 0.0),
        ("edm2-xl", 0.10, 0.0),
        ("edm2-xxl", 0.10, 0.0),
    ],
)
def test_recipes_have_dropout_and_augmentation_of_the_published_runs(
    name: str, dropout: float, augment_p: float
) -> None:
    assert {(r.dropout, r.augment_p) for r in TEACHERS[name].recipes.values()} == {(dropout, augment_p)}


def test_img64_recipes_take_the_sigmas_of_their_teachers() -> None:
    for size in ("s", "m", "l", "xl"):
        layout = json.loads(golden(f"layouts/edm2-img64-{size}.json").read_text())
        for recipe in TEACHERS[f"edm2-img64-{size}"].recipes.values():
            assert (recipe.P_mean, recipe.P_std) == (layout["loss"]["P_mean"], layout["loss"]["P_std"])


GUIDING = ("edm2-xs-uncond", "tiny-digits-guide")


def test_every_teacher_but_those_that_guide_others_has_three_recipes_that_survive_json() -> None:
    for entry in TEACHERS.values():
        assert list(entry.recipes) == ([] if entry.name in GUIDING else list(SID_MODES))
        for mode, recipe in entry.recipes.items():
            assert recipe.mode == mode
            assert recipe.teacher == entry.name
            assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize("mode", SID_MODES)
def test_a_small_teacher_of_ones_own_is_distilled_as_tiny_digits_is(mode: Mode) -> None:
    for num_parameters in (50_000, NUM_PARAMETERS["tiny-digits"]):
        recipe = catalog.recipe_for("mine", mode, catalog.SMALL_NETS["ddpmpp"], num_parameters)
        assert recipe == dataclasses.replace(TEACHERS["tiny-digits"].recipes[mode], teacher="mine", dataset="")


@pytest.mark.parametrize(("form", "like", "duration"), [("ddpmpp", "edm-cifar10-uncond", 20), ("edm2", "edm2-xs", 20)])
@pytest.mark.parametrize("mode", SID_MODES)
def test_a_large_teacher_of_ones_own_is_distilled_as_published_ones_are_for_a_tenth_of_the_time(
    mode: Mode, form: str, like: str, duration: int
) -> None:
    published = TEACHERS[like].recipes[mode]
    net = dataclasses.replace(catalog.SMALL_NETS[form], img_resolution=64)
    assert catalog.recipe_for("mine", mode, net, NUM_PARAMETERS[like]) == dataclasses.replace(
        published,
        teacher="mine",
        dataset="",
        num_accumulation_rounds=published.batch_size // (64 if form == "edm2" else 32),
        evaluate_every_nimg=500_000,
        checkpoint_every_nimg=500_000,
        evaluate_early_nimg=(),
        evaluate_also=(),
        evaluate_labels="uniform",
        duration_nimg=(duration if mode != "sid2a" else duration // 2) * 1_000_000,
        generator_from_nimg=100_000,
        dropout=0.0,
        augment_p=0.0,
        evaluate_num=10_000,
    )


@pytest.mark.parametrize("form", catalog.SMALL_NETS)
@pytest.mark.parametrize("mode", SID_MODES)
def test_the_recipe_of_a_teacher_of_ones_own_grows_with_its_network_and_trains_all_its_parts(
    mode: Mode, form: str
) -> None:
    sizes = (100_000, 400_000, 2_000_000, 10_000_000, 60_000_000, 300_000_000)
    made = [catalog.recipe_for("mine", mode, catalog.SMALL_NETS[form], size) for size in sizes]
    for smaller, larger in pairwise(made):
        assert smaller.duration_nimg <= larger.duration_nimg <= 20_000_000
        assert smaller.generator_lr >= larger.generator_lr
        assert smaller.batch_size <= larger.batch_size
    for recipe in made:
        assert recipe.untrained() == []
        for duration in (1_000, 2_000, 50_000, 10_000_000):
            shorter = recipe.lasting(duration)
            assert shorter.duration_nimg == duration
            assert duration < 4 * recipe.batch_size or shorter.untrained() == []
            assert shorter.evaluate_every_nimg <= duration


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name.startswith("edm2")])
def test_an_edm2_teacher_of_ones_own_of_published_size_takes_as_many_images_at_once(name: str) -> None:
    layout = json.loads(golden(f"layouts/{LAYOUTS[name]}").read_text())
    spec = networks.spec_of(Record(layout["class_name"], init_kwargs=layout["init_kwargs"]))
    for mode in SID_MODES:
        recipe = catalog.recipe_for("mine", mode, spec, layout["num_parameters"])
        published = TEACHERS[name].recipes[mode]
        assert (recipe.batch_size, recipe.num_accumulation_rounds) == (2048, published.num_accumulation_rounds)


@pytest.mark.parametrize(
    ("millions", "resolution", "at_once"),
    [
        (6, 64, 64),
        (124, 64, 64),
        (285, 64, 64),
        (300, 64, 32),
        (1_100, 64, 16),
        (1_500, 64, 2),
        (9_000, 64, 2),
        (124, 128, 32),
        (1_500, 128, 2),
    ],
)
def test_a_larger_edm2_teacher_of_ones_own_takes_fewer_images_at_once(
    millions: int, resolution: int, at_once: int
) -> None:
    net = dataclasses.replace(TEACHERS["edm2-xs"].net, img_resolution=resolution)
    recipe = catalog.recipe_for("mine", "sida", net, millions * 1_000_000)
    assert recipe.batch_size // recipe.num_accumulation_rounds == at_once


@pytest.mark.parametrize("name", GUIDING)
def test_a_teacher_that_guides_others_has_no_recipe(name: str) -> None:
    with pytest.raises(SidaError) as caught:
        catalog.recipe_for(name, "sida")
    assert str(caught.value) == f"{name} guides others and has no recipe. Distill another, such as edm2-xs."


def test_the_built_in_guide_is_small_and_fits_the_built_in_teacher() -> None:
    guide, taught = TEACHERS["tiny-digits-guide"], TEACHERS["tiny-digits"]
    assert guide.asset
    assert (catalog.ASSETS / guide.asset).stat().st_size < 200_000
    assert dataclasses.replace(guide.net, model_channels=16) == taught.net
    assert NUM_PARAMETERS["tiny-digits-guide"] < NUM_PARAMETERS["tiny-digits"] / 3


def test_a_guided_teacher_has_the_recipe_of_its_size() -> None:
    guided, plain = (catalog.recipe_for(name, "sida") for name in ("edm2-s-guided", "edm2-s"))
    assert guided == dataclasses.replace(plain, teacher="edm2-s-guided")
    assert catalog.GUIDES["edm2-s-guided"] == ("edm2-xs-uncond", 1.4)


def test_the_guided_teacher_is_that_of_its_size_in_another_average_and_fits_its_guide() -> None:
    guided, guide = TEACHERS["edm2-s-guided"], TEACHERS["edm2-xs-uncond"]
    assert (guided.net, guided.sampler) == (TEACHERS["edm2-s"].net, TEACHERS["edm2-s"].sampler)
    assert (guide.net.img_channels, guide.net.img_resolution, guide.net.label_dim) == (4, 64, 0)
    assert "--guide edm2-xs-uncond --guidance 1.4" in guided.about


# ---- files ----


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("edm-cifar10-uncond", "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl"),
        ("edm-imagenet64", "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-imagenet-64x64-cond-adm.pkl"),
        (
            "edm2-l",
            "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/edm2-img512-l-1879048-0.085.pkl",
        ),
        (
            "edm2-s-guided",
            "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/edm2-img512-s-2147483-0.025.pkl",
        ),
        (
            "edm2-l-dino",
            "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/edm2-img512-l-1879048-0.155.pkl",
        ),
        (
            "edm2-img64-xl",
            "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/edm2-img64-xl-0671088-0.040.pkl",
        ),
        (
            "sid/cifar10-cond",
            "https://huggingface.co/UT-Austin-PML/SiD/resolve/main/cifar10-cond/alpha1.2/"
            "network-snapshot-1.200000-713312.pkl",
        ),
        (
            "sid/afhqv2",
            "https://huggingface.co/UT-Austin-PML/SiD/resolve/main/afhq64/alpha1/network-snapshot-1.000000-371712.pkl",
        ),
        (
            "sid2a/cifar10-uncond",
            "https://huggingface.co/UT-Austin-PML/SiDA/resolve/main/EDM_distillation/"
            "cifar10_uncond_sid2a_alpha1-028160.pkl",
        ),
        (
            "sid2a/imagenet64-alpha1.2",
            "https://huggingface.co/UT-Austin-PML/SiDA/resolve/main/EDM_distillation/imgnet64_sid2a_alpha1.2-021471.pkl",
        ),
        (
            "sida/edm2-xl",  # so listed, whatever the file says
            "https://huggingface.co/UT-Austin-PML/SiDA/resolve/main/EDM2_distillation/"
            "edm2_img512_xl_sid2a_alpha1-024578.pkl",
        ),
        (
            "sid/edm2-xxl",
            "https://huggingface.co/UT-Austin-PML/SiDA/resolve/main/EDM2_distillation/"
            "edm2_img512_xxl_sida_alpha1-077932.pkl",
        ),
        (
            "sid2a/edm2-xxl",
            "https://huggingface.co/UT-Austin-PML/SiDA/resolve/main/EDM2_distillation/"
            "edm2_img512_xxl_sid2a_alpha1-029812.pkl",
        ),
    ],
)
def test_network_comes_from_its_publisher(name: str, url: str) -> None:
    source = {**TEACHERS, **GENERATORS}[name].source
    assert source
    assert source.url == url


NO_FILE = [
    "sid/cifar10-uncond-alpha1",
    "sid/cifar10-cond-alpha1",
    "sid/imagenet64-alpha1",
    "sid/ffhq64-alpha1",
    "sid/afhqv2-alpha1.2",
]


def test_generators_of_which_scores_alone_are_published_say_so() -> None:
    assert [entry.name for entry in GENERATORS.values() if not entry.source] == NO_FILE
    assert GENERATORS["sid/afhqv2-alpha1.2"].about == "SiD of edm-afhqv2, alpha 1.2, no file is published"


@pytest.mark.parametrize(
    ("name", "dataset", "scores", "about"),
    [
        (
            "scd/edm2-s",
            "imagenet512",
            {"FID": 3.07, "FID at 2 evaluations": 2.50},
            "sCD: ImageNet 512, size of EDM2-S (280M parameters), with guidance; to compare with, numbers from SiDA "
            "(2410.14919), table 4, no file",
        ),
        ("scd/edm2-xxl", "imagenet512", {"FID": 2.28, "FID at 2 evaluations": 1.88}, None),
        ("sct/edm2-m", "imagenet512", {"FID": 5.84, "FID at 2 evaluations": 5.53}, None),
        ("scd/imagenet64", "imagenet64", {"FID": 2.44, "FID at 2 evaluations": 1.66}, None),
        ("gdd-i/cifar10-uncond", "cifar10", {"FID": 1.54, "IS": 10.10}, None),
        (
            "f-distill-fastgen/cifar10-cond",
            "cifar10",
            {"FID": 1.85},
            "f-distill: cifar10-cond; to compare with, numbers from FastGen's run, no file",
        ),
    ],
)
def test_others_methods_are_there_to_compare_with(
    name: str, dataset: str, scores: dict[str, float], about: str | None
) -> None:
    entry = COMPARISONS[name]
    assert (entry.source, entry.dataset) == (None, dataset)
    assert {number: score.value for number, score in entry.scores.items()} == scores
    assert about in (None, entry.about)


def test_names_of_others_methods_are_no_names_of_ours() -> None:
    assert not set(COMPARISONS) & {*TEACHERS, *GENERATORS}
    assert all(entry.scores for entry in COMPARISONS.values())


def test_every_network_and_statistic_has_its_own_file_over_https() -> None:
    groups = (TEACHERS, GENERATORS, DETECTORS, REFERENCES)
    urls = [e.source.url for group in groups for e in group.values() if e.source]
    assert len(set(urls)) == len(urls)
    assert all(url.startswith("https://") for url in urls)
    builtin = [e.name for group in groups for e in group.values() if not e.source]
    detectors = ["tiny-digits", "random-features", "tiny-digits-ssl", "efficientnet-lite0"]
    assert builtin == ["tiny-digits", "tiny-digits-guide", *NO_FILE, *detectors]


def test_known_digests_are_pinned_and_an_uncertain_one_is_marked() -> None:
    dinov2, inception, teacher = (
        e.source for e in (DETECTORS["dinov2"], DETECTORS["inception-torchscript"], TEACHERS["edm-cifar10-uncond"])
    )
    assert dinov2
    assert inception
    assert teacher
    assert (dinov2.sha256 or "")[:8] == "d5383ea8"
    assert dinov2.size_bytes == 1_217_586_395
    assert (inception.sha256 or "")[:8] == "f58cb9b6"
    assert inception.size_bytes == 95_607_719
    assert dinov2.sha256_from_publisher
    assert inception.sha256_from_publisher
    assert (teacher.sha256 or "")[:8] == "4d5dcc1f"
    assert not teacher.sha256_from_publisher


# ---- scores ----


@pytest.mark.parametrize(
    ("name", "number", "published"),
    [
        ("edm-cifar10-uncond", "FID", (1.97, None)),
        ("edm-cifar10-uncond", "IS", (9.68, None)),
        ("edm2-s", "FID", (2.56, None)),
        ("edm2-s-dino", "FD-DINOv2", (68.64, None)),
        ("edm2-img64-m", "FID", (1.43, None)),
        ("edm2-s-guided", "FID guided", (2.23, None)),
        ("edm2-xs", "FID guided", (2.91, None)),
        ("edm2-xxl", "FID guided", (1.81, None)),
        ("edm2-m-dino", "FD-DINOv2 guided", (41.98, None)),
        ("edm2-s-dino", "FD-DINOv2 guided", (52.32, None)),
        ("edm-imagenet64", "FID at 79 evaluations", (2.64, None)),
        ("edm-imagenet64", "precision at 79 evaluations", (0.71, None)),
        ("edm-imagenet64", "recall at 79 evaluations", (0.67, None)),
        ("sid/cifar10-uncond", "FID", (1.923, 0.017)),
        ("sida/cifar10-uncond", "IS", (10.323, 0.048)),
        ("sid2a/cifar10-cond-alpha1.2", "FID", (1.396, 0.014)),
        ("sid/imagenet64", "recall", (0.63, None)),
        ("sid2a/imagenet64-alpha1.2", "FID", (1.110, 0.018)),
        ("sid2a/ffhq64", "FID", (1.040, 0.011)),
        ("sid/afhqv2", "FID", (1.628, 0.017)),
        ("sid/edm2-xs", "FID", (3.353, 0.041)),
        ("sida/edm2-xl", "FD-DINOv2", (46.47, 0.27)),
        ("sid2a/edm2-s", "FID", (1.669, 0.019)),
        ("sid2a/edm2-l", "FID in the paper", (1.465, 0.028)),
        ("sid/cifar10-uncond-alpha1", "FID", (2.028, 0.020)),
        ("sid/cifar10-uncond-alpha1", "IS", (10.017, 0.047)),
        ("sid/cifar10-cond-alpha1", "FID", (1.932, 0.019)),
        ("sid/imagenet64-alpha1", "FID", (2.022, 0.031)),
        ("sid/imagenet64-alpha1", "precision", (0.73, None)),
        ("sid/ffhq64-alpha1", "FID", (1.710, 0.018)),
        ("sid/afhqv2-alpha1.2", "FID", (1.711, 0.020)),
    ],
)
def test_published_score(name: str, number: str, published: tuple[float, float | None]) -> None:
    assert {**TEACHERS, **GENERATORS}[name].scores[number] == Published(*published)


def test_scores_of_the_publishers_page_are_told_from_those_of_the_paper() -> None:
    entries = (*TEACHERS.values(), *GENERATORS.values())
    assert {
        (entry.name, name): number.value
        for entry in entries
        for name, number in entry.scores.items()
        if number.source == "page"
    } == {("sid2a/edm2-l", "FID"): 1.413, ("sid2a/edm2-xl", "FID"): 1.379, ("sid2a/edm2-xxl", "FID"): 1.366}


# ---- the whole ----


def test_all_published_networks_are_there() -> None:
    assert Counter(e.net.architecture for e in TEACHERS.values()) == {"SongUNet": 6, "DhariwalUNet": 1, "EDM2": 18}
    assert Counter((e.mode, e.net.architecture == "EDM2") for e in GENERATORS.values()) == {
        ("sid", False): 10,
        ("sida", False): 5,
        ("sid2a", False): 10,
        ("sid", True): 6,
        ("sida", True): 6,
        ("sid2a", True): 6,
    }


def test_entries_name_datasets_and_detectors_that_exist() -> None:
    for entry in (*TEACHERS.values(), *GENERATORS.values(), *COMPARISONS.values(), *REFERENCES.values()):
        assert entry.dataset in DATASETS
    for reference in REFERENCES.values():
        assert set(reference.detectors) <= set(DETECTORS)
    assert {d.detector for d in DATASETS.values()} <= set(DETECTORS)
    assert all(entry.builtin != bool(entry.where) for entry in DATASETS.values())


def test_datasets_are_the_built_in_one_and_the_presets() -> None:
    from sidactl.data.prepare import PRESETS

    assert [name for name, entry in DATASETS.items() if not entry.labels_of] == ["tiny-digits", *PRESETS]
    labels = DATASETS["imagenet512-labels"]
    assert labels.source
    assert labels.source.url == (
        "https://huggingface.co/UT-Austin-PML/SiDA/resolve/main/EDM2_distillation/dataset.json"
    )
    assert labels.labels_of in PRESETS


def test_rows_tell_name_kind_licence_size_and_score_of_every_entry() -> None:
    rows = catalog.rows()
    assert len({(row.kind, row.name) for row in rows}) == len(rows)
    assert len(rows) == sum(map(len, (TEACHERS, GENERATORS, COMPARISONS, DATASETS, DETECTORS, REFERENCES, VAES)))
    assert all(row.about and row.licence for row in rows)
    by_name = {(row.kind, row.name): row for row in rows}
    assert by_name["teacher", "edm2-s"].licence == "CC BY-NC-SA 4.0"
    assert by_name["detector", "dinov2"].size_bytes == 1_217_586_395
    assert by_name["vae", "stabilityai/sd-vae-ft-mse"].licence == "MIT"
    assert by_name["generator", "sid2a/edm2-xs"].scores["FID"] == (2.156, 0.028, "paper")
    assert by_name["generator", "sid2a/edm2-xs"].about == "SiD2A of edm2-xs, alpha 1, 28.7M images"


def test_unknown_teacher_is_told_the_nearest_name() -> None:
    with pytest.raises(SidaError) as caught:
        catalog.teacher("edm2-xxll")
    assert str(caught.value) == "unknown teacher 'edm2-xxll'. Did you mean 'edm2-xxl'?"


def test_the_catalog_needs_the_standard_library_alone() -> None:
    code = "import sidactl.catalog, sys; print(sorted({'torch', 'numpy', 'rich', 'safetensors'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_parameter_counts_are_those_of_the_networks() -> None:
    assert set(catalog.NUM_PARAMETERS) == set(TEACHERS)
    with torch.device("meta"):
        built = {name: nets.build(entry.net) for name, entry in TEACHERS.items()}
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in built.items()}
    assert counts == dict(catalog.NUM_PARAMETERS)


@pytest.mark.parametrize("name", ["edm-cifar10-uncond", "edm-imagenet64", "edm2-xs"])
def test_the_memory_estimate_counts_networks_moments_and_gradients(name: str) -> None:
    """Activations are held against what networks keep in tests/recipes/test_memory.py."""
    recipe = dataclasses.replace(TEACHERS[name].recipes["sida"], batch_size=1, num_accumulation_rounds=1)
    estimate = Memory.of(recipe, TEACHERS[name].net, catalog.NUM_PARAMETERS[name])
    assert estimate.state_bytes == 32 * catalog.NUM_PARAMETERS[name]
    assert estimate.gradient_bytes == 4 * catalog.NUM_PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "published_gb"), [("edm-cifar10-uncond", 13.0), ("edm-imagenet64", 46.7), ("edm-ffhq64", 31.1)]
)
def test_the_memory_estimate_is_near_what_the_published_runs_allocated(name: str, published_gb: float) -> None:
    entry = TEACHERS[name]
    estimate = Memory.of(entry.recipes["sida"], entry.net, catalog.NUM_PARAMETERS[name], num_devices=8)
    # Their code is another: it keeps other tensors, and adds gradients up in float32.
    total_gb = (estimate.total_bytes - 8 * catalog.NUM_PARAMETERS[name]) / 1e9
    assert total_gb == pytest.approx(published_gb, rel=0.2)


def test_the_memory_estimate_follows_the_levers() -> None:
    entry, num_parameters = TEACHERS["edm2-s"], catalog.NUM_PARAMETERS["edm2-s"]
    recipe = entry.recipes["sida"]

    def of(num_devices: int = 1, **settings: Any) -> Memory:
        return Memory.of(recipe, entry.net, num_parameters, Execution(**settings), num_devices=num_devices)

    assert of().gradient_bytes == 12 * num_parameters  # 32 passes, summed in float64
    assert of(8, shard=True).state_bytes < of().state_bytes / 7
    assert of(8, shard=False) == of()
    # The whole is counted a sixth lower than when a third was the bound; what checkpoints keep is as it was.
    assert of(checkpoint_activations=True).activation_bytes < 0.4 * of().activation_bytes
    assert of(batch_per_device=128).activation_bytes > 1.8 * of(batch_per_device=64).activation_bytes
    assert of().activation_bytes == of(batch_per_device=64).activation_bytes
    # In half precision a tenth of the weights that are held normalised stays float32.
    in_float32 = dataclasses.replace(recipe, precision="fp32")
    assert Memory.of(in_float32, entry.net, num_parameters).activation_bytes == pytest.approx(
        2 * of().activation_bytes, rel=1e-2
    )
