"""Run directories of earlier states: all in them is read, and what was interrupted goes on bitwise, or is named.

The last is of the state before modules became folders.
"""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import sidactl
from sidactl.commands import inventory
from sidactl.store import Artifact

ARCHIVE = Path(__file__).parent / "files/run-directories.tar.xz"
GOES_ON = {"f020819": None, "6fcb80f": 448, "f0c4868": 416, "21b2b62": 448, "cbc7507": 448, "0945e18": 512}
"""by commit: the images of the newest checkpoint; None where the recipe had too few fields to be of today's question"""
SAME_MACHINE = "5e65cedcdcda"
"""how the digest begins of what the interrupted run ends with where these were made; others round otherwise"""


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="tar")
    return folder


def go_on(root: Path, told: list[str] | None = None) -> Artifact:
    told = [] if told is None else told
    return sidactl.distill(
        teacher="small",
        mode="sida",
        run=root,
        device="cpu",
        teacher_score="none",
        say=told.append,
        watch=lambda event: told.append(f"{event.kind} at {event.nimg}"),
        duration="640",
        batch_size=32,
        num_accumulation_rounds=1,
        generator_lr=1e-4,
        fake_score_lr=1e-4,
        ema_halflife="1k",
        ema_rampup_ratio=0.05,
        generator_from=32,
        adversarial_from=128,
        lambda_adv=0.1,
        discriminator_scale=1,
        evaluate_every=640,
        evaluate_num=100,
        checkpoint_every=91,
    )


def weights(root: Path, artifact: Artifact) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(sidactl.files(artifact, run=root)["model.safetensors"])


@pytest.fixture(scope="module")
def undisturbed(states: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    root = tmp_path_factory.mktemp("undisturbed") / "run"
    shutil.copytree(states / "cbc7507", root, ignore=shutil.ignore_patterns("live"))
    return root, go_on(root)


@pytest.mark.parametrize("commit", GOES_ON)
def test_what_an_earlier_state_stored_is_read(states: Path, tmp_path: Path, commit: str) -> None:
    root = Path(shutil.copytree(states / commit, tmp_path / "run"))
    assert list(sidactl.verify(run=root)) == []
    kinds = {artifact.kind for artifact, _ in sidactl.ls(run=root)}
    assert kinds >= {"teacher", "generator", "dataset", "detector", "samples", "score", "run"}
    sidactl.gc(run=root)  # what no ref reaches goes, since it is old by now
    assert list(sidactl.verify(run=root)) == []
    (before,) = sidactl.show("teacher/small", run=root).scores
    again = sidactl.fid("small", num=70, run=root, device="cpu", force=True)
    assert float(again) == pytest.approx(float(before), rel=1e-3)  # another processor may round otherwise
    drawn = sidactl.sample("generator/early", num=2, run=root, device="cpu")
    assert drawn.images.shape == (2, 8, 8, 1)
    assert sidactl.export("samples/four", tmp_path / "out.npz", run=root).is_file()


@pytest.mark.parametrize("commit", GOES_ON)
def test_what_an_earlier_state_left_unfinished_goes_on_or_is_named(
    states: Path, tmp_path: Path, undisturbed: tuple[Path, Artifact], commit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(states / commit, tmp_path / "run"))
    (unfinished,) = inventory.unfinished(run=root)
    told: list[str] = []
    made, whole = go_on(root, told), undisturbed[1]
    if nimg := GOES_ON[commit]:
        assert unfinished.checkpoint_nimg == nimg
        assert f"resumed at {nimg}" in told
        assert inventory.unfinished(run=root) == []
    else:
        command = f"sidactl gc --live {unfinished.key[:12]} removes it"
        assert (
            f"unfinished work of an older version does not go on: {unfinished.key[:12]} ({command})"
            in capsys.readouterr().err
        )
        sidactl.gc(run=root, unfinished=[unfinished.key[:12]])
    assert inventory.unfinished(run=root) == []
    if whole.files["model.safetensors"].sha256.startswith(SAME_MACHINE):
        assert made.files["model.safetensors"] == whole.files["model.safetensors"]
    for name, tensor in weights(undisturbed[0], whole).items():
        np.testing.assert_allclose(weights(root, made)[name], tensor, rtol=0, atol=1e-2)
