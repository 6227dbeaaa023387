import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sidactl import nets, sampling
from sidactl.data.codec import LatentCodec, PixelCodec, decode_affine
from sidactl.errors import SidaError
from sidactl.foreign import networks
from sidactl.nets import Preconditioned
from sidactl.noise import karras_sigmas
from sidactl.recipes import HeunSpec, OneStepSpec
from tests.golden import golden, golden_metrics
from tests.playback import IdentityVae
from tests.worlds import TINY

CPU = torch.device("cpu")
HEUN = ["edm_heun18_ddpmpp_uncond", "edm_heun18_ddpmpp_cond", "edm_churn_adm_cond"]
HEUN_EDM2 = [
    "edm2_heun32_cond",
    "edm2_heun32_cond_fp16params",
    "edm2_heun32_uncond_rgb",
    "edm2_guided_heun18",
    "edm2_guided_churn_class2",
]
ONE_STEP = [
    "onestep_sida_gen_edm",
    "onestep_sida_gen_edm_class1_sigma1.75",
    "onestep_sid_v1_gen_edm",
    "onestep_sid_v1_gen_edm_class1_sigma1.75",
]
ONE_STEP_EDM2 = [
    "onestep_sid_gen_edm2_nogan",
    "onestep_sid_gen_edm2_nogan_class1_sigma1.75",
    "onestep_sida_gen_edm2_gan_forcenorm",
    "onestep_sida_gen_edm2_gan_forcenorm_class1_sigma1.75",
]


def assert_close(images: Tensor, expected: np.ndarray, atol: float = 1e-4) -> None:
    torch.testing.assert_close(images.to(torch.float64), torch.from_numpy(expected).double(), rtol=0, atol=atol)


def assert_same_pixels(pixels: Tensor, expected: np.ndarray) -> None:
    assert pixels.dtype == torch.uint8
    levels = pixels.numpy().astype(int) - expected.astype(int)
    assert np.abs(levels).max() <= 1
    assert (levels != 0).mean() <= 1e-3


def assert_same_start(net: Preconditioned, arrays: Any, class_index: int | None) -> None:
    """Noise and labels of these seeds, and the noise of later steps, are the recorded ones, bit for bit."""
    noise = sampling.SeededNoise(seeds_of(arrays), CPU)
    latents = arrays["noise" if "noise" in arrays else "latents"]
    np.testing.assert_array_equal(noise.normal(latents.shape[1:]).numpy(), latents)
    drawn = noise.integers(net.spec.label_dim).numpy() if net.spec.label_dim else None
    if drawn is not None and class_index is None:
        np.testing.assert_array_equal(drawn, arrays["class_labels"].argmax(1))
    for recorded in arrays.get("step_noise", []):
        again = noise.normal(latents.shape[1:], torch.from_numpy(recorded).dtype)
        np.testing.assert_array_equal(again.numpy(), recorded)


def assert_same_labels(labels: Tensor | None, arrays: Any) -> None:
    assert (labels is not None) == ("class_labels" in arrays)
    if labels is not None:
        np.testing.assert_array_equal(labels.numpy(), arrays["class_labels"].argmax(1))


def seeds_of(arrays: Any) -> list[int]:
    return [int(seed) for seed in arrays["seeds"]]


@pytest.mark.parametrize("name", HEUN)
def test_heun_sampler_matches_golden(name: str) -> None:
    settings = json.loads(golden(f"samplers/{name}.json").read_text())
    arrays = np.load(golden(f"samplers/{name}.npz"))
    net = networks.read_network(golden(settings["network"]))
    options = settings["sampler_kwargs"]
    sampler = HeunSpec.from_json({k: float(v) if k.startswith("S_") else v for k, v in options.items()})
    class_index = settings.get("class_idx")
    assert_same_start(net, arrays, class_index)
    images, labels = sampling.sample_batch(net, sampler, seeds_of(arrays), CPU, class_index=class_index)
    assert images.dtype == torch.float64
    assert_same_labels(labels, arrays)
    assert_close(images, arrays["images"])
    assert_same_pixels(PixelCodec().decode(images).permute(0, 2, 3, 1), arrays["images_uint8"])
    sigmas = karras_sigmas(sampler.num_steps, sampler.sigma_min, sampler.sigma_max, sampler.rho)
    np.testing.assert_allclose(sigmas.numpy(), arrays["t_steps"], rtol=1e-12)


@pytest.mark.parametrize("name", HEUN_EDM2)
def test_edm2_heun_sampler_matches_golden(name: str) -> None:
    settings = json.loads(golden(f"samplers/{name}.json").read_text())
    arrays = np.load(golden(f"samplers/{name}.npz"))
    net = networks.read_network(golden(settings["net"]))
    if settings["params"] == "as stored (fp16)":
        net.half()
    guide = networks.read_network(golden(settings["gnet"])) if settings["gnet"] else None
    options = settings["sampler_kwargs"]
    guidance = options.pop("guidance", 1.0)
    sampler, class_index = HeunSpec.from_json({"convention": "edm2"} | options), settings["class_idx"]
    assert_same_start(net, arrays, class_index)
    images, labels = sampling.sample_batch(
        net, sampler, seeds_of(arrays), CPU, class_index=class_index, guide=guide, guidance=guidance
    )
    assert images.dtype == torch.float32
    assert_same_labels(labels, arrays)
    assert_close(images, arrays["latents"])
    if net.spec.img_channels == 3:
        assert_same_pixels(PixelCodec().decode(images), arrays["images_uint8"])
    else:
        assert_close(decode_affine(images), arrays["raw_vae_latents"], atol=1e-3)


def one_step(name: str) -> tuple[Preconditioned, OneStepSpec, int | None, Any]:
    """Generator, sampler settings, fixed class and arrays of a golden file, its draws checked."""
    arrays = np.load(golden(f"samplers/{name}.npz"))
    network = name.removeprefix("onestep_").removesuffix("_class1_sigma1.75")
    net = networks.read_network(golden(f"networks/{network}.pkl"))
    class_index = 1 if "class1" in name else None
    assert_same_start(net, arrays, class_index)
    return net, OneStepSpec(sigma_init=float(arrays["sigma_G"])), class_index, arrays


@pytest.mark.parametrize("name", ONE_STEP)
def test_one_step_generation_matches_golden(name: str) -> None:
    net, sampler, class_index, arrays = one_step(name)
    images, labels = sampling.sample_batch(net, sampler, seeds_of(arrays), CPU, class_index=class_index)
    assert_same_labels(labels, arrays)
    assert_close(images, arrays["images"])
    assert_same_pixels(PixelCodec().decode(images).permute(0, 2, 3, 1), arrays["images_uint8"])


@pytest.mark.parametrize("name", ONE_STEP_EDM2)
def test_edm2_one_step_generation_matches_golden(name: str) -> None:
    net, sampler, class_index, arrays = one_step(name)
    images, labels = sampling.sample_batch(net, sampler, seeds_of(arrays), CPU, class_index=class_index)
    assert_same_labels(labels, arrays)
    for output in ("generator_output", "generator_output_second_call"):
        assert_close(images, arrays[output], atol=2e-5)
    assert_close(decode_affine(images), arrays["vae_input"], atol=2e-4)
    (batch,) = sampling.generate(
        net, seeds_of(arrays), sampler, device=CPU, class_index=class_index, codec=LatentCodec(IdentityVae)
    )
    assert_same_labels(batch.labels, arrays)
    assert_same_pixels(batch.images, arrays["uint8_identity_vae"])


class Recorded:
    """Noise of later steps as recorded, in place of `SeededNoise`."""

    def __init__(self, draws: np.ndarray) -> None:
        self._draws = list(torch.from_numpy(draws))

    def normal(self, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._draws.pop(0)


@pytest.mark.parametrize("name", ONE_STEP_EDM2)
def test_three_step_generation_matches_golden(name: str) -> None:
    net, sampler, _, arrays = one_step(name)
    latents, labels = (torch.from_numpy(arrays[k]) for k in ("latents", "class_labels"))
    noise: Any = Recorded(arrays["multistep3_draws"])
    images = sampling.few_steps(net, latents, labels, dataclasses.replace(sampler, num_steps=3), noise)
    assert_close(images, arrays["multistep3"], atol=2e-5)


def test_draws_of_a_seed_match_golden_generation_inputs() -> None:
    arrays = np.load(golden_metrics("generation_inputs/arrays.npz"))
    noise = sampling.SeededNoise([int(seed) for seed in arrays["edm_seeds"]], CPU)
    np.testing.assert_array_equal(noise.normal((3, 4, 4)).numpy(), arrays["edm_noise"])
    np.testing.assert_array_equal(noise.integers(10).numpy(), arrays["edm_labels_after_noise_10"])
    np.testing.assert_array_equal(noise.normal((2, 2)).numpy(), arrays["edm_randn_like_after"])


@pytest.fixture(scope="module")
def net() -> Preconditioned:
    torch.manual_seed(0)
    built = nets.build(TINY).eval().requires_grad_(False)
    for parameter in built.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return built


def drawn(net: Preconditioned, seeds: range | list[int], batch_size: int, **options: Any) -> Tensor:
    sampler = options.pop("sampler", OneStepSpec())
    batches = sampling.generate(net, seeds, sampler, device=CPU, batch_size=batch_size, **options)
    return torch.cat([batch.images for batch in batches])


def test_image_depends_on_its_seed_alone(net: Preconditioned) -> None:
    together, labels = sampling.sample_batch(net, OneStepSpec(), range(12), CPU)
    assert labels is not None
    for size in (1, 5):
        parts = [sampling.sample_batch(net, OneStepSpec(), range(12)[i : i + size], CPU) for i in range(0, 12, size)]
        assert torch.equal(torch.cat([part[1] for part in parts if part[1] is not None]), labels)
        # Another batch size may make torch choose another convolution kernel: that is the last bits of a float.
        torch.testing.assert_close(torch.cat([part[0] for part in parts]), together, rtol=0, atol=1e-5)
    assert torch.equal(drawn(net, [7], 1), drawn(net, [7], 1))


def test_noise_of_a_seed_is_the_same_bits_in_any_batch() -> None:
    together = sampling.SeededNoise(range(6), CPU)
    alone = [sampling.SeededNoise([seed], CPU) for seed in range(6)]
    for _ in range(2):
        assert torch.equal(together.normal((3, 4)), torch.cat([noise.normal((3, 4)) for noise in alone]))
        assert torch.equal(together.integers(9), torch.cat([noise.integers(9) for noise in alone]))


def test_batches_are_sized_and_cover_all_seeds(net: Preconditioned) -> None:
    samples = sampling.generate(net, range(3, 14), OneStepSpec(), device=CPU, batch_size=4)
    assert len(samples) == 3
    assert [seed for batch in samples for seed in batch.seeds] == list(range(3, 14))


def test_a_compiled_net_gets_full_batches_alone_and_each_seed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, compiled = nets.build(TINY).eval(), nets.build(TINY).eval()
    compiled.load_state_dict(usual.state_dict())
    sizes: list[int] = []

    def as_if_compiled(x: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(x))
        return type(compiled).forward(compiled, x, *rest)

    monkeypatch.setattr(compiled, "forward", as_if_compiled)
    wanted, got = (
        list(sampling.generate(net, range(10), OneStepSpec(), device=CPU, batch_size=4)) for net in (usual, compiled)
    )
    assert sizes == [4, 4, 4]
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.seeds == theirs.seeds
        assert ours.labels is not None
        assert theirs.labels is not None
        assert torch.equal(ours.labels, theirs.labels)
        assert_same_pixels(ours.images, theirs.images.numpy())
    sizes.clear()
    list(sampling.generate(compiled, range(3), OneStepSpec(), device=CPU, batch_size=4))
    assert sizes == [3]


def test_fixed_class_leaves_the_noise_as_it_is(net: Preconditioned) -> None:
    samples = sampling.generate(net, range(20), OneStepSpec(), device=CPU, batch_size=20)
    (free,) = samples
    assert free.labels is not None
    (fixed,) = sampling.generate(net, range(20), OneStepSpec(), device=CPU, class_index=3, batch_size=20)
    assert fixed.labels is not None
    assert set(fixed.labels.tolist()) == {3}
    same = free.labels == 3
    assert bool(same.any())
    assert torch.equal(free.images[same], fixed.images[same])


def test_seeds_are_taken_modulo_2_to_the_32(net: Preconditioned) -> None:
    assert torch.equal(drawn(net, [5], 1), drawn(net, [5 + (1 << 32)], 1))


def test_few_steps_lower_the_noise_linearly() -> None:
    class Recorder:
        spec = TINY

        def __init__(self) -> None:
            self.sigmas: list[float] = []

        def __call__(self, x: Tensor, sigma: float, labels: Tensor | None = None) -> Tensor:
            self.sigmas.append(float(sigma))
            return torch.zeros_like(x)

    recorder = Recorder()
    sampling.sample_batch(recorder, OneStepSpec(num_steps=4), [0, 1], CPU)  # type: ignore[arg-type]
    assert recorder.sigmas == [2.5, 1.875, 1.25, 0.625]


class Gaussian:
    """The exact denoiser of data distributed as N(mean, std^2), whose sampling has a closed form."""

    spec = TINY
    mean, std = 0.3, 0.2

    def __call__(self, x: Tensor, sigma: Any, labels: Tensor | None = None) -> Tensor:
        return (self.std**2 * x + sigma**2 * self.mean) / (self.std**2 + sigma**2)


def test_heun_solves_the_probability_flow_of_a_gaussian() -> None:
    images, _ = sampling.sample_batch(Gaussian(), HeunSpec(num_steps=128), range(4), CPU)  # type: ignore[arg-type]
    start = sampling.SeededNoise(range(4), CPU).normal((1, 8, 8)).double() * 80
    exact = Gaussian.mean + (start - Gaussian.mean) * Gaussian.std / (Gaussian.std**2 + 80**2) ** 0.5
    torch.testing.assert_close(images, exact, rtol=0, atol=2e-3)


def test_heun_keeps_to_the_noise_levels_that_the_net_takes_as_the_published_one_does() -> None:
    class Bounded(Gaussian):
        spec = dataclasses.replace(TINY, sigma_min=0.1, sigma_max=10)

    def drawn(net: Any, **settings: Any) -> Tensor:
        return sampling.sample_batch(net, HeunSpec(num_steps=8, **settings), range(2), CPU)[0]

    assert torch.equal(drawn(Bounded()), drawn(Gaussian(), sigma_min=0.1, sigma_max=10))
    narrower = {"sigma_min": 0.5, "sigma_max": 5}
    assert torch.equal(drawn(Bounded(), **narrower), drawn(Gaussian(), **narrower))
    assert torch.equal(drawn(Bounded(), convention="edm2"), drawn(Gaussian(), convention="edm2"))
    with pytest.raises(SidaError) as caught:
        drawn(Bounded(), sigma_min=20)
    assert str(caught.value) == (
        "the network takes noise levels from 0.1 to 10, the sampler's are 20 to 80. Give another network."
    )


def test_number_of_function_evaluations_counts_two_per_step_but_the_last() -> None:
    assert HeunSpec(num_steps=18).nfe == 35
    assert OneStepSpec().nfe == 1


def test_guidance_extrapolates_away_from_the_guide_and_is_off_at_one() -> None:
    class Constant(Gaussian):
        def __init__(self, value: float) -> None:
            self._value = value

        def __call__(self, x: Tensor, sigma: Any, labels: Tensor | None = None) -> Tensor:
            return torch.full_like(x, self._value)

    def level(guidance: float) -> set[float]:
        net: Any = Constant(0.25)
        guide: Any = Constant(0.125)
        images, _ = sampling.sample_batch(net, HeunSpec(num_steps=2), [0], CPU, guide=guide, guidance=guidance)
        (batch,) = sampling.generate(net, [0], HeunSpec(num_steps=2), device=CPU, guide=guide, guidance=guidance)
        assert torch.equal(batch.images, PixelCodec().decode(images))
        return set(images.flatten().tolist())

    assert level(1.0) == {0.25}
    assert level(3.0) == {0.5}


class OtherClasses(Gaussian):
    spec = dataclasses.replace(TINY, label_dim=4)


@pytest.mark.parametrize("counts", [[], [1] * 11])
def test_classes_that_are_not_those_of_the_net_are_one_line(counts: list[int]) -> None:
    net: Any = Gaussian()
    with pytest.raises(SidaError) as error:
        sampling.generate(net, [0], HeunSpec(), device=CPU, class_counts=counts)
    assert str(error.value) == (
        f"the dataset's classes must be those of the net, 10, got {len(counts)}. "
        "Draw classes uniformly: leave out --labels dataset."
    )


class Unconditional(Gaussian):
    spec = dataclasses.replace(TINY, label_dim=0)


def test_class_of_an_unconditional_net_is_one_line() -> None:
    unconditional: Any = Unconditional()
    with pytest.raises(SidaError) as error:
        sampling.generate(unconditional, [0], HeunSpec(), device=CPU, class_index=0)
    assert str(error.value) == (
        "the class must be left out: the net has no classes, got 0. Pass another --class, or none."
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"class_index": 10}, "the class must be between 0 and 9, got 10. Pass another --class, or none."),
        (
            {"guide": Gaussian(), "guidance": 2.0},
            "guidance needs the heun sampler, got a one-step generator. Leave out --guide, or sample a teacher.",
        ),
        (
            {"sampler": HeunSpec(), "guide": OtherClasses()},
            "the guide must fit the net (channels, resolution, classes = 1, 8, 10), got 1, 8, 4. "
            "Pass another --guide; one without classes fits as well.",
        ),
    ],
)
def test_bad_settings_are_one_line(net: Preconditioned, options: dict[str, Any], text: str) -> None:
    with pytest.raises(SidaError) as error:
        drawn(net, range(2), 2, **options)
    assert str(error.value) == text


@pytest.mark.parametrize("spec", [OneStepSpec, HeunSpec])
def test_no_step_at_all_is_refused_by_the_settings_themselves(spec: Any) -> None:
    with pytest.raises(SidaError) as error:
        spec(num_steps=0)
    assert str(error.value) == "num_steps must be at least 1, got 0. Pass another --steps."


def test_classes_drawn_by_their_share_depend_on_the_seed_alone_and_have_that_share() -> None:
    net = nets.build(TINY).eval()
    counts = [0, 30, 0, 0, 10, 0, 0, 0, 0, 0]

    def labels(seeds: range, batch_size: int) -> list[int]:
        samples = sampling.generate(net, seeds, OneStepSpec(), device=CPU, class_counts=counts, batch_size=batch_size)
        found = [batch.labels for batch in samples]
        return [int(label) for batch in found if batch is not None for label in batch]

    drawn = labels(range(400), 100)
    assert set(drawn) == {1, 4}
    assert 250 < drawn.count(1) < 350
    assert labels(range(100, 130), 7) == drawn[100:130]
