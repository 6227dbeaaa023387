"""What a distillation is asked with: the same question in other words, and what is found out before it begins."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import sidactl
from sidactl import catalog
from sidactl.commands import assemble
from sidactl.engine import devices, ranks
from sidactl.recipes import Execution
from sidactl.store import Store
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
