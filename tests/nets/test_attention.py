"""Attention by a fused kernel, which never holds a matrix of tokens by tokens: what a GPU's kernels ask for as well."""

import math

import pytest
import torch
from torch import Tensor

from sidactl import catalog
from sidactl.nets import edm, edm2
from sidactl.recipes import NetSpec

ORDERS = [torch.contiguous_format, torch.channels_last]
ADM, EDM2 = (catalog.TEACHERS[name].net for name in ("edm-imagenet64", "edm2-xs"))


def block_of(spec: NetSpec) -> edm.UNetBlock | edm2.Block:
    """A block with two heads of 64 channels."""
    torch.manual_seed(0)
    if spec.architecture == "EDM2":
        return edm2.Block(spec, 128, 128, 32, side="encoder", attention=True)
    return edm.UNetBlock(spec, 128, 128, 32, attention=True)


@pytest.mark.parametrize("order", ORDERS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("spec", [ADM, EDM2], ids=["edm", "edm2"])
def test_attention_takes_a_fused_kernel_forward_and_backward(spec: NetSpec, order: torch.memory_format) -> None:
    block = block_of(spec)
    x = torch.randn(2, 128, 8, 8).to(memory_format=order).requires_grad_()
    with torch.autograd.profiler.profile() as profile:
        block._attend(x).sum().backward()
    names = {event.name for event in profile.function_events or () if "dot_product" in event.name}
    assert "aten::_scaled_dot_product_attention_math" not in names
    assert {name for name in names if "flash" in name and "backward" not in name}
    assert {name for name in names if "flash" in name and "backward" in name}


@pytest.mark.parametrize("order", ORDERS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("spec", [ADM, EDM2], ids=["edm", "edm2"])
def test_attention_is_softmax_of_products_in_float64(spec: NetSpec, order: torch.memory_format) -> None:
    block = block_of(spec).double()
    x = torch.randn(2, 128, 8, 8, dtype=torch.float64).to(memory_format=order)
    if isinstance(block, edm2.Block):
        weight = block.attn_qkv.normalized() / math.sqrt(128)
        qkv = torch.nn.functional.conv2d(x, weight).reshape(2, 2, 64, 3, 64)
        qkv = qkv / (1e-4 + qkv.square().mean(dim=2, keepdim=True).sqrt())
    else:
        qkv = block.qkv(x).reshape(2, 2, 64, 3, 64)
    q, k, v = qkv.unbind(3)  # [B, heads, channels, tokens]
    shares = (torch.einsum("bhcq,bhck->bhqk", q, k) / math.sqrt(64)).softmax(dim=-1)
    expected: Tensor = torch.einsum("bhqk,bhck->bhcq", shares, v).reshape(x.shape)
    torch.testing.assert_close(block._attend(x), expected, rtol=1e-12, atol=1e-12)
