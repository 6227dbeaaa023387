"""Datasets of images, and of classes alone, into the run directory."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidactl import catalog
from sidactl.commands.files import fetched_file
from sidactl.commands.identity import check_unchanged, identity_in, json_name, source_identity
from sidactl.commands.question import Question
from sidactl.commands.tasks import Task, option_words
from sidactl.commands.vae import vae_digest, vae_label
from sidactl.commands.words import OnCount, not_prepared, part_of
from sidactl.errors import SidaError
from sidactl.foreign import download, http
from sidactl.store import Artifact, Store

if TYPE_CHECKING:
    from sidactl.data.prepare import Encoder
    from sidactl.data.unfinished import PreparedDataset


@dataclass(frozen=True, kw_only=True)
class How:
    """How a preparation is asked for; nothing of it changes a byte of the dataset."""

    workers: int | None = None
    name: str | None = None
    force: bool = False
    recheck: bool = False
    say: download.OnLine | None = None
    tick: OnCount | None = None
    offline: bool = False
    mirror: str | None = None

    def of_question(self) -> dict[str, Any]:
        """The fields of a `Question` that it gives."""
        refs = [self.name] if self.name else []
        called = {"refs": refs, "called": self.name}
        return {**called, "force": self.force, "recheck": self.recheck, "say": self.say}


def prepared_as_usual(store: Store, source: str, how: How, *, any_size: bool = False) -> Artifact:
    """The dataset of a path, or of a name of the catalog, without options."""
    if labels_called(source):
        return prepare_labels(store, source, None, how)
    source = plain_source(source)
    usual = as_usual(source, dict.fromkeys(("preset", "transform", "resolution", "max_images")))
    return prepare_images(store, source, {**usual, "skip_bad": False}, how, any_size=any_size)


def labels_called(source: str) -> catalog.Dataset | None:
    """The catalog's entry of classes without images that has this name or URL."""
    entries = (entry for entry in catalog.DATASETS.values() if entry.labels_of and entry.source)
    return next((e for e in entries if source in (e.name, f"dataset/{e.name}", e.source and e.source.url)), None)


def as_usual(source: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a `plain_source`: of one that is downloaded with its preset, unless others take its place."""
    entry = catalog.DATASETS.get(source)
    takes_preset = entry and entry.source and not any(options[o] for o in ("preset", "transform", "resolution"))
    return {**options, "preset": source} if takes_preset else options


def plain_source(source: str) -> str:
    """A source of images, with a dataset of the catalog under its bare name; SidaError where a path has it, too."""
    name, is_path = source.removeprefix("dataset/"), os.path.exists(source)
    entry = catalog.DATASETS.get(name)
    is_known = entry and (entry.builtin or entry.source)
    if entry is None or (is_path and not is_known):
        return source
    if not is_known:
        raise not_prepared(entry)
    if is_path and name == source:
        raise SidaError(
            f"'{name}' is the name of a folder and of dataset/{name}",
            f"Write ./{name} for the folder, or dataset/{name}.",
        )
    return name


def prepare_images(
    store: Store,
    source: str,
    options: Mapping[str, Any],
    how: How,
    *,
    any_size: bool = False,
    latents: "LatentsBy | None" = None,
) -> Artifact:
    """Of a source that is no artifact; latents: of its images, by this VAE."""
    name = how.name
    identity = source_identity(store, source, recheck=how.force or how.recheck)
    tell_other_file(source, identity)
    asked: dict[str, Any] = {"source": identity, **options, **(latents.params if latents else {})}
    entry = catalog.DATASETS.get(source)
    file = entry.source if entry else None
    if file and {option: value for option, value in options.items() if value} == {"preset": source} and not latents:
        name = name or source
    refs = [*([source] if entry and entry.builtin and not latents else []), *([name] if name else [])]
    words = {**options, "latents": True, "vae": latents.asked} if latents else options
    task = preparation(source, asked, words, name)
    if any_size:  # a score began it
        task = dataclasses.replace(task, words=())
    fields = {**how.of_question(), "refs": refs, "called": name}
    question = Question(store=store, command="prepare-data", params=asked, task=task, **fields)
    if any_size and (how.force or not question.answer()):  # what is fit for training is fit for scores
        question = dataclasses.replace(question, params=asked | {"any_size": True})
    with question.known_or_working() as work:
        if isinstance(work, Artifact):
            _tell_count(catalog.DATASETS.get(options["preset"] or ""), work, how.say)
            return work
        from sidactl.data import prepare

        path = work.path / "images.zip"
        chosen = {option: value for option, value in options.items() if option != "subset"}
        # Before the source, which may take hours, since it may not be there.
        encode = latents.encoder() if latents else None
        ready: Any = nullcontext((source, None))
        if file:
            progress = part_of(how.tick, f"downloading {source}", "bytes")
            ready = fetched_file(store, file.url, source, entry, progress, how.offline, how.mirror)
        with ready as (readable, _):
            made = prepare.prepare(
                readable,
                path,
                **chosen,
                any_size=any_size,
                encode=encode,
                workers=how.workers,
                work=work.path,
                progress=how.tick,
                say=download.to_stderr,
            )
            entry = entry or catalog.DATASETS.get(options["preset"] or "")
            params: dict[str, Any] = {
                "name": name or json_name(Path(file.url if file else source).name),
                "licence": entry.licence if entry else None,
                **({"vae": vae_label(latents.vae)} if latents else {}),
            }
            try:
                check_unchanged(store, source, identity)
            except SidaError:
                work.clear()  # what was read before the change and what after it must not be mixed
                raise
            inputs = latents.inputs if latents else {}
            files = files_made(path, made)
            artifact = store.put(
                "dataset", files, inputs=inputs, params={**params, **options}, results=results_of(made)
            )
            _tell_count(catalog.DATASETS.get(options["preset"] or ""), artifact, download.to_stderr)
            return question.record(artifact)


def tell_other_file(source: str, identity: Any) -> None:
    """Warns of a file that is called as the published one of the catalog is, and is another."""
    for entry in catalog.DATASETS.values():
        if entry.source and Path(source).name == Path(entry.source.url).name and identity != identity_in(entry.source):
            download.to_stderr(
                f"warning: {source} is not the {Path(source).name} that was published, by its SHA-256; "
                f"sidactl prepare-data {entry.name} downloads that one"
            )


def _tell_count(entry: catalog.Dataset | None, made: Artifact, say: download.OnLine | None) -> None:
    """Warns of a dataset of the catalog that became one of another number of images, where no number was asked for."""
    count = made.results["num_images"]
    if say and entry and entry.num_images not in (None, count) and not made.params.get("max_images"):
        say(f"warning: {entry.name} has {entry.num_images:,} images, this source gave {count:,}")


def preparation(
    source: str,
    params: Mapping[str, Any],
    options: Mapping[str, Any],
    name: str | None,
    inputs: Mapping[str, str] | None = None,
) -> Task:
    resolution = options.get("resolution")
    written = {**options, "resolution": resolution and "x".join(map(str, resolution)), "name": name}
    words = ["prepare-data", source, *option_words(written)]
    return Task("prepare-data", source, words, params, inputs or {})


@dataclass(frozen=True)
class LatentsBy:
    """The VAE that latents are made by, as it was asked for; None = the usual one, which questions do not name."""

    asked: str | None
    vae: Artifact | None
    encoder: "Callable[[], Encoder]"

    @property
    def params(self) -> dict[str, Any]:
        return {"latents": True, **({"vae": vae_digest(self.vae)} if self.vae else {})}

    @property
    def inputs(self) -> dict[str, str]:
        return {"vae": self.vae.oid} if self.vae else {}


def files_made(path: Path, made: "PreparedDataset") -> dict[str, Path | bytes]:
    """A prepared zip with its contact sheet."""
    from sidactl.data import prepare
    from sidactl.data.dataset import Dataset

    sheet = prepare.contact_sheet(Dataset(path)) if made.kind == "pixels" else made.contact_sheet
    return {"images.zip": path, **({"contact-sheet.png": sheet} if sheet else {})}


def results_of(made: "PreparedDataset") -> dict[str, Any]:
    """A preparation's results without its contact sheet; a width and names of classes only where there are some."""
    rare, results = ("width", "class_names", "contact_sheet"), dataclasses.replace(made, contact_sheet=None)
    return {name: value for name, value in dataclasses.asdict(results).items() if name not in rare or value}


def prepare_labels(
    store: Store,
    source: str | None,
    classes: int | None,
    how: How,
) -> Artifact:
    """Classes without images: of a dataset.json or its URL, of the catalog's entry, or so many of them, each once."""
    if (source is None) == (classes is None):
        got = "neither" if source is None else "both"
        raise SidaError(
            f"labels without images come from a dataset.json or a number of classes, got {got}",
            "Name the file, or pass --classes.",
        )
    entry = labels_called(source) if source else None
    if entry and entry.source:
        plain_source(str(source))
        source = entry.source.url
    url = http.check_url(source) if source and "://" in source else None
    identity = source_identity(store, source, recheck=how.force or how.recheck) if source else None
    fields = how.of_question()
    if entry:
        fields |= {"refs": [entry.name, *fields["refs"]], "called": None}
    params: dict[str, Any] = {"labels_only": identity, "classes": classes}
    question = Question(store=store, command="prepare-data", params=params, **fields)
    if known := question.known():
        return known
    from sidactl.data.labels import LABEL_FILE, MAX_LABEL, LabelFile, class_counts, read_labels

    origin: dict[str, Any] = {}
    if source is not None:
        ready: Any = nullcontext((Path(source), None))
        if url:
            what = entry.name if entry else url
            progress = part_of(how.tick, f"downloading {what}", "bytes")
            ready = fetched_file(store, url, what, entry, progress, how.offline, how.mirror)
        with ready as (path, sha256):
            found = read_labels(path)
        check_unchanged(store, source, identity)
        origin = {"source_url": url, "source_sha256": sha256} if url else {}
    else:
        assert classes is not None
        if not 1 <= classes <= MAX_LABEL + 1:
            raise SidaError(f"--classes must be from 1 to {MAX_LABEL + 1}, got {classes}", "Pass the teacher's number.")
        found = LabelFile({f"class {index}": index for index in range(classes)})
    labels = found.labels or {}
    counts = class_counts(list(labels.values()), found.label_dim)
    results: dict[str, Any] = {
        "num_images": len(labels),
        "resolution": None,
        "num_channels": None,
        "label_dim": len(counts),
        "class_counts": counts,
        "skipped": [],
        "kind": "labels",
    }
    names = {"class_names": found.class_names} if found.class_names else {}
    results |= names
    called = how.name or (json_name(Path(source.partition("?")[0]).name) if source else f"classes-{classes}")
    params = {
        "name": entry.labels_of if entry else called,  # the dataset that a net trained on them is of
        "licence": entry.licence if entry else None,
        **origin,
    }
    document = json.dumps({"labels": list(labels.items()), **names}).encode()
    artifact = store.put("dataset", {LABEL_FILE: document}, params=params, results=results)
    _tell_count(entry, artifact, download.to_stderr)
    return question.record(artifact)
