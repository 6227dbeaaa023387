"""Images from networks: one-step and few-step generators, and the teachers' Heun sampler.

Noise and label of an image depend on its seed alone, drawn in the order of the published scripts: first the latent,
then (on a conditional net) the class, then the noise of later steps. So any batch size gives the same images.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sidactl.data.codec import Codec, codec_for
from sidactl.engine.configure import is_compiled
from sidactl.engine.devices import keep_memory
from sidactl.engine.ranks import rank_share
from sidactl.engine.threads import map_ordered, threads_for
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.nets import Denoiser, Preconditioned
from sidactl.nets.denoiser import as_one_hot
from sidactl.nets.guided import Unlabelled
from sidactl.nets.steps import stepwise
from sidactl.noise import karras_sigmas
from sidactl.recipes import HeunSpec, OneStepSpec


class NotFiniteError(SidaError):
    """An image that no pixels can stand for; what was drawn is not to be used."""


class SeededNoise:
    """One random generator per image, each seeded with the image's seed modulo 2^32."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._generators = [torch.Generator(device).manual_seed(int(seed) % (1 << 32)) for seed in seeds]

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Unit normal [B, *shape]."""
        draws = [torch.randn(*shape, generator=g, device=self._device, dtype=dtype) for g in self._generators]
        return torch.stack(draws)

    def integers(self, high: int) -> Tensor:
        """Uniform in 0 .. high - 1, [B] int64."""
        return torch.stack([torch.randint(high, (), generator=g, device=self._device) for g in self._generators])


@dataclass(frozen=True)
class SampleBatch:
    """images uint8 [B, C, H, W]; labels int64 [B], or None from an unconditional net; the images' seeds."""

    images: Tensor
    labels: Tensor | None
    seeds: Sequence[int]


@dataclass(frozen=True)
class Samples:
    """A sized iterable of SampleBatch on the CPU, computed as it is read.

    Reading raises NotFiniteError, naming the seed, where an image holds NaN or infinity.
    """

    net: Denoiser
    sampler: OneStepSpec | HeunSpec
    seeds: Sequence[int]
    device: torch.device
    codec: Codec
    class_index: int | None = None
    class_counts: Sequence[int] | None = None
    guide: Denoiser | Unlabelled | None = None
    guidance: float = 1.0
    guidance_interval: Sequence[float] = ()
    batch_size: int = 256

    def __len__(self) -> int:
        return -(-len(self.seeds) // self.batch_size)

    def __iter__(self) -> Iterator[SampleBatch]:
        return self._made(self._starts)

    def shared(self, first: int = 0) -> Iterator[SampleBatch]:
        """This process's share of the batches from this one on; an image depends on its seed."""
        return self._made(rank_share(self._starts[first:]))

    def _made(self, starts: Sequence[int]) -> Iterator[SampleBatch]:
        keep_memory()
        return map_ordered(self._batch, starts, threads_for(self.net))

    @property
    def _starts(self) -> range:
        return range(0, len(self.seeds), self.batch_size)

    @torch.inference_mode()
    def _batch(self, start: int) -> SampleBatch:
        seeds = drawn = self.seeds[start : start + self.batch_size]
        if start and is_compiled(self.net):  # a smaller batch would be compiled anew
            drawn = [*seeds, *[seeds[-1]] * (self.batch_size - len(seeds))]
        images, labels = sample_batch(
            self.net,
            self.sampler,
            drawn,
            self.device,
            class_index=self.class_index,
            class_counts=self.class_counts,
            guide=self.guide,
            guidance=self.guidance,
            guidance_interval=self.guidance_interval,
        )
        images, labels = images[: len(seeds)], None if labels is None else labels[: len(seeds)].cpu()
        bad = images.flatten(1).isfinite().all(1).logical_not().nonzero()
        if len(bad):
            raise NotFiniteError(
                f"the image of seed {seeds[int(bad[0])]} is not finite",
                "Take another network or precision, or less --guidance.",
                exit_code=EXIT_FAILED,
            )
        return SampleBatch(self.codec.decode(images).cpu(), labels, seeds)


def generate(
    net: Denoiser,
    seeds: Sequence[int],
    sampler: OneStepSpec | HeunSpec,
    *,
    device: torch.device,
    class_index: int | None = None,
    class_counts: Sequence[int] | None = None,
    guide: Denoiser | Unlabelled | None = None,
    guidance: float = 1.0,
    guidance_interval: Sequence[float] = (),
    codec: Codec | None = None,
    load_vae: Callable[[], Any] | None = None,
    batch_size: int = 256,
) -> Samples:
    """Images for these seeds.

    class_counts: images of each class in a dataset; then classes are drawn by their share of it, else uniformly.
    guide, guidance: a weaker net and how far to move away from it (1 = not at all), for Heun's sampler alone.
    guidance_interval: the lowest and the highest noise level at which it does; () = all.
    codec: by default that of the net's channels, where four are latents that the VAE decodes; load_vae: gives it.
    Raises SidaError for classes that the net does not have, and for a guide that does not fit.
    """
    if class_index is not None and not 0 <= class_index < net.spec.label_dim:
        what = f"between 0 and {net.spec.label_dim - 1}" if net.spec.label_dim else "left out: the net has no classes"
        raise SidaError(f"the class must be {what}, got {class_index}", "Pass another --class, or none.")
    if class_counts is not None and net.spec.label_dim and not (0 < len(class_counts) <= net.spec.label_dim):
        raise SidaError(
            f"the dataset's classes must be those of the net, {net.spec.label_dim}, got {len(class_counts)}",
            "Draw classes uniformly: leave out --labels dataset.",
        )
    if guide is not None:
        _check_guide(guide, net, sampler)
    codec = codec or codec_for(net.spec.img_channels, load_vae)
    guided = (guide, guidance, guidance_interval)
    return Samples(net, sampler, seeds, device, codec, class_index, class_counts, *guided, batch_size)


def _check_guide(guide: Denoiser | Unlabelled, net: Denoiser, sampler: OneStepSpec | HeunSpec) -> None:
    if isinstance(sampler, OneStepSpec):
        raise SidaError(
            "guidance needs the heun sampler, got a one-step generator", "Leave out --guide, or sample a teacher."
        )
    wanted, got = ((n.spec.img_channels, n.spec.img_resolution, n.spec.label_dim) for n in (net, guide))
    if wanted[:2] != got[:2] or got[2] not in (0, wanted[2]):
        raise SidaError(
            f"the guide must fit the net (channels, resolution, classes = {wanted[0]}, {wanted[1]}, {wanted[2]}), "
            f"got {got[0]}, {got[1]}, {got[2]}",
            "Pass another --guide; one without classes fits as well.",
        )


@torch.inference_mode()
def sample_batch(
    net: Denoiser,
    sampler: OneStepSpec | HeunSpec,
    seeds: Sequence[int],
    device: torch.device,
    *,
    class_index: int | None = None,
    class_counts: Sequence[int] | None = None,
    guide: Denoiser | Unlabelled | None = None,
    guidance: float = 1.0,
    guidance_interval: Sequence[float] = (),
) -> tuple[Tensor, Tensor | None]:
    """Images in [-1, 1], or latents, and class indices for these seeds.

    Images are [B, C, H, W]; float64 from an EDM-style Heun sampler, else float32.
    """
    noise = SeededNoise(seeds, device)
    latents, labels = _drawn(net, noise, class_counts)
    if labels is not None and class_index is not None:
        labels = torch.full_like(labels, class_index)
    one_hot = as_one_hot(labels, net.spec.label_dim, device)
    if isinstance(sampler, OneStepSpec):
        return few_steps(net, latents, one_hot, sampler, noise), labels
    guided: Any = {"guide": guide, "guidance": guidance, "guidance_interval": guidance_interval}
    return heun(net, latents, one_hot, sampler, noise, **guided), labels


def _drawn(net: Denoiser, noise: SeededNoise, class_counts: Sequence[int] | None) -> tuple[Tensor, Tensor | None]:
    """The unit latents [B, C, H, W] of images, and their class indices [B]."""
    spec = net.spec
    latents = noise.normal((spec.img_channels, spec.img_resolution, spec.img_resolution))
    if not spec.label_dim:
        return latents, None
    if class_counts is None:
        return latents, noise.integers(spec.label_dim)
    last = torch.tensor(class_counts, device=latents.device).cumsum(0)
    return latents, torch.searchsorted(last, noise.integers(int(last[-1])), right=True)


OTHER_NOISE = 1 << 31
"""from a seed to that of the noise that its image is not of, in random pairs"""


@torch.inference_mode()
def paired_batch(
    net: Denoiser,
    sampler: OneStepSpec,
    teacher: Denoiser,
    ode: HeunSpec,
    seeds: Sequence[int],
    device: torch.device,
    class_counts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a generator draws, what its teacher's ODE draws, and what the generator draws of other noise, same classes.

    The first two are of the same unit noise z, which the generator takes as sigma_init z, and the ODE starts from as
    sigma_max z. Each is [B, C, H, W] in [-1, 1], or latents. ode: without churn, so that the image follows from z.
    """
    assert ode.S_churn == 0
    noise, other = SeededNoise(seeds, device), SeededNoise([seed + OTHER_NOISE for seed in seeds], device)
    latents, labels = _drawn(net, noise, class_counts)
    other_latents, _ = _drawn(net, other, class_counts)
    one_hot = as_one_hot(labels, net.spec.label_dim, device)
    return (
        few_steps(net, latents, one_hot, sampler, noise),
        heun(teacher, latents, one_hot, ode, noise),
        few_steps(net, other_latents, one_hot, sampler, other),
    )


class Exported(torch.nn.Module):
    """A generator with all its steps as one function, as it is exported.

    Of unit noise [B, C, H, W]; where its steps take fresh noise, that of the later ones, [B, steps - 1, C, H, W]; and
    one-hot labels [B, K] on a conditional net.
    """

    def __init__(self, net: Preconditioned, sampler: OneStepSpec) -> None:
        super().__init__()
        self.net, self.sampler = net.eval(), sampler
        self.levels = [sampler.sigma(step) for step in range(sampler.num_steps)]
        self.takes_noise = len(self.levels) > 1 and sampler.noise == "fresh"
        self.eval()

    def forward(self, latents: Tensor, second: Tensor | None = None, third: Tensor | None = None) -> Tensor:
        """Images in [-1, 1], or latents, float32 [B, C, H, W]; noise and labels as far as they are taken."""
        noise, labels = (second, third) if self.takes_noise else (None, second)
        fresh = iter(() if noise is None else noise.unbind(1))

        def denoise(x: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
            images: Tensor = self.net(x, torch.tensor(sigma), labels)
            return images

        net = cast(Denoiser, denoise)
        return stepwise(net, latents, labels, self.levels, self.sampler.noise, lambda: next(fresh))


def few_steps(
    net: Denoiser, latents: Tensor, labels: Tensor | None, sampler: OneStepSpec, noise: SeededNoise
) -> Tensor:
    """Images of a distilled generator by the steps of its sampler."""
    levels = [sampler.sigma(step) for step in range(sampler.num_steps)]
    return stepwise(net, latents, labels, levels, sampler.noise, lambda: noise.normal(latents.shape[1:]))


def heun(
    net: Denoiser,
    latents: Tensor,
    labels: Tensor | None,
    sampler: HeunSpec,
    noise: SeededNoise,
    *,
    guide: Denoiser | Unlabelled | None = None,
    guidance: float = 1.0,
    guidance_interval: Sequence[float] = (),
) -> Tensor:
    """Images of a diffusion model by Heun's method with optional churn; the last step is Euler's.

    With a guide net, D = D_guide + guidance (D_net - D_guide), at noise levels of the interval. Source: EDM
    (2206.00364), Algorithm 2; autoguidance (2406.02507), eq. 4; the interval 2404.07724.
    """
    lowest, highest = guidance_interval or (0.0, math.inf)
    dtype = torch.float64 if sampler.convention == "edm" else torch.float32

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        denoised = net(x, sigma, labels).to(dtype)
        if guide is None or guidance == 1 or not lowest <= float(sigma) <= highest:
            return denoised
        return guide(x, sigma, labels).to(dtype).lerp(denoised, guidance)

    low, high = _levels(net, sampler)
    sigmas = karras_sigmas(sampler.num_steps, low, high, sampler.rho, dtype=dtype)
    sigmas = sigmas.to(latents.device)
    x = latents.to(dtype) * sigmas[0]
    for step in range(sampler.num_steps):
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        churns = sampler.S_churn > 0 and sampler.S_min <= float(sigma) <= sampler.S_max
        if sampler.S_churn > 0 and (churns or sampler.convention == "edm"):
            drawn = noise.normal(x.shape[1:], dtype)
        if churns:
            raised = sigma * (1 + min(sampler.S_churn / sampler.num_steps, 2**0.5 - 1))
            x = x + (raised**2 - sigma**2).sqrt() * sampler.S_noise * drawn
            sigma = raised
        slope = (x - denoise(x, sigma)) / sigma
        ahead = x + (sigma_next - sigma) * slope
        if step < sampler.num_steps - 1:
            slope_ahead = (ahead - denoise(ahead, sigma_next)) / sigma_next
            ahead = x + (sigma_next - sigma) * (slope + slope_ahead) / 2
        x = ahead
    return x


def _levels(net: Denoiser, sampler: HeunSpec) -> tuple[float, float]:
    """The lowest and highest noise level, within what the net takes; SidaError where the two do not overlap."""
    if sampler.convention != "edm":
        return sampler.sigma_min, sampler.sigma_max
    low, high = max(sampler.sigma_min, net.spec.sigma_min), min(sampler.sigma_max, net.spec.sigma_max)
    if low >= high:
        raise SidaError(
            f"the network takes noise levels from {net.spec.sigma_min:g} to {net.spec.sigma_max:g}, the sampler's are "
            f"{sampler.sigma_min:g} to {sampler.sigma_max:g}",
            "Give another network.",
        )
    return low, high
