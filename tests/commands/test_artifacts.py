"""Networks of others become artifacts: by name, URL or file, with nothing executed, right to the last digit."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import sidactl
from sidactl import catalog, fetch_teacher, load, nets, prepare_data, sampling
from sidactl.commands import dataset_stats, export, identity, plan, reference, running, scorers, words
from sidactl.commands import vae as commands_vae
from sidactl.commands.export import ExportForm
from sidactl.commands.resolve import image_source, load_dataset, resolve
from sidactl.commands.words import mapping, shape_for_nets
from sidactl.data.codec import LatentCodec
from sidactl.data.order import DataOrder
from sidactl.errors import SidaError
from sidactl.foreign import pickles
from sidactl.recipes import HeunSpec, NetSpec, OneStepSpec
from sidactl.store import KINDS, Artifact, LiveDir, Store
from sidactl.training.state import Event
from tests import processes
from tests.conftest import instead_of
from tests.data.test_data import cifar_archive, cifar_batch
from tests.golden import golden
from tests.playback import SmallVae, save_vae
from tests.web import Site, serving

EDM = ["edm_ddpmpp_uncond", "edm_ddpmpp_cond_aug9", "edm_ddpmpp_gray_traj", "edm_ncsnpp_uncond", "edm_adm_cond"]
EDM2 = ["edm2_cond_logvar", "edm2_cond_logvar_traj", "edm2_uncond_rgb", "edm2_gray_defaulthead", "edm2_guide_uncond"]
GENERATORS = ["sid_v1_gen_edm", "sida_gen_edm", "sid_gen_edm2_nogan", "sida_gen_edm2_gan_forcenorm"]
HALF = ["edm2_cond_logvar", "edm2_guide_uncond"]
SMALL = "edm_ddpmpp_uncond"
SPEC = NetSpec(
    architecture="SongUNet",
    img_resolution=8,
    img_channels=3,
    model_channels=8,
    channel_mult=(1, 2),
    channel_mult_emb=2,
    num_blocks=1,
    attn_resolutions=(4,),
    dropout=0.13,
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("no_proxy", "*")
    for name in ("SIDACTL_MIRROR", "SIDACTL_OFFLINE", "SIDACTL_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.fixture
def site(run: Path) -> Iterator[Site]:
    with serving({"/net.pkl": network(SMALL).read_bytes()}) as site:
        yield site


def network(name: str) -> Path:
    return golden(f"networks/{name}.pkl")


def silent(line: str) -> None:
    pass


def refused(source: str | Path, run: Path, **options: Any) -> str:
    """The one line in which an import is refused; it leaves neither an artifact nor a temporary file."""
    before = list(Store(run).artifacts())
    with pytest.raises(SidaError) as caught:
        fetch_teacher(str(source), run=run, say=silent, **options)
    assert "\n" not in str(caught.value)
    assert list(Store(run).artifacts()) == before
    assert not list(run.glob("tmp/import-*"))
    return str(caught.value)


def in_catalog(monkeypatch: pytest.MonkeyPatch, url: str, **options: Any) -> None:
    """Adds teacher "small" and generator "sid/small" to the catalog, both with the network SMALL."""
    source = catalog.Download(url=url, **options)
    teacher = dataclasses.replace(
        catalog.TEACHERS["edm-ffhq64"], name="small", net=SPEC, sampler=HeunSpec(num_steps=5), source=source
    )
    generator = dataclasses.replace(
        catalog.GENERATORS["sid/ffhq64"], name="sid/small", net=SPEC, source=dataclasses.replace(source, url=f"{url}?g")
    )
    monkeypatch.setitem(catalog.TEACHERS, "small", teacher)
    monkeypatch.setitem(catalog.GENERATORS, "sid/small", generator)


# ---- published files, read as foreign ones ----


@pytest.mark.parametrize("name", EDM + EDM2)
def test_pickle_in_place_of_a_teacher_denoises_to_the_golden_numbers(name: str, run: Path) -> None:
    with np.load(golden(f"networks/{name}.npz"), allow_pickle=False) as arrays:
        numbers = {
            key: torch.from_numpy(arrays[key]) for key in ("x", "sigma", "class_labels", "denoised") if key in arrays
        }
    net = load(str(network(name)), run=run)
    assert not net.training
    with torch.no_grad():
        denoised = net(numbers["x"], numbers["sigma"], numbers.get("class_labels"))
    torch.testing.assert_close(denoised, numbers["denoised"], atol=2e-5, rtol=0)
    artifact = resolve(Store(run), name, KINDS)
    assert artifact.kind == "teacher"
    assert (
        artifact.params["sampler"]
        == (HeunSpec(num_steps=32, convention="edm2") if name in EDM2 else HeunSpec()).to_json()
    )


@pytest.mark.parametrize("name", GENERATORS)
def test_snapshot_of_sid_or_sida_is_a_generator_of_the_golden_images(name: str, run: Path) -> None:
    with np.load(golden(f"samplers/onestep_{name}.npz"), allow_pickle=False) as arrays:
        expected = torch.from_numpy(arrays["images" if "images" in arrays else "generator_output"])
    net = load(str(network(name)), run=run)
    images, _ = sampling.sample_batch(net, OneStepSpec(), range(len(expected)), torch.device("cpu"))
    torch.testing.assert_close(images, expected.to(torch.float32), atol=2e-5, rtol=0)
    artifact = resolve(Store(run), name, KINDS)
    assert artifact.kind == "generator"
    assert artifact.params == {
        "name": name,
        "net": net.spec.to_json(),
        "sampler": OneStepSpec().to_json(),
        "dataset": None,
        "licence": None,
        "recipe": None,
        "source_url": None,
        "source_sha256": hashlib.sha256(network(name).read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize("name", [SMALL, *HALF])
def test_weights_are_stored_in_the_precision_of_their_source(name: str, run: Path) -> None:
    artifact = fetch_teacher(str(network(name)), run=run)
    weights = safetensors.torch.load(Store(run).read(artifact, "model.safetensors"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16 if name in HALF else torch.float32}
    assert {p.dtype for p in load(artifact.oid, run=run).parameters()} == {torch.float32}


def test_imported_generator_is_sampled_like_any_other(run: Path) -> None:
    sampled = sidactl.sample(str(network("sida_gen_edm")), seeds=range(4), run=run, device="cpu")
    assert sampled.images.shape[0] == 4
    assert Store(run).get(sampled.artifact.inputs["net"]).kind == "generator"


def test_kind_and_dataset_can_be_said(run: Path) -> None:
    artifact = fetch_teacher(str(network(SMALL)), kind="generator", dataset="cifar10", name="mine", run=run)
    assert artifact.kind == "generator"
    assert artifact.params["dataset"] == "cifar10"
    assert artifact.params["name"] == "mine"
    assert artifact.params["sampler"] == OneStepSpec().to_json()
    assert Store(run).refs() == {"generator/mine": artifact.oid}


def test_kind_follows_from_where_the_file_is_named(run: Path) -> None:
    store, path = Store(run), str(network("sid_v1_gen_edm"))
    assert resolve(store, path, words.NETS).kind == "generator"
    assert resolve(store, path, ["teacher"]).kind == "teacher"
    assert resolve(store, path, ["generator"]).kind == "generator"
    assert resolve(store, path, words.NETS).kind == "generator"


@pytest.mark.parametrize(
    ("file", "ref"), [("deadbeef.pkl", "net-deadbeef"), ("..my  net..2.pkl", "my-net.2"), ("---.pkl", "net")]
)
def test_name_of_a_file_becomes_a_ref(file: str, ref: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(network(SMALL).read_bytes())
    artifact = fetch_teacher(str(tmp_path / file), run=run)
    assert Store(run).refs() == {f"teacher/{ref}": artifact.oid}


# ---- by URL and by name ----


def test_url_is_fetched_once_and_answered_without_network_after(
    site: Site, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, said = f"{site.url}/net.pkl", list[str]()
    artifact = fetch_teacher(url, run=run, say=said.append)
    digest = hashlib.sha256(site.files["/net.pkl"]).hexdigest()
    assert artifact.params["source_url"] == url
    assert artifact.params["source_sha256"] == digest
    assert said == [
        f"downloading net: 0.2 MB from {url}",
        f"net has SHA-256 {digest}: none is known to compare it with, so this one is recorded",
    ]
    assert list((run / "tmp").iterdir()) == []
    monkeypatch.setenv("SIDACTL_OFFLINE", "1")
    assert fetch_teacher(url, run=run, say=said.append) == artifact
    assert resolve(Store(run), url, ["teacher"]).files == artifact.files
    assert len(said) == 3
    assert said[2].startswith("answered from the run directory, asked on 20")
    assert len(site.requests) == 1


def test_download_that_could_not_be_stored_is_stored_without_network(
    site: Site, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise SidaError("no space left")

    url = f"{site.url}/net.pkl"
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", fail)
        with pytest.raises(SidaError, match="no space left"):
            fetch_teacher(url, run=run, say=silent)
    assert fetch_teacher(url, run=run, say=silent) == fetch_teacher(url, run=run.parent / "other", say=silent)
    assert len(site.requests) == 2, "one for each run directory"
    assert not list(run.glob("tmp/*"))


def test_source_that_is_said_to_be_something_else_is_not_fetched_again(site: Site, run: Path) -> None:
    url = f"{site.url}/net.pkl"
    teacher = fetch_teacher(url, run=run, say=silent)
    generator = fetch_teacher(url, kind="generator", dataset="cifar10", run=run)
    assert generator.kind == "generator"
    assert generator.files == teacher.files
    changed = {"sampler": OneStepSpec().to_json(), "dataset": "cifar10", "recipe": None}
    assert generator.params == {**teacher.params, **changed}
    assert fetch_teacher(url, kind="generator", dataset="cifar10", run=run) == generator
    assert fetch_teacher(url, run=run) == teacher
    assert len(site.requests) == 1


def test_repeated_import_needs_no_torch(run: Path) -> None:
    artifact = fetch_teacher(str(network(SMALL)), run=run)
    code = (
        "import sys; from sidactl import fetch_teacher; "
        "print(fetch_teacher(sys.argv[1], run=sys.argv[2]).oid, 'torch' in sys.modules)"
    )
    again = subprocess.run(
        [sys.executable, "-c", code, str(network(SMALL)), str(run)], capture_output=True, text=True, check=True
    )
    assert again.stdout == f"{artifact.oid} False\n"


def test_catalog_name_gives_what_the_catalog_says(site: Site, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_catalog(monkeypatch, f"{site.url}/net.pkl", sha256=hashlib.sha256(site.files["/net.pkl"]).hexdigest())
    said: list[str] = []
    teacher = fetch_teacher("small", run=run, say=said.append)
    assert said == [f"downloading small: 0.2 MB from {site.url}/net.pkl, licence: CC BY-NC-SA 4.0"]
    assert teacher.kind == "teacher"
    assert teacher.params["net"] == SPEC.to_json()
    assert teacher.params["sampler"] == HeunSpec(num_steps=5).to_json()
    assert teacher.params["dataset"] == "ffhq64"
    assert teacher.params["licence"] == "CC BY-NC-SA 4.0"
    assert fetch_teacher(f"{site.url}/net.pkl", run=run, say=silent) == teacher
    site.files["/net.pkl?g"] = site.files["/net.pkl"]
    generator = resolve(Store(run), "sid/small", ["generator"])
    assert generator.params["name"] == "sid/small"
    assert generator.params["sampler"] == OneStepSpec().to_json()
    assert generator.params["recipe"] is None
    assert Store(run).refs() == {"teacher/small": teacher.oid, "generator/sid/small": generator.oid}
    assert len(site.requests) == 2
    with pytest.raises(SidaError) as caught:
        fetch_teacher("sid/small", kind="teacher", run=run)
    assert str(caught.value) == "sid/small must be a teacher, got a generator. Give another."


def test_uncertain_digest_warns_and_a_certain_one_refuses(
    site: Site, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(site.files["/net.pkl"]).hexdigest()
    in_catalog(monkeypatch, f"{site.url}/net.pkl", sha256="0" * 64)
    assert refused("small", run).startswith(f"small must have SHA-256 {'0' * 64}, got {digest}.")
    in_catalog(monkeypatch, f"{site.url}/net.pkl", sha256="0" * 64, sha256_from_publisher=False)
    said: list[str] = []
    fetch_teacher("small", run=run, say=said.append)
    assert said[-1] == f"warning: small has SHA-256 {digest}, a third party saw it with {'0' * 64}"


def test_file_that_is_not_the_network_of_its_name_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "edm-cifar10-32x32-uncond-vp.pkl").write_bytes(network(SMALL).read_bytes())
    monkeypatch.setenv("SIDACTL_MIRROR", str(tmp_path))
    assert refused("edm-cifar10-uncond", run) == (
        "edm-cifar10-uncond must be a network with img_resolution 32, got 8. "
        "The file is that of another network: look at the mirror."
    )


def test_two_at_once_import_once(site: Site, run: Path) -> None:
    site.hold, done = threading.Event(), list[Artifact]()

    def say(line: str) -> None:
        if line.startswith("waiting for another process") and site.hold:
            site.hold.set()

    threads = [
        threading.Thread(target=lambda: done.append(fetch_teacher(f"{site.url}/net.pkl", run=run, say=say)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 2
    assert done[0] == done[1]
    assert len(site.requests) == 1


def test_offline_names_what_is_missing(run: Path) -> None:
    url = "https://huggingface.co/UT-Austin-PML/SiDA/resolve/main/EDM_distillation/afhq64-v2_sida_alpha1-127488.pkl"
    assert refused("sida/afhqv2", run, offline=True) == (
        f"sida/afhqv2 must be downloaded from {url}, which offline forbids. "
        "Allow it, or set SIDACTL_MIRROR to a folder that holds the file."
    )


# ---- what is refused ----


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("edm-cifar-cond", "unknown teacher 'edm-cifar-cond'. Did you mean 'edm-cifar10-cond'?"),
        ("sid2a/edm2-xsl", "unknown teacher 'sid2a/edm2-xsl'. Did you mean 'sid2a/edm2-xs'?"),
        ("nothing like it", "unknown teacher 'nothing like it'. See sidactl ls --catalog."),
        (
            "sid/cifar10-uncond-alpha1",
            "no file of sid/cifar10-uncond-alpha1 is published, its scores alone are. "
            "Distill it: sidactl distill --teacher edm-cifar10-uncond --mode sid --alpha 1",
        ),
        (
            "scd/edm2-s",
            "no file of scd/edm2-s is in the catalog, its published scores alone are. "
            "To compare with them: sidactl show scd/edm2-s",
        ),
        ("gone.pkl", "gone.pkl: no such file. Check the path."),
        (
            "http://host/net.pth?download=true",
            "a network file must be .pkl or .safetensors, got http://host/net.pth?download=true. Convert it to one.",
        ),
    ],
)
def test_source_that_is_none(source: str, message: str, run: Path) -> None:
    assert refused(source, run) == message


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def test_hostile_pickle_is_refused_and_not_executed(
    site: Site, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.files["/net.pkl"] = pickle.dumps({"ema": Bomb()}, 4)
    (tmp_path / "bomb.pkl").write_bytes(site.files["/net.pkl"])
    for source in (f"{site.url}/net.pkl", "bomb.pkl"):
        message = refused(source, run)
        assert "net.pkl: refused, the pickle names builtins.print" in message or message.startswith("bomb.pkl: refused")
    assert capsys.readouterr().out == ""


def test_pickle_without_a_network_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "stats.pkl").write_bytes(pickle.dumps({"fid": 1.0}, 4))
    assert refused("stats.pkl", run) == (
        "stats.pkl holds no network named 'ema'. Give a snapshot that EDM, SiD or SiDA published."
    )


# ---- safetensors ----


def exported(run: Path, source: str, to: Path) -> Artifact:
    artifact = fetch_teacher(source, run=run, say=silent)
    sidactl.export(artifact.oid, to, form="safetensors", run=run)
    return artifact


def test_exported_network_comes_back_with_all_it_says(run: Path, tmp_path: Path) -> None:
    for number, source in enumerate(("tiny-digits", str(network("sida_gen_edm")))):
        path = tmp_path / f"export{number}.safetensors"
        original = exported(run, source, path)
        back = fetch_teacher(str(path), run=tmp_path / "other")
        assert back.kind == original.kind
        for key in ("net", "sampler", "dataset", "licence"):
            assert back.params[key] == original.params[key]
        theirs, ours = load(original.oid, run=run).state_dict(), load(back.oid, run=tmp_path / "other").state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs | ours)


def test_exported_generator_is_not_taken_for_a_teacher(run: Path, tmp_path: Path) -> None:
    exported(run, str(network("sida_gen_edm")), tmp_path / "g.safetensors")
    assert (
        refused("g.safetensors", run, kind="teacher")
        == "g.safetensors must be a teacher, got a generator. Give another."
    )


def described(**changes: Any) -> dict[str, str]:
    params = {"net": SPEC.to_json() | changes, "sampler": HeunSpec().to_json()}
    return {"sidactl": json.dumps({"kind": "teacher", "params": params})}


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        (None, ""),
        ({"sidactl": "{"}, ""),
        ({"sidactl": "[]"}, ""),
        ({"sidactl": '{"kind": "dataset", "params": {}}'}, ""),
        (described(model_channels="many"), " (model_channels must be a whole number, got 'many')"),
        (described(architecture="GPT"), " (architecture must be one of SongUNet, DhariwalUNet, EDM2, got 'GPT')"),
    ],
)
def test_safetensors_that_does_not_say_what_it_is(
    metadata: dict[str, str] | None, why: str, run: Path, tmp_path: Path
) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata=metadata)
    assert refused("a.safetensors", run) == (
        f"a.safetensors does not say which network it holds{why}. Give one that sidactl export --to safetensors wrote."
    )


def test_claimed_network_of_any_size_is_compared_before_it_is_built(run: Path, tmp_path: Path) -> None:
    for channels, told in (
        (1 << 16, "the weights do not fit the network: "),
        (1 << 20, "a.safetensors does not say which network it holds (model_channels must be at most 100,000, got "),
    ):
        huge = described(model_channels=channels)
        safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata=huge)
        assert refused("a.safetensors", run).startswith(told)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.index_fill(0, torch.tensor([0]), float("nan")), "weights must be finite, "),
        (lambda t: t / 0, "weights must be finite, "),
        (lambda t: t.to(torch.complex64), "weights must be real floating-point numbers, {name} is complex64. "),
        (lambda t: t.to(torch.int32), "weights must be real floating-point numbers, {name} is int32. "),
        (lambda t: t > 0, "weights must be real floating-point numbers, {name} is bool. "),
    ],
)
def test_weights_that_are_not_real_and_finite_are_refused_by_name(
    change: Any, message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "export.safetensors"
    exported(run, "tiny-digits", path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = safetensors.torch.load_file(path)
    name = sorted(name for name in weights if weights[name].ndim == 4)[3]
    changed = weights | {name: change(weights[name])}
    safetensors.torch.save_file({k: v.contiguous() for k, v in changed.items()}, path, metadata=metadata)
    before = {artifact.oid for artifact in Store(run).artifacts()}
    told = refused("export.safetensors", run)
    assert told.startswith(message.format(name=name))
    assert name in told
    assert {artifact.oid for artifact in Store(run).artifacts()} == before
    # A pickle has its weights from the same reader of records.
    record = pickles.read(network("sida_gen_edm"))["ema"]
    state = pickles.state_dict(record)
    first = sorted(name for name in state if state[name].ndim == 4)[0]
    instead_of(pickles.state_dict, lambda record: state | {first: change(state[first])}, monkeypatch)
    told = refused(network("sida_gen_edm"), run)
    assert told.startswith(message.format(name=first))
    assert first in told


def test_damaged_safetensors(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"not this")
    assert refused("a.safetensors", run).startswith("a.safetensors: damaged or not a safetensors file (")


# ---- datasets ----


def pictures(folder: Path) -> None:
    for index in range(3):
        (folder / str(index % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / str(index % 2) / f"{index}.png")


def test_folder_and_zip_in_place_of_a_dataset_are_prepared(run: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "images")
    store = Store(run)
    prepared = resolve(store, "images", ["dataset"])
    assert prepared.results["num_images"] == 3
    zipped = store.path(prepared, "images.zip")
    (tmp_path / "copy.zip").write_bytes(zipped.read_bytes())
    assert resolve(store, "copy.zip", KINDS).files["images.zip"] == prepared.files["images.zip"]


def refused_as_ambiguous(run: Path, text: str, kinds: Sequence[str]) -> str:
    with pytest.raises(SidaError) as caught:
        resolve(Store(run), text, kinds)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_word_that_names_a_folder_and_an_artifact_is_refused_with_both_ways_to_say_it(
    run: Path, tmp_path: Path
) -> None:
    pictures(tmp_path / "images")
    (tmp_path / "images.zip").write_bytes(b"")
    store, digits = Store(run), prepare_data("tiny-digits", run=run)
    store.set_ref("dataset", "images", digits.oid)
    store.set_ref("dataset", "images.zip", digits.oid)
    assert refused_as_ambiguous(run, "images", ["dataset"]) == (
        "'images' is the name of a folder and of dataset/images. Write ./images for the folder, or dataset/images."
    )
    assert refused_as_ambiguous(run, "images.zip", KINDS) == (
        "'images.zip' is the name of a file and of dataset/images.zip. "
        "Write ./images.zip for the file, or dataset/images.zip."
    )
    assert resolve(store, "dataset/images", ["dataset"]) == digits
    assert resolve(store, "./images", ["dataset"]).results["num_images"] == 3
    assert resolve(store, str(tmp_path / "images"), ["dataset"]).results["num_images"] == 3
    with pytest.raises(SidaError, match=r"^'images' is the name of a folder and of dataset/images"):
        reference.find(store, "images", digits, "images")
    with pytest.raises(SidaError, match=r"^'images' is the name of a folder and of dataset/images"):
        prepare_data("images", latents=True, run=run)
    # A ref of a kind that is not asked for hides nothing.
    store.delete_ref("dataset", "images")
    store.set_ref("stats", "images", store.put("stats", {}).oid)
    assert resolve(store, "images", ["dataset"]).results["num_images"] == 3


def test_a_folder_called_as_an_entry_of_the_catalog_is_refused_where_it_could_be_meant(
    run: Path, tmp_path: Path
) -> None:
    for name in ("tiny-digits", "cifar10"):
        pictures(tmp_path / name)
    store = Store(run)
    kinds = ("teacher", "generator", "samples", "dataset")
    told = "Write ./tiny-digits for the folder, or teacher/tiny-digits or dataset/tiny-digits."
    assert refused_as_ambiguous(run, "tiny-digits", kinds) == (
        f"'tiny-digits' is the name of a folder and of teacher/tiny-digits and dataset/tiny-digits. {told}"
    )
    with pytest.raises(SidaError, match=r"Write \./tiny-digits for the folder, or dataset/tiny-digits"):
        prepare_data("tiny-digits", run=run)
    assert resolve(store, "tiny-digits", ["teacher"]).kind == "teacher"  # no folder can be a teacher
    assert resolve(store, "dataset/tiny-digits", kinds).results["num_images"] == 1797
    assert prepare_data("dataset/tiny-digits", run=run).results["num_images"] == 1797
    assert prepare_data("./tiny-digits", run=run).results["num_images"] == 3
    with pytest.raises(SidaError, match=r"Write \./cifar10 for the folder, or dataset/cifar10"):
        prepare_data("cifar10", run=run)
    own = store.put("generator", {}, params={"net": {}, "dataset": "tiny-digits"})
    assert reference.dataset_of(store, own).results["num_images"] == 1797
    with pytest.raises(SidaError) as caught:
        reference.find(store, "cifar10", own, "moments")
    assert str(caught.value) == (
        "'cifar10' is the name of a folder and of dataset/cifar10 and stats/cifar10. "
        "Write ./cifar10 for the folder, or dataset/cifar10 or stats/cifar10."
    )


def test_a_folder_whose_name_reads_as_an_oid_is_refused_only_where_there_is_such_an_artifact(
    run: Path, tmp_path: Path
) -> None:
    store, digits = Store(run), prepare_data("tiny-digits", run=run)
    free = "0000" if not digits.oid.startswith("0000") else "1111"
    for name in (digits.oid[:6], free):
        pictures(tmp_path / name)
    assert resolve(store, free, ["dataset"]).results["num_images"] == 3
    assert refused_as_ambiguous(run, digits.oid[:6], ["dataset"]) == (
        f"'{digits.oid[:6]}' is the name of a folder and of {digits.oid[:12]}. "
        f"Write ./{digits.oid[:6]} for the folder, or {digits.oid[:12]}."
    )
    assert resolve(store, digits.oid[:12], ["dataset"]) == digits


def test_dataset_of_the_catalog_tells_where_to_get_it_until_it_is_prepared(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SidaError) as caught:
        resolve(Store(run), "ffhq64", ["dataset"])
    assert str(caught.value) == (
        "dataset ffhq64 must be prepared from its files. Get them from https://github.com/NVlabs/ffhq-dataset, "
        "then run sidactl prepare-data PATH --preset ffhq64 --name ffhq64."
    )
    pictures(tmp_path / "images")
    made = prepare_data("images", preset="ffhq64", name="ffhq64", run=run)
    assert made.params["licence"] == catalog.DATASETS["ffhq64"].licence
    assert resolve(Store(run), "ffhq64", ["dataset"]) == made


# ---- datasets that are downloaded ----

CIFAR_FILE = "cifar-10-python.tar.gz"


@pytest.fixture
def cifar(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of 15 images, also on the site; the catalog's cifar10 is this one."""
    planes = np.random.default_rng(0).integers(0, 256, 3 * 3072, dtype=np.uint8)
    path = cifar_archive(tmp_path / CIFAR_FILE, cifar_batch([0, 9, 3], planes.tobytes()))
    data = site.files[f"/{CIFAR_FILE}"] = path.read_bytes()
    source = catalog.Download(
        url=f"{site.url}/{CIFAR_FILE}", sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)
    )
    entry = dataclasses.replace(catalog.DATASETS["cifar10"], source=source, num_images=15)
    monkeypatch.setitem(catalog.DATASETS, "cifar10", entry)
    return path


def test_cifar10_is_downloaded_and_prepared_as_its_archive_would_be(
    site: Site, cifar: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = prepare_data("cifar10", run=run)
    size = f"{cifar.stat().st_size / 1e6:,.1f} MB"
    assert capsys.readouterr().err.splitlines()[0] == (
        f"downloading cifar10: {size} from {site.url}/{CIFAR_FILE}, licence: {catalog.DATASETS['cifar10'].licence}"
    )
    assert (made.results["num_images"], made.results["label_dim"]) == (15, 10)
    local = prepare_data(str(cifar), preset="cifar10", name="cifar10", run=run.parent / "other")
    assert made == local
    assert Store(run).refs() == {"dataset/cifar10": made.oid}
    assert not [*run.glob("live/*"), *run.glob("tmp/*")]
    assert prepare_data("cifar10", run=run, offline=True) == made
    assert prepare_data("dataset/cifar10", preset="cifar10", run=run, offline=True) == made
    assert prepare_data(str(cifar), preset="cifar10", name="cifar10", run=run, offline=True) == made
    assert prepare_data("cifar10", run=run.parent / "other", offline=True) == made
    assert len(site.requests) == 1
    assert prepare_data("cifar10", run=run, force=True) == made
    assert len(site.requests) == 2


def test_cifar10_with_options_of_its_own_is_not_called_cifar10(cifar: Path, run: Path) -> None:
    few = prepare_data("cifar10", max_images=4, run=run)
    assert (few.results["num_images"], few.params["preset"], few.params["name"]) == (4, "cifar10", CIFAR_FILE)
    assert few == prepare_data(str(cifar), preset="cifar10", max_images=4, run=run.parent / "other")
    small = prepare_data("cifar10", resolution="16x16", name="small", run=run)
    assert (small.results["resolution"], small.params["preset"]) == (16, None)
    assert Store(run).refs() == {"dataset/small": small.oid}


@pytest.mark.usefixtures("cifar")
def test_a_download_of_a_dataset_goes_on_and_an_interrupted_preparation_keeps_it(site: Site, run: Path) -> None:
    whole = len(site.files[f"/{CIFAR_FILE}"])
    site.cuts.append(whole // 2)
    with pytest.raises(SidaError, match=r"^cifar10 ended after .* Repeat the same command to go on\.$"):
        prepare_data("cifar10", run=run)
    with pytest.raises(Stop):
        prepare_data("cifar10", run=run, tick=stop_at(7, []))
    assert [request[1] for request in site.requests] == ["", f"bytes={whole // 2}-"]
    seen: list[int] = []
    prepare_data("cifar10", run=run, offline=True, tick=stop_at(0, seen), mirror=str(run))
    assert (seen[0], seen[-1], len(site.requests)) == (8, 15, 2)
    assert not [*run.glob("live/*"), *run.glob("tmp/*")]


@pytest.mark.usefixtures("cifar")
def test_a_dataset_that_is_downloaded_keeps_to_digest_offline_and_mirror(
    site: Site, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for offline in ({"offline": True}, {}):
        with pytest.raises(SidaError) as caught:
            prepare_data("cifar10", run=run, **offline)
        assert str(caught.value) == (
            f"cifar10 must be downloaded from {site.url}/{CIFAR_FILE}, which offline forbids. "
            "Allow it, or set SIDACTL_MIRROR to a folder that holds the file."
        )
        monkeypatch.setenv("SIDACTL_OFFLINE", "1")
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / CIFAR_FILE).write_bytes(bytes(len(site.files[f"/{CIFAR_FILE}"])))
    with pytest.raises(SidaError, match=r"^cifar10 must have SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}\. The file was re"):
        prepare_data("cifar10", mirror=str(tmp_path / "mirror"), run=run)
    (tmp_path / "mirror" / CIFAR_FILE).write_bytes(site.files[f"/{CIFAR_FILE}"])
    monkeypatch.setenv("SIDACTL_MIRROR", str(tmp_path / "mirror"))
    assert resolve(Store(run), "cifar10", ["dataset"]).results["num_images"] == 15
    assert site.requests == []


def test_another_archive_of_the_same_name_is_told_and_taken(
    cifar: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_data(str(cifar), run=run)
    assert "warning" not in capsys.readouterr().err
    cifar_archive(cifar, cifar_batch([5], bytes(3072)))
    assert prepare_data(str(cifar), run=run).results["num_images"] == 5
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {cifar} is not the {CIFAR_FILE} that was published, by its SHA-256; "
        "sidactl prepare-data cifar10 downloads that one"
    ]


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("cifar10", "50,000"),
        ("imagenet64", "1,281,167"),
        ("imagenet512", "1,281,167"),
        ("ffhq64", "70,000"),
        ("afhqv2-64", "15,803"),
        ("fashion32", "60,000"),
    ],
)
def test_a_preset_that_gives_another_number_of_images_than_published_is_told(
    preset: str, published: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.new("RGB", (520, 520) if preset == "imagenet512" else (28, 28)).save(tmp_path / f"images/{index}.png")
    told = f"warning: {preset} has {published} images, this source gave 3"
    for option in ({"preset": preset}, {"preset": preset}, {"preset": preset, "force": True}):
        prepare_data("images", run=run, **option)
        assert capsys.readouterr().err.splitlines()[-1] == told
    for options in ({"preset": preset, "max_images": 2}, {"resolution": "32x32"}):
        prepare_data("images", run=run, **options)
        assert "warning" not in capsys.readouterr().err


def test_a_preset_that_gives_the_published_number_of_images_is_not_told_of(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = dataclasses.replace(catalog.DATASETS["ffhq64"], num_images=3)
    monkeypatch.setitem(catalog.DATASETS, "ffhq64", entry)
    pictures(tmp_path / "images")
    prepare_data("images", preset="ffhq64", run=run)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.usefixtures("vae", "cifar")
def test_latents_of_a_dataset_that_is_downloaded(site: Site, run: Path) -> None:
    latents = prepare_data("cifar10", latents=True, mirror=site.url, run=run)
    assert latents.inputs["dataset"] == Store(run).refs()["dataset/cifar10"]
    assert prepare_data("cifar10", latents=True, offline=True, run=run) == latents
    assert len(site.requests) == 1


def nothing_left(run: Path) -> bool:
    """Neither an artifact nor anything half-written."""
    store = Store(run)
    return not [*store.artifacts(), *run.glob("live/*"), *run.glob("tmp/*"), *run.glob("asked/*")]


def refused_data(run: Path, source: str | Path | None, **options: Any) -> str:
    """The one line in which a source is refused with exit code 2; it leaves nothing."""
    with pytest.raises(SidaError) as caught:
        prepare_data(source if source is None else str(source), run=run, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert nothing_left(run)
    return str(caught.value)


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (8, 8), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 90).convert(mode).save(path, **options)
    return path


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


def zipped(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return path


SKIP = "Mend or remove it, or go on without: prepare-data --skip-bad."


def test_bad_sources_are_refused_by_the_command_in_one_line(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    png = cut(picture(folder / "a.png", size=(64, 64)))
    assert refused_data(run, folder) == f"{png} cannot be read as an image (the PNG ends too early). {SKIP}"
    png.unlink()
    jpeg = cut(picture(folder / "a.JPEG", size=(64, 64)))
    text = refused_data(run, folder)
    assert text.startswith(f"{jpeg} cannot be read as an image (image file is truncated")
    assert text.endswith(f"). {SKIP}")
    jpeg.unlink()
    assert refused_data(run, folder) == f"{folder} must hold images, got none. Check the path."
    picture(folder / "a.png", "I;16")
    assert refused_data(run, folder) == (
        f"{folder}/a.png must have 8 bits per channel, got Pillow's mode I;16. "
        "Convert it, or go on without: prepare-data --skip-bad."
    )
    picture(folder / "a.png")
    picture(folder / "b.png", size=(16, 16))
    assert refused_data(run, folder) == (
        f"images must all have one size, got 8x8 for {folder}/a.png and 16x16 for {folder}/b.png. "
        "Pass --resolution to prepare-data, e.g. 32x32, and a --transform if the aspect ratio shall be kept."
    )
    (folder / "dataset.json").write_text('{"labels": [["a.png", 0]]}')
    assert refused_data(run, folder, resolution=(8, 8)) == (
        f"{folder}/dataset.json must label every image, got none for b.png. "
        'Add its label, or set "labels" to null in dataset.json to go without.'
    )
    (folder / "dataset.json").write_text('{"labels": [["a.png", 0], ["b.png", 1000000]]}')
    assert refused_data(run, folder, resolution=(8, 8)) == (
        f"label of b.png in {folder}/dataset.json must be an integer from 0 to 999999, got 1000000. Correct it."
    )


def test_bad_archives_are_refused_by_the_command_in_one_line(run: Path, tmp_path: Path) -> None:
    names = {"/etc/x.png": "relative and without '..'", "a/../../x.png": "relative and without '..'"}
    for name, rule in names.items():
        path = zipped(tmp_path / "s.zip", name)
        assert refused_data(run, path) == f"names in {path} must be {rule}, got {name!r}. Make the zip again."
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = zipped(tmp_path / "s.zip", "a.png", "a.png")
    assert refused_data(run, path) == f"names in {path} must be unique, got 'a.png' twice. Make the zip again."
    (tmp_path / "c.tar.gz").write_bytes(b"not a tar")
    assert refused_data(run, tmp_path / "c.tar.gz", preset="cifar10") == (
        f"{tmp_path}/c.tar.gz is not a readable tar archive (file could not be opened successfully). "
        "Download cifar-10-python.tar.gz again."
    )


def test_decompression_bomb_is_refused_by_the_command(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    path = picture(run.parent / "in/a.png")
    assert refused_data(run, "in") == f"in/a.png must have at most 50 pixels, got more. {SKIP}"
    assert path.exists()


def test_any_number_of_workers_gives_the_same_artifact(run: Path, tmp_path: Path) -> None:
    for index in range(20):
        picture(tmp_path / f"in/{index % 2}/{index}.png")
    oids = {prepare_data("in", run=run / str(workers), workers=workers).oid for workers in (1, 2, 5)}
    assert len(oids) == 1


class Stop(Exception):
    """In place of Ctrl-C, which pytest would take for its own."""


def stop_at(image: int, seen: list[int]) -> Callable[[int, int], None]:
    def tick(done: int, total: int) -> None:
        seen.append(done)
        if done == image:
            raise Stop

    return tick


@pytest.mark.parametrize("force", [False, True])
def test_interrupted_preparation_goes_on_to_the_same_artifact(run: Path, force: bool) -> None:
    whole = prepare_data("tiny-digits", run=run if force else run.parent / "other")
    seen: list[int] = []
    for image in (700, 1000):
        with pytest.raises(Stop):
            prepare_data("tiny-digits", run=run, force=force, tick=stop_at(image, seen))
        assert len(list(run.glob("live/*/state.json"))) == 1
    assert prepare_data("tiny-digits", run=run, force=force, tick=stop_at(0, seen)) == whole
    assert seen == list(range(1, 1798))
    assert not [*run.glob("live/*"), *run.glob("tmp/*")]


@pytest.mark.parametrize("name", ["put", "answer"])
def test_preparation_that_could_not_be_stored_is_stored_without_doing_it_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise SidaError("no space left")

    seen: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Store, name, fail)
        with pytest.raises(SidaError, match="no space left"):
            prepare_data("tiny-digits", run=run, tick=stop_at(0, seen))
    done = prepare_data("tiny-digits", run=run, tick=stop_at(0, seen))
    assert seen == list(range(1, 1798))
    assert done == prepare_data("tiny-digits", run=run.parent / "other")
    assert not [*run.glob("live/*"), *run.glob("tmp/*")]


def test_what_a_preparation_that_was_killed_at_its_end_leaves_goes_with_the_next(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(LiveDir, "clear", lambda live: stop_at(0, [])(0, 0))
        with pytest.raises(Stop):
            prepare_data("tiny-digits", run=run)
    assert len(list(run.glob("live/*/images.zip"))) == 1
    seen: list[int] = []
    prepare_data("tiny-digits", run=run, tick=stop_at(0, seen))
    assert seen == []
    assert not list(run.glob("live/*"))


def test_two_at_once_prepare_once(run: Path) -> None:
    seen: list[int] = []
    done: list[Artifact] = []
    threads = [
        threading.Thread(target=lambda: done.append(prepare_data("tiny-digits", run=run, tick=stop_at(0, seen))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done[0] == done[1]
    assert seen == list(range(1, 1798))


def test_changed_source_is_another_question(run: Path, tmp_path: Path) -> None:
    picture(tmp_path / "in/own/a.png")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "in/loop").symlink_to(tmp_path / "in", target_is_directory=True)
    first = prepare_data("in", run=run)
    assert prepare_data("in", run=run, tick=stop_at(1, [])) == first
    picture(tmp_path / "elsewhere/b.png")
    assert prepare_data("in", run=run).results["num_images"] == 2

    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    images.write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", 1, 8, 8) + bytes(64))
    for number in (0, 1):
        labels.write_bytes(bytes((0, 0, 8, 1)) + struct.pack(">I", 1) + bytes([number]))
        assert prepare_data(str(images), run=run).results["label_dim"] == number + 1
        os.utime(labels, ns=(number, number))


def rewrite(path: Path, data: bytes) -> None:
    """Other bytes with the size and the times that the file had."""
    stat = path.stat()
    assert len(data) == stat.st_size
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def flat(path: Path, value: int) -> None:
    """A picture whose file has one size for any value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).convert("RGB").save(path, format="BMP")
    os.utime(path, ns=(315532800 * 10**9,) * 2)


def test_a_source_is_known_by_its_content_wherever_it_lies(run: Path, tmp_path: Path) -> None:
    flat(tmp_path / "in/a.bmp", 10)
    flat(tmp_path / "in/b.bmp", 20)
    first, said = prepare_data("in", run=run), list[str]()
    flat(tmp_path / "in/a.bmp", 30)
    second = prepare_data("in", run=run, say=said.append)
    assert said == []
    pixels = [load_dataset(Store(run), made).images([0])[0, 0, 0, 0].item() for made in (first, second)]
    assert pixels == [10, 30]
    assert prepare_data("in", run=run, force=True) == second
    shutil.move(tmp_path / "in", tmp_path / "elsewhere")
    assert prepare_data("elsewhere", run=run, tick=stop_at(1, []), say=said.append) == second
    assert len(said) == 1
    named = prepare_data("elsewhere", run=run, name="mine", tick=stop_at(1, []))
    assert (named.params["name"], named.files) == ("mine", second.files)
    assert named == prepare_data("elsewhere", run=tmp_path / "other", name="mine")


def test_a_name_that_another_artifact_had_is_told(run: Path, tmp_path: Path) -> None:
    flat(tmp_path / "one/a.bmp", 10)
    flat(tmp_path / "two/a.bmp", 20)
    said = list[str]()
    first = prepare_data("one", run=run, name="mine", say=said.append)
    assert said == []
    second = prepare_data("two", run=run, name="mine", say=said.append)
    assert said == [f"dataset/mine named {first.oid[:12]} before, and names {second.oid[:12]} now"]
    prepare_data("two", run=run, name="mine", say=said.append)
    prepare_data("one", run=run, name="mine", say=said.append)
    assert [line.partition(" ")[0] for line in said[1:]] == ["answered", "answered", "dataset/mine"]


def test_networks_statistics_and_detectors_are_known_by_their_content(run: Path, tmp_path: Path) -> None:
    store, subject = Store(run), Store(run).put("dataset", {}, params={"name": "x"})
    np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=np.eye(2))
    first = reference.find(store, "s.npz", subject, "moments")
    same = tmp_path / "t.npz"
    np.savez(same, mu=np.ones(2), sigma=np.eye(2))
    rewrite(tmp_path / "s.npz", same.read_bytes())
    assert reference.find(store, "s.npz", subject, "moments").files != first.files
    data = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "d.pth").write_bytes(data)
    weights = scorers._weights_digest(store, "d.pth")
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "d.pth", tmp_path / "moved/e.pth")
    assert scorers._weights_digest(store, "moved/e.pth") == weights
    rewrite(tmp_path / "moved/e.pth", data[:-1] + b"?")
    assert scorers._weights_digest(store, "moved/e.pth") != weights
    exported = sidactl.export(fetch_teacher("tiny-digits", run=run).oid, tmp_path / "net", run=run)
    known = identity.source_identity(store, str(exported / "model.safetensors"))
    manifest = exported / "manifest.json"
    rewrite(manifest, manifest.read_bytes().replace(b"tiny-digits", b"other-names"))
    assert identity.source_identity(store, str(exported / "model.safetensors")) != known


def test_a_source_that_was_left_alone_is_hashed_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat(tmp_path / "in/a.bmp", 10)
    first, read = prepare_data("in", run=run), list[Path]()
    digest = identity.file_digest
    instead_of(identity.file_digest, lambda path: read.append(path) or digest(path), monkeypatch)
    assert prepare_data("in", run=run) == first
    assert len(read) == 1  # it was written a moment ago
    monkeypatch.setattr(identity, "SETTLED_NS", -(10**12))
    for expected in (2, 2, 2):
        assert prepare_data("in", run=run) == first
        assert len(read) == expected
    assert prepare_data("in", run=run, recheck=True) == first
    assert len(read) == 3
    monkeypatch.setattr(identity, "SETTLED_NS", 2 * 10**9)
    rewrite(tmp_path / "in/a.bmp", (tmp_path / "in/a.bmp").read_bytes()[:-3] + bytes(3))
    assert prepare_data("in", run=run) != first
    # What cannot be noted is no error.
    shutil.rmtree(run / "digests")
    (run / "digests").write_text("")
    assert prepare_data("in", run=run) != first


def test_a_rewrite_within_one_tick_of_the_clock_is_seen(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat(tmp_path / "in/a.bmp", 10)
    now = time.time_ns()
    instead_of(identity._look_at, lambda files: ("as before", now), monkeypatch)
    first = prepare_data("in", run=run)
    flat(tmp_path / "in/a.bmp", 30)
    assert prepare_data("in", run=run) != first


def test_a_source_that_changes_while_it_is_read_becomes_no_answer(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat(tmp_path / "in/a.bmp", 10)
    with pytest.raises(SidaError) as caught:
        prepare_data("in", run=run, tick=lambda done, total: flat(tmp_path / "in/a.bmp", 30))
    assert str(caught.value) == "in changed while it was read. Repeat the command once nothing writes to it."
    assert caught.value.exit_code == 1
    assert not any((run / "live").iterdir())
    assert not (run / "asked").exists() or not any((run / "asked").iterdir())
    assert load_dataset(Store(run), prepare_data("in", run=run)).images([0])[0, 0, 0, 0] == 30


# ---- latents, classes without images, statistics ----


@pytest.fixture
def vae(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AutoencoderKL=SmallVae))


@pytest.mark.usefixtures("vae")
def test_latents_of_a_dataset_artifact_and_of_a_source_are_the_same(run: Path, tmp_path: Path) -> None:
    for index in range(11):
        picture(tmp_path / f"in/{index % 2}/{index}.png", size=(20, 20))
    options: dict[str, Any] = {"resolution": (16, 16), "skip_bad": True}
    (tmp_path / "in/0/bad.png").write_bytes(b"hello")
    pixels = prepare_data("in", name="mine", run=run, **options)
    latents = prepare_data("dataset/mine", latents=True, run=run, device="cpu")
    assert prepare_data("mine", latents=True, run=run, device="cpu", tick=stop_at(8, [])) == latents
    assert latents.inputs == {"dataset": pixels.oid}
    assert latents.params == {"name": "mine", "licence": None, "vae": "stabilityai/sd-vae-ft-mse"}
    assert latents.results == {
        **pixels.results,
        "resolution": 2,
        "num_channels": 8,
        "kind": "latents",
    }
    assert latents.results["skipped"] == [["in/0/bad.png", "must be an image, got bytes that Pillow does not know"]]
    assert shape_for_nets(latents) == (2, 4, 2)
    stored = load_dataset(Store(run), latents)
    expected = LatentCodec(SmallVae).mean_and_std(load_dataset(Store(run), pixels).images(range(11)))
    torch.testing.assert_close(stored.images(range(11)), expected.detach())
    with pytest.raises(SidaError) as caught:
        prepare_data(latents.oid, latents=True, run=run, device="cpu")
    assert str(caught.value) == (
        f"latents are made of pixels, got dataset {latents.oid[:12]} of latents. Use it as it is."
    )


@pytest.mark.usefixtures("vae")
def test_latents_of_a_path_are_made_without_its_pixels(run: Path, tmp_path: Path) -> None:
    for index in range(11):
        picture(tmp_path / f"in/{index % 2}/{index}.png", size=(20, 20))
    (tmp_path / "in/0/bad.png").write_bytes(b"hello")
    options: dict[str, Any] = {"resolution": (16, 16), "skip_bad": True}
    latents = prepare_data("in", latents=True, name="mine", run=run, device="cpu", **options)
    assert [artifact.oid for artifact in Store(run).artifacts()] == [latents.oid]
    pixels = prepare_data("in", run=run, **options)
    of_pixels = prepare_data(pixels.oid, latents=True, run=run, device="cpu")
    assert latents.files == of_pixels.files
    assert latents.results == of_pixels.results
    assert latents.inputs == {}
    assert latents.params == {**pixels.params, "name": "mine", "vae": "stabilityai/sd-vae-ft-mse"}
    assert prepare_data("in", latents=True, run=run, device="cpu", tick=stop_at(8, []), **options) == latents
    assert Store(run).refs() == {"dataset/mine": latents.oid}
    with pytest.raises(SidaError, match=r"^latents have no images to compare with, got mine\. Pass --ref with"):
        reference.find(Store(run), "mine", pixels, "moments")
    # A dataset is trained on as before.
    assert image_source(Store(run), latents).images([0]).shape == (1, 8, 2, 2)


@pytest.mark.usefixtures("vae")
def test_latents_of_the_published_images_are_called_licensed_and_counted_as_their_pixels_are(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "in/a.png", size=(600, 520))
    latents = prepare_data("in", preset="imagenet512", latents=True, name="imagenet512", run=run, device="cpu")
    assert capsys.readouterr().err.splitlines() == ["warning: imagenet512 has 1,281,167 images, this source gave 1"]
    assert (latents.results["resolution"], latents.params["preset"]) == (64, "imagenet512")
    assert latents.params["licence"] == catalog.DATASETS["imagenet512"].licence


@pytest.mark.usefixtures("vae")
def test_statistics_of_latents_without_images_and_sizes_without_latents_are_refused_before_any_work(
    run: Path, tmp_path: Path
) -> None:
    picture(tmp_path / "in/a.png", size=(16, 16))
    assert refused_data(run, "in", latents=True, with_stats=True) == (
        "feature statistics are of images, which latents of in are made without. Make a dataset of it first "
        "(prepare-data PATH --name NAME), then prepare-data dataset/NAME --latents."
    )
    (tmp_path / "in/a.png").unlink()  # nothing is read
    assert refused_data(run, "in", latents=True, resolution="500x500") == (
        "images must be square with a side that is a power of two, got 500x500 for --resolution 500x500. "
        "Pass --resolution to prepare-data, e.g. 32x32, and a --transform if the aspect ratio shall be kept."
    )
    wide: dict[str, Any] = {"transform": "center-crop-wide", "latents": True}
    assert refused_data(run, "in", resolution="4x2", **wide) == (
        "images must be at least 8x8 to have latents, got 4x4. Prepare larger images."
    )
    assert refused_data(run, "in", resolution="64x36", **wide) == "in must hold images, got none. Check the path."
    picture(tmp_path / "in/a.png", size=(16, 16))
    pixels = prepare_data("in", name="mine", run=run)
    assert prepare_data("mine", latents=True, with_stats=True, run=run).inputs == {"dataset": pixels.oid}


@pytest.mark.usefixtures("vae")
@pytest.mark.parametrize("source", ["mine", "./in"])
def test_interrupted_latents_go_on_to_the_same_artifact(source: str, run: Path, tmp_path: Path) -> None:
    for index in range(21):
        picture(tmp_path / f"in/{index:02}.png", size=(16, 16))
    prepare_data("in", name="mine", run=run)
    whole = prepare_data(source, latents=True, run=shutil.copytree(run, run.parent / "other"), device="cpu")
    seen: list[int] = []
    with pytest.raises(Stop):
        prepare_data(source, latents=True, run=run, device="cpu", tick=stop_at(16, seen))
    assert prepare_data(source, latents=True, run=run, device="cpu", tick=stop_at(0, seen)) == whole
    assert seen == [8, 16, 21]
    assert not list(run.glob("live/*"))


def test_latents_without_the_extra_or_the_weights_are_refused_before_any_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "in/a.png")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert refused_data(run, "in", latents=True) == (
        "encoding latents needs the VAE of diffusers, which is not installed. "
        "Install it with: pip install 'sidactl[vae]'."
    )

    class Empty:
        @staticmethod
        def from_pretrained(name: str, **options: bool) -> None:
            raise OSError("nothing cached")

    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AutoencoderKL=Empty))
    monkeypatch.setenv("SIDACTL_OFFLINE", "1")
    assert refused_data(run, "in", latents=True) == (
        "the VAE stabilityai/sd-vae-ft-mse must be downloaded from https://huggingface.co/stabilityai/sd-vae-ft-mse/"
        "resolve/main/diffusion_pytorch_model.safetensors, which offline forbids. Allow it, or set SIDACTL_MIRROR to a "
        "folder that holds the file."
    )


def test_vae_of_a_folder_is_known_by_its_content_wherever_it_lies(run: Path, tmp_path: Path) -> None:
    save_vae(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere/b")
    store = Store.open(run)
    one = commands_vae.fetch_vae(store, "a")
    assert commands_vae.fetch_vae(store, "elsewhere/b") == one
    assert commands_vae.fetch_vae(store, one.oid) == one
    assert one.params == {"name": "a", "licence": None, "source_url": None}
    assert store.refs() == {}  # so that the folder's name stays that of the folder
    digest = hashlib.sha256("".join(one.files[name].sha256 for name in catalog.VAE_FILES).encode()).hexdigest()[:16]
    assert commands_vae.vae_label(one) == f"a@{digest}"
    other = commands_vae.fetch_vae(store, str(save_vae(tmp_path / "c", seed=1)))
    assert commands_vae.vae_digest(other) != digest


VAE_CONFIG = {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [1, 1, 1, 1]}
SUCH_AS = "Give a VAE of Stable Diffusion's first kind, such as stabilityai/sd-vae-ft-mse."


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        (
            None,
            (),
            "v must hold config.json and diffusion_pytorch_model.safetensors, config.json is missing. Give a "
            "folder that diffusers saved, or a name such as stabilityai/sd-vae-ft-mse.",
        ),
        (
            None,
            ("vae/config.json",),
            "v must hold config.json and diffusion_pytorch_model.safetensors, config.json is "
            "missing. Did you mean v/vae?",
        ),
        (
            VAE_CONFIG,
            ("diffusion_pytorch_model.bin",),
            "v must hold config.json and "
            "diffusion_pytorch_model.safetensors, diffusion_pytorch_model.safetensors is missing. A .bin file is a "
            "pickle, which is never read: save the VAE by save_pretrained of diffusers.",
        ),
        ([], catalog.VAE_FILES[1:], f"v: config.json does not say what the VAE is. {SUCH_AS}"),
        (
            VAE_CONFIG | {"_class_name": "UNet2DConditionModel"},
            catalog.VAE_FILES[1:],
            f"v must be a VAE with class AutoencoderKL, got UNet2DConditionModel. {SUCH_AS}",
        ),
        (
            VAE_CONFIG | {"latent_channels": 16},
            catalog.VAE_FILES[1:],
            f"v must be a VAE with latent_channels 4, got 16. {SUCH_AS}",
        ),
        (
            VAE_CONFIG | {"block_out_channels": [1, 1, 1]},
            catalog.VAE_FILES[1:],
            f"v must be a VAE with reduction 8, got 4. {SUCH_AS}",
        ),
    ],
)
def test_folder_that_is_no_vae_of_latents_is_refused_before_any_work(
    config: Any, files: Sequence[str], message: str, run: Path, tmp_path: Path
) -> None:
    picture(tmp_path / "in/a.png")
    (tmp_path / "v/vae").mkdir(parents=True)
    for name in files:
        (tmp_path / "v" / name).touch()
    if config is not None:
        (tmp_path / "v/config.json").write_text(json.dumps(config))
    assert refused_data(run, "in", latents=True, vae="v") == message
    with pytest.raises(SidaError) as caught:
        commands_vae.check_vae_is_there(Store.open(run), "v")
    assert (str(caught.value), caught.value.exit_code) == (message, 2)


def test_word_that_is_no_vae_is_refused(run: Path, tmp_path: Path) -> None:
    picture(tmp_path / "in/a.png")
    assert refused_data(run, "in", latents=True, vae="gone") == (
        "a VAE must be a folder that diffusers saved, or OWNER/NAME in huggingface.co, got gone. Check the path, or "
        "pass a name such as stabilityai/sd-vae-ft-mse."
    )
    assert refused_data(run, "in", vae="gone") == (
        "--vae is for --latents, got gone without. Pass --latents, or leave it out."
    )
    (tmp_path / "stabilityai/sd-vae-ft-mse").mkdir(parents=True)
    assert refused_data(run, "in", latents=True, vae="stabilityai/sd-vae-ft-mse") == (
        "'stabilityai/sd-vae-ft-mse' is the name of a folder and of vae/stabilityai/sd-vae-ft-mse. Write "
        "./stabilityai/sd-vae-ft-mse for the folder, or vae/stabilityai/sd-vae-ft-mse."
    )


def test_mirror_serves_the_usual_vae_and_others_by_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "in/a.png", size=(16, 16))
    usual, other = (save_vae(tmp_path / f"mirror/sd-vae-ft-{name}", seed) for seed, name in enumerate(("mse", "ema")))
    monkeypatch.setenv("SIDACTL_OFFLINE", "1")
    monkeypatch.setenv("SIDACTL_MIRROR", str(tmp_path / "mirror"))
    pixels = prepare_data("in", name="mine", run=run)
    capfd.readouterr()
    latents = prepare_data("mine", latents=True, run=run, device="cpu")
    told = capfd.readouterr().err.splitlines()
    weights = usual / "diffusion_pytorch_model.safetensors"
    assert f"downloading the VAE stabilityai/sd-vae-ft-mse: 0.0 MB from {weights.as_uri()}, licence: MIT" in told
    assert (latents.inputs, latents.params["vae"]) == ({"dataset": pixels.oid}, "stabilityai/sd-vae-ft-mse")
    store = Store.open(run)
    assert store.asked(store.key("prepare-data", {"latents": True}, {"dataset": pixels.oid})) == latents
    options: dict[str, Any] = {"latents": True, "run": run, "device": "cpu"}
    assert prepare_data("mine", vae="stabilityai/sd-vae-ft-mse", **options) == latents
    by_other = prepare_data("mine", vae="stabilityai/sd-vae-ft-ema", **options)
    fetched = store.resolve("vae/stabilityai/sd-vae-ft-ema", ["vae"])
    assert fetched.params["source_url"] == (
        "https://huggingface.co/stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.safetensors"
    )
    assert by_other.inputs == {"dataset": pixels.oid, "vae": fetched.oid}
    assert by_other.params["vae"] == commands_vae.vae_label(fetched)
    assert by_other.files["images.zip"] != latents.files["images.zip"]
    monkeypatch.delenv("SIDACTL_MIRROR")  # and nothing is fetched twice
    capfd.readouterr()
    for vae, made in (("stabilityai/sd-vae-ft-ema", by_other), (str(other), by_other), (None, latents)):
        assert prepare_data("mine", vae=vae, force=vae is None, **options) == made
    assert "downloading" not in capfd.readouterr().err
    assert not list((run / "tmp").glob("file-*"))


def test_vae_that_diffusers_has_in_its_cache_is_not_downloaded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    cached = save_vae(tmp_path / "snapshots/0123")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(cached / file))
    monkeypatch.setenv("SIDACTL_OFFLINE", "1")
    store = Store.open(run)
    assert commands_vae.check_vae_is_there(store, "someone/vae") is None
    found = commands_vae.fetch_vae(store, "someone/vae")
    assert (found.params["name"], store.refs()) == ("someone/vae", {"vae/someone/vae": found.oid})
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux/config.json").write_text(json.dumps(VAE_CONFIG | {"latent_channels": 16}))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(tmp_path / "flux" / file))
    for ask in (commands_vae.check_vae_is_there, commands_vae.fetch_vae):
        with pytest.raises(SidaError) as caught:
            ask(store, "someone/flux")
        assert str(caught.value) == f"the VAE someone/flux must be a VAE with latent_channels 4, got 16. {SUCH_AS}"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(cached / file))
    assert fetch_teacher("stabilityai/sd-vae-ft-mse", run=run) == found  # the same files, under another name
    assert store.refs()["vae/stabilityai/sd-vae-ft-mse"] == found.oid


def test_classes_without_images_come_from_a_dataset_json_or_a_number(run: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"labels": [["x.png", 2], ["y.png", 0], ["z.png", 2]], "other": 1}')
    published = prepare_data("dataset.json", labels_only=True, name="mine", run=run)
    assert published.results == {
        "num_images": 3,
        "resolution": None,
        "num_channels": None,
        "label_dim": 3,
        "class_counts": [1, 0, 2],
        "skipped": [],
        "kind": "labels",
    }
    assert Store(run).read(published, "dataset.json") == b'{"labels": [["x.png", 2], ["y.png", 0], ["z.png", 2]]}'
    assert prepare_data("dataset.json", labels_only=True, run=run) == published
    source = image_source(Store(run), published)
    assert source.num_images == 3
    assert source.one_hot([0, 1, 2]).tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]
    uniform = prepare_data(None, classes=1000, run=run)
    assert uniform.params["name"] == "classes-1000"
    assert uniform.results["class_counts"] == [1] * 1000
    assert torch.equal(image_source(Store(run), uniform).one_hot(range(1000)), torch.eye(1000))


def test_classes_without_images_come_from_a_url(site: Site, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site.files["/labels/dataset.json"] = data = b'{"labels": [["x.png", 2], ["y.png", 0]]}'
    url = f"{site.url}/labels/dataset.json"
    made = prepare_data(url, labels_only=True, run=run)
    assert capsys.readouterr().err.startswith(f"downloading {url}: 0.0 MB from {url}\n")
    assert made.results["class_counts"] == [1, 0, 1]
    assert made.params == {
        "name": "dataset.json",
        "licence": None,
        "source_url": url,
        "source_sha256": hashlib.sha256(data).hexdigest(),
    }
    assert prepare_data(url, labels_only=True, offline=True, run=run) == made
    assert len(site.requests) == 1
    assert not list(run.glob("tmp/*"))
    with pytest.raises(SidaError, match=r"^labels without images take no options of images"):
        prepare_data(url, labels_only=True, max_images=1, run=run)


def test_published_classes_are_fetched_by_name_and_are_those_of_their_dataset(
    site: Site, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.files["/dataset.json"] = b'{"labels": [["x.png", 999], ["y.png", 0]]}'
    source = catalog.Download(url=f"{site.url}/dataset.json")
    entry = dataclasses.replace(catalog.DATASETS["imagenet512-labels"], source=source, num_images=2)
    monkeypatch.setitem(catalog.DATASETS, entry.name, entry)
    made = prepare_data("imagenet512-labels", labels_only=True, name="mine", run=run)
    assert (made.params["name"], made.results["label_dim"]) == ("imagenet512", 1000)
    assert Store(run).refs() == {"dataset/imagenet512-labels": made.oid, "dataset/mine": made.oid}
    for asks in (
        lambda: prepare_data("imagenet512-labels", run=run),
        lambda: prepare_data(source.url, labels_only=True, run=run),
        lambda: resolve(Store(run), "imagenet512-labels", ["dataset"]),
    ):
        assert asks() == made
    assert len(site.requests) == 1
    with pytest.raises(SidaError, match=r"^dataset imagenet512 must be prepared from its files\. "):
        resolve(Store(run), "imagenet512", ["dataset"])
    elsewhere = resolve(Store(run.parent / "other"), "imagenet512-labels", ["dataset"])
    assert elsewhere == made


def test_image_source_of_images_is_the_dataset(run: Path) -> None:
    digits = prepare_data("tiny-digits", run=run)
    assert image_source(Store(run), digits).images([0]).shape == (1, 1, 8, 8)
    assert shape_for_nets(digits) == (8, 1, 10)


def test_classes_without_images_are_refused_where_images_are_needed(run: Path) -> None:
    classes = prepare_data(None, classes=10, name="ten", run=run)
    text = f"images are needed, got dataset {classes.oid[:12]} of classes alone. Give a dataset with images."
    for use in (
        lambda: sidactl.fid("dataset/ten", run=run),
        lambda: sidactl.prec_recall("dataset/ten", run=run),
        lambda: sidactl.train_teacher("dataset/ten", name="x", run=run),
        lambda: dataset_stats.dataset_stats("dataset/ten", run=run),
        lambda: prepare_data("dataset/ten", latents=True, run=run),
        lambda: sidactl.export("dataset/ten", run / "out", form="png", run=run),
    ):
        with pytest.raises(SidaError) as caught:
            use()
        assert str(caught.value) == text
    with pytest.raises(SidaError) as caught:
        sidactl.fid("tiny-digits", reference="dataset/ten", run=run)
    assert str(caught.value) == (
        "there are no images to compare with: ten is of classes alone. Pass --ref with a folder or a dataset of images."
    )


def test_classes_without_images_fit_any_net_of_as_many_classes(run: Path) -> None:
    for number in (10, 11):
        data = prepare_data(None, classes=number, run=run)
        net = catalog.TEACHERS["tiny-digits"].net
        if number == 10:
            running.check_fit(shape_for_nets(data), net, "teacher")
            continue
        with pytest.raises(SidaError, match=r"^the dataset must fit the teacher"):
            running.check_fit(shape_for_nets(data), net, "teacher")


@pytest.mark.parametrize(
    ("source", "options", "text"),
    [
        (None, {}, "a source is needed, got none. Name a folder, an archive, or tiny-digits."),
        (
            None,
            {"labels_only": True},
            "labels without images come from a dataset.json or a number of classes, got neither. "
            "Name the file, or pass --classes.",
        ),
        (
            "l.json",
            {"classes": 3},
            "labels without images come from a dataset.json or a number of classes, got both. "
            "Name the file, or pass --classes.",
        ),
        (
            "l.json",
            {"labels_only": True, "resolution": (8, 8)},
            "labels without images take no options of images, got some. Leave them out.",
        ),
        ("l.json", {"labels_only": True}, "l.json must hold labels, got none. Give a dataset.json with labels."),
        ("no.json", {"labels_only": True}, "no.json cannot be read: No such file or directory. Check the path."),
        (None, {"classes": 0}, "--classes must be from 1 to 1000000, got 0. Pass the teacher's number."),
    ],
)
def test_bad_words_about_labels_are_refused(
    source: str | None, options: dict[str, Any], text: str, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "l.json").write_text('{"labels": null}')
    assert refused_data(run, source, **options) == text


def test_statistics_of_a_dataset_are_those_that_scores_use(run: Path) -> None:
    digits = prepare_data("tiny-digits", run=run)
    made = dataset_stats.dataset_stats("tiny-digits", run=run, device="cpu")
    assert made.kind == "stats"
    assert made.inputs == {"dataset": digits.oid}
    assert Store(run).refs()["stats/tiny-digits-tiny-digits"] == made.oid
    before = [*Store(run).artifacts()]
    assert sidactl.fid("dataset/tiny-digits", reference=made.oid, run=run).value == pytest.approx(0, abs=1e-6)
    assert [artifact.kind for artifact in Store(run).artifacts() if artifact not in before] == ["score"]


def test_network_in_place_of_a_dataset_is_refused(run: Path) -> None:
    with pytest.raises(SidaError) as caught:
        resolve(Store(run), "net.pkl", ["dataset"])
    assert str(caught.value) == "net.pkl cannot be read as a dataset. Give an artifact or another file."


@pytest.mark.parametrize(
    "source",
    [
        "sida_gen_edm",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sid_gen_edm2_nogan", "onestep_uncond")),
    ],
)
def test_a_generator_in_onnx_draws_the_same_images(run: Path, tmp_path: Path, source: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'sidactl[dev]'")
    if source == "onestep_uncond":
        torch.manual_seed(0)
        net = nets.build(dataclasses.replace(SPEC, label_dim=0))
        weights = {"model.safetensors": safetensors.torch.save(net.state_dict())}
        params = {"name": source, "net": net.spec.to_json(), "sampler": OneStepSpec(sigma_init=1.5).to_json()}
        oid = Store.open(run).put("generator", weights, params=params | {"dataset": None}).oid
    else:
        oid = sidactl.fetch_teacher(str(network(source)), kind="generator", run=run).oid
    path = sidactl.export(oid, tmp_path / "g.onnx", form="onnx", run=run)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    net = sidactl.load(oid, run=run)
    sigma_init = float(mapping(Store.open(run).get(oid).params["sampler"])["sigma_init"])
    for batch in (1, 3):
        latents = torch.randn(batch, net.spec.img_channels, net.spec.img_resolution, net.spec.img_resolution)
        given = {"latents": latents.numpy()}
        labels = torch.eye(net.spec.label_dim)[torch.arange(batch) % net.spec.label_dim] if net.spec.label_dim else None
        if labels is not None:
            given["labels"] = labels.numpy()
        (images,) = session.run(["images"], given)
        with torch.no_grad():
            expected = net(latents * sigma_init, sigma_init, labels)
        torch.testing.assert_close(torch.from_numpy(images), expected, rtol=1e-4, atol=1e-5)
    card = (tmp_path / "g.onnx.md").read_text()
    assert f"ONNX, opset {opset_of(path)}: `latents`, unit normal float32 [N, " in card
    is_latent = net.spec.img_channels == 4
    drawn = executed(card, tmp_path)["images" if is_latent else "pixels"]
    assert (drawn.shape, drawn.dtype) == ((64, *latents.shape[1:]), np.float32 if is_latent else np.uint8)
    assert ("normalised latents" in card) == is_latent


def opset_of(path: Path) -> int:
    import onnx

    (opset,) = onnx.load(path).opset_import
    return int(opset.version)


def executed(card: str, folder: Path) -> dict[str, Any]:
    """What the Python in a model card leaves behind, run where the exported file is."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    before = os.getcwd()
    os.chdir(folder)
    try:
        exec(code, names)
    finally:
        os.chdir(before)
    return names


@pytest.mark.parametrize("kind", ["teacher", "generator"])
def test_the_card_of_a_state_dict_draws_the_same_images(run: Path, tmp_path: Path, kind: Literal["teacher"]) -> None:
    oid = fetch_teacher(str(network(SMALL)), kind=kind, run=run).oid
    sidactl.export(oid, tmp_path / "n.pt", form="state-dict", run=run)
    images = executed((tmp_path / "n.pt.md").read_text(), tmp_path)["images"]
    drawn = sidactl.sample(oid, seeds=range(64), run=run, device="cpu").images
    assert (images.permute(0, 2, 3, 1).numpy() == drawn).all()


def test_the_built_in_teacher_takes_a_name_of_your_own(run: Path) -> None:
    oid = fetch_teacher("tiny-digits", name="mine", run=run).oid
    assert Store.open(run).resolve("teacher/mine").oid == Store.open(run).resolve("teacher/tiny-digits").oid == oid


@pytest.mark.parametrize("form", ["files", "safetensors"])
def test_the_card_says_how_an_exported_network_comes_back(run: Path, tmp_path: Path, form: ExportForm) -> None:
    original = fetch_teacher("tiny-digits", run=run)
    path = sidactl.export(original.oid, tmp_path / "my net.safetensors", form=form, run=run)
    card = path / "README.md" if form == "files" else tmp_path / f"{path.name}.md"
    (command,) = re.findall(r"sidactl fetch-teacher (.*) \| sidactl sample --num 64", card.read_text())
    assert [command] == (["model.safetensors"] if form == "files" else ["'my net.safetensors'"])
    file = card.parent / command.strip("'")
    back = fetch_teacher(str(file), run=tmp_path / "other")
    assert (back.kind, back.files) == ("teacher", original.files)
    for key in ("net", "sampler", "dataset", "licence"):
        assert back.params[key] == original.params[key]


def test_forms_of_one_network_go_side_by_side(run: Path, tmp_path: Path) -> None:
    oid = fetch_teacher("tiny-digits", run=run).oid
    (tmp_path / "to").mkdir()
    sidactl.export(oid, tmp_path / "to/v1.5.safetensors", form="safetensors", run=run)
    sidactl.export(oid, tmp_path / "to/v1.5.pt", form="state-dict", run=run)
    sidactl.export(oid, tmp_path / "to/v1.5", run=run)
    names = ["v1.5", "v1.5.pt", "v1.5.pt.md", "v1.5.safetensors", "v1.5.safetensors.md"]
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == names


def test_a_manifest_speaks_for_its_own_files_alone(run: Path, tmp_path: Path) -> None:
    folder = sidactl.export(fetch_teacher("tiny-digits", run=run).oid, tmp_path / "out", run=run)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({k: v + 1 for k, v in weights.items()}, folder / "model.safetensors")
    assert refused(str(folder / "model.safetensors"), run / "other") == (
        f"{folder}/model.safetensors does not say which network it holds. "
        "Give one that sidactl export --to safetensors wrote."
    )


def test_export_to_onnx_says_what_is_missing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oid = sidactl.fetch_teacher(str(network("sida_gen_edm")), kind="generator", run=run).oid
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SidaError, match=r"^export to ONNX needs the package onnx\. pip install 'sidactl\[onnx\]'"):
        sidactl.export(oid, tmp_path / "g.onnx", form="onnx", run=run)
    monkeypatch.delitem(sys.modules, "onnx")
    monkeypatch.setattr(export, "ONNX_MAX_BYTES", 1000)
    with pytest.raises(SidaError, match=r"^an ONNX file holds at most 2 GB, this network is larger\. "):
        sidactl.export(oid, tmp_path / "g.onnx", form="onnx", run=run)
    assert not list(tmp_path.glob("g*"))


@pytest.mark.usefixtures("vae")
def test_latents_are_trained_on_as_four_channels_and_scored_by_pixels_alone(run: Path, tmp_path: Path) -> None:
    for index in range(4):
        picture(tmp_path / f"in/{index % 2}/{index}.png", size=(64, 64))
    latents = prepare_data("in", latents=True, name="mine", run=run, device="cpu")
    teacher = sidactl.train_teacher("mine", name="t", run=run, device="cpu", duration_nimg=32, batch_size=16)
    assert teacher.inputs == {"dataset": latents.oid}
    net = NetSpec.from_json(words.mapping(teacher.params["net"]))
    assert (net.img_resolution, net.img_channels, net.label_dim) == (8, 4, 2)
    told = "latents have no images to compare with, got mine. Pass --ref with the dataset of pixels, or with published"
    asked: dict[str, Any] = {"teacher": "t", "mode": "sida", "generator": None, "dataset": None, "overrides": {}}
    for ask in (
        lambda: plan.plan(**asked, store=Store(run)),
        lambda: sidactl.distill(teacher="t", mode="sida", run=run, device="cpu"),
        lambda: dataset_stats.dataset_stats("mine", run=run, device="cpu"),
    ):
        with pytest.raises(SidaError, match=f"^{re.escape(told)}"):
            ask()
    pixels = prepare_data("in", name="pixels", run=run)
    assert prepare_data("pixels", latents=True, run=run, device="cpu").files == latents.files
    assert reference.find(Store(run), "pixels", teacher, "moments") == pixels
    digits = prepare_data("tiny-digits", latents=True, name="small", run=run, device="cpu")
    stats = dataset_stats.dataset_stats("small", run=run, device="cpu")
    assert stats.inputs == digits.inputs
    assert Store(run).refs()["stats/small-tiny-digits"] == stats.oid


# ---- large sources, and real ones ----


def prepared_apart(source: Path, run: Path, *options: str) -> tuple[Artifact, float]:
    """The dataset that a process of its own made of the source, and the most memory it held, in GB."""
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'sidactl', 'prepare-data', *sys.argv[1:]], check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6)\n"
    )
    command = [sys.executable, "-c", code, str(source), "--run", str(run), *options]
    oid, peak = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return Store(run).get(oid), float(peak)


def npz_of(count: int, path: Path) -> Path:
    """A batch of `count` labelled images of 64x64 pixels, written as a stream."""
    block = np.random.default_rng(0).integers(0, 256, (1000, 64, 64, 3), dtype=np.uint8)
    block[:, 8:] = 0
    classes = io.BytesIO()
    np.save(classes, np.arange(count) % 1000)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, 64, 64, 3)}
            np.lib.format.write_array_header_1_0(member, header)
            for _ in range(count // 1000):
                member.write(block.tobytes())
        archive.writestr("arr_1.npy", classes.getvalue())
    return path


@pytest.mark.slow
def test_memory_does_not_grow_with_the_source(run: Path, tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 8e9:
        pytest.skip("8 GB of free disk are needed")
    made, peak = prepared_apart(npz_of(200_000, tmp_path / "s.npz"), run)
    assert made.results["num_images"] == 200_000
    assert made.results["class_counts"] == [200] * 1000
    assert made.files["images.zip"].size_bytes > 2.4e9
    assert peak < 1.5
    (tmp_path / "s.zip").symlink_to(Store(run).path(made, "images.zip"))
    smaller, peak_of_zip = prepared_apart(tmp_path / "s.zip", run, "--resolution", "16x16")
    assert smaller.results["class_counts"] == made.results["class_counts"]
    assert peak_of_zip < 1.5
    print(f"peak memory: {peak:.2f} GB from npz, {peak_of_zip:.2f} GB from zip")


FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.slow
def test_a_small_teacher_learns_from_real_fashion_mnist(run: Path) -> None:
    if not (FASHION / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("Fashion-MNIST is not there: apt-get install dataset-fashion-mnist")
    start_sec = time.monotonic()
    made, _ = prepared_apart(FASHION, run, "--preset", "fashion32", "--name", "fashion32")
    prepared_sec = time.monotonic() - start_sec
    assert (made.results["num_images"], made.results["class_counts"]) == (60_000, [6000] * 10)
    losses: list[float] = []

    def watch(event: Event) -> None:
        if event.kind == "progress":
            losses.append(event.values["denoising_loss"])

    size = {"model_channels": 4, "num_blocks": 1, "channel_mult": (1, 2), "attn_resolutions": (), "dropout": 0.0}
    rates = {"batch_size": 16, "duration_nimg": 4800, "lr": 3e-3, "lr_rampup_nimg": 500}
    start_sec = time.monotonic()
    sidactl.train_teacher("fashion32", name="small", run=run, device="cpu", watch=watch, **size, **rates)
    trained_sec = time.monotonic() - start_sec
    first, last = np.mean(losses[:3]), np.mean(losses[-3:])
    assert last < 0.6 * first

    dataset = load_dataset(Store(run), made)
    order = DataOrder(dataset.num_images, seed=0)
    rates_read = []
    for memory in ("from the zip", "from memory"):
        start_sec = time.monotonic()
        for position in range(0, 60_000, 250):
            dataset.images(order.indices(position, 250))
        rates_read.append(60_000 / (time.monotonic() - start_sec))
        print(f"read {memory}, shuffled: {rates_read[-1]:,.0f} images/s")
    trained = f"trained on {4800 / trained_sec:.0f} images/s, loss {first:.3f} -> {last:.3f}"
    print(f"prepared in {prepared_sec:.1f} s; {trained}")


@pytest.mark.parametrize(("source", "num_processes"), [("mine", 2), ("./in", 3)])
def test_latents_of_several_processes_are_those_of_one(
    source: str, num_processes: int, run: Path, tmp_path: Path
) -> None:
    for index in range(21):
        picture(tmp_path / f"in/{index % 2}/{index:02d}.png", size=(32, 32))
    (tmp_path / "in/0/00.png").write_bytes(b"hello")  # so that what is kept are 20, 8 + 8 + 4
    (tmp_path / "in/1/99.png").write_bytes(b"hello")
    prepare_data("in", name="mine", skip_bad=True, run=run)
    code = (
        "import sys\n"
        "import sidactl\n"
        "from sidactl.data import codec\n"
        "from tests.playback import SmallVae\n"
        "codec.stable_diffusion_vae = lambda **options: SmallVae()\n"
        "skip_bad = sys.argv[2] == './in'\n"
        "for _ in range(2):  # the second time it is answered\n"
        "    made = sidactl.prepare_data(sys.argv[2], latents=True, skip_bad=skip_bad, run=sys.argv[1], device='cpu')\n"
        "    print(f'oid={made.oid}')\n"
    )
    script = tmp_path / "encode.py"
    script.write_text(code)
    other = Path(shutil.copytree(run, tmp_path / "other"))

    def encoded(root: Path, num_processes: int) -> set[str]:
        done = processes.run(num_processes, [str(root), source], {}, str(script))
        assert {each.code for each in done} == {0}, "\n".join(each.err for each in done)
        assert all(each.out.count("oid=") == 2 for each in done)
        return {oid for each in done for oid in re.findall("oid=([0-9a-f]{64})", each.out)}

    (alone,), (shared,) = encoded(run, 1), encoded(other, num_processes)
    assert shared == alone
    assert Store(other).get(shared).results["kind"] == "latents"
    assert not list((other / "live").iterdir())


def test_a_network_in_an_exported_folder_is_called_as_the_folder_is(run: Path, tmp_path: Path) -> None:
    folder = sidactl.export(fetch_teacher("tiny-digits", run=run).oid, tmp_path / "my-net", run=run)
    made = fetch_teacher(str(folder / "model.safetensors"), run=tmp_path / "other")
    assert Store.open(tmp_path / "other").names_of(made.oid) == ["teacher/my-net"]


def test_a_local_file_is_held_to_the_limit_as_well(run: Path, tmp_path: Path) -> None:
    path = sidactl.export(fetch_teacher("tiny-digits", run=run).oid, tmp_path / "net.safetensors", run=run)
    with pytest.raises(SidaError, match="net must have at most 1,000 bytes"):
        fetch_teacher(str(path), max_bytes="1k", run=tmp_path / "other")
    assert fetch_teacher(str(path), max_bytes="1M", run=tmp_path / "other").kind == "teacher"


def test_a_pipe_in_the_place_of_a_manifest_is_not_waited_for(run: Path, tmp_path: Path) -> None:
    folder = sidactl.export(fetch_teacher("tiny-digits", run=run).oid, tmp_path / "net", run=run)
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(SidaError, match="does not say which network it holds"):
        fetch_teacher(str(folder / "model.safetensors"), run=tmp_path / "other")
