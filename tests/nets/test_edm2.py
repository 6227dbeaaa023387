import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sidactl import nets
from sidactl.errors import SidaError
from sidactl.foreign import pickles
from sidactl.nets import Preconditioned
from sidactl.nets.edm2 import Block, MPConv, MPFourier, force_normalize_, mp_cat, mp_silu, mp_sum, normalize, resample
from sidactl.recipes import NetSpec
from tests.golden import golden
from tests.worlds import TINY_EDM2

CONDITIONAL = ["edm2_cond_logvar", "edm2_cond_logvar_traj", "edm2_gray_defaulthead"]
UNCONDITIONAL = ["edm2_uncond_rgb", "edm2_guide_uncond"]
HALF_PRECISION = ["edm2_cond_logvar", "edm2_guide_uncond"]
LAYOUTS = [f"edm2-img512-{size}" for size in ("xs", "s", "m", "l", "xl", "xxl")] + [
    f"edm2-img64-{size}" for size in ("xs", "s", "m", "l", "xl")
]
DEFAULTS: dict[str, Any] = {
    "model_channels": 192,
    "channel_mult": (1, 2, 3, 4),
    "channel_mult_noise": None,
    "channel_mult_emb": None,
    "num_blocks": 3,
    "attn_resolutions": (16, 8),
    "channels_per_head": 64,
    "logvar_channels": 128,
}
TINY = dataclasses.replace(TINY_EDM2, img_channels=3, label_dim=4)


def spec_from(init_kwargs: dict[str, Any], **changes: Any) -> NetSpec:
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in init_kwargs.items() if k != "use_fp16"}
    return NetSpec(architecture="EDM2", **(DEFAULTS | options | changes))


def published(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Preconditioned:
    """The net of a golden pickle in eval mode, its weights cast to `dtype`."""
    init_kwargs = json.loads(golden("networks/configs_edm2.json").read_text())[name]["init_kwargs"]
    net = nets.build(spec_from(init_kwargs, **changes))
    weights = pickles.state_dict(pickles.read(golden(f"networks/{name}.pkl"))["ema"])
    if not net.spec.logvar_channels:
        weights = {key: value for key, value in weights.items() if not key.startswith("logvar_")}
    net.load_state_dict({key: value.to(torch.float32) for key, value in weights.items()}, strict=True)
    return net.to(dtype).eval()


class Numbers:
    """Arrays of a golden file as tensors; `labels` is None where the file has none."""

    def __init__(self, name: str) -> None:
        with np.load(golden(f"networks/{name}.npz"), allow_pickle=False) as arrays:
            self.arrays = dict(arrays)
        self.x, self.sigma = self["x"], self["sigma"]
        self.labels = self["class_labels"] if "class_labels" in self.arrays else None

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])


def close(actual: Tensor, expected: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0, check_dtype=False)


def rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


@pytest.mark.parametrize("name", CONDITIONAL + UNCONDITIONAL)
def test_denoiser_matches_golden_numbers(name: str) -> None:
    net, numbers = published(name), Numbers(name)
    x = numbers.x.requires_grad_()
    D_x = net(x, numbers.sigma, numbers.labels)
    close(D_x, numbers["denoised"])
    close(D_x, numbers["denoised_float64"])
    close(net.logvar(numbers.sigma), numbers["logvar"])
    close(net.logvar(numbers.sigma), numbers["logvar_float64"])
    close(net(x, numbers["scalar_sigma"], numbers.labels), numbers["denoised_scalar_sigma"])
    (gradient,) = torch.autograd.grad(D_x, x, numbers["vjp_cotangent"])
    close(gradient, numbers["vjp_x"], atol=1e-4 * float(numbers["vjp_x"].abs().max()))


@pytest.mark.parametrize("name", CONDITIONAL)
def test_labels_may_be_indices_or_none(name: str) -> None:
    net, numbers = published(name), Numbers(name)
    assert numbers.labels is not None
    with torch.no_grad():
        close(net(numbers.x, numbers.sigma, None), numbers["denoised_nolabel"])
        close(net(numbers.x, numbers.sigma, numbers.labels.argmax(1)), numbers["denoised"])


@pytest.mark.parametrize("name", CONDITIONAL + UNCONDITIONAL)
def test_encoder_and_pair_match_golden_numbers(name: str) -> None:
    net, numbers = published(name), Numbers(f"sida_{name}")
    x = numbers.x.requires_grad_()
    logits = net.logits(x, numbers.sigma, numbers.labels)
    assert logits.shape == numbers["encoder"].shape
    close(logits, numbers["encoder"])
    close(logits, numbers["logits_float64"])
    (gradient,) = torch.autograd.grad(logits, x, numbers["encoder_vjp_cotangent"])
    close(gradient, numbers["encoder_vjp_x"], atol=1e-4 * float(numbers["encoder_vjp_x"].abs().max()))
    with torch.no_grad():
        D_x, pair_logits = net.denoise_and_logits(x, numbers.sigma, numbers.labels)
        close(D_x, numbers["pair_denoised"])
        close(pair_logits, numbers["pair_logits"])
        close(net(x, numbers.sigma, numbers.labels), numbers["decoder"])
        close(net.logvar(numbers.sigma), numbers["logvar"])


@pytest.mark.parametrize("name", HALF_PRECISION)
def test_half_precision_weights_match_golden_numbers(name: str) -> None:
    numbers = Numbers(name)
    upcast, half = published(name), published(name, dtype=torch.float16)
    with torch.no_grad():
        for net, atol in ((upcast, 1e-3), (half, 2e-5)):  # gains over sqrt(fan-in) round to float16 in the half net
            close(net(numbers.x, numbers.sigma, numbers.labels), numbers["denoised_fp16_params"], atol)
            close(net.logvar(numbers.sigma), numbers["logvar_fp16_params"], atol)


@pytest.mark.parametrize("name", CONDITIONAL + UNCONDITIONAL)
def test_forced_normalization_matches_published_training_mode(name: str) -> None:
    numbers = Numbers(name)
    net = published(name, dropout=0.0).train()
    force_normalize_(net)
    with torch.no_grad():
        close(net(numbers.x, numbers.sigma, numbers.labels), numbers["train_mode_denoised"])
    weights = dict(net.named_parameters())
    names = [key.removeprefix("train_mode_weight_rms/") for key in numbers.arrays if "weight_rms/" in key]
    assert set(names) == {key for key, weight in weights.items() if weight.ndim > 1}
    for key in names:
        if key == "logvar_linear.weight":  # the published pass did not evaluate the uncertainty head
            continue
        assert rms(weights[key]) == pytest.approx(float(numbers[f"train_mode_weight_rms/{key}"]), abs=1e-6)
    for key in ("unet.out_conv.weight", "unet.emb_noise.weight"):
        close(weights[key].detach(), numbers[f"train_mode_weight/{key}"], atol=1e-6)


@pytest.mark.parametrize("name", ["edm2_multihead_formula"])
def test_several_attention_heads_match_golden_numbers(name: str) -> None:
    layout, numbers = json.loads(golden(f"networks/{name}.json").read_text()), Numbers(name)
    net = nets.build(spec_from(layout["init_kwargs"])).eval()
    assert [[key, list(p.shape)] for key, p in net.named_parameters()] == layout["parameter_order"]
    assert [[key, list(b.shape)] for key, b in net.named_buffers()] == layout["buffer_order"]

    def wave(k: int, like: Tensor) -> Tensor:
        i = torch.arange(1, like.numel() + 1, dtype=torch.float64)
        return torch.sin(0.61 * i + 1.7 * k).reshape(like.shape)

    with torch.no_grad():
        for k, parameter in enumerate(net.parameters(), start=1):
            s = wave(k, parameter)
            parameter.copy_(s if parameter.ndim else 0.5 + 0.1 * s)
        for k, (key, buffer) in enumerate(net.named_buffers(), start=1):
            s = wave(k, buffer)
            buffer.copy_(9 * s if key.endswith("freqs") else math.pi * (s + 1))
        D_x = net(numbers.x, numbers.sigma, numbers.labels)
        close(D_x, numbers["denoised"])
        close(D_x, numbers["denoised_float64"])
        close(net.logvar(numbers.sigma), numbers["logvar"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layout_has_the_same_names_shapes_and_order(name: str) -> None:
    layout = json.loads(golden(f"layouts/{name}.json").read_text())
    with torch.device("meta"):
        net = nets.build(spec_from(layout["init_kwargs"]))
    assert [(key, list(p.shape)) for key, p in net.named_parameters()] == list(layout["parameters"].items())
    assert {key: list(b.shape) for key, b in net.named_buffers()} == layout["buffers"]
    assert sum(p.numel() for p in net.parameters()) == layout["num_parameters"]
    assert sum(b.numel() for b in net.buffers()) == layout["num_buffer_elements"]


@pytest.mark.parametrize("name", ["edm2_cond_logvar_traj"])
def test_net_without_uncertainty_head_denoises_alike_and_refuses_logvar(name: str) -> None:
    numbers, net = Numbers(name), published(name, logvar_channels=0)
    assert not [key for key in net.state_dict() if "logvar" in key]
    with torch.no_grad():
        close(net(numbers.x, numbers.sigma, numbers.labels), numbers["denoised"])
    with pytest.raises(SidaError, match="uncertainty head"):
        net.logvar(1.0)


def test_fresh_net_is_its_skip_path_with_unit_magnitude_features() -> None:
    torch.manual_seed(0)
    net, sigma = nets.build(TINY), torch.tensor(2.0)
    x = torch.randn(64, 3, 8, 8)
    labels = torch.eye(4).repeat(16, 1)
    with torch.no_grad():
        close(net(x, sigma, labels), x * 0.5**2 / (2.0**2 + 0.5**2))
        encoded = net.raw.encode(x, sigma.log().reshape(1) / 4, labels, None)
    for features in [*encoded.skips, encoded.embedding]:
        assert rms(features) == pytest.approx(1, abs=0.25)


def test_layers_preserve_magnitude() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(64, 48, 8, 8), torch.randn(64, 16, 8, 8)
    unit = pytest.approx(1, rel=0.03)
    assert rms(mp_silu(a)) == unit
    assert rms(mp_sum(a[:, :16], b, 0.3)) == unit
    joined = mp_cat(a, b, 0.5)
    assert rms(joined) == unit
    assert joined[:, :48].square().sum() == pytest.approx(float(joined[:, 48:].square().sum()), rel=0.03)
    assert rms(MPConv(48, 64, 1)(a)) == unit
    assert rms(MPConv(48, 64)(a.transpose(1, 3))) == unit
    assert rms(MPConv(48, 64, 3)(a)[:, :, 1:-1, 1:-1]) == unit
    assert rms(MPFourier(512)(torch.linspace(-1, 1, 64))) == unit
    assert rms(normalize(7 * a, dim=1)) == pytest.approx(1, rel=1e-4)


def test_effective_weight_ignores_the_scale_of_the_stored_weight() -> None:
    torch.manual_seed(0)
    layer, x = MPConv(16, 8, 3, has_gain=True), torch.randn(2, 16, 4, 4)
    with torch.no_grad():
        before = layer(x, gain=2.0)
        layer.weight.mul_(1e3)
        close(layer(x, gain=2.0), before, atol=2e-3)  # the epsilon of 1e-4 counts less for larger weights
        close(layer(x, gain=torch.tensor(4.0)), 2 * before, atol=4e-3)


def test_force_normalize_is_idempotent_up_to_its_epsilon() -> None:
    torch.manual_seed(0)
    net, x = nets.build(TINY).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.3) if parameter.ndim else parameter.fill_(0.7)
        outputs = [net(x, 1.0)]
        for _ in range(3):
            force_normalize_(net)
            outputs.append(net(x, 1.0))
        assert all(float(p) == pytest.approx(0.7) for p in net.parameters() if p.ndim == 0)
    first, second, third = [float((b - a).abs().max()) for a, b in itertools.pairwise(outputs)]
    assert 1e-6 < first < 1e-3
    assert second < 2e-6
    assert third < 2e-6


def test_force_normalize_leaves_other_nets_alone() -> None:
    net = nets.build(
        NetSpec(
            architecture="DhariwalUNet",
            img_resolution=8,
            img_channels=3,
            model_channels=8,
            channel_mult=(1,),
            num_blocks=1,
            attn_resolutions=(),
        )
    )
    before = {key: value.clone() for key, value in net.state_dict().items()}
    force_normalize_(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_forward_never_changes_weights() -> None:
    net = nets.build(TINY).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net(torch.randn(2, 3, 8, 8), 1.0, torch.tensor([0, 3])).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_activations_stay_in_their_limits() -> None:
    net = nets.build(TINY)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("emb_gain"):
                parameter.fill_(1e6)
        encoded = net.raw.encode(torch.randn(2, 3, 8, 8), torch.zeros(1), torch.eye(4)[:2], None)
    assert max(float(features.abs().max()) for features in encoded.skips) == 256


def test_balances_and_the_limit_of_activations_are_the_nets_own() -> None:
    torch.manual_seed(0)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 16)

    def block(**changes: Any) -> Tensor:
        spec = dataclasses.replace(TINY, **changes)
        torch.manual_seed(1)
        made = Block(spec, 8, 8, 16, side="decoder", attention=True)
        out: Tensor = made(x, emb)
        return out

    usual = block()
    assert torch.equal(block(res_balance=0.3, attn_balance=0.3, clip_act=256.0), usual)
    assert torch.equal(block(res_balance=0, attn_balance=0), x)
    assert not torch.equal(block(res_balance=0.5), usual)
    assert not torch.equal(block(attn_balance=0.5), usual)
    # All of the residual branch, or of the attention, is what its balance says: the sums blend linearly.
    ends = [block(res_balance=t, attn_balance=0) for t in (0, 1, 0.25)]
    torch.testing.assert_close(ends[2], mp_sum(ends[0], ends[1], 0.25))
    assert torch.equal(block(clip_act=0.5), usual.clamp(-0.5, 0.5))
    assert block(clip_act=None, res_balance=0, attn_balance=0).abs().max() > 1


def test_logits_map_has_the_coarsest_resolution() -> None:
    net = nets.build(TINY)
    assert net.logits(torch.randn(5, 3, 8, 8), torch.rand(5, 1, 1, 1) + 0.1).shape == (5, 1, 4, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_compute_stays_near_float32_and_returns_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, x = nets.build(TINY), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        net.get_parameter("unet.out_gain").fill_(1.0)
        expected, expected_logits = net.denoise_and_logits(x, 0.5)
        net.compute_dtype = dtype
        D_x, logits = net.denoise_and_logits(x, 0.5)
    assert D_x.dtype == logits.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    close(D_x, expected, atol=8 * eps)
    close(logits, expected_logits, atol=8 * eps)
    assert not torch.equal(D_x, expected)


def test_dropout_acts_in_training_mode_only() -> None:
    torch.manual_seed(0)
    net = nets.build(TINY)
    net.set_dropout(0.5)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        net.get_parameter("unet.out_gain").fill_(1.0)
        assert not torch.equal(net(x, 1.0), net(x, 1.0))
        net.eval()
        assert torch.equal(net(x, 1.0), net(x, 1.0))


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_keeps_constants_inside_the_border(taps: tuple[int, ...]) -> None:
    x = torch.full((1, 2, 8, 8), 3.0)
    close(resample(x, "down", taps)[..., 1:-1, 1:-1], torch.full((1, 2, 2, 2), 3.0))
    close(resample(x, "up", taps)[..., 2:-2, 2:-2], torch.full((1, 2, 12, 12), 3.0))


def test_box_resampling_equals_the_general_filter() -> None:
    x = torch.randn(2, 3, 4, 4)
    close(resample(x, "down", (1, 1)), resample(x, "down", (0, 1, 1, 0)), atol=1e-6)
    close(resample(x, "up", (1, 1)), resample(x, "up", (0, 1, 1, 0)), atol=1e-6)
