"""Nothing in a training step makes the host wait for a GPU, but the one read-back of the augmentation."""

import ast
import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sidactl import nets
from sidactl.data.augment import AugmentPipe
from sidactl.data.codec import encode_affine
from sidactl.recipes import NetSpec
from sidactl.training import batches as training_batches
from sidactl.training import distillation as training_distillation
from tests.worlds import RECIPE, TINY, TINY_EDM2, distillation

PACKAGE = Path(__file__).parents[2] / "sidactl"
STEP_CODE = [
    *[PACKAGE / f"data/{name}.py" for name in ("augment", "codec")],
    *[PACKAGE / f"nets/{name}.py" for name in ("constants", "denoiser", "edm", "edm2")],
    *[PACKAGE / f"training/{name}.py" for name in ("batches", "distillation", "pretraining", "updates")],
    *[PACKAGE / f"engine/{name}.py" for name in ("gradients", "threads")],
    *(PACKAGE / "methods").glob("*.py"),
    PACKAGE / "noise.py",
]
WAITS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}


def copies_from_the_host(path: Path) -> list[str]:
    """Calls, outside of constructors, that make a tensor of Python's numbers on a device."""
    tree = ast.parse(path.read_text())
    once = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
        for inner in ast.walk(node)
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [
        f"{path.name}:{call.lineno}"
        for call in calls
        if id(call) not in once
        and isinstance(call.func, ast.Attribute)
        and (
            call.func.attr == "new_tensor"
            or (call.func.attr == "tensor" and any(keyword.arg == "device" for keyword in call.keywords))
        )
    ]


@pytest.mark.parametrize("path", STEP_CODE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_step_code_makes_no_tensor_of_numbers_on_a_device(path: Path) -> None:
    assert copies_from_the_host(path) == []


class Waiting(TorchDispatchMode):
    """Counts what a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.name().split(".")[0]) in WAITS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("spec", "changed"),
    [
        (TINY, {}),
        (TINY, {"dropout": 0.1, "precision": "fp16"}),
        (TINY_EDM2, {"forced_normalization": "intended"}),
        (TINY_EDM2, {"share_fakes": True, "dropout": 0.1}),
    ],
)
@pytest.mark.usefixtures("one_pass_at_a_time")
def test_a_step_reads_nothing_back(spec: NetSpec, changed: dict[str, Any]) -> None:
    run = distillation(spec, generator_from_nimg=None, num_accumulation_rounds=2, **changed)
    run.nimg = 10**6
    run.step()
    with Waiting() as waiting:
        losses = run.step()
    assert "generator_adversarial_loss" in losses
    assert not waiting.found


@pytest.fixture
def one_pass_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dispatch mode sees its own thread alone."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def test_a_read_back_would_be_seen() -> None:
    with Waiting() as waiting:
        assert torch.ones(()) > 0
        torch.ones(3).nonzero()
    assert waiting.found == {"aten::_local_scalar_dense": 1, "aten::nonzero": 1}


def test_the_augmentation_reads_its_margins_back_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, read = Tensor.tolist, list[torch.Size]()

    def noting(values: Tensor) -> Any:
        read.append(values.shape)
        return usual(values)

    monkeypatch.setattr(Tensor, "tolist", noting)
    with Waiting() as waiting:
        AugmentPipe(p=0.5)(torch.randn(4, 3, 8, 8), training_batches.SeededDraws(0, torch.device("cpu")))
    assert read == [(2, 2)]
    assert not waiting.found


class Nowhere:
    """Draws without values. Implements `Draws`."""

    def normal(self, shape: Iterable[int]) -> Tensor:
        return torch.randn(*shape, device="meta")

    def uniform(self, shape: Iterable[int]) -> Tensor:
        return torch.rand(*shape, device="meta")

    def integers(self, high: int, shape: Iterable[int]) -> Tensor:
        return torch.randint(high, tuple(shape), device="meta")


class OfMeta:
    """Micro-batches without values. Implements `MicroBatches`."""

    def __init__(self, spec: NetSpec) -> None:
        self._shape = 4, spec.img_channels, spec.img_resolution, spec.img_resolution

    def get(self, batch: int, round: int) -> training_batches.MicroBatch:
        labels, draws = torch.zeros(4, 10, device="meta"), Nowhere()

        def reals() -> Tensor:
            images = torch.zeros(self._shape, device="meta")
            return encode_affine(images) if self._shape[1] == 4 else images

        return training_batches.MicroBatch(labels, draws, draws, draws, [0], reals)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("spec", [TINY, TINY_EDM2], ids=["edm", "edm2"])
@pytest.mark.usefixtures("one_pass_at_a_time")
def test_a_step_needs_no_value_of_its_tensors(spec: NetSpec, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device tensors have none, so that whatever asks for one, or copies one there or back, fails."""
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda groups, fused: adam(groups, foreach=True, capturable=False))
    with torch.device("meta"):
        teacher = nets.build(spec)
    options: dict[str, Any] = {"generator_from_nimg": None, "num_accumulation_rounds": 2, "precision": precision}
    recipe = dataclasses.replace(RECIPE, **options)
    run = training_distillation.Distillation(recipe, teacher, None, OfMeta(spec))
    for side in run.sides.values():
        side.optimizer.step = lambda *_: None  # type: ignore[method-assign]  # torch has no fused Adam there
    run.nimg = 10**6
    assert {name: loss.device.type for name, loss in run.step().items()} == dict.fromkeys(
        ["fake_score_loss", "discriminator_loss", "generator_sid_loss", "generator_adversarial_loss"], "meta"
    )
