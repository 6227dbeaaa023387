"""Networks whose parameters are split over the processes (FSDP2)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sidactl import launch, nets
from sidactl.engine.ranks import join, rank_and_size
from sidactl.nets import Preconditioned
from sidactl.nets.edm import UNetBlock
from sidactl.nets.edm2 import Block
from sidactl.recipes import Memory


class ShardedForm(NamedTuple):
    """What of a sharded run is still whole on every device, by the memory that there is."""

    has_whole_teacher: bool = False
    """in the type that its convolutions are computed in; the others need not gather it in every pass"""
    reduces_each_pass: bool = False
    """gradients are added up over the processes after each pass, and kept in parts: float32 between passes"""

    def told(self) -> list[str]:
        """A line for each, for people."""
        whole = "the teacher lies whole on every device (--shard): there is memory for it"
        reduced = (
            "gradients are added up over the processes after every pass (--shard), since their sums would not fit: "
            "their last digits differ"
        )
        return [whole] * self.has_whole_teacher + [reduced] * self.reduces_each_pass


_USABLE = 0.9
"""of a device's memory, which estimates may be off by"""


def form_of(estimate: Memory, teacher_bytes: int, device_bytes: int | None) -> ShardedForm:
    """What memory allows and asks for. device_bytes: None where it is not known, as on a CPU; then all is split."""
    if device_bytes is None:
        return ShardedForm()
    room = _USABLE * device_bytes - estimate.total_bytes
    return ShardedForm(has_whole_teacher=room >= teacher_bytes, reduces_each_pass=room < 0)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked without importing that class, which takes longer than many a command."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that lies in this process; others as they are."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, in every process; others as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sum_of_parts(values: Tensor, sharded: Tensor) -> Tensor:
    """The sum over the processes that hold the parts of a sharded tensor, in the place of `values`."""
    mesh = sharded.device_mesh  # type: ignore[attr-defined]
    torch.distributed.all_reduce(values, group=mesh.get_group(mesh.ndim - 1))
    return values


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The U-Net's residual blocks."""
    return [module for module in net.modules() if isinstance(module, (UNetBlock, Block))]


_VECTOR_SIZE = 16
"""numbers of float32 that a CPU's kernels take at a time, at most"""


def shard_(net: Preconditioned) -> None:
    """Splits the net's parameters over the processes with FSDP2; its numbers stay the same."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    _split([*blocks_of(net), net])
    for method in ("denoise_and_logits", "denoise_and_features", "features", "logits", "logvar"):
        register_fsdp_forward_method(net, method)


def shard_parts_(heads: nn.Module) -> None:
    """Likewise every module inside that has parameters of its own; what `heads` itself has stays whole.

    Its parts are what is called, and not itself.
    """
    parts = [part for part in heads.modules() if part is not heads and any(True for _ in part.parameters(False))]
    if parts:
        _split(parts[::-1])


def _split(modules: Sequence[nn.Module]) -> None:
    """Splits the parameters of these modules, inner ones first, over the processes of a machine (HSDP).

    Machines hold a copy each, since between them weights would travel far slower than within. Small ones stay whole:
    single numbers (EDM2's gains), which FSDP2 cannot split, and what does not split into full
    vectors, since the optimiser's kernel rounds the rest of a vector in another way.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    parameters = {parameter for module in modules for parameter in module.parameters()}
    kind = next(iter(parameters)).device.type
    if rank_and_size()[1] == 1:  # without torchrun FSDP2 needs a group of one
        join(store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    size = launch.processes_per_machine()
    num_copies = launch.world_size() // size
    mesh = init_device_mesh(kind, (num_copies, size), mesh_dim_names=("copies", "parts"))
    mesh = mesh if num_copies > 1 else mesh["parts"]
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float64)  # see GradientSum
    stay_whole = {p for p in parameters if p.ndim == 0 or len(p) % size or p.numel() // size % _VECTOR_SIZE}
    for module in modules:
        sharded = fully_shard(
            module, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=stay_whole
        )
        sharded.set_gradient_divide_factor(1.0)  # gradients are summed: losses are divided by the whole batch


def gathered(net: Preconditioned, device: torch.device) -> Preconditioned:
    """The net whole and on this device, to sample from; the net itself where it is that already."""
    place = next(net.parameters()).device
    if place.type == device.type and device.index in (None, place.index) and not any(map(is_sharded, net.parameters())):
        return net
    with torch.device("meta"):
        copied = nets.build(net.spec)
    state = {name: whole(tensor.detach()).to(device) for name, tensor in net.state_dict().items()}
    copied.load_state_dict(state, assign=True)
    copied.compute_dtype, copied.memory_format = net.compute_dtype, net.memory_format
    return copied.eval().requires_grad_(False)
