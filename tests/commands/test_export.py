"""Exports replace earlier exports and nothing else; killed or refused by the disk, they leave the old or the new."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch

from sidactl import export, prepare_data, sample
from sidactl.commands import export as commands_export
from sidactl.commands import inventory
from sidactl.commands.export import EXPORT_FORMS, ExportForm
from sidactl.errors import SidaError
from sidactl.store import Store, outputs

REPOSITORY = Path(__file__).parents[2]
TEACHER = "teacher/tiny-digits"


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a teacher and samples; tests only read it."""
    root = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("export") / "run"))
    sample("tiny-digits", seeds=range(4), name="four", run=root, device="cpu")
    sample("tiny-digits", seeds=range(6), name="six", run=root, device="cpu")
    return root


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def content(root: Path) -> dict[str, bytes | str]:
    """All that lies below, links and pipes by what they are."""
    return {
        str(path.relative_to(root)): path.read_bytes() if outputs.type_of(path) == "a file" else outputs.type_of(path)
        for path in root.rglob("*")
    }


def refused(ref: str, to: Path | str, *, run: Path, form: ExportForm | None = "files", force: bool = True) -> str:
    with pytest.raises(SidaError) as caught:
        export(ref, to, form=form, run=run, force=force)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


# what is never replaced


@pytest.mark.parametrize("form", ["files", "png", "safetensors"])
def test_places_that_are_no_place_of_its_own_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: ExportForm
) -> None:
    own = Path(shutil.copytree(run, tmp_path / "run"))
    (tmp_path / "home/me").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home/me"))
    (tmp_path / "link").symlink_to(own)
    (tmp_path / "notes.txt").write_text("mine")
    before = content(tmp_path)
    ref = "samples/four" if form == "png" else TEACHER
    a_place = "an export must be a place of its own, got {}: {}. Name a new folder or file in it."
    for to, what in {
        ".": "the current directory or what holds it",
        "": "the current directory or what holds it",
        "..": "the current directory or what holds it",
        "../..": "the current directory or what holds it",
        "../cwd": "the current directory or what holds it",
        "/": "the current directory or what holds it",
        f"{tmp_path}/home/me": "home or what holds it",
        f"{tmp_path}/home": "home or what holds it",
        f"{own}": "the run directory or what holds it",
        f"{tmp_path}/link": "the run directory or what holds it",
        "/proc": "a mount point",
    }.items():
        assert refused(ref, to, run=own, form=form) == a_place.format(what, Path(to))
    for to in (own / "x", own / "objects", own / "objects/new/deeper", tmp_path / "link/x"):
        assert refused(ref, to, run=own, form=form) == (
            f"an export must be outside of the run directory, got {to}. Name a place elsewhere."
        )
    assert content(tmp_path) == before


def test_force_replaces_a_folder_only_if_its_manifest_lists_all_that_is_in_it(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    only = f"only an earlier export can be replaced, got {{}}: {folder}. Choose another name, or move it away."
    for harm, what in (
        (lambda: None, "a folder without the manifest of an export"),
        (lambda: (folder / "notes.txt").write_text("mine"), "a folder without the manifest of an export"),
        (
            lambda: (folder / "manifest.json").write_text(json.dumps({"kind": "page", "files": {"notes.txt": {}}})),
            "a folder without the manifest of an export",
        ),
        (lambda: (folder / "manifest.json").write_text("[" * 5000), "a folder without the manifest of an export"),
    ):
        harm()
        before = content(tmp_path)
        assert refused("samples/four", folder, run=run) == only.format(what)
        assert content(tmp_path) == before
    shutil.rmtree(folder)
    for form in ("files", "png"):
        export("samples/four", folder, form=form, run=run, force=folder.exists())  # type: ignore[arg-type]
        assert refused("samples/four", folder, run=run, force=False) == (
            f"{folder} exists already. Choose another name, or pass --force to replace it."
        )
        inner = next(path.parent for path in sorted(folder.rglob("*.png")))
        for name, make in {
            "notes.txt": lambda path: path.write_text("mine"),
            "mine": lambda path: path.mkdir(),
            "link": lambda path: path.symlink_to(tmp_path),
        }.items():
            make(inner / name)
            before = content(tmp_path)
            where = (inner / name).relative_to(folder)
            assert refused("samples/six", folder, run=run) == only.format(
                f"a folder with {where}, which no export wrote"
            )
            assert content(tmp_path) == before
            outputs.remove(inner / name)
    before = content(folder)
    export("samples/six", folder, form="png", run=run, force=True)
    assert len(list(folder.rglob("*.png"))) == 6
    assert set(before) < set(content(folder))
    assert sorted(os.listdir(tmp_path)) == ["cwd", "out"]


def test_an_export_of_an_earlier_version_is_known_by_its_manifest(run: Path, tmp_path: Path) -> None:
    folder = export(TEACHER, tmp_path / "out", run=run)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["exported"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    export("samples/four", folder, run=run, force=True)
    assert json.loads((folder / "manifest.json").read_text())["kind"] == "samples"


FILES = {"npz": "samples/four", "safetensors": TEACHER, "state-dict": TEACHER}


@pytest.mark.parametrize(
    ("name", "form"), [("a.npz", "npz"), ("a.safetensors", "safetensors"), ("A.PT", "state-dict"), ("v1.5", "files")]
)
def test_the_form_goes_by_the_suffix_where_none_is_given(
    run: Path, tmp_path: Path, name: str, form: ExportForm
) -> None:
    ref = FILES.get(form, TEACHER)
    by_name = export(ref, tmp_path / name, run=run)
    told = export(ref, tmp_path / "told", form=form, run=run)
    assert outputs.type_of(by_name) == outputs.type_of(told) == ("a folder" if form == "files" else "a file")
    assert content(by_name) == content(told)
    if form == "files":  # nor is a folder made that is named like a file
        for suffix in ("zip", "PNG", "pkl"):
            assert f"no export is a .{suffix} file" in refused(TEACHER, tmp_path / f"b.{suffix}", run=run, form=None)
    if form == "safetensors":  # what no such file can hold is no folder of that name
        assert "must be of kind teacher or generator" in refused(
            "samples/four", tmp_path / "b.safetensors", run=run, form=None
        )


@pytest.mark.parametrize("form", FILES)
def test_force_replaces_a_file_only_if_its_content_is_of_the_form(run: Path, tmp_path: Path, form: ExportForm) -> None:
    path, ref = tmp_path / "out", FILES[form]
    other = {"npz": "safetensors", "safetensors": "state-dict", "state-dict": "npz"}[form]
    export(FILES[other], tmp_path / "other", form=other, run=run)  # type: ignore[arg-type]
    for make, what in (
        (lambda: path.write_bytes(b""), f"a file that is no {form}"),
        (lambda: path.write_bytes(b"PK\x03\x04"), f"a file that is no {form}"),
        (lambda: path.write_bytes(b"\x02\0\0\0\0\0\0\0[]"), f"a file that is no {form}"),
        (lambda: shutil.copy(tmp_path / "other", path), f"a file that is no {form}"),
        (lambda: path.symlink_to(tmp_path / "other"), "a symbolic link"),
        (lambda: path.symlink_to(tmp_path / "nothing"), "a symbolic link"),
        (lambda: path.mkdir(), "a folder"),
        (lambda: os.mkfifo(path), "a pipe"),
    ):
        make()
        before = content(tmp_path)
        assert refused(ref, path, form=form, run=run) == (
            f"only an earlier export can be replaced, got {what}: {path}. Choose another name, or move it away."
        )
        assert content(tmp_path) == before
        outputs.remove(path)
    assert "a device or socket" in refused(ref, "/dev/null", form=form, run=run)
    export(ref, path, form=form, run=run)
    path.chmod(0o600)
    first = path.read_bytes()
    export(ref, path, form=form, run=run, force=True)
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (first, 0o666 & ~umask())


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def test_a_model_card_of_the_users_is_kept(run: Path, tmp_path: Path) -> None:
    path, card = tmp_path / "g.safetensors", tmp_path / "g.safetensors.md"
    card.write_text("# My notes\n")
    for force in (False, True):
        assert refused(TEACHER, path, form="safetensors", run=run, force=force) == (
            f"only an earlier export can be replaced, got a file that is no model card: {card}. "
            "Choose another name, or move it away."
        )
    assert sorted(os.listdir(tmp_path)) == ["cwd", "g.safetensors.md"]
    assert card.read_text() == "# My notes\n"


def test_what_is_called_as_temporaries_once_were_is_left_alone(run: Path, tmp_path: Path) -> None:
    for name in (".out.part", ".sidactl-export-mine", ".sidactl-export-abcdefgh", ".sidactl-export-12345678"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    (tmp_path / ".sidactl-export-12345678/lock").write_text("mine")
    before = content(tmp_path)
    export("samples/four", tmp_path / "out", run=run)
    shutil.rmtree(tmp_path / "out")
    assert content(tmp_path) == before


# rights


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_and_folders_have_the_rights_that_the_umask_leaves(run: Path, tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        export(TEACHER, tmp_path / "made/folder", run=run)
        export("samples/four", tmp_path / "png", form="png", run=run)
        for form, ref in FILES.items():
            export(ref, tmp_path / form, form=form, run=run)  # type: ignore[arg-type]
    finally:
        os.umask(old)
    made = [path for path in tmp_path.rglob("*") if path.name != "cwd"]
    assert len(made) > 15
    rights = {path: stat.S_IMODE(path.stat().st_mode) for path in made}
    assert rights == {path: (0o777 if path.is_dir() else 0o666) & ~mask for path in made}


# several at once


@pytest.mark.parametrize("force", [False, True])
def test_exports_to_one_place_at_once_leave_one_of_them_whole(run: Path, tmp_path: Path, force: bool) -> None:
    wholes = {}
    for ref in ("four", "six"):
        folder = export(f"samples/{ref}", tmp_path / ref, form="png", run=run)
        wholes[ref] = content(folder)
    target = tmp_path / "out"
    if force:
        export("samples/four", target, form="png", run=run)
    told: list[str] = []

    def work(ref: str) -> None:
        try:
            export(f"samples/{ref}", target, form="png", run=run, force=force)
            told.append("done")
        except SidaError as error:
            told.append(str(error))

    threads = [threading.Thread(target=work, args=(ref,)) for ref in ("four", "six") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    exists = f"{target} exists already. Choose another name, or pass --force to replace it."
    assert sorted(told) == sorted(["done"] * 6 if force else ["done", *[exists] * 5])
    assert content(target) in wholes.values()
    assert sorted(os.listdir(tmp_path)) == ["cwd", "four", "out", "six"]


# kills

# Forks one child per moment, which dies just before its n-th change of the disk, until a child lives to the end.
KILL_DRIVER = """
import os, shutil, signal, sys
from pathlib import Path
import safetensors.torch, torch
from sidactl.commands import export
from sidactl.store import outputs
from tests.mortal import die_before

base, run, ref, form, force = Path(sys.argv[1]), *sys.argv[2:5], sys.argv[5] == "force"
export.export(ref, base / "warm", form=form, run=run)
if sys.argv[6] == "plain":
    outputs._renameat2 = lambda *arguments: False
for fatal in range(1, 400):
    root = base / str(fatal)
    shutil.copytree(base / "begin", root)
    pid = os.fork()
    if pid == 0:
        die_before(fatal)
        export.export(ref, root / "out", form=form, run=run, force=force)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(fatal, code, flush=True)
    if code != -signal.SIGKILL:
        break
"""


def exported(root: Path) -> dict[str, Any]:
    return {name: data for name, data in content(root).items() if not name.startswith(".sidactl-export-")}


@pytest.mark.parametrize(
    ("form", "old", "new", "system"),
    [
        pytest.param("files", "samples/six", "samples/four", "exchange", marks=pytest.mark.slow),
        ("files", "samples/six", "samples/four", "plain"),
        ("safetensors", None, TEACHER, "exchange"),
        pytest.param("safetensors", "teacher/other", TEACHER, "exchange", marks=pytest.mark.slow),
        pytest.param("safetensors", "teacher/other", TEACHER, "plain", marks=pytest.mark.slow),
        pytest.param("state-dict", None, TEACHER, "plain", marks=pytest.mark.slow),
        pytest.param("npz", "samples/six", "samples/four", "exchange", marks=pytest.mark.slow),
        pytest.param("png", "samples/six", "samples/four", "exchange", marks=pytest.mark.slow),
        pytest.param("png", None, "samples/four", "plain", marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_and_the_command_again_finishes(
    run: Path, tmp_path: Path, form: ExportForm, old: str | None, new: str, system: str
) -> None:
    if old == "teacher/other":
        run = Path(shutil.copytree(run, tmp_path / "run"))
        teacher = Store(run).resolve(TEACHER)
        params = {**teacher.params, "name": "other"}
        files = {"model.safetensors": Store(run).path(teacher, "model.safetensors")}
        Store(run).set_ref("teacher", "other", Store(run).put("teacher", files, params=params).oid)
    (tmp_path / "begin").mkdir()
    (tmp_path / "whole").mkdir()
    if old:
        export(old, tmp_path / "begin/out", form=form, run=run)
    export(new, tmp_path / "whole/out", form=form, run=run)
    before, whole = content(tmp_path / "begin"), content(tmp_path / "whole")
    force = "force" if old else "new"
    words = [sys.executable, "-c", KILL_DRIVER, str(tmp_path), str(run), new, form, force, system]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    codes = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert (done.stderr, codes[-1]) == ("", 0)
    assert len(codes) > 8
    for moment in range(1, len(codes) + 1):
        root = tmp_path / str(moment)
        found = exported(root)
        for name in {*before, *whole}:
            if form in commands_export.FOLDER_FORMS:
                is_aside = system == "plain" and not found and len(list(root.glob(".sidactl-export-*/old-0"))) == 1
                assert found in (before, whole) or is_aside
            else:
                assert found.get(name) in (before.get(name), whole.get(name))
        if moment < len(codes):  # the last one finished
            is_done = not old and "out" in found
            if is_done:
                assert refused(new, root / "out", form=form, run=run, force=False).endswith("to replace it.")
                export(new, root / "second", form=form, run=run)
                for path in root.glob("second*"):
                    outputs.remove(path)
            else:
                export(new, root / "out", form=form, run=run, force=bool(old))
        assert content(root) == whole


def export_until_a_file_is_large(limit: int, to: Path, run: Path, form: ExportForm) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    export(TEACHER, to, form=form, run=run)


@pytest.mark.parametrize("form", ["safetensors", "state-dict"])
def test_what_a_kill_in_the_middle_of_a_file_leaves_goes_with_the_next_export(
    run: Path, tmp_path: Path, form: ExportForm
) -> None:
    whole = export(TEACHER, tmp_path / "whole/out", form=form, run=run).parent
    limit = (whole / "out").stat().st_size // 2
    process = get_context("forkserver").Process(
        target=export_until_a_file_is_large, args=(limit, tmp_path / "killed/out", run, form)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGXFSZ
    assert not exported(tmp_path / "killed")
    assert content(tmp_path / "killed")
    export(TEACHER, tmp_path / "killed/out", form=form, run=run)
    assert content(tmp_path / "killed") == content(whole)


# disks that refuse


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("form", EXPORT_FORMS)
@pytest.mark.parametrize("limit", [0, 500])
def test_a_file_size_limit_is_one_line_and_leaves_what_was_there(
    run: Path, tmp_path: Path, form: ExportForm, limit: int
) -> None:
    ref = "samples/four" if form in ("png", "npz") else TEACHER
    if form == "onnx":
        pytest.importorskip("onnxscript", reason="onnx is not installed: pip install 'sidactl[dev]'")
        run, ref = with_generator(run, tmp_path), "generator/g"
    target = tmp_path / "new/out"
    with file_size_limit(limit):
        told = refused(ref, target, form=form, run=run, force=False)
    assert told == f"{target} cannot be written: File too large. Free some space, or choose another place."
    assert not (tmp_path / "new").exists()


def with_generator(run: Path, tmp_path: Path) -> Path:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    teacher = Store(run).resolve(TEACHER)
    files = {"model.safetensors": Store(run).path(teacher, "model.safetensors")}
    params = {**teacher.params, "sampler": {"sigma_init": 2.5}, "recipe": None}
    Store(run).set_ref("generator", "g", Store(run).put("generator", files, params=params).oid)
    return run


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "No space left on device. Free some space, or choose another place."),
        (errno.EROFS, "Read-only file system. Check its folder and your permissions, or choose another place."),
        (errno.EACCES, "Permission denied. Check its folder and your permissions, or choose another place."),
        (errno.EIO, "Input/output error. Check its folder and your permissions, or choose another place."),
    ],
)
@pytest.mark.parametrize("call", ["mkdtemp", "fsync", "rename"])
def test_a_disk_that_refuses_is_one_line_and_leaves_what_was_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, hint: str, call: str
) -> None:
    path = export(TEACHER, tmp_path / "g", form="safetensors", run=run)
    (tmp_path / "g.md").write_text((tmp_path / "g.md").read_text() + "old\n")
    before = content(tmp_path)
    renames = iter((True, False))

    def refuse(*arguments: Any, **options: Any) -> Any:
        # The card is brought to its place, the file is not: the old card has to come back.
        if call == "rename" and (next(renames, None) is not False):
            return rename(*arguments)
        raise OSError(number, os.strerror(number))

    rename = outputs._renameat2
    where = {"mkdtemp": "tempfile.mkdtemp", "fsync": "os.fsync", "rename": "sidactl.store.outputs._renameat2"}[call]
    Store(run).resolve(TEACHER)
    data = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in data.items()}, path)
    before = content(tmp_path)
    monkeypatch.setattr(where, refuse)
    assert refused(TEACHER, path, form="safetensors", run=run) == f"{path} cannot be written: {hint}"
    assert content(tmp_path) == before


def test_paths_that_cannot_be_are_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    before = content(tmp_path)
    long = "x" * 253  # with .md it is too long
    for form in ("files", "safetensors"):
        for to, told in {
            "file/out": "cannot be written: Not a directory. Choose another place.",
            "file/deeper/out": "cannot be written: Not a directory. Choose another place.",
            "x" * 300: "cannot be written: File name too long. Choose a shorter name.",
        }.items():
            assert refused(TEACHER, tmp_path / to, form=form, run=run, force=False) == f"{tmp_path / to} {told}"  # type: ignore[arg-type]
    assert "File name too long" in refused(TEACHER, tmp_path / long, form="safetensors", run=run)
    assert refused(TEACHER, "a\0b", run=run).startswith("a path must not hold a zero byte, got one")
    assert content(tmp_path) == before


# text from outside


HOSTILE = "MIT\n\n## Use\n<script>alert(1)</script> | [x](http://y) `z` \x1b[31m\u202e&lt;"


def hostile(run: Path, tmp_path: Path, text: str = HOSTILE) -> tuple[Path, str]:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    teacher = Store(run).resolve(TEACHER)
    files = {"model.safetensors": Store(run).path(teacher, "model.safetensors")}
    params = {**teacher.params, "name": text, "licence": text, "dataset": text}
    return run, Store(run).put("teacher", files, params=params).oid


def test_a_model_card_takes_names_and_licences_as_text(run: Path, tmp_path: Path) -> None:
    run, oid = hostile(run, tmp_path)
    for form in ("safetensors", "state-dict"):
        export(oid, tmp_path / "a\n```\n<b>", form=form, run=run)  # type: ignore[arg-type]
        card = (tmp_path / "a\n```\n<b>.md").read_text()
        text = r"MIT\\n\\n## Use\\n&lt;script&gt;alert(1)&lt;/script&gt; \| \[x\](http://y) \`z\` "
        text += r"\\x1b\[31m\\u202e&amp;lt;"
        lines = card.splitlines()
        assert lines[0] == f"# {text}"
        assert f"- licence: {text}" in lines
        assert f"- dataset: {text}" in lines
        assert [line for line in lines if line.startswith("#")] == [
            f"# {text}",
            "## Scores",
            "## Use",
            "## Network, sampler and recipe",
        ]
        assert [line for line in lines if line.startswith("```")] == [
            {"safetensors": "```sh", "state-dict": "```python"}[form],
            "```",
            "```json",
            "```",
        ]
        assert "<script" not in card
        assert "\x1b" not in card
        assert "\u202e" not in card
        for path in tmp_path.glob("a*"):
            path.unlink()


def test_the_command_in_a_card_names_the_file_whatever_it_is_called(run: Path, tmp_path: Path) -> None:
    path = export(TEACHER, tmp_path / "it's\n1\x1b\u202e\\2.safetensors", form="safetensors", run=run)
    card = path.with_name(f"{path.name}.md").read_text()
    (word,) = re.findall(r"fetch-teacher (.*) \| sidactl", card)
    done = subprocess.run(["bash", "-c", f"test -f {word} && printf %s {word}"], cwd=tmp_path, capture_output=True)
    assert done.stdout == os.fsencode(path.name)


def test_a_dataset_that_a_foreign_network_names_is_never_read_as_a_path(run: Path, tmp_path: Path) -> None:
    from sidactl import distill, fid

    pictures = tmp_path / "cwd/pictures"
    np.savez(tmp_path / "cwd/pictures.npz", arr_0=np.zeros((4, 8, 8, 1), np.uint8))
    export("samples/four", pictures, form="png", run=run)
    for number, name in enumerate(("pictures", str(pictures), "pictures.npz", "http://127.0.0.1:9/x.zip")):
        own, oid = hostile(run, tmp_path / str(number), name)
        before = {path for path in own.rglob("*") if path.is_file()}
        told = (
            f"the network is of dataset {name!r}, which is no name of the catalog and no ref in {own}. "
            "Pass the dataset: --ref in a score, --dataset in training."
        )
        for use in (
            lambda own=own, oid=oid: fid(oid, num=4, run=own, device="cpu"),
            lambda own=own, oid=oid: distill(teacher=oid, mode="sida", run=own, device="cpu", duration_nimg=6400),
        ):
            with pytest.raises(SidaError) as caught:
                use()
            assert str(caught.value) == told
        assert {path for path in own.rglob("*") if path.is_file()} == before
    # A ref of that name is what is meant.
    own, oid = hostile(run, tmp_path / "ref", "pictures")
    stored = prepare_data("tiny-digits", name="pictures", run=own)
    assert fid(oid, num=4, run=own, device="cpu").references["FD tiny-digits"] == stored.oid


def test_a_catalog_dataset_is_not_read_from_a_folder_of_its_name(run: Path, tmp_path: Path) -> None:
    from sidactl.commands.reference import dataset_of

    export("samples/four", tmp_path / "cwd/ffhq64", form="png", run=run)
    own, oid = hostile(run, tmp_path, "ffhq64")
    with pytest.raises(SidaError, match=r"^dataset ffhq64 must be prepared from its files\. Get them from "):
        dataset_of(Store(own), Store(own).get(oid))


def test_show_tells_foreign_text_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sidactl.cli import main

    own, oid = hostile(run, tmp_path)
    monkeypatch.setenv("SIDACTL_RUN", str(own))
    for words in (["show", oid], ["export", oid, str(tmp_path / "a\n\x1bb")], ["show", "x/\x1b[31m\u202e"]):
        with pytest.raises(SystemExit):
            main(words)
        out, err = capsys.readouterr()
        assert not re.search("[\x1b\u202e]", out + err)
        if words == ["show", oid]:
            shown = r"MIT\n\n## Use\n<script>alert(1)</script> | [x](http://y) `z` \x1b[31m\u202e&lt;"
            assert [line for line in out.splitlines() if "licence" in line] == [f"  setting  licence: {shown}"]
        elif words[0] == "export":
            assert out == f"{tmp_path}/a\\n\\x1bb\n"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pairs of keys, ours and theirs."""
    pytest.importorskip("model_signing", reason="signatures need: pip install 'sidactl[sign]'")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
        public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pem").write_bytes(private)
        (folder / f"{name}.pub").write_bytes(public)
    for name, other in (("rsa", rsa.generate_private_key(65537, 2048)), ("locked", key)):
        lock = form.NoEncryption() if name == "rsa" else form.BestAvailableEncryption(b"secret")
        (folder / f"{name}.pem").write_bytes(other.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, lock))
    return folder


@pytest.mark.parametrize("name", ["net", "net.safetensors"])
def test_a_signed_export_is_known_by_its_key_and_no_other(run: Path, tmp_path: Path, keys: Path, name: str) -> None:
    path, check = tmp_path / name, inventory.verify_signature
    for _ in range(2):
        export(TEACHER, path, sign=keys / "ours.pem", run=run, force=True)
        check(path, keys / "ours.pub")
    with pytest.raises(SidaError, match="is not what was signed by this key: Key mismatch"):
        check(path, keys / "theirs.pub")
    if path.is_dir():
        (path / ".git").mkdir()
        (path / ".git/config").write_text("[core]\nfsmonitor = evil")
        with pytest.raises(SidaError, match="Extra files"):
            check(path, keys / "ours.pub")
        shutil.rmtree(path / ".git")
    changed = path / "README.md" if path.is_dir() else path
    changed.write_bytes(changed.read_bytes() + b" ")
    with pytest.raises(SidaError, match="is not what was signed by this key: Signature mismatch"):
        check(path, keys / "ours.pub")


def test_what_cannot_be_signed_or_checked_is_said_before_anything_is_written(
    run: Path, tmp_path: Path, keys: Path
) -> None:
    for key, told in (
        ("ours.pub", "no private key"),
        ("none.pem", "No such file"),
        ("../keys0", "no private key"),
        ("rsa.pem", "no private key of an elliptic curve in PEM .it is of another kind"),
        ("locked.pem", "needs a password, which cannot be given. Write it without: openssl ec"),
    ):
        with pytest.raises(SidaError, match=told):
            export(TEACHER, tmp_path / "net", sign=keys / key, run=run)
    (tmp_path / "net.sig").write_text("mine")
    with pytest.raises(SidaError, match="got a file that is no signature"):
        export(TEACHER, tmp_path / "net", sign=keys / "ours.pem", run=run, force=True)
    assert sorted(os.listdir(tmp_path)) == ["cwd", "net.sig"]
    for path, key, told in (
        ("net", "ours.pub", "net is not there"),
        ("net.sig", "ours.pub", "net.sig.sig is not there"),
        ("net.sig", "ours.pem", "no public key"),
    ):
        with pytest.raises(SidaError, match=told):
            inventory.verify_signature(tmp_path / path, keys / key)
    (tmp_path / "cwd.sig").write_text("{}")
    with pytest.raises(SidaError, match="is not what was signed by this key"):
        inventory.verify_signature(tmp_path / "cwd", keys / "ours.pub")
