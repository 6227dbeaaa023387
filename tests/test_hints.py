"""What errors on the roads advise works: each is brought about, its advice is read from its text, and followed."""

import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sidactl
from sidactl import cli
from sidactl.commands import dataset_stats
from sidactl.store import Store
from tests import standins
from tests.conftest import SHORT

FLAG = "--[a-z][a-z0-9-]+"
DISTILL = ["distill", "--teacher", "tiny-digits", "--dry-run"]
SIDA = [*DISTILL, "--mode", "sida"]
CIFAR = ["distill", "--teacher", "edm-cifar10-uncond", "--mode", "sida", "--dry-run"]
FOUR = ["--num", "4", "--device", "cpu"]


class Town:
    """A run directory with a generator of the digits and four samples of it, files beside it, and the command line."""

    def __init__(self, root: Path, run: Path) -> None:
        self.root, self.run = root, run

    def __call__(self, words: Sequence[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
        """Exit code, stdout and stderr; with "|" between the words what one command prints is the next one's ref."""
        if "|" in words:
            at = len(words) - 1 - [*words][::-1].index("|")
            code, out, err = self(words[:at], capfd)
            return (code, out, err) if code else self([words[at + 1], out, *words[at + 2 :]], capfd)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--run", str(self.run)])
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out.strip(), err


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    root = tmp_path_factory.mktemp("town")
    standins.write_mirror(root / "mirror")
    random = np.random.default_rng(0)
    for folder, shape in (("pictures", (70, 80, 3)), ("bad", (16, 16, 3)), ("tiny-digits", (8, 8, 3))):
        (root / folder).mkdir()
        for index in range(4):
            Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(root / folder / f"{index}.png")
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(root / "bad/deep.png")
    np.savez(root / "statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
    (root / "img512-sd.zip").write_bytes(standins.latents_zip())
    (root / "program.pt").write_bytes(b"none")
    run = root / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIDACTL_MIRROR", str(root / "mirror"))
        patch.delenv("SIDACTL_OFFLINE", raising=False)
        standins.small_catalog(patch, root / "mirror")
        options = {name: value for name, value in SHORT.items() if not name.startswith("adversarial")}
        made = sidactl.distill(teacher="tiny-digits", mode="sid", run=run, device="cpu", say=None, **options)
        sidactl.sample(made, num=4, name="four", run=run, device="cpu")
        sidactl.prepare_data(root / "pictures", any_size=True, name="wide", run=run)
        dataset_stats.dataset_stats("dataset/tiny-digits", detector="random-features", run=run, device="cpu")
        sidactl.export(made, root / "exported", run=run)
        yield Town(root, run)


@pytest.fixture
def town(built: Town, monkeypatch: pytest.MonkeyPatch) -> Town:
    monkeypatch.chdir(built.root)
    return built


def advised(words: Sequence[str], error: str, places: Mapping[str, str]) -> list[list[str]]:
    """The commands that an error's hint tells to give instead; `places` has what is put for REF, PATH and the like."""
    hint = re.split(r"\. (?=[A-Z])", error, maxsplit=1)[1].rstrip(".")
    if command := re.search(r"(?<![\w-])sidactl ([a-z-]+ .*)$", hint):
        return [[places.get(word, word) for word in shlex.split(command[1].replace("| sidactl ", "| "))]]
    if written := re.fullmatch(r"Write (\S+) for the \w+, or (\S+)", hint):
        return [[new if word == Path(new).name else word for word in words] for new in written.groups()]
    found = []
    for way in re.split(r", or ", re.split(": (?!prepare-data)", hint)[0]):
        changed = [*words]
        flags = re.findall(rf"({FLAG})(?:,? (?:such as|e\.g\.))?(?: (\w\S*))?", way)
        for flag, value in flags:
            changed = _without(changed, flag)
            if not way.lower().startswith("leave out"):
                put = places.get(flag, places.get(value, value))
                changed += [flag, put.rstrip(",")] if put else [flag]
        found += [changed] if flags else []
    return found


def _without(words: Sequence[str], flag: str) -> list[str]:
    if flag not in words:
        return [*words]
    at = words.index(flag)
    has_value = at + 1 < len(words) and not words[at + 1].startswith("--")
    return [*words[:at], *words[at + 1 + has_value :]]


SAMPLE = ["sample", "generator/latest", *FOUR]
FID = ["fid", "generator/latest", *FOUR]
OF_DIGITS = {"--ref": "dataset/tiny-digits"}
PLAIN = ["prepare-data", "./tiny-digits"]
PICKLE = "mirror/edm-cifar10-32x32-uncond-vp.pkl"


@pytest.mark.parametrize(
    ("words", "problem", "places", "then"),
    [
        # what to distill
        ([*DISTILL, "--mode", "sidd"], "mode must be one of ", {}, None),
        ([*DISTILL, "--mode", "sid2a"], "mode sid2a starts from a generator", {"REF": "generator/latest"}, None),
        ([*SIDA, "--generator", "generator/latest"], "mode sida starts from the teacher", {}, None),
        ([*DISTILL, "--mode", "sid", "--lambda-adv", "1"], "lambda_adv belongs to the adversarial loss", {}, None),
        ([*SIDA, "--duration", "2000"], "the generator trains from 4,000 images on", {"--duration": "70k"}, None),
        ([*SIDA, "--teacher-score", "mine"], "the teacher's score must be one of ", {}, None),
        ([*SIDA, "--teacher-score", "published"], "no FD tiny-digits of tiny-digits", {}, None),
        ([*SIDA, "--device", "tpu"], "device must be cpu, cuda or cuda:N", {}, None),
        ([*SIDA, "--batch-per-device", "100"], "batch-per-device must be one of ", {}, None),
        ([*CIFAR, "--batch-per-device", "48"], "batch-per-device must be one of ", {}, None),
        ([*CIFAR, "--batch-per-device", "64", "--compile"], "with compiled dropout a pass holds one ", {}, None),
        ([*SIDA, "--shard", "--compile"], "compiled nets cannot be sharded", {}, None),
        ([*CIFAR, "--ref", "statistics.npz"], "statistics.npz holds statistics of 64", {"--ref": "cifar10"}, None),
        ([*CIFAR, "--detector", "gone.pth"], "gone.pth: no such file", {}, None),
        ([*CIFAR, "--detector", "tiny-digits"], "detector tiny-digits needs grey images", {}, None),
        ([*CIFAR, "--ref", "dataset/tiny-digits"], "detector tiny-digits needs", {"--ref": "cifar10"}, None),
        ([*CIFAR, "--detector", "random-features"], "cifar10 holds statistics by inception",
         {"--ref": "wide", "--detector": "inception"}, None),
        ([*CIFAR, "--dataset", "wide"], "images to train on must be square", {"PATH": "pictures"}, None),
        (["distill", "--teacher", "gone", "--dry-run"], "unknown teacher 'gone'", {}, None),
        (["distill", "--teacher", PICKLE, "--dry-run"], "must be imported before it can be planned with", {}, None),
        ([*SIDA, "--vae", "pictures"], "--vae is for networks of latents", {}, None),
        (["finetune-sid2a", "--teacher", "tiny-digits", "--generator", "sid/cifar10-cond-alpha1", "--dry-run"],
         "no file of sid/cifar10-cond-alpha1 is published", {}, None),
        # networks
        (["fetch-teacher", "cifar10"], "cifar10 is a dataset, not a network", {}, None),
        (["fetch-teacher", "imagenet64-edm2"], "imagenet64-edm2 is a reference", {"REF": "samples/four"}, None),
        (["fetch-teacher", "scd/edm2-s"], "no file of scd/edm2-s is in the catalog", {}, None),
        (["fetch-teacher", "edm2-xs", "--max-bytes", "10"], "edm2-xs must have at most", {"--max-bytes": "1M"}, None),
        # datasets
        (["prepare-data", "tiny-digits"], "'tiny-digits' is the name of a folder", {}, None),
        (["prepare-data", "pictures"], "images must be square",
         {"--resolution": "32x32", "--transform": "center-crop"}, None),
        (["prepare-data", "bad"], "bad/deep.png must have", {}, None),
        (["prepare-data", "pictures", "--transform", "center-crop"], "must have a resolution", {}, None),
        (["prepare-data", "--labels-only"], "labels without images come from", {"--classes": "10"}, None),
        ([*PLAIN, "--detector", "random-features"], "--detector is for --stats", {}, None),
        ([*PLAIN, "--vae", "mirror/sd-vae-ft-mse"], "--vae is for --latents", {}, None),
        # images
        (["sample", "generator/latest", "--num", "0"], "sample count must be >= 1", {}, None),
        ([*SAMPLE, "--sampler", "heun"], "the heun sampler needs a teacher", {}, None),
        ([*SAMPLE, "--sampler", "best"], "the sampler must be one-step or heun", {}, None),
        (["sample", "teacher/tiny-digits", *FOUR, "--steps", "2", "--sampler", "best"],
         "the sampler must be one-step or heun", {}, None),
        ([*SAMPLE, "--steps", "0"], "the number of steps must be >= 1", {}, None),
        ([*SAMPLE, "--class", "10"], "the class must be between 0 and 9", {"--class": "9"}, None),
        ([*SAMPLE, "--s-churn", "1"], "--s-churn is of the heun sampler", {}, None),
        (["sample", "teacher/tiny-digits", *FOUR, "--steps", "2", "--s-min", "1"], "counts with churn alone", {}, None),
        (["sample", "teacher/tiny-digits", *FOUR, "--steps", "2", "--guidance-interval", "0.2,3"],
         "a guidance interval counts for nothing with --guidance 1", {}, None),
        (["sample", "teacher/tiny-digits", *FOUR, "--steps", "2", "--guidance", "2", "--guidance-interval", "3,1"],
         "the guidance interval must be two noise levels", {}, None),
        ([*SAMPLE, "--guide", "teacher/tiny-digits"], "guidance needs the heun sampler", {}, None),
        ([*SAMPLE, "--vae", "pictures"], "--vae is for networks of latents", {}, None),
        ([*SAMPLE, "--precision", "tf32"], "precision must be", {"--precision": "bf16"}, None),
        # scores
        (["fid", "generator/latest", "--num", "1"], "sample count must be >= 2", {}, None),
        ([*FID, "--trials", "0"], "the number of trials must be >= 1", {}, None),
        ([*FID, "--subset-seed", "1"], "a subset is of images that there are", {}, None),
        (["fid", "samples/four", "--trials", "2"], "trials need images drawn anew", {}, None),
        (["fid", "samples/four", "--num", "5"], "sample count must be <= 4", {"--num": "3"}, None),
        (["fid", "samples/four", "--num", "4", "--subset-seed", "1"], "a subset must have fewer", {"--num": "3"}, None),
        (["fid", "samples/four", "--num", "3", "--subset-seed", "-1"], "the subset seed must be from 0", {}, None),
        (["fid", "samples/four", "--steps", "2"], "a sampler is of a net that draws images", {}, None),
        (["fid", "samples/four", "--precision", "bf16"], "precision and form are those of a net", {}, None),
        (["fid", "samples/four", "--vae", "pictures"], "a VAE is of a net that draws latents", {}, None),
        (["fid", "pictures"], "a dataset needs another", {"DATASET": "cifar10"}, None),
        (["fid", PICKLE, *FOUR], "it is not known which dataset", {"DATASET": "cifar10"}, None),
        (["fid", "exported"], "source must hold images, got the export of a generator", {"10k": "4"}, None),
        ([*FID, "--ref", "img512-sd.zip"], "latents have no images", {"--ref": "imagenet512"}, None),
        ([*FID, "--detector", "tiny-digits", "--ref", "STATISTICS"], "statistics compare under one", {}, None),
        ([*FID, "--detector", "gone.pth"], "gone.pth: no such file", {}, None),
        ([*FID, "--detector", "program.pt"], "program.pt is a program in TorchScript", {}, "is not a detector"),
        (["fid", "pictures", "--ref", "cifar10", "--detector", "tiny-digits"], "cifar10 holds statistics by inception",
         {"--ref": "wide", "--detector": "inception"}, "detector tiny-digits needs"),
        (["fid", "pictures", "--ref", "wide", "--detector", "tiny-digits"], "detector tiny-digits needs", {}, None),
        (["fd-dinov2", *FID[1:], "--detector", "inception"], "fd-dinov2 is by detector dinov2", {}, "the mirror has"),
        (["prec-recall", *FID[1:], "--ref", "cifar10-32x32.npz"], "precision, recall and KID need images",
         OF_DIGITS, None),
        (["inception-score", *FID[1:], "--detector", "random-features", "--num-splits", "2"],
         "the inception score needs classes", {}, None),
        (["inception-score", *FID[1:]], "number of splits must be", {"--num-splits": "2"}, None),
        (["prec-recall", *FID[1:], "--neighbours", "4"], "generated features must number", {"--neighbours": "2"}, None),
    ],
)  # fmt: skip
def test_advice_of_an_error_is_right(
    words: list[str],
    problem: str,
    places: Mapping[str, str],
    then: str | None,
    town: Town,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """then: what another error says, where one comes next that has nothing to do with the first."""
    stats = Store.open(town.run).artifacts(kind="stats")
    by_random = next(a.oid for a in stats if "random-features" in str(a.params.get("detector")))
    known = {"STATISTICS": by_random, "cifar10-32x32.npz": "mirror/cifar10-32x32.npz"}
    words = [known.get(word, word) for word in words]
    code, _, told = town(words, capfd)
    error = told.splitlines()[-1]
    assert (code != 0, problem in error) == (True, True), told
    commands = advised(words, error, places)
    assert commands, error
    for command in commands:
        trains = command[0] in ("distill", "finetune-sid2a") and "--dry-run" not in command
        code, _, told = town([*command, "--dry-run"] if trains else command, capfd)
        after = told.splitlines()[-1] if told else ""
        assert not (after.startswith("error: ") and problem in after), f"{error}\n{shlex.join(command)}\n{after}"
        assert code == 0 or (then and re.search(then, after)), f"{error}\n{shlex.join(command)}\n{after}"


@pytest.mark.parametrize(
    "words",
    [
        ["fetch-teacher", "edm-imagenet64"],
        ["prepare-data", "cifar10", "--resolution", "32x32"],
        ["prepare-data", "pictures", "--resolution", "16x16", "--latents", "--vae", "owner/sd-vae-ft-mse"],
        [*FID, "--ref", "imagenet64"],
    ],
)
def test_a_mirror_helps_as_advised_where_offline_forbids_or_a_file_is_not_there(
    words: list[str], town: Town, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    town = Town(town.root, Path(shutil.copytree(town.run, tmp_path / "run")))
    full, empty = town.root / "mirror", tmp_path / "mirror"
    monkeypatch.setenv("SIDACTL_OFFLINE", "1")
    monkeypatch.delenv("SIDACTL_MIRROR")
    code, _, told = town(words, capfd)
    assert code == 2
    assert told.endswith("Allow it, or set SIDACTL_MIRROR to a folder that holds the file.\n")
    empty.mkdir()
    monkeypatch.setenv("SIDACTL_MIRROR", str(empty))
    for _ in range(3):  # a VAE has two files
        code, _, told = town(words, capfd)
        if code == 0:
            break
        missing = re.search(r"the mirror has neither \S+ nor file://(\S+)\. Put the file there, or ", told)
        assert (code, bool(missing)) == (1, True), told
        place = Path(missing[1] if missing else "")
        place.parent.mkdir(exist_ok=True)
        shutil.copy(full / place.relative_to(empty), place)
    assert code == 0
