import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sidactl import nets
from sidactl.errors import SidaError
from sidactl.foreign import networks, records
from sidactl.nets import Preconditioned
from sidactl.recipes import NetSpec
from tests.golden import golden
from tests.worlds import TINY

NETWORKS = [
    "edm_ddpmpp_uncond",
    "edm_ddpmpp_cond_aug9",
    "edm_ddpmpp_gray_traj",
    "edm_ncsnpp_uncond",
    "edm_adm_cond",
]
ENCODER_DECODERS = [
    "sida_edm_ddpmpp_uncond",
    "sida_edm_ddpmpp_cond_aug9",
    "sida_edm_ddpmpp_gray_traj",
    "sida_edm_adm_cond",
]
FORMULA_NETWORKS = ["edm_ncsnpp_skip_formula", "edm_adm_multihead_formula"]
LAYOUTS = [
    "edm-cifar10-32x32-uncond-vp",
    "edm-cifar10-32x32-cond-vp",
    "edm-ffhq-64x64-uncond-vp",
    "edm-afhqv2-64x64-uncond-vp",
    "edm-imagenet-64x64-cond-adm",
]


class Arrays:
    """The arrays of a golden file as tensors; an absent or zero-width one is None."""

    def __init__(self, name: str) -> None:
        self._arrays = np.load(golden(name))

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self._arrays[name]))

    def get(self, name: str) -> Tensor | None:
        found = name in self._arrays and self._arrays[name].size > 0
        return self[name] if found else None


def load(name: str) -> Preconditioned:
    return networks.read_network(golden(f"networks/{name}.pkl"))


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_denoised_images_match_golden(name: str) -> None:
    net, arrays = load(name), Arrays(f"networks/{name}.npz")
    x, sigma, labels = arrays["x"], arrays["sigma"], arrays.get("class_labels")
    assert_close(net(x, sigma, labels), arrays["denoised"])
    assert_close(net(x, sigma.reshape(-1, 1, 1, 1), labels), arrays["denoised"])
    assert_close(net(x, arrays["scalar_sigma"], labels), arrays["denoised_scalar_sigma"])
    if (expected := arrays.get("denoised_aug")) is not None:
        assert_close(net(x, sigma, labels, arrays["augment_labels"]), expected)
    if (expected := arrays.get("denoised_nolabel")) is not None:
        assert_close(net(x, sigma), expected)
    if labels is not None:
        assert_close(
            net(x, sigma, labels.argmax(dim=1)), net(x, sigma, torch.eye(labels.shape[1])[labels.argmax(dim=1)])
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_with_respect_to_the_image_matches_golden(name: str) -> None:
    net, arrays = load(name), Arrays(f"networks/{name}.npz")
    x = arrays["x"].requires_grad_()
    denoised = net(x, arrays["sigma"], arrays.get("class_labels"))
    (gradient,) = torch.autograd.grad(denoised, x, arrays["vjp_cotangent"])
    assert float((gradient - arrays["vjp_x"]).norm() / arrays["vjp_x"].norm()) < 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_denoised_images_match_golden_in_float64_to_float32_rounding(name: str) -> None:
    net, arrays = load(name), Arrays(f"networks/{name}.npz")
    ours = net(arrays["x"], arrays["sigma"], arrays.get("class_labels")).double()
    error = (ours - arrays["denoised_float64"]).abs().max()
    assert float(error) < 1e-5


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_logits_and_pair_match_golden(name: str) -> None:
    net, arrays = load(name.removeprefix("sida_")), Arrays(f"networks/{name}.npz")
    inputs = Arrays(f"networks/{name.removeprefix('sida_')}.npz")
    x, sigma = (arrays.get(k) if arrays.get(k) is not None else inputs[k] for k in ("x", "sigma"))
    labels, augment = inputs.get("class_labels"), arrays.get("augment_labels")
    assert x is not None
    assert sigma is not None
    assert_close(net(x, sigma, labels, augment), arrays["decoder"])
    assert_close(net.logits(x, sigma, labels, augment), arrays["encoder"])
    denoised, logits = net.denoise_and_logits(x, sigma, labels, augment)
    assert_close(denoised, arrays["pair_denoised"])
    assert_close(logits, arrays["pair_logits"])
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net.logits(x, sigma, labels, augment), x, arrays["encoder_vjp_cotangent"])
    assert float((gradient - arrays["encoder_vjp_x"]).norm() / arrays["encoder_vjp_x"].norm()) < 1e-4


@pytest.mark.parametrize("name", FORMULA_NETWORKS)
def test_net_with_formula_weights_matches_golden(name: str) -> None:
    settings, arrays = json.loads(golden(f"networks/{name}.json").read_text()), Arrays(f"networks/{name}.npz")
    net = nets.build(spec_of(settings)).eval().requires_grad_(False)
    tensors = net.state_dict()
    for k, (key, _) in enumerate(settings["parameter_order"], start=1):
        wave = formula(tensors[key], k)
        if wave.ndim >= 2:
            wave = 1.2 * wave / math.sqrt(wave[0].numel())
        else:
            wave = 1 + 0.2 * wave if key.endswith("weight") else 0.1 * wave
        tensors[key].copy_(wave)
    for k, (key, _) in enumerate(settings["buffer_order"], start=1):
        if key.endswith("freqs"):
            tensors[key].copy_(16 * formula(tensors[key], k))
    x, sigma, labels = arrays["x"], arrays["sigma"], arrays.get("class_labels")
    assert_close(net(x, sigma, labels), arrays["denoised"])
    if (expected := arrays.get("denoised_aug")) is not None:
        assert_close(net(x, sigma, labels, arrays["augment_labels"]), expected)


def formula(like: Tensor, k: int) -> Tensor:
    i = torch.arange(1, like.numel() + 1, dtype=torch.float64)
    return torch.sin(0.61 * i + 1.7 * k).reshape(like.shape)


def spec_of(settings: dict[str, object]) -> NetSpec:
    record = records.Record(
        class_name=str(settings["class_name"]), init_args=(), init_kwargs=settings["init_kwargs"], state={}
    )
    return networks.spec_of(record)


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_dict_has_the_names_and_shapes_of_the_published_checkpoint(name: str) -> None:
    layout = json.loads(golden(f"layouts/{name}.json").read_text())
    with torch.device("meta"):
        net = nets.build(spec_of(layout))
    assert {k: list(v.shape) for k, v in net.named_parameters()} == layout["parameters"]
    assert {k: list(v.shape) for k, v in net.named_buffers()} == layout["buffers"]
    assert sum(p.numel() for p in net.parameters()) == layout["num_parameters"]


def test_spec_survives_the_way_through_json() -> None:
    assert NetSpec.from_json(json.loads(json.dumps(TINY.to_json()))) == TINY


def test_spec_refuses_channels_that_groups_do_not_divide() -> None:
    with pytest.raises(SidaError) as error:
        NetSpec(**(TINY.to_json() | {"model_channels": 9, "channel_mult": (1, 2)}))
    assert str(error.value) == (
        "channel counts must be divisible by their GroupNorm groups, got 9 channels. "
        "Choose model_channels such as 16, 32, 64 or 128."
    )


def test_spec_refuses_a_resolution_that_levels_do_not_divide() -> None:
    with pytest.raises(SidaError, match=r"^img_resolution must be divisible by 4, got 6\."):
        NetSpec(**(TINY.to_json() | {"img_resolution": 6, "channel_mult": (1, 2, 2)}))


def test_preconditioning_returns_the_image_itself_as_noise_vanishes() -> None:
    net = nets.build(TINY).eval()
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    torch.testing.assert_close(net(x, 1e-4), x, rtol=0, atol=1e-3)


def test_new_net_starts_near_the_zero_function() -> None:
    torch.manual_seed(0)
    net = nets.build(TINY).eval()
    x = torch.randn(4, 1, 8, 8)
    shrunk = x * 0.25 / (1 + 0.25)  # c_skip x at sigma 1: what is left when F is zero
    torch.testing.assert_close(net(x, 1.0), shrunk, rtol=0, atol=1e-2)


@pytest.mark.parametrize("before", [0.0, 0])
def test_dropout_is_a_setting_that_reaches_every_block(before: float) -> None:
    net = nets.build(dataclasses.replace(TINY, dropout=before)).train()
    torch.nn.init.ones_(net.get_parameter("model.enc.8x8_block0.conv1.weight"))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(net(x, 1.0), net(x, 1.0))
    net.set_dropout(0.5)
    assert net.spec.dropout == 0.5
    assert not torch.equal(net(x, 1.0), net(x, 1.0))
    assert torch.equal(net.eval()(x, 1.0), net(x, 1.0))


def test_weights_that_do_not_fit_are_listed() -> None:
    net = nets.build(TINY)
    state = dict(net.state_dict())
    state["model.extra"] = state.pop("model.map_layer0.weight")
    with pytest.raises(SidaError) as error:
        networks.load_weights(net, state)
    assert str(error.value).startswith(
        "the weights do not fit the network: 1 missing (model.map_layer0.weight); 1 unexpected (model.extra)."
    )
