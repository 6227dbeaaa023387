"""Samples depend on their seeds alone; other settings are another question, or are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sidactl
from sidactl import sampling
from sidactl.commands import resolve, sample
from sidactl.data.codec import PixelCodec
from sidactl.errors import SidaError
from sidactl.nets import Preconditioned
from sidactl.nets.guided import Unlabelled
from sidactl.recipes import HeunSpec, SamplingForm
from sidactl.store import Store
from tests.commands.conftest import refs
from tests.conftest import Finished, Forbid, instead_of, read_only


def test_an_image_depends_on_its_seed_alone(finished: Finished) -> None:
    many = sidactl.sample("generator/best", seeds=range(600), run=finished.root, device="cpu")
    few = sidactl.sample("generator/best", seeds=[599, 3, 501], run=finished.root, device="cpu")
    assert many.images.dtype == np.uint8
    assert many.images.shape == (600, 8, 8, 1)
    assert np.array_equal(few.images, many.images[[599, 3, 501]])
    assert many.labels is not None
    assert few.labels is not None
    assert few.labels.tolist() == many.labels[[599, 3, 501]].tolist()
    assert (list(many.seeds), list(few.seeds)) == (list(range(600)), [599, 3, 501])
    assert many.artifact.results == {"num_images": 600, "nfe": 1}


def test_a_class_can_be_chosen_and_leaves_the_noise_alone(finished: Finished) -> None:
    free = sidactl.sample("generator/best", seeds=range(40), run=finished.root)
    assert free.labels is not None
    fixed = sidactl.sample("generator/best", seeds=range(40), class_index=3, run=finished.root)
    assert fixed.labels is not None
    assert set(fixed.labels) == {3}
    same = free.labels == 3
    assert same.any()
    assert np.array_equal(free.images[same], fixed.images[same])


def test_a_repeated_sample_is_answered_from_the_run_directory(finished: Finished, forbidden: Forbid) -> None:
    first = sidactl.sample("generator/best", seeds=range(10), run=finished.root)
    with forbidden(resolve.load_net):
        again = sidactl.sample("generator/best", seeds=range(10), name="ten", run=finished.root)
    assert again.artifact == first.artifact
    assert refs(finished.root)["samples/ten"] == first.artifact.oid


def test_force_samples_again_and_gets_the_same(finished: Finished) -> None:
    ticks: list[tuple[int, int]] = []
    first = sidactl.sample("generator/best", seeds=[5, 9], run=finished.root)
    again = sidactl.sample(
        "generator/best", seeds=[5, 9], force=True, run=finished.root, tick=lambda *done: ticks.append(done)
    )
    assert again.artifact == first.artifact
    assert ticks == [(2, 2)]


def test_steps_and_sampler_are_those_of_the_net_unless_asked_for(finished: Finished) -> None:
    def nfe(ref: str, **options: Any) -> object:
        return sidactl.sample(ref, seeds=[0], run=finished.root, **options).artifact.results["nfe"]

    assert nfe("tiny-digits") == 35
    assert nfe("tiny-digits", steps=4) == 7
    assert nfe("tiny-digits", sampler="heun", steps=1) == 1
    assert nfe("tiny-digits", sampler="one-step") == 1
    assert nfe("generator/best") == 1
    assert nfe("generator/best", steps=3) == 3


def test_settings_of_heuns_sampler_take_the_place_of_the_teachers_own(finished: Finished) -> None:
    heun: dict[str, float] = {"sigma_min": 0.01, "sigma_max": 40, "rho": 5, "S_churn": 3, "S_min": 0.1, "S_max": 20}

    def drawn(**options: Any) -> sample.Sampled:
        return sidactl.sample("tiny-digits", num=2, run=finished.root, **options)

    made = drawn(steps=4, heun=heun | {"S_noise": 1.01})
    spec = HeunSpec(
        num_steps=4, sigma_min=0.01, sigma_max=40.0, rho=5.0, S_churn=3.0, S_min=0.1, S_max=20.0, S_noise=1.01
    )
    assert made.artifact.params["sampler"] == spec.to_json()
    net = sidactl.load("tiny-digits", finished.root)
    (batch,) = sampling.generate(net, range(2), spec, device=torch.device("cpu"))
    assert np.array_equal(made.images, batch.images.permute(0, 2, 3, 1).numpy())
    assert drawn(steps=4).oid != made.oid
    assert drawn(steps=4, heun={"rho": 7}).oid == drawn(steps=4).oid  # the teacher's own


def test_another_precision_is_another_question_and_another_form_is_not(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, torch.memory_format]] = []
    generate = sampling.generate

    def noting(net: Preconditioned, *arguments: Any, **options: Any) -> sampling.Samples:
        seen.append((net.compute_dtype, net.memory_format))
        return generate(net, *arguments, **options)

    instead_of(sampling.generate, noting, monkeypatch)

    def images(force: bool = False, **setting: Any) -> sample.Sampled:
        return sidactl.sample(
            "generator/best", seeds=range(80), setting=SamplingForm(**setting), force=force, run=finished.root
        )

    usual, half, by_pixel = images(force=True), images(precision="bf16"), images(force=True, channels_last=True)
    assert seen == [
        (torch.float32, torch.contiguous_format),
        (torch.bfloat16, torch.contiguous_format),
        (torch.float32, torch.channels_last),
    ]
    assert "precision" not in usual.artifact.params
    assert half.artifact.params["precision"] == "bf16"
    apart = {
        name: np.abs(other.images.astype(int) - usual.images) for name, other in (("bf16", half), ("form", by_pixel))
    }
    assert 0 < apart["bf16"].mean() < 1
    assert apart["form"].max() <= 1
    assert images(channels_last=True).artifact == images().artifact
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("ref", "options", "message"),
    [
        (
            "generator/best",
            {"setting": SamplingForm(precision="tf32")},
            "precision must be fp32, fp16 or bf16 here, got tf32. Pass another --precision.",
        ),
        ("generator/best", {"seeds": []}, "sample count must be >= 1, got 0. Pass --num 1 or more."),
        (
            "generator/best",
            {"class_index": 10},
            "the class must be between 0 and 9, got 10. Pass another --class, or none.",
        ),
        (
            "generator/best",
            {"class_index": -1},
            "the class must be between 0 and 9, got -1. Pass another --class, or none.",
        ),
        ("generator/best", {"steps": 0}, "the number of steps must be >= 1, got 0. Pass --steps 1 or more."),
        (
            "generator/best",
            {"sampler": "heun"},
            "the heun sampler needs a teacher, got a one-step generator. Leave out --sampler: --steps takes more than "
            "one.",
        ),
        (
            "tiny-digits",
            {"sampler": "ddim"},
            "the sampler must be one-step or heun, got 'ddim'. Pass --sampler heun.",
        ),
        (
            "generator/best",
            {"heun": {"S_churn": 1}},
            "--s-churn is of the heun sampler of a teacher, got one-step. Leave out --s-churn.",
        ),
        (
            "tiny-digits",
            {"heun": {"rho": 5}, "sampler": "one-step"},
            "--rho is of the heun sampler of a teacher, got one-step. Leave out --rho.",
        ),
        (
            "tiny-digits",
            {"heun": {"S_noise": 1.1}},
            "--s-noise counts with churn alone, got --s-churn 0. Pass --s-churn, such as 40.",
        ),
        (
            "tiny-digits",
            {"heun": {"sigma_min": 90}},
            "sigma_min must be below sigma_max, 80, got 90.0. Pass another --sigma-min.",
        ),
        (
            "tiny-digits",
            {"heun": {"S_churn": -1.0}},
            "S_churn must be at least 0 and finite, got -1.0. Pass another --s-churn.",
        ),
        (
            "tiny-digits",
            {"heun": {"num_steps": 4}},
            "unknown setting 'num_steps' of Heun's sampler. "
            "It has sigma_min, sigma_max, rho, S_churn, S_min, S_max, S_noise.",
        ),
        ("generator/none", {}, "no ref 'generator/none' in {root}. See what there is with: sidactl ls"),
        (
            "dataset/tiny-digits",
            {},
            "'dataset/tiny-digits' must be of kind teacher or generator, got dataset. "
            "See what there is with: sidactl ls",
        ),
        (
            "generator/best",
            {"device": "cuda:99"},
            "device cuda:99 is not there: torch sees {gpus} GPUs. Pass --device cpu.",
        ),
    ],
)
def test_sample_refuses_what_it_cannot_do(finished: Finished, ref: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SidaError) as caught:
        sidactl.sample(ref, **({"seeds": range(3), "run": finished.root, "force": True} | options))
    assert str(caught.value) == message.format(root=finished.root, gpus=torch.cuda.device_count())
    assert caught.value.exit_code == 2


def test_load_gives_the_denoiser_ready_for_use(finished: Finished) -> None:
    net = sidactl.load("generator/best", finished.root)
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    assert net(torch.zeros(2, 1, 8, 8), 2.5, torch.tensor([0, 9])).shape == (2, 1, 8, 8)


def test_samples_that_could_not_be_kept_are_not_drawn(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, forbidden: Forbid
) -> None:
    monkeypatch.setattr(Store, "_writing", read_only)
    with (
        forbidden(resolve.load_net),
        pytest.raises(SidaError, match=r"^the run directory .* cannot be written: Read-only file system\."),
    ):
        sidactl.sample("generator/best", seeds=range(777), run=finished.root)


def test_guidance_moves_away_from_the_guide(edm2: tuple[Path, str], finished: Finished) -> None:
    root, _ = edm2
    weak = sidactl.train_teacher("tiny-digits", name="weak", duration_nimg=64, batch_size=32, run=root).oid
    plain = sidactl.sample("tiny-digits", seeds=range(4), steps=4, run=root)
    same = sidactl.sample("tiny-digits", seeds=range(4), steps=4, guide=weak, guidance=1.0, run=root)
    guided = sidactl.sample("tiny-digits", seeds=range(4), steps=4, guide=weak, guidance=2.0, run=root)
    assert (same.images == plain.images).all()
    assert (guided.images != plain.images).any()
    assert guided.artifact.inputs["guide"] == weak
    assert guided.artifact.params["guidance"] == 2.0
    for options, message in (
        (
            {"guidance": 2.0, "sampler": "one-step"},
            "guidance needs the heun sampler of a teacher. Leave out --guidance.",
        ),
        (
            {"guidance_interval": (0.2, 3.0)},
            "a guidance interval counts for nothing with --guidance 1. Pass --guidance 1.4, too.",
        ),
        (
            {"guidance": 2.0, "guidance_interval": (3.0, 0.2)},
            "the guidance interval must be two noise levels, the lower first, that reach into 0.002 to 80, got 3,0.2. "
            "Pass --guidance-interval 0.2,3.",
        ),
        (
            {"guidance": 2.0, "guidance_interval": (0.2, float("inf"))},
            "the guidance interval must be two noise levels, the lower first, that reach into 0.002 to 80, got "
            "0.2,inf. Pass --guidance-interval 0.2,3.",
        ),
        (
            {"guide": weak, "sampler": "one-step"},
            "guidance needs the heun sampler, got a one-step generator. Leave out --guide, or sample a teacher.",
        ),
        ({"guide": weak, "guidance": float("nan")}, "guidance must be finite, got nan. Pass another --guidance."),
        ({"guidance": float("inf")}, "guidance must be finite, got inf. Pass another --guidance."),
    ):
        with pytest.raises(SidaError) as caught:
            sidactl.sample("tiny-digits", seeds=[0], run=root, **options)  # type: ignore[arg-type]
        assert str(caught.value) == message


def test_a_teacher_guides_itself_without_labels_and_at_the_noise_levels_that_are_asked_for(finished: Finished) -> None:
    def images(**options: Any) -> Any:
        return sidactl.sample("tiny-digits", seeds=range(4), steps=4, run=finished.root, **options).images

    plain, guided = images(), images(guidance=3.0)
    assert (plain != guided).any()
    assert (images(guidance=3.0, guidance_interval=(79.0, 79.5)) == plain).all()
    assert (images(guidance=3.0, guidance_interval=(0.0, 300.0)) == guided).all()
    part = images(guidance=3.0, guidance_interval=(0.0, 1.0))
    assert (part != plain).any()
    assert (part != guided).any()
    net = sidactl.load("tiny-digits", finished.root)
    noise = sampling.SeededNoise(range(4), torch.device("cpu"))
    latents, labels = noise.normal((1, 8, 8)), torch.nn.functional.one_hot(noise.integers(10), 10).float()
    with torch.no_grad():
        drawn = sampling.heun(net, latents, labels, HeunSpec(num_steps=4), noise, guide=Unlabelled(net), guidance=3.0)
    assert (PixelCodec().decode(drawn).permute(0, 2, 3, 1).numpy() == guided).all()


def test_a_one_step_generator_does_not_guide(finished: Finished) -> None:
    with pytest.raises(SidaError) as caught:
        sidactl.sample("tiny-digits", seeds=[0], guide="generator/best", guidance=2.0, run=finished.root)
    assert str(caught.value) == (
        "'generator/best' must be of kind teacher, got generator. See what there is with: sidactl ls"
    )
