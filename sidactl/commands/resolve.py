"""From a word to its artifact, which is fetched or prepared first where it is not there, and loaded."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sidactl import catalog
from sidactl.commands.fetch import fetch_detector, fetch_teacher
from sidactl.commands.inputs import Ref, ref_text, run_of
from sidactl.commands.prepare_images import How, prepared_as_usual
from sidactl.commands.words import (
    NET_FILES,
    NETS,
    RunDir,
    catalog_entries,
    is_source,
    not_prepared,
    not_readable,
    require_images,
    say_once,
    stored,
    suffix_of,
)
from sidactl.errors import MissingError, SidaError
from sidactl.recipes import NetSpec
from sidactl.store import Artifact, Store

if TYPE_CHECKING:
    import torch

    from sidactl.data.dataset import Dataset
    from sidactl.nets import Preconditioned
    from sidactl.training.batches import ImageSource


def resolve(
    store: Store, text: str, kinds: Sequence[str], *, any_size: bool = False, recheck: bool = False
) -> Artifact:
    """The artifact that `text` means: an oid, a prefix, a ref, a catalog name, a foreign file, a URL or a folder.

    What is not in the run directory yet is fetched, imported or prepared first. "./name" is always a path; "kind/name"
    never is one, and may be a catalog name. any_size: of images, for scores. recheck: read sources again, and derive
    again what is damaged, as --force does. Raises SidaError where there is none, it is ambiguous, or it is of another
    kind.
    """
    nets = [kind for kind in NETS if kind in kinds]
    if is_source(store, text, kinds):
        is_net = "://" in text or suffix_of(text) in NET_FILES
        if is_net and not nets:
            raise SidaError(f"{text} cannot be read as a {' or '.join(kinds)}", "Give an artifact or another file.")
        if problem := None if "://" in text or os.path.exists(text) else not_readable(store, text, kinds):
            raise problem
        if not is_net and "dataset" in kinds:
            return prepared_as_usual(store, text, How(recheck=recheck), any_size=any_size)
        if not nets:
            raise SidaError(f"{text} cannot be read as a {' or '.join(kinds)}", "Give an artifact or another file.")
        kind = nets[0] if len(nets) == 1 else None
        return fetch_teacher(text, kind=kind, run=store.root, recheck=recheck, is_inner=True)
    if text in store.refs() and os.path.exists(text):
        say_once(f"{text} is taken for the artifact of this name; ./{text} would be the file or folder")
    kind_and_name = next(iter(catalog_entries(store, text, kinds)), None)
    if kind_and_name and kind_and_name[0] in NETS:
        return fetch_teacher(kind_and_name[1], run=store.root, recheck=recheck, is_inner=True)
    if kind_and_name and kind_and_name[0] == "dataset":
        return dataset_called(store, kind_and_name[1], recheck=recheck)
    if problem := not_readable(store, text, kinds):
        raise problem
    found = stored(store, text, kinds)
    return repaired(store, found) if recheck else found


def dataset_called(store: Store, name: str, *, recheck: bool = False, may_download: bool = True) -> Artifact:
    """The dataset that a network says it is of: one of the catalog, or a ref. recheck: as in `resolve`.

    What the catalog says where to get is downloaded and prepared, unless may_download is False. What a file from
    outside says is a name, never the path or URL of something to be read. Raises MissingError where it is not there.
    """
    entry = catalog.DATASETS.get(name)
    if entry and entry.builtin:
        return prepared_as_usual(store, f"dataset/{name}", How(recheck=recheck))
    if store.ref("dataset", name):
        found = store.resolve(f"dataset/{name}", ["dataset"])
        return repaired(store, found) if recheck else found
    if entry and entry.source and may_download:
        return prepared_as_usual(store, f"dataset/{name}", How(recheck=recheck))
    if entry:
        raise not_prepared(entry)
    raise MissingError(
        f"the network is of dataset {name!r}, which is no name of the catalog and no ref in {store.root}",
        "Pass the dataset: --ref in a score, --dataset in training.",
    )


def repaired(store: Store, artifact: Artifact) -> Artifact:
    """The artifact, after an attempt to derive it again where a file of it is damaged and its origin is known."""
    if store.is_whole(artifact):
        return artifact
    name, url = str(artifact.params.get("name")), artifact.params.get("source_url")
    if artifact.kind == "detector":
        fetch_detector(name, run=store.root, recheck=True)
    elif artifact.kind == "dataset" and name in catalog.DATASETS and catalog.DATASETS[name].builtin:
        prepared_as_usual(store, f"dataset/{name}", How(force=True))
    elif artifact.kind in NETS and (url or name in catalog.TEACHERS) and "dataset" not in artifact.inputs:
        fetch_teacher(str(url or name), run=store.root, force=True, is_inner=True)
    return artifact


def load(ref: Ref, run: RunDir = None, device: str = "cpu") -> "Preconditioned":
    """The denoiser of a teacher or generator, in eval mode and float32."""
    store = Store.open(run_of(ref, run))
    return load_net(store, resolve(store, ref_text(ref), NETS), device)


def load_net(store: Store, artifact: Artifact, device: "str | torch.device") -> "Preconditioned":
    import safetensors.torch

    from sidactl import nets as nets_module
    from sidactl.foreign import networks

    net = nets_module.build(NetSpec.from_json(artifact.params["net"]))
    networks.load_weights(net, safetensors.torch.load(store.read(artifact, "model.safetensors")))
    return net.eval().requires_grad_(False).to(device)


def load_dataset(store: Store, artifact: Artifact) -> "Dataset":
    """The images of a dataset or samples artifact; raises SidaError for classes alone."""
    from sidactl.data.dataset import Dataset

    require_images(artifact)
    return Dataset(store.path(artifact, "images.zip"))


def image_source(store: Store, artifact: Artifact) -> "ImageSource":
    """What training needs of a dataset artifact, be it of images or of classes alone."""
    if artifact.results["kind"] != "labels":
        return load_dataset(store, artifact)
    from sidactl.data import labels as data_labels
    from sidactl.training import batches

    found = data_labels.read_labels(store.path(artifact, data_labels.LABEL_FILE))
    return batches.ClassesAlone(found.label_dim, list((found.labels or {}).values()))
