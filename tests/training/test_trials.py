"""What is found by trying before a run begins, with memory and a clock that tests make up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sidactl import methods
from sidactl.engine import ranks
from sidactl.engine.failures import explain_failure, is_out_of_memory
from sidactl.methods import score_losses
from sidactl.recipes import Execution
from sidactl.training import trials
from tests.conftest import instead_of
from tests.worlds import distillation, roomy, stopped_clock, weights

SIZES = [1, 2, 4, 8, 16]
CUDNN = "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
NO_ENGINE = "GET was unable to find an engine to execute this computation"


def tried(times: dict[int, float | None], start: int) -> tuple[trials.Fit, list[int]]:
    asked: list[int] = []

    def seconds_of(size: int) -> float | None:
        asked.append(size)
        return times[size]

    return trials.fastest(SIZES, start, seconds_of), asked


@pytest.mark.parametrize(
    ("times", "start", "expected", "asked"),
    [
        ([5, 4, 3, 2, 1], 4, 16, [4, 8, 16]),
        ([5, 4, 3, 3.5, 1], 4, 4, [4, 8, 2]),
        ([1, 2, 3, 4, 5], 4, 1, [4, 8, 2, 1]),
        ([5, 4, 3, None, None], 16, 4, [16, 8, 4, 2]),
        ([5, None, None, None, None], 8, 1, [8, 4, 2, 1]),
        ([5, 4, 3, 2, None], 8, 8, [8, 16, 4]),
    ],
)
def test_the_fastest_that_fits_is_found_from_the_estimate_on(
    times: list[float | None], start: int, expected: int, asked: list[int]
) -> None:
    fit, order = tried(dict(zip(SIZES, times, strict=True)), start)
    assert (fit.size, order) == (expected, asked)
    assert fit.seconds == times[SIZES.index(expected)]


def test_where_nothing_fits_it_is_the_smallest_without_a_time() -> None:
    assert tried(dict.fromkeys(SIZES), 4)[0] == (1, None)


def test_the_slowest_process_counts_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    others: dict[int, float] = {4: 3.0, 8: 9.0, 2: 4.0}
    asked: list[int] = []

    def least(number: int) -> int:
        return min(number, -round(others[asked[-1]] * 1e12))

    def seconds_of(size: int) -> float:
        asked.append(size)
        return 1.0 / size

    instead_of(ranks.all_reduce_min, least, monkeypatch)
    assert trials.fastest(SIZES, 4, seconds_of) == (4, 3.0)


def test_a_work_counts_by_its_shortest_repetition() -> None:
    seconds = iter([0.0, 3.0, 10.0, 11.0, 20.0, 24.0])
    assert trials.least_seconds(lambda: None, lambda: next(seconds), num_tries=3) == 1.0


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), *map(RuntimeError, (CUDNN, CUBLAS, NO_ENGINE))],
    ids=["torch", "cudnn", "cublas", "no engine"],
)
def test_the_images_at_a_time_are_found_by_trying_and_nothing_of_it_remains(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, untouched = (distillation(generator_from_nimg=None, num_accumulation_rounds=4) for _ in range(2))
    micro_batch = run.recipe.batch_size // 4
    computed = methods.fake_score_loss
    sizes: list[int] = []

    def limited(fake_score: Any, images: Tensor, *arguments: Any, **options: Any) -> score_losses.ScoreLoss:
        sizes.append(len(images) // micro_batch)
        if len(images) > 2 * micro_batch:
            raise error
        return computed(fake_score, images, *arguments, **options)

    with monkeypatch.context() as patched:
        instead_of(methods.fake_score_loss, limited, patched)
        assert run.fit_batch_per_device(roomy, stopped_clock).size == 2 * micro_batch
    assert list(dict.fromkeys(sizes)) == [4, 2, 1]
    assert [list(rounds) for rounds in run.passes] == [[0, 1], [2, 3]]
    untouched.passes = run.passes
    for training in (run, untouched):
        training.step()
    assert torch.equal(weights(run.generator), weights(untouched.generator))


def test_another_error_of_a_trial_is_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    run = distillation(generator_from_nimg=None, num_accumulation_rounds=4)

    def broken(*arguments: Any, **options: Any) -> score_losses.ScoreLoss:
        raise RuntimeError("an illegal memory access was encountered")

    with monkeypatch.context() as patched:
        instead_of(methods.fake_score_loss, broken, patched)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            run.fit_batch_per_device(roomy, stopped_clock)


def test_a_form_is_timed_with_passes_as_they_are_and_one_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    run, untouched = (distillation(generator_from_nimg=None, num_accumulation_rounds=4) for _ in range(2))
    moments = iter([0.0, 8.0, 10.0, 16.0])
    micro_batch = run.recipe.batch_size // 4
    assert run.seconds_per_image(roomy, lambda: next(moments)) == (6.0 / (2 * micro_batch), None)
    for training in (run, untouched):
        training.step()
    assert torch.equal(weights(run.generator), weights(untouched.generator))

    def broken(*arguments: Any, **options: Any) -> score_losses.ScoreLoss:
        raise RuntimeError("no C++ compiler\nand more")

    instead_of(methods.fake_score_loss, broken, monkeypatch)
    assert run.seconds_per_image(roomy, stopped_clock) == (None, "no C++ compiler")


def sizes_tried(free: Callable[[int], int], total: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[int]]:
    """What is chosen on a device of `total` bytes, of which `free(size)` are left at a size, and what was tried."""
    run = distillation(generator_from_nimg=None, num_accumulation_rounds=4)
    sizes: list[int] = []
    computed = run._gradients

    def noting(turn: Any, passes: Any, shared: Any) -> Any:
        sizes.append(len(passes[0]))
        return computed(turn, passes, shared)

    monkeypatch.setattr(run, "_gradients", noting)
    fit = run.fit_batch_per_device(lambda: (free(sizes[-1]) if sizes else total, total), stopped_clock)
    return fit.size * 4 // run.recipe.batch_size, list(dict.fromkeys(sizes))


def test_a_twentieth_of_the_memory_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    total = 1 << 50
    left = {1: total, 2: total // 20 + 1, 4: total // 20 - 1}
    assert sizes_tried(left.__getitem__, total, monkeypatch) == (2, [4, 2, 1])


def test_the_first_size_is_the_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that by the estimate holds a single micro-batch is not begun with four."""
    assert sizes_tried(lambda size: 10, 10, monkeypatch)[1][0] == 1


def test_a_collective_comes_before_memory_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    run = distillation(generator_from_nimg=None, num_accumulation_rounds=4)
    happened: list[str] = []

    def noted(values: Tensor) -> Tensor:
        happened.append(f"collective of {values.nbytes >> 20} MiB")
        return values

    def memory() -> tuple[int, int]:
        happened.append("memory")
        return roomy()

    instead_of(ranks.all_reduce_sum, noted, monkeypatch)
    run.fit_batch_per_device(memory, stopped_clock)
    assert happened[:2] == ["collective of 64 MiB", "memory"]


def test_where_images_depend_on_their_pass_one_micro_batch_at_a_time_is_all_that_is_tried() -> None:
    run = distillation(generator_from_nimg=None, num_accumulation_rounds=4, dropout=0.1)
    assert run.recipe.joins_micro_batches(Execution())
    run._joins = run.recipe.joins_micro_batches(Execution(compile=True))
    assert run.fit_batch_per_device(roomy, stopped_clock).size == run.recipe.batch_size // 4


def test_cudnns_and_cublas_allocations_are_out_of_memory_to_people_and_a_missing_kernel_is_not() -> None:
    for text in (CUDNN, CUBLAS):
        told = explain_failure(RuntimeError(text))
        assert told
        assert told.message == "out of memory"
    assert explain_failure(RuntimeError(NO_ENGINE)) is None
    assert not is_out_of_memory(ValueError(CUDNN))
