import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sidactl import nets, sampling, teachers
from sidactl.codec import PixelCodec
from sidactl.diffusion import Preconditioned, karras_sigmas
from sidactl.errors import SidaError
from sidactl.recipe import HeunSpec, NetSpec, OneStepSpec
from tests.golden import golden

CPU = torch.device("cpu")
HEUN = ["edm_heun18_ddpmpp_uncond", "edm_heun18_ddpmpp_cond", "edm_churn_adm_cond"]
ONE_STEP = {
    "onestep_sida_gen_edm": OneStepSpec(),
    "onestep_sida_gen_edm_class1_sigma1.75": OneStepSpec(sigma_init=1.75),
    "onestep_sid_v1_gen_edm": OneStepSpec(),
    "onestep_sid_v1_gen_edm_class1_sigma1.75": OneStepSpec(sigma_init=1.75),
}
TINY = NetSpec(
    architecture="SongUNet",
    img_resolution=8,
    img_channels=1,
    label_dim=10,
    model_channels=16,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
)


def assert_same_images(images: Tensor, arrays: Any) -> None:
    expected = torch.from_numpy(arrays["images"])
    torch.testing.assert_close(images.to(expected.dtype), expected, rtol=0, atol=1e-4)
    levels = PixelCodec().decode(images).permute(0, 2, 3, 1).numpy().astype(int) - arrays["images_uint8"].astype(int)
    assert np.abs(levels).max() <= 1
    assert (levels != 0).mean() <= 1e-3


def assert_same_start(net: Preconditioned, arrays: Any, class_index: int | None) -> None:
    """Noise and labels of these seeds are the recorded ones, bit for bit."""
    noise = sampling.SeededNoise([int(seed) for seed in arrays["seeds"]], CPU)
    np.testing.assert_array_equal(noise.normal(arrays["latents"].shape[1:]).numpy(), arrays["latents"])
    if net.spec.label_dim and class_index is None:
        np.testing.assert_array_equal(noise.integers(net.spec.label_dim).numpy(), arrays["class_labels"].argmax(1))


@pytest.mark.parametrize("name", HEUN)
def test_heun_sampler_matches_golden(name: str) -> None:
    settings = json.loads(golden(f"samplers/{name}.json").read_text())
    arrays = np.load(golden(f"samplers/{name}.npz"))
    net = teachers.read_network(golden(settings["network"]))
    options = settings["sampler_kwargs"]
    sampler = HeunSpec.from_json({k: float(v) if k.startswith("S_") else v for k, v in options.items()})
    class_index = settings.get("class_idx")
    assert_same_start(net, arrays, class_index)
    seeds = [int(seed) for seed in arrays["seeds"]]
    images, _ = sampling.sample_batch(net, sampler, seeds, CPU, class_index=class_index)
    assert images.dtype == torch.float64
    assert_same_images(images, arrays)
    sigmas = karras_sigmas(sampler.num_steps, sampler.sigma_min, sampler.sigma_max, sampler.rho)
    np.testing.assert_allclose(sigmas.numpy(), arrays["t_steps"], rtol=1e-12)


@pytest.mark.parametrize("name", ONE_STEP)
def test_one_step_generation_matches_golden(name: str) -> None:
    arrays = np.load(golden(f"samplers/{name}.npz"))
    network = name.removeprefix("onestep_").removesuffix("_class1_sigma1.75")
    net = teachers.read_network(golden(f"networks/{network}.pkl"))
    class_index = 1 if "class1" in name else None
    assert_same_start(net, arrays, class_index)
    images, labels = sampling.sample_batch(
        net, ONE_STEP[name], [int(s) for s in arrays["seeds"]], CPU, class_index=class_index
    )
    assert labels is not None
    np.testing.assert_array_equal(labels.numpy(), arrays["class_labels"].argmax(1))
    assert_same_images(images, arrays)


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
    together = drawn(net, range(12), 12)
    # Another batch size may choose another convolution kernel, so that a value on an edge falls to the next level.
    difference = (together.int() - drawn(net, range(12), 5).int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 1e-2
    assert torch.equal(drawn(net, [7], 1), drawn(net, [7], 1))
    assert (together[7].int() - drawn(net, [7], 1)[0].int()).abs().max() <= 1


def test_batches_are_sized_and_cover_all_seeds(net: Preconditioned) -> None:
    samples = sampling.generate(net, range(3, 14), OneStepSpec(), device=CPU, batch_size=4)
    assert len(samples) == 3
    assert [seed for batch in samples for seed in batch.seeds] == list(range(3, 14))


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


def test_number_of_function_evaluations_counts_two_per_step_but_the_last() -> None:
    assert HeunSpec(num_steps=18).nfe == 35
    assert OneStepSpec().nfe == 1


def test_uint8_conversion_truncates_and_clips() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0])
    assert PixelCodec().decode(images).tolist() == [0, 0, 128, 255, 255, 255]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"class_index": 10}, "the class must be between 0 and 9, got 10. Pass another --class, or none."),
        (
            {"sampler": OneStepSpec(num_steps=0)},
            "the number of steps must be >= 1, got 0. Pass --steps 1 or more.",
        ),
    ],
)
def test_bad_settings_are_one_line(net: Preconditioned, options: dict[str, Any], text: str) -> None:
    with pytest.raises(SidaError) as error:
        drawn(net, range(2), 2, **options)
    assert str(error.value) == text
