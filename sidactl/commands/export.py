"""The ways out of a run directory: exported files with their model cards."""

import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

from sidactl import catalog
from sidactl.commands import signing
from sidactl.commands.blindness import seen_by, trained_by
from sidactl.commands.inputs import Ref, ref_text, run_of
from sidactl.commands.inventory import is_safetensors, show
from sidactl.commands.resolve import load_dataset, load_net
from sidactl.commands.scores import score_name
from sidactl.commands.words import NETS, RunDir, require_images
from sidactl.errors import SidaError
from sidactl.recipes import OneStepSpec
from sidactl.store import KINDS, Artifact, Store
from sidactl.store.outputs import MANIFEST, Output, manifest_of, type_of, whole
from sidactl.text import markdown, shell_word

ExportForm = Literal["files", "png", "npz", "safetensors", "state-dict", "onnx"]

EXPORT_FORMS: tuple[ExportForm, ...] = ("files", "png", "npz", "safetensors", "state-dict", "onnx")

ONNX_MAX_BYTES = 2 * 10**9
"""what fits into one ONNX file"""

ONNX_OPSET = 18

FOLDER_FORMS: tuple[ExportForm, ...] = ("files", "png")

_FORM_OF_SUFFIX: Mapping[str, ExportForm] = {
    ".npz": "npz",
    ".safetensors": "safetensors",
    ".pt": "state-dict",
    ".pth": "state-dict",
    ".onnx": "onnx",
}

_NO_FORM = (".zip", ".tar", ".gz", ".tgz", ".png", ".jpg", ".jpeg", ".webp", ".pkl", ".ckpt", ".bin", ".npy", ".json")
"""whoever ends a name in one of these means a file, which a folder of that name is not"""

_FORM_KINDS: dict[ExportForm, Sequence[str]] = {
    "files": KINDS,
    "png": ("samples", "dataset"),
    "npz": ("samples", "dataset"),
    "safetensors": NETS,
    "state-dict": NETS,
    "onnx": ("generator",),
}


def export(
    ref: Ref,
    destination: os.PathLike[str] | str,
    *,
    form: ExportForm | None = None,
    sign: os.PathLike[str] | str | None = None,
    run: RunDir = None,
    force: bool = False,
) -> Path:
    """Writes an artifact out, whole or not at all, and returns where. The form goes by the suffix if it is not given.

    files: a folder with its files and manifest.json; png: a folder of images by class; npz: arr_0 uint8 [N, H, W, C]
    and arr_1 classes, as the guided-diffusion evaluator reads them;
    safetensors: weights with their network spec in the metadata; state-dict: a torch file {"ema": weights} that holds
    no code; onnx: the generator with its steps, from `latents` (unit noise, float32 [N, C, H, W]), `noise` of the later
    steps where they take it ([N, steps - 1, C, H, W]) and one-hot `labels` [N, K] to `images`, in opset 18. A network
    comes with a model card: README.md in the folder, or beside the file, under its name with .md added. `force`
    replaces an earlier export: a folder whose manifest lists all that is in it,
    or a file of the same form; nothing else. sign: a private key, which makes DESTINATION.sig, too (see `signing`).
    """
    store, path = Store.open(run_of(ref, run)), Path(destination)
    if form is None and path.suffix.lower() in _NO_FORM:
        raise SidaError(
            f"no export is a {path.suffix} file, got {path}",
            "Pass --to files for a folder of that name, or end the name in .npz, .safetensors, .pt or .onnx.",
        )
    form = form or _FORM_OF_SUFFIX.get(path.suffix.lower(), "files")
    if form not in EXPORT_FORMS:
        raise SidaError(f"--to must be one of {', '.join(EXPORT_FORMS)}, got {form!r}", "Leave it out for the files.")
    artifact = store.resolve(ref_text(ref), _FORM_KINDS[form])
    if form in ("png", "npz"):
        require_images(artifact)
    outputs = [Output(path, partial(_problem_of, form))]
    if artifact.kind in NETS and form != "files":
        outputs.insert(0, Output(path.parent / f"{path.name}.md", _problem_of_card))
    write_signature = None if sign is None else signing.signer(Path(sign))
    if write_signature:
        outputs.insert(0, Output(signing.signature_of(path), _problem_of_signature))
    with whole(outputs, force=force, run=store.root) as (*beside, temporary):
        for card in beside[bool(write_signature) :]:
            card.write_text(model_card(store, artifact, form, path.name), encoding="utf-8")
        if form == "files":
            _export_files(store, artifact, temporary)
        elif form == "png":
            _export_png(store, artifact, temporary)
        elif form == "npz":
            _export_npz(store, artifact, temporary)
        elif form == "onnx":
            _export_onnx(store, artifact, temporary)
        else:
            _export_weights(store, artifact, temporary, form)
        if write_signature:
            write_signature(temporary, beside[0])
    return path


def _problem_of(form: ExportForm, path: Path) -> str:
    """What is at `path`, if that is no earlier export of this form; empty if it is."""
    found = type_of(path)
    if form in FOLDER_FORMS:
        return _problem_of_folder(path) if found == "a folder" else found
    if found != "a file":
        return found
    return "" if _IS_OF_FORM[form](path) else f"a file that is no {form}"


def _problem_of_folder(folder: Path) -> str:
    while True:
        before = os.stat(folder).st_ino
        problem = _problem_of_files(folder)
        if not problem or os.stat(folder).st_ino == before:
            return problem  # else another export took its place meanwhile


def _problem_of_files(folder: Path) -> str:
    listed = _listed(folder)
    if listed is None:
        return "a folder without the manifest of an export"
    inner = {parent.as_posix() for name in listed for parent in PurePosixPath(name).parents}
    for where, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            path = Path(where, name)
            known = inner if type_of(path) == "a folder" else listed
            if path.is_symlink() or path.relative_to(folder).as_posix() not in known:
                return f"a folder with {path.relative_to(folder)}, which no export wrote"
    return ""


def _listed(folder: Path) -> set[str] | None:
    """The files of an exported folder, by its manifest; None where there is no such manifest."""
    if (manifest := manifest_of(folder)) is None:
        return None
    try:
        # An earlier version listed the artifact's files alone.
        listed = manifest["exported"] if "exported" in manifest else [*manifest["files"], "README.md"]
        return {MANIFEST, *map(str, listed)}
    except (LookupError, TypeError):
        return None


def _problem_of_signature(path: Path) -> str:
    found = type_of(path)
    return signing.problem_of(path) if found == "a file" else found


def _problem_of_card(path: Path) -> str:
    if (found := type_of(path)) != "a file":
        return found
    with path.open("rb") as file:
        is_card = re.match(rb"# [^\n]*\n\nA (teacher|generator) for sidactl, oid `[0-9a-f]{64}`", file.read(1 << 12))
    return "" if is_card else "a file that is no model card"


def _has_members(path: Path, name: str) -> bool:
    """Whether it is a zip with a member of that name, in whichever folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(PurePosixPath(member).name == name for member in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _is_onnx(path: Path) -> bool:
    with path.open("rb") as file:
        return bool(re.match(rb"\x08[\x01-\x1f]\x12.pytorch", file.read(16), re.DOTALL))


_IS_OF_FORM: Mapping[str, Callable[[Path], bool]] = {
    "npz": partial(_has_members, name="arr_0.npy"),
    "safetensors": is_safetensors,
    "state-dict": partial(_has_members, name="data.pkl"),
    "onnx": _is_onnx,
}


def _write_manifest(store: Store, artifact: Artifact, folder: Path) -> None:
    """What the folder is, and what is in it: by that --force knows what it may replace."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    listed = {"exported": sorted([*names, MANIFEST]), **_seen_by(store, artifact)}
    described = show(artifact.oid, run=store.root).to_json() | listed
    (folder / MANIFEST).write_text(json.dumps(described, indent=2) + "\n")


def _export_files(store: Store, artifact: Artifact, folder: Path) -> None:
    folder.mkdir()
    for name in artifact.files:
        shutil.copyfile(store.path(artifact, name), folder / name)
    if artifact.kind in NETS:
        (folder / "README.md").write_text(model_card(store, artifact, "files", "model.safetensors"), encoding="utf-8")
    _write_manifest(store, artifact, folder)


def _against(store: Store, reference: str | None) -> str:
    """What a score compares with, by name and oid; nothing where it compares with nothing, or that is gone."""
    known = [a for a in store.starting_with(reference) if a.oid == reference] if reference else []
    return f"{_text(known[0].params['name'])} `{reference[:12]}`" if known and reference else ""


def model_card(store: Store, artifact: Artifact, form: ExportForm, file: str) -> str:
    """What somebody who gets the file should know: where it comes from, its scores, its licence, how to sample it."""
    described = show(artifact.oid, run=store.root)
    params, results = artifact.params, artifact.results
    origin = {role: parent for role, parent in described.ancestors if role in ("teacher", "generator", "dataset")}
    teacher = origin.get("teacher", artifact)
    licence = params.get("licence") or teacher.params.get("licence") or "not known: ask where the weights come from"
    lines = [f"# {_text(params['name'])}", "", f"A {artifact.kind} for sidactl, oid `{artifact.oid}`.", ""]
    lines += [f"- {role}: {_text(parent.params['name'])} (`{parent.oid}`)" for role, parent in origin.items()]
    lines += [f"- dataset: {_text(params['dataset'])}"] if "dataset" not in origin else []
    lines += [f"- its latents are decoded by the VAE {_text(params['vae'])}"] if "vae" in params else []
    lines += [f"- images seen in training: {results['images_seen']:,}"] if "images_seen" in results else []
    if (mode := (params.get("recipe") or {}).get("mode")) in ("add", "ladd"):
        lines.append(f"- no training code of {mode.upper()} is published: its scores are ours")
    if trained := sorted(trained_by(store, artifact)):
        lines.append(f"- trained on the features of {_text(', '.join(trained))}: scores by them are no claim")
    if eyes := _eyes(store, artifact):
        lines.append(f"- trained or chosen by {_text(', '.join(eyes))}: scores by other detectors are blind to it")
    lines += [f"- licence: {_text(licence)}", "", "## Scores", ""]
    rows = [
        f"| {_text(name)} | {n['value']:.4g} | {'' if n['std'] is None else format(n['std'], '.2g')} "
        f"| {len(each['seeds']) or 1} x {each['num']:,} | {_text(n['detector'])} | {_against(store, n['reference'])} |"
        for each in (score.to_json() for score in described.scores)
        for name, n in each["scores"].items()
    ]
    if results.get("selection_score") is not None:
        rows += _rows_of_training(artifact)
    by = {"paper": "published", "page": "published on the publisher's page"}
    rows += [
        f"| {name} | {number.value:g} | {'' if number.std is None else f'{number.std:g}'} "
        f"| 50,000 | {by[number.source]} | |"
        for name, number in described.published.items()
    ]
    head = ["| score | mean | std | images | by | against |", "|---|---|---|---|---|---|"]
    lines += [*head, *rows] if rows else ["None was taken in this run directory."]
    lines += ["", "## Use", "", *_usage(artifact, form, file)]
    settings = {"net": params["net"], "sampler": params["sampler"], "recipe": params.get("recipe")}
    lines += ["", "## Network, sampler and recipe", "", "```json", json.dumps(settings, indent=2), "```", ""]
    return "\n".join(lines)


def _rows_of_training(generator: Artifact) -> Iterator[str]:
    """What the run measured by which it chose this generator, and of its teacher."""
    results = generator.results
    recipe = generator.params["recipe"]
    by = _text(results["detector"])
    name = score_name(str(results["detector"]), recipe.get("evaluate_by", "fid"))
    for of, value in (("", results["selection_score"]), (", its teacher", results.get("teacher_score"))):
        if isinstance(value, int | float):
            yield f"| {_text(name)}{of} | {value:.4g} | | 1 x {recipe['evaluate_num']:,} | {by} | in its training |"


def _text(value: object) -> str:
    return markdown(str(value))


def _usage(artifact: Artifact, form: ExportForm, file: str) -> list[str]:
    """How images are drawn from the exported `file`, as lines of Markdown."""
    if form in ("files", "safetensors"):
        return ["```sh", f"sidactl fetch-teacher {shell_word(file)} | sidactl sample --num 64", "```"]
    net, sampler = artifact.params["net"], artifact.params["sampler"]
    if form == "state-dict":
        spec = "HeunSpec" if artifact.kind == "teacher" else "OneStepSpec"
        code = [
            "import torch",
            "from sidactl import nets, sampling",
            f"from sidactl.recipes import {', '.join(sorted(['NetSpec', spec]))}",
            "",
            f"net = nets.build(NetSpec.from_json({dict(net)})).eval()",
            f'net.load_state_dict(torch.load({file!r}, weights_only=True)["ema"])',
            f"sampler = {spec}.from_json({dict(sampler)})",
            'batches = sampling.generate(net, range(64), sampler, device=torch.device("cpu"))',
            "images = torch.cat([batch.images for batch in batches])  # uint8 [N, C, H, W]",
        ]
        return ["```python", *code, "```"]
    channels, size, classes = net["img_channels"], net["img_resolution"], net["label_dim"]
    steps = OneStepSpec.from_json(sampler)
    between = steps.num_steps - 1 if steps.noise == "fresh" else 0
    shape = f"[N, {channels}, {size}, {size}]"
    is_latent = channels == catalog.LATENT_CHANNELS
    what = "normalised latents (`sidactl.data.codec` decodes them)" if is_latent else "pixels in [-1, 1]"
    code = [
        "import numpy as np",
        "import onnxruntime",
        "",
        f"session = onnxruntime.InferenceSession({file!r})",
        "noise = np.random.default_rng(0)",
        f"given = {{'latents': noise.standard_normal((64, {channels}, {size}, {size}), dtype=np.float32)}}",
        *(
            [f"given['noise'] = noise.standard_normal((64, {between}, {channels}, {size}, {size}), dtype=np.float32)"]
            if between
            else []
        ),
        *([f"given['labels'] = np.eye({classes}, dtype=np.float32)[np.arange(64) % {classes}]"] if classes else []),
        "(images,) = session.run(['images'], given)",
        *([] if is_latent else ["pixels = (images * 127.5 + 128).clip(0, 255).astype(np.uint8)"]),
    ]
    labels = f" and `labels`, one-hot float32 [N, {classes}]," if classes else ""
    noise = f" `noise` of the later steps, likewise [N, {between}, {channels}, {size}, {size}]," if between else ""
    summary = f"ONNX, opset {ONNX_OPSET}: `latents`, unit normal float32 {shape},{noise}{labels} to `images`, {what}."
    return [summary, "", "```python", *code, "```"]


def _export_png(store: Store, artifact: Artifact, folder: Path) -> None:
    from sidactl.data.images import encode_png

    dataset = load_dataset(store, artifact)
    for index in range(dataset.num_images):
        group = "images" if dataset.labels is None else f"{dataset.labels[index]:05d}"
        (folder / group).mkdir(parents=True, exist_ok=True)
        pixels = dataset.images([index])[0].permute(1, 2, 0).numpy()
        data = encode_png(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        (folder / group / f"img{index:08d}.png").write_bytes(data)
    _write_manifest(store, artifact, folder)


def _export_npz(store: Store, artifact: Artifact, path: Path) -> None:
    import numpy as np

    dataset = load_dataset(store, artifact)
    images = dataset.images(range(dataset.num_images)).permute(0, 2, 3, 1).numpy()
    arrays = {"arr_0": images} | ({} if dataset.labels is None else {"arr_1": dataset.labels})
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _eyes(store: Store, artifact: Artifact) -> list[str]:
    """By which detectors a generator came to be."""
    return sorted(seen_by(store, artifact)) if artifact.kind == "generator" else []


def _seen_by(store: Store, artifact: Artifact) -> dict[str, list[str]]:
    """Those, so that whoever imports it knows."""
    return {"seen_by": eyes} if (eyes := _eyes(store, artifact)) else {}


def _export_weights(store: Store, artifact: Artifact, path: Path, form: ExportForm) -> None:
    import safetensors.torch
    import torch

    state = {k: v.contiguous() for k, v in load_net(store, artifact, "cpu").state_dict().items()}
    if form == "safetensors":
        described = {"kind": artifact.kind, "params": dict(artifact.params), **_seen_by(store, artifact)}
        # Not by save_file, which writes beside the path first, under a name that the next export would not clear away.
        path.write_bytes(safetensors.torch.save(state, metadata={"sidactl": json.dumps(described)}))
    else:
        buffer = io.BytesIO()
        torch.save({"ema": state}, buffer)
        path.write_bytes(buffer.getvalue())


def _export_onnx(store: Store, artifact: Artifact, path: Path) -> None:
    import logging
    import warnings

    import torch

    from sidactl.sampling import Exported

    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SidaError(f"export to ONNX needs the package {error.name}", "pip install 'sidactl[onnx]'") from None
    net = load_net(store, artifact, "cpu")
    if 4 * sum(p.numel() for p in net.parameters()) > ONNX_MAX_BYTES:
        raise SidaError("an ONNX file holds at most 2 GB, this network is larger", "Export it --to safetensors.")
    step = Exported(net, OneStepSpec.from_json(artifact.params["sampler"]))
    # Two images, since torch takes a single one for a constant.
    spec, batch = net.spec, {0: torch.export.Dim.DYNAMIC}
    latents = torch.zeros(2, spec.img_channels, spec.img_resolution, spec.img_resolution)
    inputs = {"latents": latents}
    if step.takes_noise:
        inputs["noise"] = torch.zeros(2, len(step.levels) - 1, *latents.shape[1:])
    if spec.label_dim:
        inputs["labels"] = torch.zeros(2, spec.label_dim)
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        # The exporter chats on both streams about what does not matter here.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                step,
                tuple(inputs.values()),
                path,
                dynamo=True,
                input_names=list(inputs),
                output_names=["images"],
                dynamic_shapes=tuple(batch for _ in inputs),
                external_data=False,
                opset_version=ONNX_OPSET,
                verbose=False,
            )
    finally:
        logging.disable(level)
