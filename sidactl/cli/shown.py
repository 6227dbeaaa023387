"""Artifacts, generators, scores and progress as people see them."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sidactl import units
from sidactl.cli import console
from sidactl.cli import display as cli_display
from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.recipes import FROM_GENERATOR, HeunSpec, Recipe, flag_of

if TYPE_CHECKING:
    from sidactl.catalog import Published, Row
    from sidactl.commands.scores import Score
    from sidactl.store import Artifact


def named_classes(names: Sequence[str]) -> str:
    first = ", ".join(f"{index} {name}" for index, name in enumerate(names[:5]))
    return f"{len(names):,} classes: {first}{', ...' if len(names) > 5 else ''}"


@dataclasses.dataclass(frozen=True)
class Shown:
    """What functions call with events of training, or with how many images are done; `part` shows parts of the work."""

    tell: Callable[..., None]
    part: Callable[..., Callable[[int, int], None]]

    def __call__(self, *told: Any) -> None:
        self.tell(*told)


@contextmanager
def ticking(title: str, unit: str = "images") -> Iterator[Shown]:
    """A display of work that counts images, or bytes, opened when it first says how far it is."""
    with cli_display.display() as display:
        yield Shown(lambda done, total: display.show(title, total or None, unit).update(done), display.part)


def print_entries(rows: "Sequence[Row]", as_json: bool) -> None:
    """What the catalog says of a name that is not in the run directory."""
    if as_json:
        console.print_json({"name": rows[0].name, "catalog": [row_json(row) for row in rows]})
        return
    for row in rows:
        console.print_data(f"{row.kind} {row.name}, in the catalog, not in the run directory")
        facts = {"about": row.about, "licence": row.licence, "url": row.url}
        facts["size"] = None if row.size_bytes is None else units.format_bytes(row.size_bytes)
        for name, fact in facts.items():
            if fact is not None:
                console.print_data(f"  {name:8} {fact}")
        for name, number in row.scores.items():
            console.print_data(f"  {number.source:8} {published_text(name, number)}")


def published_text(name: str, number: "Published") -> str:
    spread = "" if number.std is None else f" +- {number.std:g}"
    return f"{name} {number.value:g}{spread}; 50,000 images"


def row_json(row: "Row") -> dict[str, Any]:
    return row._asdict() | {"scores": {name: score._asdict() for name, score in row.scores.items()}}


def short_text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def images_text(done: int | None, total: int | None) -> str | None:
    if done is None:
        return None
    return f"{done:,}" if total is None else f"{done:,} / {total:,}"


def size_text(artifact: "Artifact") -> str:
    return units.format_bytes(sum(entry.size_bytes for entry in artifact.files.values()))


def print_artifact(artifact: "Artifact", as_json: bool) -> None:
    if as_json:
        console.print_json(
            {
                "oid": artifact.oid,
                "kind": artifact.kind,
                "params": dict(artifact.params),
                "results": dict(artifact.results),
            }
        )
    else:
        console.print_data(artifact.oid)


def print_generator(artifact: "Artifact", as_json: bool) -> None:
    from sidactl.commands.scores import score_name

    results: Mapping[str, Any] = artifact.results
    recipe, seen = Recipe.from_json(artifact.params["recipe"]), results["images_seen"]
    look = f"Look at it: sidactl export {artifact.oid[:12]} FOLDER"
    steps = "one step" if (num_steps := recipe.sampler().num_steps) == 1 else f"{num_steps} steps"
    if untrained := recipe.untrained(seen):
        start = "its teacher" if recipe.mode not in FROM_GENERATOR else "the generator that it started from"
        what = f"it is {start}, unchanged" if "generator" in untrained else "it is from before the adversarial part"
        console.warn(f"nothing of the {untrained[0]} was trained in the {seen:,} images of this generator: {what}")
    if results["selection_score"] is None:
        console.note(f"last generator, not scored: {seen:,} images, {steps}. {look}")
    else:
        teacher = results["teacher_score"]
        beside = "not scored" if teacher is None else f"{teacher:.4g}"
        beside += " (published)" if "teacher_score_is" in results else ""
        of_best = {name: dict(points).get(seen) for name, points in results.get("also", {}).items()}
        also = "".join(f", {name} {value:.4g}" for name, value in of_best.items() if value is not None)
        scored = f"{score_name(str(results['detector']), recipe.evaluate_by)} {results['selection_score']:.4g}{also}"
        console.note(f"best generator: {scored} after {seen:,} images, {steps}; its teacher: {beside}. {look}")
    print_artifact(artifact, as_json)


def print_score(score: "Score", against: Mapping[str, str], as_json: bool, all_lines: bool) -> None:
    """The numbers of one metric in one line on stdout, and how they were made on stderr; or all of it on stdout."""
    for warning in score.warnings:
        console.warn(warning)
    if as_json:
        console.print_json(score.to_json())
    else:
        for line in score_lines(score, against):
            (console.print_data if all_lines else console.note)(line)
        if not all_lines:
            console.print_data(" ".join(f"{numbers['value']:.6g}" for numbers in score.to_json()["scores"].values()))
    refuse_unkept(score)


def refuse_unkept(score: "Score") -> None:
    """Ends with exit code 1, after the numbers, where they unexpectedly could not be kept."""
    if score.unkept:
        raise SidaError(f"the score above is not kept: {score.unkept}", "Free some space.", exit_code=EXIT_FAILED)


def score_lines(score: "Score", against: Mapping[str, str]) -> list[str]:
    """One line per number: mean, standard deviation, minimum, how it was made, and what it compares with."""
    from sidactl.commands.scores import told as told_number

    told = score.to_json()
    trials = f"{len(told['seeds'])} x {score.num:,} images" if told["seeds"] else f"{score.num:,} images"
    if "subset_of" in score.settings:
        of, seed = score.settings["subset_of"], score.settings["subset_seed"]
        trials = f"{score.num:,} of {of:,} images, drawn by seed {seed}"
    if "sampler" in score.settings:
        trials += f", drawn by {_told_sampler(score.settings['sampler'])}"

    if "vae" in score.settings:
        trials += f", decoded by the VAE {score.settings['vae']}"

    def line(name: str, n: Mapping[str, Any]) -> str:
        lowest = "" if n["std"] is None else f" (minimum {told_number(name, n['minimum'])})"
        beside = f", against {against[name]}" if name in against else ""
        blind = "" if n["blind"] else ", which chose it: not blind"
        value = told_number(name, n["value"], n["std"])
        return f"{name} {value}{lowest}; {trials}, {n['detector']}{blind}{beside}"

    return [line(name, n) for name, n in told["scores"].items()]


def _told_sampler(sampler: Mapping[str, Any]) -> str:
    """A sampler that is not the net's own, by the flags that differ from its kind's defaults."""
    from sidactl.commands.samplers import sampler_from

    spec = sampler_from(sampler)
    usual = type(spec)(num_steps=spec.num_steps)
    apart = [f.name for f in dataclasses.fields(spec) if getattr(spec, f.name) != getattr(usual, f.name)]
    words = [f"{flag_of(name)} {getattr(spec, name)}" for name in ("num_steps", *apart) if name != "convention"]
    return " ".join(["heun" if isinstance(spec, HeunSpec) else "one-step", *words])
