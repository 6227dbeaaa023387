"""Where the arithmetic happens: devices, threads, and the processes that torchrun starts."""

import atexit
import ctypes
import gc
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache, partial
from itertools import islice
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.utils.checkpoint import checkpoint

from sidactl import nets
from sidactl.diffusion import Denoiser, Preconditioned
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.heartbeat import LONGEST, Watch
from sidactl.nets.edm import UNetBlock
from sidactl.nets.edm2 import Block
from sidactl.recipes import Execution, Recipe, Setting
from sidactl.recipes import passes_of as rounds_of

SMALL_NET = 1 << 25
"""parameters times pixels below which a net on the CPU is run by one thread"""

In = TypeVar("In")
Out = TypeVar("Out")


def _settle_kernels() -> None:
    """Calls each vector function of MKL that we use once, while no other thread does.

    MKL chooses a function's kernel at its first call; of two threads that make that call together one may be given a
    coarser kernel for it, off by up to thousands of units in the last place. Source: PyTorch, issue 188792.
    """
    for function in (torch.sqrt, torch.exp, torch.log, torch.cos, torch.sin):
        for dtype in (torch.float32, torch.float64):
            function(torch.ones(1, dtype=dtype))


_settle_kernels()  # here, since whatever starts threads imports this


def pick_device(name: str | None = None) -> torch.device:
    """The named device ("cpu", "cuda", "cuda:1"), or a GPU where there is one; raises SidaError if it is not there.

    Of the processes that torchrun starts on a machine each gets a GPU of its own. Its float32 is exact from now on,
    also in convolutions, where torch would round to TF32 unasked.
    """
    allow_tf32(False)
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SidaError(f"device must be cpu, cuda or cuda:N, got {name!r}", "Pass --device cpu.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SidaError(
            f"device {name} is not there: torch sees {torch.cuda.device_count()} GPUs", "Pass --device cpu."
        )
    if device.type not in ("cpu", "cuda"):
        raise SidaError(f"device must be cpu, cuda or cuda:N, got {name!r}", "Pass --device cpu.")
    return device


def is_small(net: Denoiser) -> bool:
    """Whether the net is on the CPU and so small that threads sharing its work would mostly wait for each other."""
    if not isinstance(net, Preconditioned) or any(p.device.type != "cpu" for p in net.parameters()):
        return False
    return sum(p.numel() for p in net.parameters()) * net.spec.img_resolution**2 < SMALL_NET


@contextmanager
def fitting_threads(is_small: bool) -> Iterator[None]:
    """Within the block what is small is run by one thread: the same bits on any number of cores, however busy."""
    usual = torch.get_num_threads()
    if is_small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@cache
def keep_memory() -> None:
    """From now on this process keeps the memory that tensors on the CPU leave for those to come.

    By itself glibc gives back what is larger than 32 MB, and every new tensor of that size is fetched and cleared page
    by page, which takes several times as long as most operations on it. Does nothing where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def side_by_side(make: Callable[[In], Out], items: Iterable[In], num_threads: int) -> Iterator[Out]:
    """`make` of each item, in order, each by one thread, so many of them at a time."""
    usual = torch.get_num_threads()
    try:
        yield from in_order(make, items, num_threads, initializer=partial(torch.set_num_threads, 1))
    finally:
        torch.set_num_threads(usual)  # what a worker sets holds for threads that are still to come


def batches_of(net: Denoiser, make: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """`make` of each item, in order; with a small net every core makes one of its own, with others all share in one."""
    keep_memory()
    yield from side_by_side(make, items, torch.get_num_threads()) if is_small(net) else map(make, items)


def in_order(
    make: Callable[[In], Out], items: Iterable[In], num_threads: int, *, initializer: Callable[[], None] | None = None
) -> Generator[Out]:
    """`make` of each item, in the order of `items`, a few of them ahead in other threads."""
    if num_threads == 1:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(num_threads, initializer=initializer) as pool:
        pending: deque[Future[Out]] = deque()
        try:
            for item in items:
                # torch keeps settings in the context, such as how many graphs it compiles.
                pending.append(pool.submit(copy_context().run, make, item))
                if len(pending) > 4 * num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are; joins those that torchrun started. (0, 1) without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return 0, 1
    _join()
    return dist.get_rank(), dist.get_world_size()


def _join(**where: Any) -> None:
    if dist.is_initialized():
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    has_own = local_rank < torch.cuda.device_count()
    if has_own:
        torch.cuda.set_device(local_rank)  # NCCL takes the current one for its own work
    watch = None
    if not where:
        store, rank, size = next(rendezvous("env://", timeout=LONGEST))
        watch, where = Watch(rank, size), {"store": store, "rank": rank, "world_size": size}
    # One process may prepare or download for hours while the others wait; of one that ends they hear at once, and of
    # one that hangs by the watch.
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_own else "gloo", timeout=LONGEST, **where)
    atexit.register(_leave, watch)


def _leave(watch: Watch | None) -> None:
    if watch:
        watch.end()
    gc.collect()  # sharded tensors must be gone before the connections that they use
    dist.destroy_process_group()


def told_plainly(error: Exception) -> SidaError | None:
    """What a failure of the machine, and not of ours, means to people; None for other errors."""
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        wanted = re.search(r"tried to allocate ([\d.]+ ?\w+)", text, re.IGNORECASE)
        return SidaError(
            f"out of memory{f' while asking for {wanted[1]} more' if wanted else ''}",
            "Hold less at a time: --checkpoint-activations, --ema-on-cpu, --precision bf16, a smaller "
            "--batch-per-device, more --num-accumulation-rounds, or --shard; --dry-run tells what is needed.",
            exit_code=EXIT_FAILED,
        )
    is_lost = isinstance(error, dist.DistError) or "onnection closed by peer" in text or "onnection reset" in text
    if is_lost and dist.is_initialized():
        return SidaError(
            "another process of this run has ended, so this one ends, too",
            "Repeat the same command to go on from the last checkpoint.",
            exit_code=EXIT_FAILED,
        )
    return None


def share(items: Sequence[In]) -> Sequence[In]:
    """The items that fall to this process: every n-th of n processes."""
    rank, size = rank_and_size()
    return items[rank::size]


def joined(shared: Iterable[Out], num_items: int, *, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Out]:
    """What all processes made of their shares of `num_items` items, in order, on rank 0; on the others nothing.

    Every process must read it to its end, which comes early once should_stop() is true in one of them.
    """
    rank, size = rank_and_size()
    mine = iter(shared)
    for start in range(0, num_items, size):
        if any_process(should_stop()):
            return
        made = next(mine) if start + rank < num_items else None
        everyone: list[Out] | None = [made] * size if rank == 0 else None  # type: ignore[list-item]  # filled below
        if size > 1:
            dist.gather_object(made, everyone)
        yield from (everyone or [])[: num_items - start]


def handed_out(make: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """`make` of each item of rank 0, which all processes share, in order, on rank 0; on the others nothing.

    Every process must read it to its end; on the others `items` are none.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield from map(make, items)
        return
    waiting, num_taken = iter(items), size
    while num_taken == size:
        taken = list(islice(waiting, size))
        parts = [(len(taken), item) for item in [*taken, *[None] * (size - len(taken))]]
        told: list[Any] = [None]
        dist.scatter_object_list(told, parts if rank == 0 else None)
        num_taken, item = told[0]
        yield from joined(map(make, [item] if rank < num_taken else []), num_taken)


def agreed(make: Callable[[], str]) -> str:
    """What rank 0 makes, on all processes; an error of rank 0 ends the others, too."""
    rank, size = rank_and_size()
    told: list[str | None] = [make() if rank == 0 else None]
    if size > 1:
        dist.broadcast_object_list(told)
    assert told[0] is not None
    return told[0]


@contextmanager
def first_alone() -> Iterator[None]:
    """Within the block the first of several processes is alone; the others come after it, and find what it left."""
    if rank_and_size()[0] > 0:
        agreed(str)
        yield
    else:
        yield
        agreed(str)


def any_process(holds: bool) -> bool:
    """Whether something holds in at least one process; all must ask."""
    if rank_and_size()[1] == 1:
        return holds
    told = torch.tensor(int(holds))  # on the CPU, so that no GPU is waited for
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told)


def smallest(number: int) -> int:
    """The smallest of the numbers that all processes give."""
    if rank_and_size()[1] == 1:
        return number
    told = torch.tensor(number)
    dist.all_reduce(told, dist.ReduceOp.MIN)
    return int(told)


def first_told(message: str | None) -> str | None:
    """The message of the first process that has one, on all processes."""
    told: list[str | None] = [message] * rank_and_size()[1]
    if len(told) > 1:
        dist.all_gather_object(told, message)
    return next((m for m in told if m is not None), None)


def summed(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in its place."""
    if rank_and_size()[1] > 1:
        dist.all_reduce(values)
    return values


class GradientSum:
    """The gradients of a net, added up over the passes of a step and once over all processes.

    It adds in float64: Adam without momentum makes steps as large out of small gradients as out of large ones, so that
    sums which differ in their last bit, as those of other orders do, would lead to another run within a few steps.
    Of what is sharded FSDP2 adds up the rest, in the same way.

    loss_scale: a power of two, on the net's device, that losses are multiplied by and the sums divided by, so that the
    small gradients of a loss divided by a large batch are numbers of float16; exact in every other type.
    """

    def __init__(self, net: nn.Module, num_passes: int, loss_scale: Tensor | None = None) -> None:
        trained = [p for p in net.parameters() if p.requires_grad]
        self._parameters = [p for p in trained if not is_sharded(p)]
        self._sharded = [p for p in trained if is_sharded(p)]
        self._is_needed = num_passes > 1 or rank_and_size()[1] > 1
        self._loss_scale = loss_scale
        self._sums: dict[nn.Parameter, Tensor] = {}

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradients `add` takes."""
        return loss if self._loss_scale is None else loss * self._loss_scale

    def of(self, output: Tensor, gradient: Tensor | None = None) -> Sequence[Tensor | None]:
        """The gradients of a pass, to be added; of a net that is not sharded several threads may ask at a time.

        gradient: that of a loss which was `scaled`, with respect to the output; without it the output is the loss.
        """
        if gradient is None:
            output = self.scaled(output)
        if not self._sharded:
            return torch.autograd.grad(output, self._parameters, gradient, allow_unused=True)
        torch.autograd.backward(output, gradient)
        gradients = [p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return gradients

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Takes the gradients of a pass."""
        for parameter, value in zip(self._parameters, gradients, strict=True):
            if value is None:
                continue
            if value.stride() != parameter.stride():  # the fused optimiser takes both for laid out alike
                value = torch.empty_like(parameter).copy_(value)
            if not self._is_needed:
                parameter.grad = value
            elif parameter in self._sums:
                self._sums[parameter] += value
            else:
                self._sums[parameter] = value.to(torch.float64)

    def finish(self) -> None:
        """Gives the net the sum of all that was taken, in all processes, without the loss scale."""
        if self._loss_scale is not None:
            for parameter in self._sharded:
                if parameter.grad is not None:
                    local(parameter.grad).div_(self._loss_scale)
            for parameter in () if self._is_needed else self._parameters:
                if parameter.grad is not None:  # not in its place: autograd may give two parameters the same tensor
                    parameter.grad = parameter.grad / self._loss_scale
        while self._sums:  # one by one, so that not all of both is held at a time
            parameter, values = self._sums.popitem()
            values = summed(values)
            if self._loss_scale is not None:
                values /= self._loss_scale
            parameter.grad = values.to(parameter.dtype)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked without importing that class, which takes longer than many a command."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that lies in this process; others as they are."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, in every process; others as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def passes_of(recipe: Recipe, execution: Execution) -> list[Sequence[int]]:
    """The accumulation rounds of this process, in groups that go through the nets at once; see `recipe.passes_of`."""
    return rounds_of(recipe, execution, *rank_and_size())


DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def arrange(
    recipe: Recipe,
    execution: Execution,
    teacher: Preconditioned,
    fake_score: Preconditioned,
    generator: Preconditioned,
    ema: Preconditioned,
) -> None:
    """Gives the nets of a distillation their precision, place and form, before any optimiser is made."""
    for net in (teacher, fake_score, generator, ema):
        net.compute_dtype = DTYPES[recipe.precision]
    if recipe.teacher_precision:
        teacher.compute_dtype = DTYPES[recipe.teacher_precision]
    allow_tf32(recipe.precision == "tf32")
    if execution.channels_last:
        for net in (teacher, fake_score, generator, ema):
            # FSDP2 takes weights in the usual order alone; then every convolution turns them
            lay_out_by_pixel(net, weights=not execution.shard)
    if execution.checkpoint_activations:
        for net in (teacher, fake_score, generator):
            for block in blocks_of(net):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if execution.ema_on_cpu:
        ema.cpu()
    if execution.shard:
        for net in (teacher, fake_score, generator, ema):
            shard_(net)
    if execution.compile:
        for net in (teacher, fake_score, generator, ema):
            compile_(net)


def set_up(net: Preconditioned, setting: Setting) -> Preconditioned:
    """Gives a net that is sampled its precision and form, and returns it."""
    net.compute_dtype = DTYPES[setting.precision]
    if setting.channels_last:
        lay_out_by_pixel(net)
    if setting.compile:
        compile_(net)
    return net


def lay_out_by_pixel(net: Preconditioned, *, weights: bool = True) -> None:
    """Puts the net's activations, and its weights, into channels-last order."""
    net.memory_format = torch.channels_last
    if weights:
        cast(Any, net).to(memory_format=torch.channels_last)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on this device; what goes to a GPU goes from pinned memory, so that the host need not wait for it."""
    source = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return source.to(device, non_blocking=True)


def memory_of(device: torch.device) -> list[str | int]:
    """A GPU's name, and its memory in bytes."""
    properties = torch.cuda.get_device_properties(device)
    return [properties.name, properties.total_memory]


def allow_tf32(allow: bool) -> None:
    """Whether a GPU may round the inputs of float32 products and convolutions to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow


_GRAPHS_OF_A_METHOD = 64
"""a method of all nets, in training and not, with each size of batch"""


def compile_(net: Preconditioned) -> None:
    """Compiles the net's passes, when they first run with inputs of a form; its weights and their names stay."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS_OF_A_METHOD)
    # C++ all through takes longer to compile, but passes side by side then do not wait for Python's lock.
    all_through: dict[str, Any] = {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}
    options = all_through if is_small(net) else None
    for method in ("forward", "denoise_and_logits", "logits"):
        compiled = torch.compile(getattr(net, method), dynamic=False, options=options)
        setattr(net, method, _compiled_once(net, compiled))


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


@contextmanager
def without_weight_gradients(net: Preconditioned) -> Iterator[None]:
    """Within the block a compiled net computes no gradients of its weights, whatever is asked for.

    What is not compiled leaves them out by itself where only gradients of its inputs are asked for.
    """
    if not is_compiled(net):
        yield
        return
    trained = [p for p in net.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The U-Net's residual blocks."""
    return [module for module in net.modules() if isinstance(module, (UNetBlock, Block))]


_VECTOR_SIZE = 16
"""numbers of float32 that a CPU's kernels take at a time, at most"""


def shard_(net: Preconditioned) -> None:
    """Splits the net's parameters over the processes with FSDP2; its numbers stay the same.

    Small ones stay whole: single numbers (EDM2's gains), which FSDP2 cannot split, and what does not split into full
    vectors, since the optimiser's kernel rounds the rest of a vector in another way.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    kind = next(net.parameters()).device.type
    size = rank_and_size()[1]
    if size == 1:  # without torchrun FSDP2 needs a group of one
        _join(store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(kind, (size,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float64)  # see GradientSum
    stay_whole = {p for p in net.parameters() if p.ndim == 0 or len(p) % size or p.numel() // size % _VECTOR_SIZE}
    for module in (*blocks_of(net), net):
        sharded = fully_shard(
            module, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=stay_whole
        )
        sharded.set_gradient_divide_factor(1.0)  # gradients are summed: losses are divided by the whole batch
    for method in ("denoise_and_logits", "logits", "logvar"):
        register_fsdp_forward_method(net, method)


def sync_gradients(net: nn.Module, now: bool) -> None:
    """Whether the next backward pass of a sharded net adds up gradients over the processes."""
    if any(map(is_sharded, net.parameters())):
        cast(Any, net).set_requires_gradient_sync(now)


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
