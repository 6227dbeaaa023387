"""The precision, place and form of networks before they train or are sampled."""

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sidactl.engine.devices import allow_tf32, bytes_of
from sidactl.engine.ranks import rank_and_size
from sidactl.engine.sharding import ShardedForm, blocks_of, form_of, shard_
from sidactl.engine.threads import Out, is_small
from sidactl.nets import Denoiser, Preconditioned
from sidactl.nets.dropout import replayed
from sidactl.nets.edm import Conv2d
from sidactl.nets.edm2 import MPConv
from sidactl.recipes import Execution, Memory, Recipe, SamplingForm
from sidactl.recipes import passes_of as rounds_of


def passes_of(recipe: Recipe, execution: Execution) -> list[Sequence[int]]:
    """The accumulation rounds of this process, in groups that go through the nets at once; see `recipes.passes_of`."""
    return rounds_of(recipe, execution, *rank_and_size())


DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def configure_for_training(
    recipe: Recipe,
    execution: Execution,
    teacher: Preconditioned,
    fake_score: Preconditioned,
    generator: Preconditioned,
    ema: Preconditioned,
    guide: Preconditioned | None = None,
) -> ShardedForm:
    """Gives the nets of a distillation their precision, place and form, before any optimiser is made.

    guide: that of the teacher, if any, which is treated like it but that it is never whole.

    Returns what of a sharded run stays whole.
    """
    guides = (guide,) if guide else ()
    each = tuple(dict.fromkeys((teacher, fake_score, generator, ema, *guides)))  # a fake score may be the teacher
    for net in each:
        net.compute_dtype = DTYPES[recipe.precision]
    if recipe.teacher_precision:
        for net in (teacher, *guides):
            net.compute_dtype = DTYPES[recipe.teacher_precision]
    allow_tf32(recipe.precision == "tf32")
    if execution.channels_last:
        for net in each:
            # FSDP2 takes weights in the usual order alone; then every convolution turns them
            to_channels_last_(net, weights=not execution.shard)
    if execution.checkpoint_activations:
        # The compiler traces no contexts; nor do compiled passes hold several micro-batches with dropout.
        contexts: dict[str, Any] = {} if execution.compile else {"context_fn": replayed}
        for net in (net for net in each if net is not ema):
            for block in blocks_of(net):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, **contexts)
    if execution.ema_on_cpu:
        ema.cpu()
    form = ShardedForm()
    if execution.shard:
        num_parameters, device = sum(p.numel() for p in teacher.parameters()), next(teacher.parameters()).device
        estimate = Memory.of(recipe, teacher.spec, num_parameters, execution, num_devices=rank_and_size()[1])
        form = form_of(estimate, num_parameters * teacher.compute_dtype.itemsize, bytes_of(device))
        if teacher is fake_score:
            form = form._replace(has_whole_teacher=False)
        for net in each:
            if net is not teacher or not form.has_whole_teacher:
                shard_(net)
    if execution.compile:
        for net in each:
            compile_(net)
    return form


def keep_as_computed_(net: Preconditioned) -> None:
    """Keeps weights of convolutions in the type alone that they are computed in; for a net that never trains.

    Of EDM2's it is what is held normalised (`edm2.holding`), for good. The numbers stay the same.
    """
    for module in net.modules():
        if isinstance(module, Conv2d):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(net.compute_dtype)
        elif isinstance(module, MPConv) and module.held is not None and module.kernel and not module.has_gain:
            module.weight.data = module.held.detach()


def configure_for_sampling(net: Preconditioned, setting: SamplingForm) -> Preconditioned:
    """Gives a net that is sampled its precision and form, and returns it."""
    net.compute_dtype = DTYPES[setting.precision]
    if setting.channels_last:
        to_channels_last_(net)
    if setting.compile:
        compile_(net)
    return net


def to_channels_last_(net: Preconditioned, *, weights: bool = True) -> None:
    """Puts the net's activations, and its weights, into channels-last order."""
    net.memory_format = torch.channels_last
    if weights:
        cast(Any, net).to(memory_format=torch.channels_last)


_GRAPHS_OF_A_METHOD = 64
"""a method of all nets, in training and not, with each size of batch"""


def compile_(net: Preconditioned) -> None:
    """Compiles the net's passes, when they first run with inputs of a form; its weights and their names stay."""
    keep_compiled()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS_OF_A_METHOD)
    # C++ all through takes longer to compile, but passes side by side then do not wait for Python's lock.
    all_through: dict[str, Any] = {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}
    options = all_through if is_small(net) else None
    for method in ("forward", "denoise_and_logits", "denoise_and_features", "features", "logits"):
        compiled = torch.compile(getattr(net, method), dynamic=False, options=options)
        setattr(net, method, _compiled_once(net, compiled))


def keep_compiled() -> None:
    """Compiled kernels and graphs are kept in the user's cache, unless a variable of torch's says where.

    By itself torch keeps them in the temporary folder, which machines of a cluster empty or do not share.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sidactl" / "inductor"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that nothing can be written to
        return
    if os.access(cache, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


def _compiled_once(net: Preconditioned, compiled: Callable[..., Out]) -> Callable[..., Out]:
    """The compiled method; of threads that call it with inputs of a new form the first compiles, the others wait.

    torch would compile it once for each of them.
    """
    lock, known = threading.Lock(), set[Any]()

    def call(*inputs: Any, **options: Any) -> Out:
        trains = net.training, next(net.parameters()).requires_grad
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        form = trains, modes, *map(_form, inputs), *((name, _form(value)) for name, value in options.items())
        if form in known:
            return compiled(*inputs, **options)
        with lock:
            output = compiled(*inputs, **options)
        known.add(form)
        return output

    return call


def _form(value: Any) -> Any:
    """What of an input a compiled graph depends on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.requires_grad
    return value


def is_compiled(net: Denoiser) -> bool:
    """Whether `compile_` was here."""
    return "forward" in vars(net)


def num_graphs() -> int:
    """How many graphs this process has compiled."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
