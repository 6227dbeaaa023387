"""What a distillation needs and whether it is there, told before anything is computed, fetched or written; no torch.

Not how what is missing is had: that is what artifacts and references do.
"""

import ast
import re
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from sidactl import catalog
from sidactl.commands import files, moments, resolve, words
from sidactl.commands import reference as commands_reference
from sidactl.commands.fetch import detector_file, detector_ref
from sidactl.commands.vae import check_vae_is_there, refuse_vae_of_pixels, vae_for
from sidactl.commands.words import NET_FILES, NETS, is_source, require_images, shape_for_nets
from sidactl.errors import SidaError
from sidactl.foreign import download
from sidactl.recipes import FROM_GENERATOR, NetSpec, Recipe, SidRecipe
from sidactl.store import Artifact, Store

VAE_BYTES = 335_000_000

_NUM_FEATURES = {
    "tiny-digits": 64,
    "tiny-digits-ssl": 64,
    "random-features": 128,
    "inception": 2048,
    "dinov2": 1024,
    "efficientnet-lite0": 1280,
}

_HOW = {"dataset": "downloaded and prepared"}


@dataclass(frozen=True)
class Need:
    """What is fetched or made before training begins."""

    what: str
    how: str
    url: str | None = None
    size_bytes: int | None = None
    """None = not known"""


@dataclass(frozen=True)
class Input:
    """What a word stands for: an artifact of the run directory, or something that becomes one first."""

    text: str
    artifact: Artifact | None = None
    entry: catalog.Entry | None = None
    need: Need | None = None

    @property
    def params(self) -> Mapping[str, Any]:
        """Name, dataset and network of a teacher or generator; empty where they are not known yet."""
        if self.artifact:
            return self.artifact.params
        if isinstance(self.entry, (catalog.Teacher, catalog.Generator)):
            return {"name": self.entry.name, "dataset": self.entry.dataset, "net": self.entry.net.to_json()}
        return {}

    @property
    def has_images(self) -> bool:
        """Whether a dataset holds images, not classes alone; of what is prepared first, whether it will."""
        if self.artifact:
            return bool(self.artifact.results["kind"] != "labels")
        return not (isinstance(self.entry, catalog.Dataset) and self.entry.labels_of)


def check_images(data: Input) -> None:
    """Raises SidaError for a dataset of classes alone."""
    if data.artifact:
        require_images(data.artifact)
    elif not data.has_images:
        raise SidaError(f"images are needed, {data.text} is of classes alone", "Give a dataset with images.")


def find(store: Store, text: str, kinds: list[str]) -> Input:
    """What `resolve.resolve` would make of a word. Raises SidaError where that would, as far as can be seen."""
    groups: Mapping[str, Mapping[str, catalog.Entry]] = {
        "teacher": catalog.TEACHERS,
        "generator": {**catalog.GENERATORS, **catalog.COMPARISONS},
        "dataset": catalog.DATASETS,
    }
    if is_source(store, text, kinds):
        if "://" not in text and not Path(text).exists():
            raise SidaError(f"{text}: no such file or folder", "Check the path, or see sidactl ls for names.")
        suffix, nets = Path(text.partition("?")[0]).suffix.lower(), [kind for kind in kinds if kind in NETS]
        if not nets and ("://" in text or suffix in NET_FILES):
            raise SidaError(f"{text} cannot be read as a {' or '.join(kinds)}", "Give an artifact or another file.")
        is_net = "://" in text or suffix in NET_FILES
        return Input(
            text, need=_need_of_file(text, "imported" if is_net else "prepared", is_file=not Path(text).is_dir())
        )
    for kind in kinds:
        name = text.removeprefix(f"{kind}/")
        if (entry := groups.get(kind, {}).get(name)) and (name == text or not store.ref(kind, name)):
            if store.ref(kind, name):
                return Input(text, store.resolve(f"{kind}/{name}"), entry)
            return Input(text, None, entry, _need_of(entry, kind))
    return Input(text, words.stored(store, text, kinds))


def dataset_called(store: Store, name: str, *, may_download: bool = True) -> Input:
    """What `resolve.dataset_called` would give: a network from outside names no path or URL that is read."""
    entry = catalog.DATASETS.get(name)
    if entry and entry.source and not may_download and not store.ref("dataset", name):
        raise words.not_prepared(entry)
    if entry and not store.ref("dataset", name):
        return Input(name, None, entry, _need_of(entry, "dataset"))
    return Input(name, resolve.dataset_called(store, name), entry)


def _need_of(entry: catalog.Entry, kind: str) -> Need | None:
    if isinstance(entry, catalog.Dataset) and not (entry.builtin or entry.source):
        raise words.not_prepared(entry)
    files.check_has_file(entry)
    if entry.source is None:
        return None  # built in
    return _download(f"{kind} {entry.name}", entry.source, _HOW.get(kind, "downloaded"))


def _download(what: str, source: catalog.Download, how: str = "downloaded") -> Need:
    download.refuse_forbidden(source.url, what)
    return Need(what, how, source.url, source.size_bytes)


def _need_of_file(text: str, how: str, *, is_file: bool) -> Need:
    if "://" in text:
        return _download(text, catalog.Download(url=text))
    if is_file and not Path(text).is_file():
        raise SidaError(f"{text}: no such file", "Check the path.")
    return Need(text, how)


def reference(store: Store, asked: str | None, teacher: Input, data: Input | None) -> Input:
    """What `reference.of_run`, or else `reference.find`, gives to score against. data: None = not there.

    Raises SidaError where there is nothing.
    """
    if asked is None:
        held = data.artifact if data else None
        if data and data.has_images:
            name = str(held.params["name"]) if held else data.entry.name if data.entry else Path(data.text).name
            if entry := commands_reference.published_for(name, _net(teacher).architecture):
                return _published(store, entry)
            if held is None and not _holds_latents(data.text):
                return data  # whatever it is made of is images
            if held and (pixels := commands_reference.pixels_of(store, held)).results["kind"] == "pixels":
                return Input(data.text, pixels)
        return _own_reference(store, teacher)
    published = catalog.REFERENCES.get(asked)
    published = published or next((e for e in catalog.REFERENCES.values() if e.source and e.source.url == asked), None)
    if published:
        return _published(store, published)
    if Path(asked.partition("?")[0]).suffix in (".pkl", ".npz"):
        return Input(asked, need=_need_of_file(asked, "imported", is_file=True))
    found = find(store, asked, ["dataset", "stats"])
    check_images(found)
    if found.artifact and found.artifact.kind == "dataset":
        commands_reference.refuse_latents(pixels := commands_reference.pixels_of(store, found.artifact))
        return Input(asked, pixels)
    return found


def _holds_latents(path: str) -> bool:
    """Whether a file, by the name of its first member, is a zip of latents."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(1024)
    except OSError:
        return False
    return head[:4] == b"PK\3\4" and b"/img-mean-std-" in head[30 : 30 + int.from_bytes(head[26:28], "little")]


def _own_reference(store: Store, teacher: Input) -> Input:
    name = (
        commands_reference.dataset_name(store, teacher.artifact) if teacher.artifact else str(teacher.params["dataset"])
    )
    if entry := commands_reference.published_for(name, _net(teacher).architecture):
        return _published(store, entry)
    if teacher.artifact and "dataset" in teacher.artifact.inputs:
        pixels = commands_reference.pixels_of(store, store.get(teacher.artifact.inputs["dataset"]))
        commands_reference.refuse_latents(pixels)
        return Input(name, pixels)
    return dataset_called(store, name)


def _published(store: Store, entry: catalog.Reference) -> Input:
    if f"stats/{entry.name}" in store.refs():
        return Input(entry.name, store.resolve(f"stats/{entry.name}"), entry)
    assert entry.source
    return Input(entry.name, None, entry, _download(f"statistics {entry.name}", entry.source))


def _net(of: Input) -> NetSpec:
    return NetSpec.from_json(of.params["net"])


def default_detector(of: Input) -> str:
    """The detector that a run is scored with by default; of what is prepared first, as it will be."""
    if of.artifact:
        return moments.training_detector(of.artifact)
    if isinstance(of.entry, catalog.Reference):
        return of.entry.detectors[0]
    if isinstance(of.entry, catalog.Dataset):
        return of.entry.detector
    return "inception" if Path(of.text.partition("?")[0]).suffix in (".pkl", ".npz") else moments.RANDOM_FEATURES


def drawn_by(net: NetSpec) -> tuple[int, int]:
    """Channels and side of the images that a net draws, latents decoded."""
    if net.img_channels == catalog.LATENT_CHANNELS:
        return 3, net.img_resolution * catalog.LATENT_SCALE
    return net.img_channels, net.img_resolution


def check_detector(store: Store, name: str, net: NetSpec, compared: Input) -> list[Need]:
    """Refuses a detector that does not take the generator's images or that the reference is not by; what it needs."""
    channels, size = drawn_by(net)
    drawn = f"the generator draws {channels} channels of {size}x{size}"
    if name in moments.OF_TINY_DIGITS and (size, channels) != (8, 1):
        own = default_detector(compared)
        way = "random-features, or another --ref" if own in moments.OF_TINY_DIGITS else own
        raise SidaError(f"detector {name} needs grey images of 8x8 pixels, {drawn}", f"Pass --detector {way}.")
    if channels not in (1, 3):
        raise SidaError(f"detectors take grey or RGB images, {drawn}", "Pass --no-score.")
    needs: list[Need] = []
    if moments.is_detector_file(name):
        if not Path(name).is_file():
            raise SidaError(f"{name}: no such file", "Check the path, or use --detector inception.")
        if moments.is_torchscript(name):
            catalog.digest_of_code(name)
    else:
        entry, is_here = catalog.detector(name), f"detector/{detector_ref(name)}" in store.refs()
        if catalog.timm_name(name) or not is_here:
            where, _ = detector_file(entry)
            if where and "://" in where and not is_here:
                needs.append(_download(f"detector {name}", entry.source or catalog.Download(url=where)))
    _check_statistics(name, compared)
    return needs


def check_compares_images(metric: str, compared: Input) -> None:
    """Refuses statistics for a score that compares with the features of single images."""
    held, suffix = compared.artifact, Path(compared.text.partition("?")[0]).suffix
    of_file = compared.need is not None and compared.entry is None and suffix in (".pkl", ".npz")
    if isinstance(compared.entry, catalog.Reference) or (held and held.kind == "stats") or of_file:
        raise SidaError(
            f"--evaluate-by {metric} compares with real images, the reference {compared.text} is statistics",
            "Pass --ref dataset/NAME or a folder of images, or --evaluate-by fid.",
        )


def _check_statistics(detector: str, compared: Input) -> None:
    held = compared.artifact
    name = "inception" if moments.is_detector_file(detector) else detector
    if held and held.kind == "stats":
        by = moments.detector_name(held)
        others = [by] if "detector" in held.params else sorted(f.removesuffix(".npz") for f in held.files)
        called = str(held.params.get("name", compared.text))
    elif held is None and isinstance(compared.entry, catalog.Reference):
        others, called = list(compared.entry.detectors), compared.entry.name
    elif held is None and compared.text.endswith(".npz") and (width := _width(compared.text)):
        if name != "inception" or width != _NUM_FEATURES["inception"]:
            gives = f", {name} gives {_NUM_FEATURES[name]:,}" if detector in _NUM_FEATURES else ""
            raise SidaError(
                f"{compared.text} holds statistics of {width:,} features, which are taken for Inception's 2,048{gives}",
                "Pass another --ref." if width != _NUM_FEATURES["inception"] else "Pass --detector inception.",
            )
        return
    else:
        return
    if name not in others:
        raise SidaError(
            f"{called} holds statistics by {', '.join(others)}, not by {name}", "Pass another --ref, or --detector."
        )


def _width(path: str) -> int | None:
    """The number of features of statistics in an npz file, by the header of `mu`; None where there are none."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("mu.npy") as file:
            head = file.read(10)
            described = ast.literal_eval(file.read(int.from_bytes(head[8:10], "little")).decode("latin1"))
            return int(described["shape"][0])
    except (OSError, zipfile.BadZipFile, LookupError, ValueError, SyntaxError, TypeError):
        return None


def vae(store: Store, asked: str | None, teacher: Input, *, is_needed: bool) -> list[Need]:
    """What the VAE that decodes a run's latents needs: the one asked for, or else the teacher's own, or the usual one.

    is_needed: whether the run fails without it. Raises SidaError for a network of pixels where one is asked for, and
    for what is no VAE.
    """
    net = teacher.params["net"]
    if asked is not None:
        refuse_vae_of_pixels(str(teacher.params["name"]), net)
    elif net["img_channels"] != catalog.LATENT_CHANNELS or not is_needed:
        return []
    own = vae_for(store, None, teacher.artifact) if asked is None and teacher.artifact else None
    url = check_vae_is_there(store, own.oid if own else asked, ", or pass --no-score")
    if url is None:
        return []
    name = (asked or catalog.VAE_NAME).removeprefix("vae/")
    return [Need(f"the VAE {name}", "downloaded", url, VAE_BYTES if name == catalog.VAE_NAME else None)]


def check_device(name: str | None) -> None:
    """Refuses a device that is none by its name; whether it is there only torch knows."""
    if name is not None and not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise SidaError(f"device must be cpu, cuda or cuda:N, got {name!r}", "Pass --device cpu.")


def shape_of(data: Input) -> tuple[int | None, int | None, int] | None:
    """Resolution, channels and classes of a dataset as a network sees it; None where they are not known yet."""
    if data.artifact:
        return shape_for_nets(data.artifact)
    return data.entry.shape if isinstance(data.entry, catalog.Dataset) else None


def check_stages(recipe: Recipe) -> SidaError | None:
    """What to refuse a recipe with whose duration ends before the generator, or its adversarial part, is trained."""
    untrained = recipe.untrained()
    if not untrained:
        return None
    end = f"the run ends at {recipe.duration_nimg:,}"
    if "generator" in untrained:
        start, what = recipe.generator_from_nimg or 0, "the generator trains"
        would = (
            "return its teacher" if recipe.mode not in FROM_GENERATOR else "return the generator that it starts from"
        )
        flag, choices = "--generator-from", [recipe.duration_nimg // 4, 0, None]
    else:
        assert isinstance(recipe, SidRecipe)
        assert recipe.adversarial
        start, what = recipe.adversarial.adversarial_from_nimg, "the adversarial part counts"
        would, flag, choices = "be mode sid", "--adversarial-from", [recipe.duration_nimg // 2, 0]
    steps = f", in steps of {recipe.batch_size:,}" if start < recipe.duration_nimg else ""
    what = f"{what} from {start:,} images on{steps}, {end}: it would {would}"
    fitting = next((n for n in choices if untrained[0] not in _with(recipe, flag, n).untrained()), recipe)
    if fitting is recipe:
        return SidaError(what, "Pass a longer --duration.")
    ways = [f"{flag} {'none' if fitting is None else fitting}"]
    if "generator" in untrained and (then := check_stages(_with(recipe, flag, cast("int | None", fitting)))):
        if not then.hint.startswith("Pass --adv"):
            return SidaError(what, "Pass a longer --duration.")
        ways.append(then.hint.removeprefix("Pass ").partition(",")[0])
    return SidaError(what, f"Pass {' and '.join(ways)}, or a longer --duration.")


def _with(recipe: Recipe, flag: str, nimg: int | None) -> Recipe:
    if flag == "--generator-from":
        return replace(recipe, generator_from_nimg=nimg)
    assert isinstance(recipe, SidRecipe)
    assert recipe.adversarial
    assert nimg is not None
    return replace(recipe, adversarial=replace(recipe.adversarial, adversarial_from_nimg=nimg))


def disk_bytes(num_parameters: int) -> int:
    """What a run holds on the disk at most: three checkpoints as one is written, three bests, two generators."""
    values_of_checkpoint = 3 + 2 * 2  # fake score, generator, EMA; two moments of two nets
    return 4 * num_parameters * (3 * values_of_checkpoint + 3 + 2)


def check_disk(store: Store, num_parameters: int) -> int:
    """The free bytes where the run directory is, or will be. Raises SidaError where they are too few for the run."""
    place = store.root.absolute()
    while not place.exists():
        place = place.parent
    free, needed = shutil.disk_usage(place).free, disk_bytes(num_parameters)
    held = 0
    for path in (store.root / "live").rglob("*"):
        with suppress(OSError):  # another process may just have removed it
            held += path.stat().st_size
    if needed > free + held:
        raise SidaError(
            f"the run needs about {needed / 1e9:.1f} GB in the run directory {store.root}, where {free / 1e9:.1f} GB "
            "are free",
            "Free some space or choose another with --run DIR.",
        )
    return free
