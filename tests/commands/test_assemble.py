"""What a distillation is asked with: the same question in other words, and what is found out before it begins."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import sidactl
from sidactl import catalog
from sidactl.commands import assemble
from sidactl.engine import configure, devices, ranks
from sidactl.recipes import Execution
from sidactl.store import LiveDir, Store
from tests.commands.conftest import never, refs
from tests.conftest import SHORT, Finished, instead_of, short_distill


def test_the_images_at_a_time_are_tried_anew_with_other_processes_devices_and_settings(tmp_path: Path) -> None:
    gpu, num_tries = torch.device("cuda:0"), 0

    def fit(memory: Any, clock: Any) -> tuple[int, float]:
        nonlocal num_tries
        num_tries += 1
        return 128, 0.25

    def tries(size: int, memory: int, execution: Execution) -> int:
        before = num_tries
        training = SimpleNamespace(recipe=catalog.recipe_for("tiny-digits", "sida"), fit_batch_per_device=fit)
        with pytest.MonkeyPatch.context() as patch:
            instead_of(ranks.rank_and_size, lambda: (0, size), patch)
            instead_of(ranks.broadcast_from_rank0, lambda make: make(), patch)
            instead_of(devices.memory_of, lambda device: ["a GPU", memory], patch)
            assemble.find_batch_per_device(cast(Any, training), execution, live, gpu)
        return num_tries - before

    with Store(tmp_path).live("key") as live:
        assert [tries(1, 80, Execution()) for _ in range(2)] == [1, 0]
        assert tries(2, 80, Execution()) == 1
        assert tries(2, 40, Execution()) == 1
        assert tries(2, 40, Execution(checkpoint_activations=True)) == 1


class Trial:
    """In place of a distillation on a GPU: steps take as long as its form says."""

    def __init__(self, execution: Execution, seconds: Mapping[bool, float | None], dropout: float) -> None:
        self.recipe = dataclasses.replace(catalog.recipe_for("tiny-digits", "sida"), dropout=dropout)
        self.execution, self.passes = execution, configure.passes_of(self.recipe, execution)
        self.notes: list[str] = []
        self._seconds = seconds[execution.channels_last]

    def fit_batch_per_device(self, memory: Any, clock: Any) -> tuple[int, float]:
        images = self.recipe.batch_size
        self.passes = configure.passes_of(self.recipe, Execution(batch_per_device=images))
        return images, 0.25

    def seconds_per_image(self, memory: Any, clock: Any) -> tuple[float | None, str | None]:
        return self._seconds, None if self._seconds else "no C++ compiler"


def formed(
    live: LiveDir,
    seconds: Mapping[bool, float | None],
    execution: Execution = Execution(),  # noqa: B008
    device: str = "cuda:0",
    dropout: float = 0.0,
) -> tuple[Trial, list[str], list[Execution]]:
    """What is trained with, the lines that tell it, and every form that was made."""
    made: list[Execution] = []

    def make(execution: Execution) -> Any:
        made.append(execution)
        return Trial(execution, seconds, dropout)

    with pytest.MonkeyPatch.context() as patch:
        instead_of(devices.memory_of, lambda device: ["a GPU", 80], patch)
        instead_of(devices.free, lambda device: None, patch)
        training, told = assemble.in_fastest_form(make, execution, live, torch.device(device))
    return cast(Any, training), told, made


def test_the_faster_form_stays_is_told_and_goes_on_with_the_run(tmp_path: Path) -> None:
    with Store(tmp_path).live("key") as live:
        training, told, made = formed(live, {False: 0.5, True: 0.25})
        assert (training.execution.compile, training.execution.channels_last) == (True, True)
        assert len(made) == 2
        assert told[-1] == (
            "channels-last and compiled stays (--form): an image takes 500 ms in the plain form, 250 ms channels-last "
            "and compiled"
        )
        again, told, made = formed(live, {False: 0.1, True: 9.0})
        assert (again.execution, again.passes) == (training.execution, training.passes)
        assert (len(made), told) == (1, [])


@pytest.mark.parametrize("seconds", [0.75, None], ids=["slower", "does not run"])
def test_where_the_compiled_form_is_slower_or_does_not_run_the_plain_one_stays(
    seconds: float | None, tmp_path: Path
) -> None:
    with Store(tmp_path).live("key") as live:
        training, told, made = formed(live, {False: 0.5, True: seconds})
        assert training.execution == Execution()
        assert len(training.passes[0]) * len(training.passes) == training.recipe.num_accumulation_rounds
        assert len(made) == 3
        assert told[-1].startswith("the plain form stays (--form): an image takes 500 ms")
        assert ("no C++ compiler" in told[-1]) == (seconds is None)
        assert formed(live, {False: 9.0, True: 0.1})[0].execution == Execution()


def test_a_short_run_tries_no_other_form(tmp_path: Path) -> None:
    duration = catalog.recipe_for("tiny-digits", "sida").duration_nimg
    with Store(tmp_path).live("key") as live:
        _, told, made = formed(live, {False: 0.9 * assemble.LEAST_SECONDS / duration, True: 1e-9})
        assert (made, len(told)) == ([Execution()], 1)


def test_with_dropout_the_form_that_is_tried_is_not_compiled(tmp_path: Path) -> None:
    with Store(tmp_path).live("key") as live:
        training, _, _ = formed(live, {False: 0.5, True: 0.25}, dropout=0.1)
        assert (training.execution.compile, training.execution.channels_last) == (False, True)


@pytest.mark.parametrize(
    ("execution", "device"),
    [
        (Execution(), "cpu"),
        (Execution(form="asked"), "cuda:0"),
        (Execution(compile=True), "cuda:0"),
        (Execution(channels_last=True), "cuda:0"),
        (Execution(shard=True), "cuda:0"),
    ],
)
def test_on_a_cpu_and_where_a_form_is_asked_for_none_is_timed(
    execution: Execution, device: str, tmp_path: Path
) -> None:
    with Store(tmp_path).live("key") as live:
        training, _, made = formed(live, {False: None, True: None}, execution, device)
        assert made == [execution]
        assert training.execution == execution


def test_teacher_by_name_oid_or_ref_is_one_question(finished: Finished) -> None:
    oid = refs(finished.root)["teacher/tiny-digits"]
    for teacher in (oid, oid[:12], "teacher/tiny-digits"):
        again = sidactl.distill(teacher=teacher, mode="sida", run=finished.root, watch=never, **SHORT)
        assert again == finished.best


def test_what_shapes_no_generator_is_no_part_of_the_question(finished: Finished) -> None:
    again = short_distill(finished.root, never, checkpoint_every_nimg=7, stop_if_nan_steps=3)
    assert again == finished.best
    options: dict[str, Any] = {"teacher": "tiny-digits", "mode": "sida", "run": finished.root, "watch": never}
    assert sidactl.distill(**options, teacher_score="none", detector="tiny-digits", **SHORT) == finished.best


def test_the_question_of_the_default_recipe_is_what_it_was(finished: Finished) -> None:
    store = Store.open(finished.root)
    options = {"teacher": "tiny-digits", "mode": "sida", "generator": None, "dataset": None, "reference": None}
    more = {"score": True, "detector": None, "allow_untrained": False, "overrides": {}}
    asked_for = assemble.assembled(store, execution=Execution(), device=None, recheck=False, **options, **more)
    oids = {role: refs(finished.root)[f"{role}/tiny-digits"] for role in ("teacher", "dataset")}
    recipe = catalog.TEACHERS["tiny-digits"].recipes["sida"].to_json()
    assert asked_for.questions(store)["best"].key == store.key("distill", {"recipe": recipe, "which": "best"}, oids)
