import dataclasses
import json
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from sidactl import catalog, nets, scopes
from sidactl.cli import app
from sidactl.commands import bench
from sidactl.engine import meter, threads
from sidactl.errors import SidaError
from sidactl.recipes import Execution, Mode, NetSpec, Recipe, SamplingForm
from sidactl.training import made_up

TINY = catalog.TEACHERS["tiny-digits"]
WITHOUT_ATTENTION = dataclasses.replace(TINY.net, attn_resolutions=(), num_blocks=1)
CPU = torch.device("cpu")


class Ticking:
    """A clock that goes on by so many seconds whenever it is read; one that another process is given, by three."""

    def __init__(self, step: int = 1) -> None:
        self.now, self.step = 0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now

    def __reduce__(self) -> tuple[type["Ticking"], tuple[int]]:
        return Ticking, (3,)


class Thread(threading.Thread):
    """A thread in place of a process, with a copy of what that would be given."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, bench._Task], daemon: bool) -> None:
        pipe, task = args
        kept = Connection(os.dup(pipe.fileno()))
        super().__init__(target=target, args=(kept, pickle.loads(pickle.dumps(task))), daemon=daemon)


@pytest.fixture(scope="module")
def ran() -> tuple[bench.Report, Result]:
    """What `bench` has measured by that clock, and what it has printed."""
    reports: list[bench.Report] = []

    def run(*arguments: Any, **options: Any) -> bench.Report:
        reports.append(usual(*arguments, **options, clock=Ticking()))
        return reports[0]

    usual, words = bench.run, "bench tiny-digits --batch-size 4 --rounds 2 --steps 1 --device cpu"
    with pytest.MonkeyPatch.context() as patch, threads.one_thread_if(True):
        patch.setattr(bench, "run", run)
        context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Thread)
        patch.setattr(multiprocessing, "get_context", lambda method: context)
        words += " --channels-last --against eager --json"
        result = CliRunner().invoke(app, words.split(), catch_exceptions=False)
    return reports[0], result


@pytest.fixture
def report(ran: tuple[bench.Report, Result]) -> bench.Report:
    return ran[0]


def of_pass(mode: Mode, num: int, num_rounds: int = 1) -> Recipe:
    """The built-in recipe, with all stages in reach, in passes of so many images."""
    return made_up.recipe_of("tiny-digits", mode, num, num_rounds, 1, {})[0]


def forward_flop(spec: NetSpec, num: int) -> int:
    """Two per weight of a layer and per position that it is applied at, counted from the state dict's names."""
    with torch.device("meta"):
        state = nets.build(spec).state_dict()
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
    flop = bench.flop_per_image(of_pass("sida", 4), WITHOUT_ATTENTION, CPU)["SiDA"]
    expected = forward_flop(WITHOUT_ATTENTION, 1)
    # in0 attends whatever attn_resolutions says: q k^T and its product with v, over 16 positions of 32 channels
    expected += 2 * 2 * 16 * 16 * 32
    # a step generates twice; teacher and fake score both see the images of the generator's loss
    assert flop["generator forward"] == flop["generator loss"] == 2 * expected


def test_operations_of_the_parts_relate_as_their_passes_do(report: bench.Report) -> None:
    flop = {part.name: part.flop / 8 for part in report.measured[0].parts}
    # gradients of the inputs alone cost about as much as a forward pass, those of weights and inputs twice as much
    assert flop["generator loss backward"] == pytest.approx(flop["generator loss"], rel=0.02)
    assert flop["generator backward"] == pytest.approx(flop["generator forward"], rel=0.02)
    assert flop["fake score backward"] == pytest.approx(2 * flop["fake score forward"], rel=0.02)
    # reals go through the encoder, too
    assert flop["fake score forward"] > flop["generator forward"] / 2
    alone, _, whole = report.measured[0].stages
    assert whole.flop_per_image == sum(flop.values())
    once = flop["generator forward"] / 2 + flop["fake score forward"] + flop["fake score backward"]
    assert alone.flop_per_image == once


def test_operations_of_a_step_are_those_of_one_image_times_its_images() -> None:
    recipe = of_pass("sid", 2, num_rounds=2)
    training = made_up.distillation_of(recipe, Execution(), WITHOUT_ATTENTION, CPU)
    training.num_threads = 1
    with threads.one_thread_if(True), meter.operation_counter() as counter:
        made_up.step(training, "SiD")
    stages = bench.flop_per_image(recipe, WITHOUT_ATTENTION, CPU)
    assert list(stages) == ["fake score", "SiD"]
    assert counter.get_total_flops() == 4 * sum(stages["SiD"].values())


def test_what_happens_inside_a_scope_is_no_part_of_the_scope_around_it() -> None:
    clock = 0

    def work() -> None:
        nonlocal clock
        clock += 1
        for _ in range(2):
            with scopes.scope("outer"):
                clock += 10
                with scopes.scope("inner"):
                    clock += 100
                clock += 1000
        clock += 3

    assert scopes.by_part(work, lambda: clock) == {"outer": 2020, "inner": 200, "rest": 4}


def test_after_work_that_fails_nobody_measures() -> None:
    num_read = 0

    def read() -> float:
        nonlocal num_read
        num_read += 1
        return 0

    def work() -> None:
        with scopes.scope("part"):
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        scopes.by_part(work, read)
    assert num_read == 3
    with scopes.scope("part"):
        pass
    assert num_read == 3


def test_report_is_what_the_clock_said(report: bench.Report) -> None:
    assert (report.batch_size, report.num_rounds, report.num_parameters) == (4, 2, 188_945)
    (measured,), eager = report.measured, report.against
    assert eager
    assert (
        (measured.setting, eager.setting)
        == (report.best, made_up.EAGER)
        == (SamplingForm(channels_last=True), SamplingForm())
    )
    # the smallest product and convolution already take longer than is needed
    product, convolution = 2 * 256**3, 2 * 32**2 * 256 * 256 * 9
    for found, seconds in ((measured, 1), (eager, 3)):
        assert found.peak == meter.Peak(matrix_product=product / seconds, convolution=convolution / seconds)
        assert [s.name for s in found.stages] == ["fake score", "SiD", "SiDA"]
        for stage in found.stages:
            assert (stage.seconds, stage.images_per_sec, stage.sec_per_kimg) == (seconds, 8 / seconds, 125 * seconds)
            assert stage.utilisation == pytest.approx(8 * stage.flop_per_image / convolution)
        assert found.sampling_images_per_sec == 8 * 4 / seconds
        assert (found.num_graphs, found.num_recompiled) == (0, 0)
    assert measured.ratios == {"fake score": 3, "SiD": 3, "SiDA": 3, "sampling": 3}
    assert (eager.parts, eager.ratios) == ([], {})
    assert report.detector_images_per_sec is not None
    recipe = TINY.recipes["sida"]
    evaluating = recipe.evaluate_num * (1 / 32 + 1 / report.detector_images_per_sec)
    assert report.evaluation_share == pytest.approx(evaluating / (evaluating + recipe.evaluate_every_nimg / 8))


def test_parts_are_entered_as_often_as_their_passes_say(report: bench.Report) -> None:
    # one second for each that is entered and left, and one more around another
    num_rounds, seconds = 2, {part.name: part.seconds for part in report.measured[0].parts}
    # Reals are fetched within the fake score's forward pass, and the loss goes back within the generator's loss.
    assert seconds.pop("rest") == 1 + sum(seconds.values()) - 2 * 2 * num_rounds
    assert seconds == {
        "data": 3 * num_rounds,  # draws of either update, and reals
        "generator forward": 2 * num_rounds,
        "fake score forward": 2 * num_rounds,
        "fake score backward": num_rounds,
        "generator loss": 2 * num_rounds,
        "generator loss backward": num_rounds,
        "generator backward": num_rounds,
        "optimisers": 2,
        "EMA": 1,
    }


def test_peak_is_the_fastest_of_all_sizes_and_ends_with_one_that_keeps_the_device_busy() -> None:
    times = iter([0.02, 0.01, 0.02, 0.02, 0.02, 0.02, 0.2, 0.3, 0.2, 0.2, 0.2, 0.2])
    now, is_running, done = 0.0, False, list[int]()

    def clock() -> float:
        nonlocal now, is_running
        now += next(times) if is_running else 0
        is_running = not is_running
        return now

    growing = ((partial(done.append, size), size * 1000) for size in (1, 30, 900))
    assert meter._highest_rate(growing, clock) == pytest.approx(30 * 1000 / 0.2)
    assert done == [1] * 6 + [30] * 6


def test_peak_memory_is_that_of_what_lives_at_the_same_time() -> None:
    def work() -> torch.Tensor:
        kept = torch.ones(1000)
        for _ in range(3):
            torch.ones(500)
        return kept

    assert meter.peak_bytes(work, CPU) == 4 * (1000 + 500)


def test_peak_memory_holds_nets_and_optimisers_and_grows_with_the_stage(report: bench.Report) -> None:
    first, sid, _ = report.measured[0].stages
    # four nets and two optimisers of two moments each, in float32
    assert first.peak_bytes > 4 * 8 * 188_945
    assert sid.peak_bytes > first.peak_bytes


def test_ratios_are_medians_over_pairs() -> None:
    assert bench.ratios({"SiD": [2, 9, 4]}, {"SiD": [1, 3, 4], "SiDA": [1, 1, 1]}) == {"SiD": 2}


def test_the_end_of_the_eager_process_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    # a process that says that it is ready, and ends
    monkeypatch.setattr(bench, "_serve_eager", Connection.send)
    message = r"^the process of the eager step has ended with code 0\. Leave out --against"
    with pytest.raises(SidaError, match=message), bench._eager_process("ready") as ask:  # type: ignore[arg-type]
        ask("time", "SiD")


def test_every_setting_of_a_sweep_is_another() -> None:
    names = [setting.name for setting in bench.sweep("cpu")]
    assert names[0] == made_up.EAGER.name == "fp32"
    assert len(set(names)) == len(names) == 8
    assert "bf16 channels-last compiled" in names


def test_json_on_stdout_and_what_is_measured_on_stderr(ran: tuple[bench.Report, Result]) -> None:
    report, result = ran
    found = json.loads(result.stdout)
    assert found == json.loads(json.dumps(dataclasses.asdict(report)))
    assert found["teacher"] == "tiny-digits"
    assert found["best"] == {"precision": "fp32", "channels_last": True, "compile": False}
    assert result.stderr.splitlines() == [
        "counting operations",
        "preparing the eager step",
        "measuring fp32 channels-last",
        "measuring the detector tiny-digits",
    ]


def test_tables_tell_every_stage_and_part(report: bench.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = dataclasses.replace(report.measured[0], setting=SamplingForm(), num_graphs=6, warm_up_seconds=240.2)
    shown = dataclasses.replace(report, measured=[measured], detector_images_per_sec=None)
    monkeypatch.setattr(bench, "run", lambda *arguments, **options: shown)
    lines = CliRunner().invoke(app, ["bench", "tiny-digits"], catch_exceptions=False).stdout.splitlines()
    assert lines[0] == f"tiny-digits, sida: 188,945 parameters, 2 x 4 images a step, cpu, {report.num_threads} threads"
    assert [line.split()[0] for line in lines[2:10]] == ["fp32"] * 4 + ["eager"] * 4
    message = f"{measured.stages[-1].utilisation:.4g}", f"{measured.peak.convolution / 1e9:.4g}"
    assert [*lines[4].split()[:5], *lines[4].split()[6:8]] == ["fp32", "SiDA", "1", "8", "125", *message]
    assert [lines[index].split()[-1] for index in (4, 8)] == ["3", "-"]
    assert lines[5].split() == ["fp32", "sampling", "-", "32", *["-"] * 5, "3"]
    note = "6 graphs compiled in 240 s, 0 later"
    assert lines[10] == f"fp32: parts of a step of SiDA, passes one after the other; {note}"
    total = sum(part.seconds for part in measured.parts)
    for part, line in zip(measured.parts, lines[12:], strict=True):
        share, rate = part.seconds / total, part.flop / part.seconds / 1e9
        assert line.startswith(f"{part.name} ")
        assert line.split()[-3:] == [f"{part.seconds:g}", f"{share:.4g}", f"{float(f'{rate:.4g}'):g}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be >= 1, got 0. Pass --batch-size 1 or more."),
        ({"num_steps": 0}, "--steps must be >= 1, got 0. Pass --steps 1 or more."),
        ({"mode": "gan"}, "tiny-digits has no recipe of mode 'gan'. It has sid, sida, sid2a."),
        (
            {"mode": "dmd2"},
            "steps of mode dmd2 are not timed here, those of sid, sida, sid2a are. "
            "See examples/bench_methods.py for all modes side by side.",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(SidaError) as caught:
        bench.run("tiny-digits", **options)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_unknown_teacher_lists_those_with_recipes() -> None:
    with pytest.raises(SidaError, match=r"^unknown teacher 'edm3'\. Use one of tiny-digits, edm-cifar10-uncond, "):
        bench.run("edm3")
