"""The runs that `compare --methods` trains first: which they are, what of them is there, and their training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sidactl.commands.assemble import assembled
from sidactl.commands.distill import distill
from sidactl.commands.inputs import Count, field_values
from sidactl.commands.plan import plan
from sidactl.commands.running import OnEvent
from sidactl.errors import SidaError
from sidactl.foreign import download
from sidactl.recipes import FROM_GENERATOR, MODES, Execution, Recipe
from sidactl.store import Artifact, Store


@dataclass(frozen=True)
class Training:
    """What `compare` may train first: each method so many times, with seeds from 0 on."""

    methods: Sequence[str]
    teacher: str
    duration: Count | None = None
    runs: int = 1

    def chains(self) -> list[list[tuple[str, int]]]:
        """Methods and seeds in pieces that do not wait for each other.

        What starts from a generator follows the sid of its seed.
        """
        chains = []
        for seed in range(self.runs):
            own = [[(method, seed)] for method in self.methods if method not in FROM_GENERATOR]
            if later := [(method, seed) for method in self.methods if method in FROM_GENERATOR]:
                of_sid = next((chain for chain in own if chain[0][0] == "sid"), None)
                if of_sid is None:
                    own.append(of_sid := [("sid", seed)])
                of_sid += later
            chains += own
        return chains


def planned(
    store: Store, training: Training, part: tuple[int, int] = (1, 1)
) -> Iterator[tuple[str, int, Artifact | None]]:
    """The runs of this share, by method and seed, with the answer where the run directory has it; checked before."""
    for chain in training.chains()[part[0] - 1 :: part[1]]:
        first: Artifact | None = None
        for method, seed in chain:
            needs_other = method in FROM_GENERATOR and first is None
            made = None if needs_other else _known(store, training, method, seed, first)
            first = made if (method, seed) == chain[0] else first
            yield method, seed, made


def _known(store: Store, training: Training, method: str, seed: int, start: Artifact | None) -> Artifact | None:
    """The answer to a run that nothing need be fetched or prepared for to tell."""
    if not store.refs_called(training.teacher) and training.teacher not in store.refs():
        return None
    options: dict[str, Any] = dict.fromkeys(("dataset", "reference", "detector"))
    overrides = dict(field_values(_options(training, seed), Recipe))
    found = assembled(
        store,
        teacher=training.teacher,
        mode=method,
        generator=start.oid if start and method in FROM_GENERATOR else None,
        overrides=overrides,
        execution=Execution(),
        score=True,
        allow_untrained=False,
        device=None,
        recheck=False,
        **options,
    )
    return found.questions(store)["best"].answer()


def check_training(store: Store, training: Training) -> None:
    """Refuses before anything is trained what `distill` would refuse later."""
    if unknown := [method for method in training.methods if method not in MODES]:
        raise SidaError(f"methods must be of {', '.join(MODES)}, got {unknown[0]!r}", "See sidactl distill --help.")
    if len(set(training.methods)) < len(training.methods):
        what = f"each method is trained once for each seed, got {','.join(training.methods)}"
        raise SidaError(what, "Name each once, and pass --runs for more seeds.")
    if not training.methods:
        raise SidaError("methods to train are needed, got none", "Pass --methods sid,sida.")
    if training.runs < 1:
        raise SidaError(f"the number of runs must be >= 1, got {training.runs}", "Pass --runs 1 or more.")
    for method in {"sid" if method in FROM_GENERATOR else method for method in training.methods}:
        overrides = dict(field_values(_options(training, 0), Recipe))
        try:
            planned_run = plan(
                teacher=training.teacher, mode=method, generator=None, dataset=None, store=store, overrides=overrides
            )
        except SidaError as error:
            # Of a recipe's flags a comparison has its duration alone.
            hint = "Pass a longer --duration." if "a longer --duration" in error.hint else error.hint
            raise SidaError(f"{method}: {error.message}", hint, exit_code=error.exit_code) from error
        if planned_run.missing:
            raise planned_run.missing[0]


def trained(
    store: Store,
    training: Training,
    part: tuple[int, int],
    process: tuple[int, int],
    device: str | None,
    say: download.OnLine | None,
    watch: OnEvent | None,
) -> Iterator[tuple[str, Artifact]]:
    """Each method's generators, trained unless they are there; one that merely serves others is trained and not named.

    What `check_training` refuses is for the caller to have refused.

    A run that was interrupted goes on, as `distill` does. process: whose share of this part's runs, from 0 on, and of
    how many.
    """
    # Of an old answer, too: a comparison has no --force.
    told = None if say is None else lambda line: say(line.partition("; --force")[0])
    for chain in training.chains()[part[0] - 1 :: part[1]][process[0] :: process[1]]:
        first: Artifact | None = None
        for method, seed in chain:
            if say:
                say(f"{method}, training seed {seed}")
            made = distill(
                teacher=training.teacher,
                mode=method,
                generator=first.oid if first and method in FROM_GENERATOR else None,
                run=store.root,
                device=device,
                teacher_score="none",
                say=told,
                watch=watch,
                **_options(training, seed),
            )
            first = first or made
            if method in training.methods:
                yield method, made


def _options(training: Training, seed: int) -> dict[str, Any]:
    """The options of a run that differ from the recipe's."""
    return {"seed": seed} | ({} if training.duration is None else {"duration": training.duration})
