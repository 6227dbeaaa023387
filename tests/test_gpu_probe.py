"""The scripts that look at a GPU, as far as a CPU goes: verdicts, exit codes, and what finds the lines that wait."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = next(parent / "examples" for parent in Path(__file__).resolve().parents if (parent / "examples").is_dir())
CPU = torch.device("cpu")


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import gpu_probe

    return gpu_probe


@pytest.fixture
def check(probe: ModuleType) -> ModuleType:
    import gpu_check

    return gpu_check


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", [script.__name__, *words])
    code = script.main()
    assert isinstance(code, int)
    return code


def test_seeds_on_a_cpu_are_those_of_torch(
    probe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(probe, monkeypatch, "cpu", "--only", "seeds", "--json", str(tmp_path / "found.json")) == 0
    line, last = capsys.readouterr().out.splitlines()
    assert line.startswith("ok: seeds: 12 draws of 4 seeds have torch's bits; the generator is mt19937 (expected: ")
    assert last == "all 1 checks passed"
    part = json.loads((tmp_path / "found.json").read_text())["parts"]["seeds"]
    assert part["figures"]["first_of_seed_0"] == [1.541, -0.2934, -2.1788, 0.5684]  # as anywhere where torch runs
    assert line.startswith(part["verdict"])


@pytest.mark.parametrize(("script", "words", "count"), [("probe", ["cpu", "--only", "syncs"], 3)])
def test_what_needs_a_gpu_is_skipped_and_counted(
    script: str,
    words: list[str],
    count: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(request.getfixturevalue(script), monkeypatch, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[:-1]] == ["needs a GPU: skipped: syncs"] * count
    assert lines[-1] == f"all 0 checks passed, {count} skipped"


def parts(probe: ModuleType) -> dict[str, tuple[str, Callable[[], Any]]]:
    def other() -> Any:
        raise probe.NotAsExpectedError("it is 3", {"number": 3})

    return {
        "good": ("2", lambda: ("it is 2", {"number": 2})),
        "other": ("2", other),
        "broken": ("2", lambda: [][0]),
    }


def test_every_part_has_a_verdict_and_one_that_fails_fails_the_script(
    probe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    assert probe.run_parts(parts(probe), CPU, "", path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" in ")[0] for line in lines[:-1]] == [
        'ok: good: it is 2 (expected: 2) {"number": 2}',
        'NOT as expected: other: because it is 3 (expected: 2) {"number": 3}',
        "NOT as expected: broken: because it ended with IndexError: list index out of range (expected: 2) {}",
    ]
    assert lines[-1] == "2 of 3 checks failed"
    assert [part["figures"] for part in json.loads(path.read_text())["parts"].values()] == [
        {"number": 2},
        {"number": 3},
        {},
    ]
    assert probe.run_parts(parts(probe), CPU, "good", None) == 0


def test_a_part_that_is_not_there_is_refused(probe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as caught:
        run(probe, monkeypatch, "cpu", "--only", "seed of")
    assert caught.value.code == 2


def test_lines_that_wait_are_the_innermost_ones_of_ours(probe: ModuleType) -> None:
    def wait() -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    first = wait.__code__.co_firstlineno + 1

    def wait_twice() -> None:
        wait()
        wait()

    found = probe.synchronising_lines(wait_twice)
    assert dict(found) == {f"{Path(__file__).resolve().relative_to(EXAMPLES.parent)}:{first}": 2}


@pytest.mark.parametrize(
    ("ops", "is_expected"),
    [
        ({"aten::_scaled_dot_product_flash_attention": 2, "aten::_flash_attention_backward": 2}, True),
        ({"aten::_scaled_dot_product_efficient_attention": 2}, True),
        ({"aten::_scaled_dot_product_attention_math": 2}, False),
        (
            {"aten::_scaled_dot_product_attention_math": 1, "aten::_scaled_dot_product_flash_attention_for_cpu": 1},
            False,
        ),
        ({}, False),
    ],
)
def test_attention_must_be_fused_everywhere(probe: ModuleType, ops: dict[str, int], is_expected: bool) -> None:
    if is_expected:
        assert probe.fused_or_not(ops)[0].startswith("fused kernels alone")
    else:
        with pytest.raises(probe.NotAsExpectedError):
            probe.fused_or_not(ops)


def test_a_profiler_sees_attention_in_every_small_net(probe: ModuleType) -> None:
    for name in ("edm-imagenet64", "edm-cifar10-uncond", "edm2-xs"):
        try:
            words, figures = probe.attention(CPU, name)
        except probe.NotAsExpectedError as other:  # which kernel it is depends on the processor, too
            words, figures = other.because, other.figures
        assert "kernel" in words
        assert sum(figures.values()) >= 2


def test_products_are_told_from_the_rest(probe: ModuleType) -> None:
    words, figures = probe.shares({"aten::cudnn_convolution": 30.0, "aten::mm": 20.0, "aten::mul": 50.0}, {})
    assert (words, figures["products"]) == ("products take 50% of a step", 0.5)
    with pytest.raises(
        probe.NotAsExpectedError, match=r"^products take 10%; the longest others: aten::copy_, aten::mul$"
    ):
        probe.shares({"aten::mm": 10.0, "aten::mul": 40.0, "aten::copy_": 50.0}, {"gemm": 10.0})


def test_float16_points_where_float32_does_at_the_recipes_loss_scale_and_not_at_one(probe: ModuleType) -> None:
    words, figures = probe.half_precision(CPU, scales=(1,))
    assert words.startswith("at the recipe's loss scale, x512, the cosine is 0.99")
    assert figures["x1"] < 0.5 < 0.99 < figures["x512, the recipe"]


def test_a_check_without_golden_numbers_is_skipped(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "GOLDEN", tmp_path / "nowhere")
    assert run(check, monkeypatch, "--device", "cpu", "--only", "golden") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "all 0 checks passed, 6 skipped"


def test_a_golden_trajectory_is_followed_by_the_script_too(check: ModuleType) -> None:
    if not check.GOLDEN.is_dir():
        pytest.skip("golden reference data not found")
    words, figures = check.golden_trajectory(CPU, "edm2_sid_logvar_from_states")
    assert words.startswith("3 steps deviate by ")
    assert {name.split()[0] for name in figures} == {"gradients", "weights"}


def test_a_job_ends_soon_after_one_of_its_processes_has_failed(check: ModuleType) -> None:
    words, figures = check.one_raises(CPU)
    assert words.startswith("2 processes ended after ")
    assert figures["code"] != 0


def test_runs_that_differ_are_told(check: ModuleType) -> None:
    words, _ = check._same(("a", 1.0), ("a", 1.0), CPU, "the stopped run")
    assert words == "the stopped run scores 1, beside 1, with the same bits"
    for device, other in ((CPU, ("b", 1.0)), (torch.device("cuda"), ("b", 2.0))):
        with pytest.raises(check.NotAsExpectedError):
            check._same(("a", 1.0), other, device, "the stopped run")
    assert check._same(("a", 1.0), ("b", 1.1), torch.device("cuda"), "it")[0].endswith("with other bits")


def test_small_detectors_give_a_device_what_they_give_a_cpu(check: ModuleType) -> None:
    words, figures = check.detector(CPU, "tiny-digits")
    assert words.startswith("features are within 0.0e+00")
    assert figures["distances"][0] > 1
