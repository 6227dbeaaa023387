import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from sidactl import catalog
from sidactl.commands.evaluation import vae_dtype
from sidactl.data.codec import LatentCodec, PixelCodec, codec_for, decode_affine, encode_affine, stable_diffusion_vae
from sidactl.errors import SidaError
from tests.golden import golden, golden_metrics
from tests.playback import IdentityVae, Playback, save_vae

NO_DRAWS = Playback([])


def numbers() -> Any:
    arrays = np.load(golden_metrics("latents/latents.npz"))
    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_posterior_sample_matches_golden_losses_vae_latent_affine() -> None:
    arrays = np.load(golden("losses/vae_latent_affine.npz"))
    encoded = LatentCodec().encode(torch.from_numpy(arrays["raw_mean_std"]), Playback([arrays["draw_randn"]]))
    close(encoded, torch.from_numpy(arrays["encoded"]))
    scale, bias = (torch.from_numpy(arrays[name]).reshape(1, 4, 1, 1) for name in ("scale", "bias"))
    close(encode_affine(torch.ones(1, 4, 1, 1)), scale + bias)
    close(encode_affine(torch.zeros(1, 4, 1, 1)), bias)


def test_latents_match_golden_metrics_latents() -> None:
    n = numbers()
    raw = n["raw_latents"]
    close(LatentCodec().encode(raw, Playback([n["noise_manual_seed123"].numpy()])), n["final_with_noise"])
    without_std = torch.cat([raw[:, :4], torch.zeros_like(raw[:, 4:])], dim=1)
    close(LatentCodec().encode(without_std, Playback([n["noise_manual_seed123"].numpy()])), n["final_std_zero"])
    close(decode_affine(n["final_with_noise"]), n["vae_decoder_input"])
    vae = IdentityVae(n["stub_vae_output"].numpy())
    assert torch.equal(LatentCodec(lambda: vae).decode(n["final_with_noise"]), n["decoded_uint8"])
    close(vae.seen[0], n["vae_decoder_input"])
    vae = IdentityVae()
    LatentCodec(lambda: vae).mean_and_std(n["pixels_uint8"])
    assert torch.equal(vae.seen[0], n["vae_encoder_input"])


def test_pixels_match_golden_metrics_latents() -> None:
    n = numbers()
    assert torch.equal(PixelCodec().encode(torch.arange(256, dtype=torch.uint8), NO_DRAWS), n["rgb_encode_all_uint8"])
    assert torch.equal(PixelCodec().decode(n["rgb_decode_input"]), n["rgb_decode_output"])
    values = n["unit_decode_input"]
    latents = encode_affine(values.reshape(-1, 1, 1, 1).expand(-1, 4, 1, 1))
    exact = IdentityVae(values.numpy())
    assert torch.equal(LatentCodec(lambda: exact).decode(latents[:4]), n["unit_decode_output"])


def test_affine_there_and_back_is_the_identity() -> None:
    raw = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0)) * 4
    torch.testing.assert_close(decode_affine(encode_affine(raw)), raw, rtol=1e-5, atol=1e-5)


def test_large_batches_go_through_the_vae_in_parts_and_it_is_loaded_once() -> None:
    loaded: list[IdentityVae] = []

    def load() -> IdentityVae:
        loaded.append(IdentityVae())
        return loaded[-1]

    latents = LatentCodec(load)
    assert not loaded
    assert latents.decode(torch.zeros(19, 4, 2, 2)).shape == (19, 4, 2, 2)
    statistics = latents.mean_and_std(torch.full((9, 3, 2, 2), 255, dtype=torch.uint8))
    assert torch.equal(statistics, torch.tensor([1.0, 2.0]).repeat_interleave(3).reshape(1, 6, 1, 1).expand(9, 6, 2, 2))
    (vae,) = loaded
    assert [len(part) for part in vae.seen] == [8, 8, 3, 8, 1]


def test_in_half_precision_the_vae_decodes_channels_last_and_pixels_stay_within_rounding() -> None:
    class Half(torch.nn.Conv2d):
        def decode(self, latents: torch.Tensor) -> SimpleNamespace:
            assert latents.dtype == self.weight.dtype
            assert self.weight.is_contiguous(memory_format=torch.channels_last)
            return SimpleNamespace(sample=self(latents).sigmoid())

    torch.manual_seed(0)
    vae, latents = Half(4, 3, 3, padding=1), torch.randn(5, 4, 8, 8)
    with torch.no_grad():
        exact = LatentCodec(lambda: copy.deepcopy(vae).to(memory_format=torch.channels_last)).decode(latents)
        codec = LatentCodec(lambda: vae, torch.bfloat16)  # float16 convolutions are slow on a CPU
        half = codec.decode(latents)
    assert vae.weight.dtype == torch.bfloat16
    assert (half.int() - exact.int()).abs().max() <= 6
    codec.leave_device()


def test_a_training_looks_at_latents_in_half_precision_on_a_gpu_alone() -> None:
    assert vae_dtype(torch.device("cuda", 1)) == torch.float16
    assert vae_dtype(torch.device("cpu")) == torch.float32


def test_four_channels_are_latents_and_others_pixels() -> None:
    assert [type(codec_for(channels)) for channels in (1, 3, 4)] == [PixelCodec, PixelCodec, LatentCodec]


def test_missing_diffusers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SidaError) as error:
        LatentCodec().decode(torch.zeros(1, 4, 2, 2))
    assert str(error.value) == (
        "decoding latents needs the VAE of diffusers, which is not installed. "
        "Install it with: pip install 'sidactl[vae]'."
    )


class Hub:
    """In place of diffusers' AutoencoderKL, with what is in its cache."""

    def __init__(self, *, cached: bool) -> None:
        self.cached = cached

    def from_pretrained(self, name: str, **options: bool) -> torch.nn.Module:
        assert name == catalog.VAE_NAME
        assert options == {"local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": False}
        if not self.cached:
            raise OSError("no such file")
        return torch.nn.Linear(1, 1)


def test_cached_vae_is_loaded_frozen_and_without_its_files_being_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AutoencoderKL=Hub(cached=True)))
    vae = stable_diffusion_vae(files=lambda: pytest.fail("asked"))
    assert not vae.training
    assert not any(p.requires_grad for p in vae.parameters())


def test_vae_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AutoencoderKL=Hub(cached=False)))
    with pytest.raises(SidaError) as error:
        stable_diffusion_vae()
    assert str(error.value) == (
        "decoding latents needs the VAE stabilityai/sd-vae-ft-mse, which diffusers does not have in its cache. Get it "
        "once with: hf download stabilityai/sd-vae-ft-mse config.json diffusion_pytorch_model.safetensors"
    )


def files_of(folder: Path) -> Mapping[str, Path]:
    """The files of a VAE as the run directory keeps them: under names that say nothing."""
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    return {name: (folder / name).rename(folder / f"object-{index}") for index, name in enumerate(names)}


def test_vae_is_loaded_from_its_files_wherever_they_lie(tmp_path: Path) -> None:
    files = files_of(save_vae(tmp_path / "vae"))
    vae = stable_diffusion_vae(files=lambda: files, is_usual=False)
    stored = safetensors.torch.load_file(files["diffusion_pytorch_model.safetensors"])
    assert vae.state_dict().keys() == stored.keys()
    assert all(torch.equal(vae.state_dict()[name], tensor) for name, tensor in stored.items())
    assert not vae.training
    assert not any(p.requires_grad for p in vae.parameters())
    assert LatentCodec(lambda: vae).decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 32, 32)


def test_vae_whose_tensors_are_not_those_of_its_config_is_refused(tmp_path: Path) -> None:
    files = files_of(save_vae(tmp_path / "vae"))
    weights = files["diffusion_pytorch_model.safetensors"]
    tensors = safetensors.torch.load_file(weights)
    tensors["encoder.other"] = tensors.pop("decoder.conv_in.bias")
    safetensors.torch.save_file(tensors, weights)
    with pytest.raises(SidaError) as error:
        stable_diffusion_vae(files=lambda: files, is_usual=False)
    assert str(error.value) == (
        "the VAE must have the tensors of its config, got decoder.conv_in.bias missing, encoder.other unexpected. Get "
        "its files again."
    )
    weights.write_bytes(b"junk")
    with pytest.raises(SidaError, match=r"^the VAE cannot be loaded \(.*\)\. Get its files again\.$"):
        stable_diffusion_vae(files=lambda: files, is_usual=False)
