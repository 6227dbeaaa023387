import dataclasses
import json
import math

import pytest
import torch
from typer.testing import CliRunner

from sidactl import catalog
from sidactl.cli import app
from sidactl.commands import bench
from sidactl.errors import SidaError
from sidactl.recipes import Mode, NetSpec, Recipe

TINY = catalog.TEACHERS["tiny-digits"]
WITHOUT_ATTENTION = dataclasses.replace(TINY.net, attn_resolutions=(), num_blocks=1)
PASS = ["generator forward", "fake-score step forward", "fake-score step backward", "discriminator on reals"]
PASS += ["generator forward with graph", "teacher forward", "teacher backward", "fake score forward"]
PASS += ["fake score backward", "generator backward"]


@pytest.fixture(scope="module")
def report() -> bench.Report:
    return bench.run("tiny-digits", batch_size=4, num_rounds=2, num_steps=1, device="cpu")


def of_batch(mode: Mode, num: int) -> Recipe:
    """The built-in recipe with one pass of so many images."""
    return dataclasses.replace(TINY.recipes[mode], batch_size=num, num_accumulation_rounds=1)


def forward_flop(spec: NetSpec, num: int) -> int:
    """Two per weight of a layer and per position that it is applied at, counted from the state dict's names."""
    with torch.device("meta"):
        state = bench.nets.build(spec).state_dict()
    total = 0
    for name, tensor in state.items():
        if not name.endswith(".weight") or "norm" in name:
            continue
        positions = 1
        if tensor.ndim == 4:
            side = int(name.split(".")[2].partition("x")[0])
            positions = side**2
        total += 2 * tensor.numel() * positions * num
    return total


def test_operations_of_a_forward_pass_equal_a_count_by_hand() -> None:
    flop = bench.flop_of_parts(of_batch("sida", 4), WITHOUT_ATTENTION)
    expected = forward_flop(WITHOUT_ATTENTION, 4)
    # in0 attends whatever attn_resolutions says: q k^T and its product with v, over 16 positions of 32 channels
    expected += 2 * 2 * 4 * 16 * 16 * 32
    assert flop["teacher forward"] == flop["generator forward"] == expected


def test_operations_of_the_parts_relate_as_their_passes_do() -> None:
    flop = bench.flop_of_parts(of_batch("sida", 4), TINY.net)
    assert list(flop) == PASS
    assert flop["teacher forward"] == flop["fake score forward"]
    assert flop["teacher backward"] == flop["fake score backward"]
    # gradients of the inputs alone cost about as much as a forward pass, those of weights and inputs twice as much
    assert flop["teacher backward"] == pytest.approx(flop["teacher forward"], rel=0.02)
    assert flop["generator backward"] == pytest.approx(2 * flop["generator forward with graph"], rel=0.02)
    sid = bench.flop_of_parts(of_batch("sid", 4), TINY.net)
    assert "discriminator on reals" not in sid
    assert sid["fake-score step forward"] < flop["fake-score step forward"]


def test_operations_grow_with_the_batch() -> None:
    eight, four = (bench.flop_of_parts(of_batch("sida", num), TINY.net) for num in (8, 4))
    assert eight["teacher forward"] == 2 * four["teacher forward"]


def test_report_is_consistent(report: bench.Report) -> None:
    assert (report.batch_size, report.num_rounds, report.num_parameters) == (4, 2, 188_945)
    (measured,) = report.measured
    assert measured.setting == bench.EAGER
    assert [s.name for s in measured.stages] == ["fake score", "SiD", "SiDA"]
    assert [p.name for p in measured.parts] == ["data", *PASS, "optimisers", "EMA"]
    for stage in measured.stages:
        assert stage.images_per_sec == pytest.approx(8 / stage.seconds)
        assert stage.sec_per_kimg == pytest.approx(1000 / stage.images_per_sec)
        rate = stage.flop_per_image * stage.images_per_sec
        assert stage.utilisation == pytest.approx(rate / max(measured.peak.matrix_product, measured.peak.convolution))
    sida = measured.stages[-1]
    assert sida.flop_per_image == sum(p.flop * p.times for p in measured.parts if p.inside is None) / 8
    assert (measured.num_graphs, measured.num_recompiled) == (0, 0)
    assert report.evaluation_share is not None
    assert 0 < report.evaluation_share < 1


def test_peak_memory_holds_nets_and_optimisers_and_grows_with_the_stage(report: bench.Report) -> None:
    first, sid, _ = report.measured[0].stages
    # four nets and two optimisers of two moments each, in float32
    assert first.peak_bytes > 4 * 8 * 188_945
    assert sid.peak_bytes > first.peak_bytes


def test_against_eager_gives_a_ratio_for_each_stage_and_sampling() -> None:
    setting = bench.SamplingForm(precision="bf16", channels_last=True)
    found = bench.run(
        "tiny-digits",
        mode="sid",
        batch_size=2,
        num_steps=1,
        settings=[setting],
        against_eager=True,
        with_detector=False,
        device="cpu",
    )
    (measured,) = found.measured
    assert sorted(measured.ratios) == ["SiD", "fake score", "sampling"]
    assert sorted(measured.cpu_ratios) == sorted(measured.ratios)
    assert all(ratio > 0 for ratio in (*measured.ratios.values(), *measured.cpu_ratios.values()))
    assert found.against is not None
    assert found.against.setting == bench.EAGER
    assert found.best is measured
    assert (found.detector_images_per_sec, found.evaluation_share) == (None, None)


def test_every_setting_of_a_sweep_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [setting.name for setting in bench.sweep("cpu")]
    assert names[0] == bench.EAGER.name == "fp32"
    assert len(set(names)) == len(names) == 8
    assert "bf16 channels-last compiled" in names


def test_json_on_stdout_and_what_is_measured_on_stderr() -> None:
    words = ["bench", "tiny-digits", "--batch-size", "2", "--steps", "1", "--json", "--device", "cpu"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found["teacher"] == "tiny-digits"
    assert found["best"] == {"precision": "fp32", "channels_last": False, "compile": False}
    assert all(math.isfinite(stage["seconds"]) for stage in found["measured"][0]["stages"])
    assert result.stderr.splitlines() == ["measuring fp32", "measuring the detector tiny-digits"]


def test_tables_name_every_part_and_stage() -> None:
    words = ["bench", "tiny-digits", "--batch-size", "2", "--steps", "1", "--no-detector", "--device", "cpu"]
    out = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    lines = out.splitlines()
    (data,) = [line.split() for line in lines if line.startswith("data ")]
    (heads,) = [line.split() for line in lines if line.startswith("part ")]
    assert dict(zip(heads, data, strict=True))["times"] == "2"
    assert lines[0] == "tiny-digits, sida: 188,945 parameters, 1 x 2 images a step, cpu, 1 threads"
    for name in ("fp32     SiDA", *PASS, "optimisers", "EMA"):
        assert any(line.startswith(name) for line in lines), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be >= 1, got 0. Pass --batch-size 1 or more."),
        ({"num_steps": 0}, "--steps must be >= 1, got 0. Pass --steps 1 or more."),
        ({"mode": "gan"}, "tiny-digits has no recipe of mode 'gan'. It has sid, sida, sid2a."),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(SidaError) as caught:
        bench.run("tiny-digits", **options)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_the_end_of_the_eager_process_is_one_line() -> None:
    recipe, spec = bench._recipe("tiny-digits", "sid", 2, 1, 1, {})
    eager = bench._Eager(recipe, spec, torch.device("cpu"))
    eager._process.kill()
    with pytest.raises(SidaError, match=r"^the process of the eager step has ended with code -9\. Leave out --against"):
        eager.time("SiD")


def test_unknown_teacher_lists_those_with_recipes() -> None:
    with pytest.raises(SidaError, match=r"^unknown teacher 'edm3'\. Use one of tiny-digits, edm-cifar10-uncond, "):
        bench.run("edm3")
