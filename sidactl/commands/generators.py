"""The generators of a finished training: drawn, stored, named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sidactl.commands.assemble import Assembled
from sidactl.commands.blindness import trained_by
from sidactl.commands.evaluation import finite_or_none, preview_of
from sidactl.commands.moments import detector_name
from sidactl.commands.question import name_artifact
from sidactl.commands.scores import detector_label, name_of, score_name
from sidactl.commands.vae import vae_label, vae_loader
from sidactl.commands.words import plain_name
from sidactl.errors import SidaError
from sidactl.foreign import download
from sidactl.store import Artifact, LiveDir, Store

if TYPE_CHECKING:
    from sidactl.detectors import Detector
    from sidactl.nets import Preconditioned
    from sidactl.training.state import History


@dataclass(frozen=True)
class Drawn:
    """The last and the best generator of a training, by these words: files, and images seen with the score."""

    files: Mapping[str, Mapping[str, bytes]]
    seen: Mapping[str, tuple[int, float | None]]
    net: Mapping[str, Any]
    """the NetSpec's JSON"""
    results: Mapping[str, Any]
    """what both say of the training"""
    scores: Sequence[tuple[int, float]]


def draw(
    store: Store,
    wanted: Assembled,
    net: "Preconditioned",
    nimg: int,
    num_skipped: int,
    history: "History",
    live: LiveDir,
    say: download.OnLine | None,
) -> Drawn:
    """Weights and a picture of the last generator, which is `net` after `nimg` images, and of the best.

    Of a training that was not scored they are the same.
    """
    import safetensors.torch

    from sidactl import sampling
    from sidactl.data.codec import codec_for
    from sidactl.foreign import networks
    from sidactl.training import loop

    recipe, codec = wanted.recipe, codec_for(net.spec.img_channels, vae_loader(store, wanted.vae))
    files: dict[str, dict[str, bytes]] = {}
    for which in ("last", "best"):
        if which == "best" and history.best:
            networks.load_weights(net, safetensors.torch.load(loop.best_weights(history, live)))
        files[which] = {"model.safetensors": loop.weights(net)}
        try:
            files[which]["grid.png"] = preview_of(net, recipe.sampler(), codec)
        except SidaError as error:
            # Of a run that was scored the last may draw what is no image; one that is not may be without its VAE.
            if isinstance(error, sampling.NotFiniteError) != (wanted.compared is not None):
                raise
            if wanted.compared is None and which == "best" and say:
                say(f"warning: there is no picture of the generator: {error.message}")
    also = {name: [[nimg, finite_or_none(value)] for nimg, value in points] for name, points in history.also.items()}
    untrained = recipe.untrained()
    unscored = nimg, None
    return Drawn(
        files,
        {"last": history.scores[-1] if history.best else unscored, "best": history.best or unscored},
        net.spec.to_json(),
        {
            "scores": [[n, finite_or_none(s)] for n, s in history.scores],
            **({"also": also} if also else {}),
            "skipped_updates": num_skipped,
            **({"untrained": untrained} if untrained else {}),
        },
        history.scores,
    )


def keep(
    store: Store,
    wanted: Assembled,
    drawn: Drawn,
    detector: "Detector | None",
    of_teacher: float | None,
    *,
    is_published: bool = False,
    trained_by: str | None = None,
) -> dict[str, Artifact]:
    """Stores the last and the best generator, beside this score of the teacher, and what they were trained on."""
    from sidactl import report

    recipe, made = wanted.recipe, dict[str, Artifact]()
    curve, num_steps = {}, recipe.sampler().num_steps
    if detector:
        curve["curve.png"] = report.curve(
            drawn.scores,
            teacher_score=of_teacher,
            title=f"{recipe.mode} of {recipe.teacher}, {'one step' if num_steps == 1 else f'{num_steps} steps'}",
            ylabel=name_of(recipe.evaluate_by, detector),
        )
    for which, (nimg, score) in drawn.seen.items():
        made[which] = store.put(
            "generator",
            {**drawn.files[which], **curve},
            inputs={role: artifact.oid for role, artifact in wanted.inputs.items()}
            | ({"vae": wanted.vae.oid} if wanted.vae else {}),
            params={
                "name": f"{recipe.teacher}-{recipe.mode}",
                "net": drawn.net,
                "sampler": recipe.sampler().to_json(),
                "dataset": recipe.dataset,
                "recipe": recipe.to_json(),
                **({"vae": vae_label(wanted.vae)} if wanted.vae else {}),
            },
            results={
                "images_seen": nimg,
                "selection_score": finite_or_none(score),
                "teacher_score": of_teacher,
                **({"teacher_score_is": "published"} if is_published else {}),
                "detector": detector_label(detector) if detector else None,
                **({"trained_by": [trained_by]} if trained_by else {}),
                **drawn.results,
            },
        )
    return made


def name_run(store: Store, wanted: Assembled, made: Mapping[str, Artifact], say: download.OnLine) -> None:
    """Stores a run, which keeps its generators reachable when a later one takes over the names best and last."""
    recipe, oids = wanted.recipe, {which: artifact.oid for which, artifact in made.items()}
    record = store.put("run", {}, inputs=oids, params=recipe.to_json())
    store.set_ref("run", f"{recipe.teacher}-{recipe.mode}-{record.oid[:8]}".replace("/", "-"), record.oid)
    _name_generators(store, made, wanted.inputs["dataset"], say)


def _name_generators(store: Store, made: Mapping[str, Artifact], data: Artifact, say: download.OnLine) -> None:
    """Gives a finished run its names; see `distill` for which of them move."""
    new, recipe = made["best"], made["best"].params["recipe"]
    name_artifact(store, made["last"], ["last"])
    name_artifact(store, new, ["latest", f"{recipe['teacher']}-{recipe['mode']}".replace("/", "-")])
    detector = new.results["detector"]
    of_dataset = f"best-{plain_name(str(new.params['dataset']))}"
    of_dataset += "" if detector in (None, detector_name(data)) else f"-{plain_name(str(detector))}"
    of_dataset += "" if (by := recipe.get("evaluate_by", "fid")) == "fid" else f"-by-{by}"
    if is_flattered := detector in trained_by(store, new):
        of_dataset += "-trained-on-it"
        say(f"{detector} trained this generator and scores it, so generator/best stays: see generator/{of_dataset}")
    for name in (of_dataset,) if is_flattered else (of_dataset, "best"):
        try:
            old = store.resolve(f"generator/{name}", ["generator"])
        except SidaError:  # there is none, or it is damaged
            old = new
        verdict = _is_better(new, old)
        if old.oid == new.oid or verdict:
            name_artifact(store, new, [name])
        elif name == "best" and verdict is None:
            say(
                f"generator/best stays {old.oid[:12]} ({old.params['name']}, of {old.params['dataset']}), which does "
                f"not compare with this run; the best of its dataset is generator/{of_dataset}"
            )
        elif name == "best" or verdict is None:
            verb = "does not compare with" if verdict is None else "is not better than"
            say(
                f"generator/latest, {_told_score(new)}, {verb} generator/{name}, {_told_score(old)} "
                f"({old.params['name']}, {old.oid[:12]}); generator/{name} stays"
            )


def _is_better(new: Artifact, old: Artifact) -> bool | None:
    """Whether a generator did better than another by their selection scores; None where these do not compare."""

    def shared(generator: Artifact) -> list[object]:
        against = generator.inputs.get("reference", generator.inputs.get("dataset"))
        recipe: Any = generator.params.get("recipe") or {}
        by = recipe.get("evaluate_by", "fid")
        return [generator.params.get("dataset"), generator.results.get("detector"), by, against]

    def rank(generator: Artifact) -> tuple[int, float]:
        score, recipe = generator.results.get("selection_score"), generator.params.get("recipe")
        if not isinstance(score, int | float) or not isinstance(recipe, Mapping):
            return 0, 0.0
        return recipe.get("evaluate_num", 0), -score

    if rank(old)[0] == 0 and new.params["dataset"] == old.params.get("dataset"):
        return rank(new)[0] > 0
    return rank(new) > rank(old) if shared(new) == shared(old) else None


def _told_score(generator: Artifact) -> str:
    score, recipe = generator.results.get("selection_score"), generator.params.get("recipe")
    if not isinstance(score, int | float):
        return "(not scored)"
    by = recipe.get("evaluate_by", "fid") if isinstance(recipe, Mapping) else "fid"
    return f"{score_name(str(generator.results.get('detector')), by)} {score:.4g}"
