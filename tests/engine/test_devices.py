"""What a GPU is told before it works, and which one is refused; asked of stand-ins, since no GPU is needed for it."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from sidactl.engine import configure, devices
from sidactl.errors import SidaError
from sidactl.recipes import Recipe
from sidactl.training import updates
from tests.training.test_trainer import SMALL, parameter_with_gradient
from tests.worlds import RECIPE, distillation, gradients_of, weights

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")


@pytest.mark.parametrize(
    ("capability", "built"),
    [
        ((7, 5), CUDA_13),
        ((8, 9), CUDA_13),
        ((9, 0), CUDA_13),
        ((12, 1), CUDA_13),
        ((13, 0), CUDA_13),
        ((7, 0), CUDA_12_6),
        ((9, 4), ["gfx942"]),
        ((9, 0), []),
    ],
)
def test_a_gpu_with_kernels_is_taken(
    capability: tuple[int, int], built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability, built)
    assert devices.pick_device() == torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "built", "install"),
    [
        ((7, 0), CUDA_13, "the build of torch for cu126"),
        ((6, 1), CUDA_13, "the build of torch for cu126"),
        ((10, 0), CUDA_12_6, "the build of torch for cu128"),
        ((8, 0), ["sm_90", "compute_90"], "another build of torch"),
    ],
)
def test_a_gpu_without_kernels_is_refused_with_the_build_that_has_them(
    capability: tuple[int, int], built: list[str], install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability, built)
    with pytest.raises(SidaError) as caught:
        devices.pick_device("cuda:0")
    name = f"sm_{capability[0]}{capability[1]}"
    assert f"has no kernels for Some GPU ({name}), only for {', '.join(built)}" in str(caught.value)
    assert f"Install {install}" in str(caught.value)
    assert caught.value.exit_code == 2


def test_products_of_float16_are_added_up_in_float32_on_every_device_that_was_picked() -> None:
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    devices.pick_device("cpu")
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


def test_kernels_are_chosen_by_trying_while_a_gpu_trains_and_never_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    run = distillation(generator_from_nimg=None)
    usual = run._update
    monkeypatch.setattr(run, "_update", lambda *a: (seen.append(torch.backends.cudnn.benchmark), usual(*a))[1])
    for kind in ("cpu", "cuda"):
        run._device = torch.device(kind)
        run.step()
        assert not torch.backends.cudnn.benchmark
    assert seen == [False, False, True, True]


# Gradients that are not finite


def test_the_published_way_with_gradients_that_are_not_finite_leaves_no_trace_in_a_recipe_that_has_it_not() -> None:
    assert "nonfinite" not in RECIPE.to_json()
    published = dataclasses.replace(RECIPE, nonfinite="zero")
    assert published.to_json() == RECIPE.to_json() | {"nonfinite": "zero"}
    assert Recipe.from_json(published.to_json()) == published
    with pytest.raises(SidaError, match="nonfinite must be one of skip, zero"):
        dataclasses.replace(RECIPE, nonfinite="clip")  # type: ignore[arg-type]


def test_nan_becomes_zero_and_infinity_a_large_number() -> None:
    net, optimizer = parameter_with_gradient([1.0, math.nan, math.inf, -math.inf])
    assert not updates.finite_made_(optimizer)
    assert net.weight.grad is not None
    assert net.weight.grad.tolist() == [[1.0, 0.0, 1e5, -1e5]]
    assert updates.finite_made_(optimizer)


@pytest.mark.parametrize(("nonfinite", "steps"), [("skip", False), ("zero", True)])
def test_an_update_with_a_gradient_that_is_not_finite_is_made_only_where_the_recipe_says(
    nonfinite: str, steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"nonfinite": nonfinite, "generator_from_nimg": None, "precision": "fp16"}
    run = distillation(SMALL, **options)
    before, scale = weights(run.generator), run.skipped.loss_scales["generator"]
    usual, size = run._gradients, float(scale.value.fill_(8.0))
    scale._start = 8.0
    wrong: list[int] = []

    def with_nan(turn: Any, *rest: Any) -> Any:
        total, losses = usual(turn, *rest)
        finish = total.finish

        def finished() -> None:
            finish()
            if turn == "generator":
                first = next(p for p in run.generator.parameters() if p.grad is not None)
                assert first.grad is not None
                first.grad.view(-1)[0] = math.nan
                wrong.append(len(gradients_of(run.generator)))

        monkeypatch.setattr(total, "finish", finished)
        return total, losses

    monkeypatch.setattr(run, "_gradients", with_nan)
    run.step()
    assert wrong
    assert torch.equal(weights(run.generator), before) != steps
    assert bool(weights(run.generator).isfinite().all())
    assert run.skipped.total["generator"] == int(not steps)
    assert float(scale.value) == size / 2, "what float16 could not hold makes the scale fall in either way"


def test_what_is_compiled_is_kept_in_the_users_cache_unless_torch_is_told_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    configure.keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    configure.keep_compiled()
    assert cache_dir() == str(tmp_path / "sidactl" / "inductor")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    configure.keep_compiled()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
