"""The VAE of latents: fetched, kept, chosen, told apart."""

import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from sidactl import catalog
from sidactl.commands.files import fetched_file
from sidactl.commands.identity import check_unchanged, source_identity
from sidactl.commands.question import Question
from sidactl.commands.words import NETS, is_ref, means_path, plain_name
from sidactl.errors import MissingError, SidaError
from sidactl.foreign import download
from sidactl.store import Artifact, Store


def fetch_vae(
    store: Store,
    source: str,
    *,
    offline: bool = False,
    mirror: str | None = None,
    recheck: bool = False,
    progress: download.OnCount | None = None,
) -> Artifact:
    """The artifact of a VAE: of a folder in diffusers' layout, of OWNER/NAME in the hub, or one that is there already.

    One that diffusers has in its cache is not downloaded again. It is known by the content of its two files, whatever
    it is called. Raises SidaError for what is no VAE of latents with four channels and an eighth of the side.
    """
    if means_path(store, source, ["vae"]):
        return _kept_vae(store, _vae_in(source), plain_name(Path(source).absolute().name), recheck=recheck)
    name = source.removeprefix("vae/")
    if source not in catalog.VAES and (is_ref(store, source) or store.starting_with(source)):
        found = store.resolve(source, ["vae"])
        if not recheck or found.params["source_url"] is None:
            return found
        name = str(found.params["name"])
    url = _vae_url(source, name)
    question = Question(store=store, command="fetch-vae", params={"source": url}, refs=[name], recheck=recheck)
    if known := question.known():
        return known
    lock = store.root / "tmp" / f"vae-{question.key[:16]}.lock"
    waiting = f"waiting for another process: the VAE {name}"
    with download.exclusive(lock, lambda: download.to_stderr(waiting)), ExitStack() as fetched:
        if known := question.known():
            return known
        files = _vae_of_diffusers(name)
        if files is None:
            download.refuse_forbidden(url, f"the VAE {name}", offline=offline, mirror=mirror)
            files = {}
            for file in catalog.VAE_FILES:  # the config first, so that what does not fit is told before the rest comes
                what = f"the VAE {name}" if file == catalog.VAE_WEIGHTS else f"{file} of the VAE {name}"
                ready = fetched_file(
                    store, catalog.vae_url(name, file), what, catalog.VAES.get(name), progress, offline, mirror
                )
                files[file], _ = fetched.enter_context(ready)
                _check_vae(f"the VAE {name}", files[catalog.VAE_CONFIG])
        made = _kept_vae(store, files, name, url, recheck=recheck)
        return question.record(made)


def _vae_url(source: str, name: str) -> str:
    """The address of a VAE's weights in the hub. Raises SidaError for a word that can be no name there."""
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII):
        return catalog.vae_url(name, catalog.VAE_WEIGHTS)
    raise SidaError(
        f"a VAE must be a folder that diffusers saved, or OWNER/NAME in huggingface.co, got {source}",
        f"Check the path, or pass a name such as {catalog.VAE_NAME}.",
    )


def _vae_in(source: str) -> Mapping[str, Path]:
    """The files of a VAE by name, of a folder. Raises SidaError where they are not there, or of another kind."""
    folder = Path(source)
    files = {name: folder / name for name in catalog.VAE_FILES}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        hint = f"Give a folder that diffusers saved, or a name such as {catalog.VAE_NAME}."
        if (folder / "vae" / catalog.VAE_CONFIG).is_file():
            hint = f"Did you mean {folder / 'vae'}?"
        elif missing == [catalog.VAE_WEIGHTS] and list(folder.glob("*.bin")):
            hint = "A .bin file is a pickle, which is never read: save the VAE by save_pretrained of diffusers."
        raise SidaError(f"{source} must hold {' and '.join(catalog.VAE_FILES)}, {missing[0]} is missing", hint)
    _check_vae(source, files[catalog.VAE_CONFIG])
    return files


def _check_vae(called: str, config: Path) -> None:
    """Raises SidaError for a VAE that is not of the form that latents of four channels need, by its config."""
    hint = f"Give a VAE of Stable Diffusion's first kind, such as {catalog.VAE_NAME}."
    try:
        config_json = json.loads(config.read_bytes())
        if not isinstance(config_json, dict):
            raise ValueError
        blocks = config_json.get("block_out_channels", [64])
        if not isinstance(blocks, list):
            raise TypeError
        got = {
            "class": config_json.get("_class_name"),
            "in_channels": config_json.get("in_channels", 3),
            "out_channels": config_json.get("out_channels", 3),
            "latent_channels": config_json.get("latent_channels", 4),
            "reduction": 2 ** (len(blocks) - 1),
        }
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise SidaError(f"{called}: {catalog.VAE_CONFIG} does not say what the VAE is", hint) from error
    wanted = ("AutoencoderKL", 3, 3, catalog.LATENT_CHANNELS, catalog.LATENT_SCALE)
    for (name, value), want in zip(got.items(), wanted, strict=True):
        if value != want:
            raise SidaError(f"{called} must be a VAE with {name} {want}, got {value}", hint)


def _vae_of_diffusers(name: str) -> Mapping[str, Path] | None:
    """The files of a VAE that diffusers has in its cache; None where it does not have both. SidaError as `_vae_in`."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = ((file, try_to_load_from_cache(name, file)) for file in catalog.VAE_FILES)
    files = {file: Path(path) for file, path in found if isinstance(path, str)}
    if len(files) < len(catalog.VAE_FILES):
        return None
    _check_vae(f"the VAE {name}", files[catalog.VAE_CONFIG])
    return files


def _kept_vae(
    store: Store, files: Mapping[str, Path], name: str, url: str | None = None, *, recheck: bool = False
) -> Artifact:
    """The artifact of these files; the one that there is, where they were kept before."""
    identities = {file: source_identity(store, str(path), recheck=recheck) for file, path in files.items()}
    digests = {file: identity["sha256"] for file, identity in identities.items()}
    question = Question(store=store, command="keep-vae", params=digests, recheck=recheck)
    if known := question.known():
        return known
    entry = catalog.VAES.get(name)
    params = {"name": name, "licence": entry.licence if entry else None, "source_url": url}
    artifact = store.put("vae", dict(files), params=params)
    for file, identity in identities.items():
        check_unchanged(store, str(files[file]), identity)
    return question.record(artifact)


def vae_digest(vae: Artifact) -> str:
    """What stands for a VAE in questions: 16 hex digits of its content."""
    held = "".join(vae.files[name].sha256 for name in catalog.VAE_FILES)
    return hashlib.sha256(held.encode()).hexdigest()[:16]


def vae_label(vae: Artifact | None) -> str:
    """What artifacts say of the VAE that made them: its name, of another than the usual one (None) with its digest."""
    return f"{vae.params['name']}@{vae_digest(vae)}" if vae else catalog.VAE_NAME


def vae_for(store: Store, asked: str | None, net: Artifact, *, recheck: bool = False) -> Artifact | None:
    """The VAE that decodes what a network draws: the one asked for, else its own; None = the usual one, or pixels.

    Raises SidaError for a network of pixels where one is asked for, and where it cannot be had.
    """
    if asked is not None:
        refuse_vae_of_pixels(str(net.params["name"]), net.params["net"])
        return chosen_vae(store, asked, recheck=recheck)
    label = str(net.params.get("vae") or catalog.VAE_NAME)
    if label == catalog.VAE_NAME or not is_of_latents(net):
        return None
    if "vae" in net.inputs:
        return store.get(net.inputs["vae"])
    for found in store.artifacts(kind="vae"):
        if vae_digest(found) == label.rpartition("@")[2]:
            return found
    raise MissingError(
        f"{net.params['name']} was made with the VAE {label}, which is not in {store.root}",
        f"Pass it as --vae PATH or OWNER/NAME, or --vae {catalog.VAE_NAME} for the usual one.",
    )


def chosen_vae(
    store: Store, asked: str, *, offline: bool = False, mirror: str | None = None, recheck: bool = False
) -> Artifact | None:
    """The VAE that --vae names; None for the usual one."""
    if asked.removeprefix("vae/") == catalog.VAE_NAME and not means_path(store, asked, ["vae"]):
        return None
    return fetch_vae(store, asked, offline=offline, mirror=mirror, recheck=recheck)


def is_of_latents(artifact: Artifact) -> bool:
    """Whether it is a network that draws latents, which a VAE decodes."""
    return artifact.kind in NETS and artifact.params["net"]["img_channels"] == catalog.LATENT_CHANNELS


def refuse_vae_of_pixels(name: str, net: Mapping[str, Any]) -> None:
    """Raises SidaError for a network that needs no VAE."""
    if net["img_channels"] != catalog.LATENT_CHANNELS:
        raise SidaError(f"--vae is for networks of latents, {name} draws pixels", "Leave out --vae.")


def other_vae(made: Artifact, used: Artifact | None) -> str | None:
    """What to know of latents, or of a network, that was made with another VAE than the one that decodes now."""
    label, now = str(made.params.get("vae") or catalog.VAE_NAME * is_of_latents(made)), vae_label(used)
    if not label or label.partition("@")[2] == now.partition("@")[2]:
        return None
    return f"{made.params['name']} was made with the VAE {label}, latents are decoded by {now} here (--vae)"


def check_vae_is_there(store: Store, asked: str | None = None, remedy: str = "") -> str | None:
    """The address that a VAE, by default the usual one, is downloaded from when it is needed; None where it is here.

    Raises SidaError without diffusers, and where it cannot be had; reads its config alone, and needs no torch.
    """
    installed = sys.modules["diffusers"] if "diffusers" in sys.modules else importlib.util.find_spec("diffusers")
    if installed is None:
        raise SidaError(
            "decoding latents needs the VAE of diffusers, which is not installed",
            f"Install it with: pip install 'sidactl[vae]'{remedy}.",
        )
    asked = catalog.VAE_NAME if asked is None else asked
    if means_path(store, asked, ["vae"]):
        _vae_in(asked)
        return None
    name = asked.removeprefix("vae/")
    if is_ref(store, f"vae/{name}") or store.starting_with(asked) or _vae_of_diffusers(name):
        return None
    url = _vae_url(asked, name)
    download.refuse_forbidden(url, f"the VAE {name}")
    return url


def vae_loader(
    store: Store,
    vae: Artifact | None,
    *,
    purpose: str = "decoding latents",
    offline: bool = False,
    mirror: str | None = None,
) -> Callable[[], Any]:
    """Loads a VAE, once; None = the usual one, fetched where neither diffusers nor the run directory has it."""

    def files() -> Mapping[str, Path]:
        held = vae or fetch_vae(store, catalog.VAE_NAME, offline=offline, mirror=mirror)
        return {name: store.path(held, name) for name in catalog.VAE_FILES}

    @cache
    def load() -> Any:
        from sidactl.data import codec

        return codec.stable_diffusion_vae(files=files, is_usual=vae is None, purpose=purpose)

    return load
