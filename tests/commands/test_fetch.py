"""Networks of others become artifacts: by name, URL or file, with nothing executed, right to the last digit."""

import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import sidactl
from sidactl import catalog, fetch_teacher, load, sampling
from sidactl.commands import words
from sidactl.commands.resolve import resolve
from sidactl.errors import SidaError
from sidactl.foreign import pickles
from sidactl.recipes import HeunSpec, OneStepSpec
from sidactl.store import KINDS, Artifact, Store
from tests.commands.conftest import SMALL, SPEC, exported, network, refused, silent
from tests.conftest import instead_of
from tests.golden import golden
from tests.web import Site

EDM = ["edm_ddpmpp_uncond", "edm_ddpmpp_cond_aug9", "edm_ddpmpp_gray_traj", "edm_ncsnpp_uncond", "edm_adm_cond"]


EDM2 = ["edm2_cond_logvar", "edm2_cond_logvar_traj", "edm2_uncond_rgb", "edm2_gray_defaulthead", "edm2_guide_uncond"]


GENERATORS = ["sid_v1_gen_edm", "sida_gen_edm", "sid_gen_edm2_nogan", "sida_gen_edm2_gan_forcenorm"]


HALF = ["edm2_cond_logvar", "edm2_guide_uncond"]


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


def test_a_file_fetched_as_another_kind_dataset_and_name_is_stored_as_them(run: Path) -> None:
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


def test_a_source_fetched_again_as_another_kind_is_not_downloaded_again(site: Site, run: Path) -> None:
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
def test_unknown_names_missing_files_and_other_formats_are_refused_with_what_to_do(
    source: str, message: str, run: Path
) -> None:
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


def test_the_built_in_teacher_takes_a_name_of_your_own(run: Path) -> None:
    oid = fetch_teacher("tiny-digits", name="mine", run=run).oid
    assert Store.open(run).resolve("teacher/mine").oid == Store.open(run).resolve("teacher/tiny-digits").oid == oid


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
