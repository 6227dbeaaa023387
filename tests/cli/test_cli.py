"""The command line: what goes to stdout, what to stderr, exit codes, and the exact text of errors."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from typer.testing import CliRunner

from sidactl import __version__, cli, units
from sidactl.cli import console, train
from sidactl.commands import words
from sidactl.data import prepare, transforms
from sidactl.recipes import MODES, HeunSpec, flag_of, names_of
from sidactl.store import Store
from tests.golden import golden
from tests.web import serving

FAST = {
    "duration": "512",
    "evaluate-every": "512",
    "evaluate-num": "100",
    "checkpoint-every": "256",
    "generator-from": "128",
    "adversarial-from": "256",
    "batch-size": "128",
}


def sidactl(
    *arguments: str, run: Path | None = None, stdin: str = "", check: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """A command as in a process of its own, but in this one, where torch is there already; see `process`."""
    said, told, piped = io.StringIO(), io.StringIO(), sys.stdin
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(told):
        for name in [name for name in os.environ if name.startswith("SIDACTL_")]:
            patch.delenv(name)
        if run is not None:
            patch.setenv("SIDACTL_RUN", str(run))
        words.say_once.cache_clear()
        sys.stdin = io.StringIO(stdin)
        try:
            cli.main(arguments)
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.stdin = piped
    if check is not None:
        assert code == check, told.getvalue()
    return subprocess.CompletedProcess(arguments, code, said.getvalue(), told.getvalue())


def process(
    *arguments: str, run: Path | None = None, stdin: str = "", check: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SIDACTL_")} | {"OMP_NUM_THREADS": "1"}
    if run is not None:
        environment["SIDACTL_RUN"] = str(run)
    command = [sys.executable, "-m", "sidactl", *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, timeout=300)
    if check is not None:
        assert done.returncode == check, done.stderr
    return done


def flags(**changed: str) -> list[str]:
    return [word for name, value in (FAST | changed).items() for word in (f"--{name}", value)]


def assert_one_line(done: subprocess.CompletedProcess[str], text: str, code: int = 2) -> None:
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"error: {text}\n")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run directory with a very short distillation, and its oid."""
    run = tmp_path_factory.mktemp("cli") / "run"
    done = sidactl("distill", "--teacher", "tiny-digits", "--mode", "sida", *flags(), run=run)
    return run, done.stdout.strip()


def test_help_imports_nothing_heavy_and_lists_every_command() -> None:
    code = (
        "import sys\n"
        "from sidactl.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'scipy', 'rich', 'PIL', 'safetensors'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    for command in ("fetch-teacher", "prepare-data", "distill", "finetune-sid2a", "sample", "fid", "prec-recall"):
        assert command in done.stdout


def all_commands() -> Sequence[str]:
    import typer

    from sidactl.cli import app

    group = typer.main.get_command(app)
    return sorted(group.commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", all_commands())
def test_help_of_every_command_begins_with_a_verb_and_has_an_example(command: str) -> None:
    told = sidactl(command, "--help").stdout
    assert told.startswith("Usage: sidactl ")
    assert f"Example: sidactl {command}" in " ".join(told.split())


def test_help_lists_every_member_of_a_closed_set() -> None:
    prepared, trained = [" ".join(sidactl(command, "--help").stdout.split()) for command in ("prepare-data", "distill")]
    for name in (*prepare.PRESETS, *transforms.TRANSFORMS):
        assert re.search(rf"\b{name}\b", prepared), name
    assert "--precision fp32|tf32|fp16|bf16 " in trained
    assert "--forced-normalization off|published|intended " in trained


def test_the_bare_command_prints_its_help_line_by_line() -> None:
    done = process(check=2)
    assert done.stdout == ""
    assert done.stderr == process("--help").stdout


@pytest.mark.parametrize("arguments", [["distill", "--help"], ["train-teacher", "--help"], ["bench", "--help"]])
def test_every_option_says_what_it_is(arguments: list[str]) -> None:
    """A name that fills its line stands alone; what it is for begins on the next."""
    _, _, listed = re.split(r"^\w[\w ]*(:)$", sidactl(*arguments).stdout, maxsplit=1, flags=re.MULTILINE)
    lines = listed.splitlines()
    options = [i for i, line in enumerate(lines) if line.startswith("  -")]
    silent = [lines[i] for i in options if "  " not in lines[i].strip() and not lines[i + 1].startswith("   ")]
    assert options
    assert silent == []


@pytest.mark.parametrize("arguments", [["--debug", "show", "3fa2b1"], ["show", "3fa2b1", "--debug"]])
def test_debug_may_stand_anywhere(arguments: list[str], tmp_path: Path) -> None:
    done = process(*arguments, run=tmp_path / "run", check=2)
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith("error: no ")


def test_version_is_one_line() -> None:
    assert process("--version").stdout == f"{__version__}\n"


def test_misspelt_command_gets_the_nearest_one() -> None:
    assert_one_line(sidactl("distil", check=None), "No such command 'distil'. Did you mean 'distill'?")


def test_word_shaped_like_an_oid_reaches_show(tmp_path: Path) -> None:
    text = "no artifact starts with '3fa2b1'. See what there is with: sidactl ls"
    assert_one_line(sidactl("3fa2b1", run=tmp_path / "run", check=None), text)


def test_unknown_option_is_one_line() -> None:
    done = sidactl("sample", "--nun", "3", check=None)
    assert_one_line(done, "No such option '--nun'. Did you mean '--num' or '--run'?")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["distill", "--teacher", "tiny-digts"], "unknown teacher 'tiny-digts'. Did you mean 'tiny-digits'?"),
        (
            ["distill", "--teacher", "tiny-digits", "--mode", "sid2a"],
            "mode sid2a starts from a generator, got none. Pass --generator REF: distill one with --mode sid first.",
        ),
        (
            ["distill", "--teacher", "tiny-digits", "--mode", "sidd"],
            f"mode must be one of {', '.join(MODES)}, got 'sidd'. Pass --mode sida.",
        ),
        (
            ["distill", "--teacher", "tiny-digits", "--duration", "many"],
            "--duration must be a whole number of images such as 500, 50k or 1.5M, got 'many'",
        ),
        (
            ["distill", "--teacher", "tiny-digits", "--batch-size", "0"],
            "batch_size must be at least 1, got 0. Pass another --batch-size.",
        ),
        (
            ["distill", "--teacher", "tiny-digits", "--mode", "sid", "--lambda-adv", "1"],
            "lambda_adv belongs to the adversarial loss, which mode sid does not have. "
            "Use --mode sida, or leave it out.",
        ),
        (["sample", "tiny-digits", "--num", "0"], "sample count must be >= 1, got 0. Pass --num 1 or more."),
        (
            ["sample", "tiny-digits", "--precision", "fp8"],
            "precision must be one of fp32, tf32, fp16, bf16, got 'fp8'. Pass another --precision.",
        ),
        (
            ["fid", "tiny-digits", "--num", "9", "--precision", "tf32"],
            "precision must be fp32, fp16 or bf16 here, got tf32. Pass another --precision.",
        ),
        (["fid", "tiny-digits", "--num", "1"], "sample count must be >= 2, got 1. Pass --num 2 or more."),
        (["sample", "generator/best"], "no ref 'generator/best' in {run}. See what there is with: sidactl ls"),
        (
            ["sample", "generator/best", "--num", "1", "--guidance", "much"],
            "Invalid value for '--guidance': 'much' is not a valid float. Try it with --help.",
        ),
        (
            ["sample", "tiny-digits", "--num", "1", "--seeds", "0-3"],
            "--num and --seeds cannot both be given. Pass one of them.",
        ),
        (
            ["distill", "--teacher", "tiny-digits", "--checkpoint-every", "0"],
            "checkpoint_every_nimg must be at least 1, got 0. Pass another --checkpoint-every.",
        ),
        (
            ["distill", "--teacher", "tiny-digits", "--lambda-adv", "nan"],
            "lambda_adv must be at least 0 and finite, got nan. Pass another --lambda-adv.",
        ),
        (
            ["distill", "--teacher", "tiny-digits", "--name", "beef"],
            "a ref name must not be 4 or more hex digits, which would read as an oid, got 'beef'. Add another letter.",
        ),
        (
            ["fid", "tiny-digits", "--detector", "incepton"],
            "unknown detector 'incepton'. Did you mean 'inception'?",
        ),
        (
            ["train-teacher", "tiny-digits", "--name", "x", "--net", "unet"],
            "the net must be one of ddpmpp, ncsnpp, adm, edm2, got 'unet'. Pass --net ddpmpp.",
        ),
        (
            ["distill", "--teacher", "tiny-digits", "--logvar", "maybe"],
            "--logvar must be true or false, got 'maybe'. Pass --logvar true.",
        ),
        (
            ["distill", "--teacher", "tiny-digits", "--alpha", "3x"],
            "--alpha must be a number, got '3x'. Pass another value.",
        ),
        (
            ["train-teacher", "tiny-digits", "--name", "x", "--channel-mult", "1,b"],
            "--channel-mult must be whole numbers such as 1,2,2, got '1,b'. Pass another value.",
        ),
        (["fid", "tiny-digits", "--convention", "tf"], None),
        (["ls", "pictures"], None),
        (["prepare-data", "tiny-digits", "--resolution", "64"], None),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path, arguments: list[str], text: str | None
) -> None:
    run = tmp_path / "run"
    done = sidactl(*arguments, run=run, check=None)
    if text is None:
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    else:
        assert_one_line(done, text.format(run=run))
    assert not (run / "objects").exists()


def test_empty_pipe_is_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    text = "the pipe is empty: the command before this one gave no artifact. See its message."
    for command in ("sample", "fid", "prec-recall", "show"):
        assert_one_line(sidactl(command, run=tmp_path / "run", check=None), text)
    assert not (tmp_path / "run").exists()
    with Path(os.devnull).open() as nothing:
        done = subprocess.run(
            [sys.executable, "-m", "sidactl", "fid"], stdin=nothing, capture_output=True, text=True, check=False
        )
    assert done.stderr == "error: an artifact is needed, got none. Name one (see sidactl ls), or pipe one in.\n"


def test_run_directory_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    Store(tmp_path / "run").put("run", {})
    (tmp_path / "run" / "format").write_text("2\n")
    text = (
        f"the run directory {tmp_path / 'run'} has format 2, this sidactl reads format 1. "
        "Upgrade sidactl, or choose another directory with --run DIR."
    )
    assert_one_line(sidactl("ls", run=tmp_path / "run", check=None), text)


def test_run_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = sidactl("fetch-teacher", "tiny-digits", run=tmp_path / "file" / "run", check=None)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the run directory {tmp_path / 'file' / 'run'} cannot be ")
    assert done.stderr.count("\n") == 1


def test_dry_run_prints_the_recipe_and_writes_nothing(tmp_path: Path) -> None:
    done = sidactl(
        "distill", "--teacher", "tiny-digits", "--dry-run", "--alpha", "2.1", "--duration", "11k", run=tmp_path / "r"
    )
    plan = json.loads(done.stdout)
    assert plan["recipe"]["alpha"] == 2.1
    assert plan["recipe"]["duration_nimg"] == 11_000
    assert plan["inputs"] == {"teacher": "tiny-digits", "dataset": "tiny-digits"}
    assert plan["stages"] == [
        {"trains": "fake score", "from_nimg": 0},
        {"trains": "generator", "from_nimg": 4096},
        {"trains": "adversarial part", "from_nimg": 10_112},
    ]
    assert plan["scoring"] == {
        "score": "FD tiny-digits",
        "detector": "tiny-digits",
        "reference": "tiny-digits",
        "evaluations": 2,
        "images": 10_000,
        "teacher_score": "measure",
    }
    assert (plan["first"], plan["missing"], plan["estimate"]["disk_gb"]) == ([], [], 0.02)
    told = "warning: alpha is 2.1; values from 0 to 2 are known, 1.0 and 1.2 the published ones\n"
    assert done.stderr == told
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--duration", "2k"], "the generator trains from 4,000 images on, the run ends at 2,000: it would return its"),
        (["--ref", "nowhere"], "no ref 'nowhere' in "),
        (["--log", "nowhere"], "the logger must be one of tensorboard, wandb, got 'nowhere'. "),
        (["--device", "abacus"], "device must be cpu, cuda or cuda:N, got 'abacus'. "),
        (["--shard", "--compile"], "compiled nets cannot be sharded, got both. "),
        (["--no-score", "--detector", "inception"], "--detector is for scoring, got inception and --no-score. "),
    ],
)
def test_dry_run_refuses_as_the_run_would(tmp_path: Path, words: list[str], told: str) -> None:
    arguments = ["distill", "--teacher", "tiny-digits", *words]
    for more in ([], ["--dry-run"]):
        done = sidactl(*arguments, *more, run=tmp_path / "r", check=None)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {told}")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_dry_run_estimates_memory_and_hours_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from sidactl.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit:\n    pass\n"
        "assert not {'torch', 'numpy', 'scipy'} & set(sys.modules)\n"
        "assert time.process_time() < 1\n"
    )

    def planned(teacher: str) -> dict[str, Any]:
        words = ["distill", "--teacher", teacher, "--mode", "sida", "--dry-run", "--run", str(tmp_path / "r")]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0
        assert done.stderr.startswith("scored against the published statistics ")
        told: dict[str, Any] = json.loads(done.stdout)
        assert told["scoring"]["teacher_score"] == "published"
        return told

    edm2 = planned("edm2-s")
    assert (edm2["recipe"]["batch_size"], edm2["recipe"]["fake_score_lr"]) == (2048, 5e-5)
    told = edm2["estimate"]
    assert (told["parameters"], told["state_gb"], told["of"]) == (280_212_837, 8.97, "fp16, 64 images at a time")
    rows = told["memory_gb_per_device"]
    assert [row["devices"] for row in rows] == [1, 2, 4, 8, 16, 32]
    total = 0.25 + told["state_gb"] + told["gradients_gb"] + told["activations_gb"]
    assert rows[0]["whole"] == rows[5]["whole"] == pytest.approx(total, abs=0.02)
    assert rows[0]["sharded"] > rows[1]["sharded"] > rows[5]["sharded"] > total - told["state_gb"]
    assert (edm2["estimate"]["hours"], edm2["estimate"]["pace"]) == (None, "not published")
    edm = planned("edm-cifar10-uncond")["estimate"]
    assert (edm["hours"], edm["pace"]) == (300.0, "3.6 s per 1,000 images on 8 V100 (16 GB), as published")


def test_dry_run_counts_the_parameters_of_a_stored_teacher(distilled: tuple[Path, str]) -> None:
    run, _ = distilled
    oid = Store.open(run).resolve("teacher/tiny-digits").oid
    known, stored = (
        json.loads(sidactl("distill", "--teacher", name, "--dry-run", run=run).stdout) for name in ("tiny-digits", oid)
    )
    assert stored["estimate"]["state_gb"] == known["estimate"]["state_gb"] == 0.01


def test_flag_takes_none_where_the_recipe_does(tmp_path: Path) -> None:
    arguments = ["--generator-from", "none", "--ema-rampup-ratio", "none", "--logvar", "false"]
    done = sidactl("distill", "--teacher", "tiny-digits", "--dry-run", *arguments, run=tmp_path / "r")
    recipe = json.loads(done.stdout)["recipe"]
    assert (recipe["generator_from_nimg"], recipe["ema_rampup_ratio"]) == (None, None)
    assert recipe["logvar"] is False


def test_distill_prints_one_oid_and_people_read_stderr(distilled: tuple[Path, str]) -> None:
    run, oid = distilled
    assert len(oid) == 64
    assert Store.open(run).get(oid).kind == "generator"
    again = process("distill", "--teacher", "tiny-digits", "--mode", "sida", *flags(), run=run)
    assert again.stdout == f"{oid}\n"
    lines = again.stderr.splitlines()
    assert lines[0].startswith("answered from the run directory, asked on 20")
    assert lines[1].startswith("best generator: FD tiny-digits ")


def test_finished_command_is_answered_without_torch(distilled: tuple[Path, str]) -> None:
    run, oid = distilled
    arguments = ["distill", "--teacher", "tiny-digits", "--mode", "sida", "--run", str(run), *flags()]
    code = (
        "import sys\n"
        "from sidactl.cli import main\n"
        f"try:\n    main({arguments!r})\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{oid}\n"
    assert done.stderr.endswith("False\n")


def test_pipeline_prints_one_number_and_nothing_else(distilled: tuple[Path, str]) -> None:
    run, _ = distilled
    python = sys.executable
    command = (
        f"{python} -m sidactl distill --teacher tiny-digits --mode sida {' '.join(flags())}"
        f" | {python} -m sidactl sample --num 200 | {python} -m sidactl fid"
    )
    environment = os.environ | {"SIDACTL_RUN": str(run), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert 0 < float(done.stdout) < 100
    assert "FD tiny-digits" in done.stderr
    assert "FID" not in done.stderr


def test_pipeline_whose_first_command_fails_ends_in_one_line_each(tmp_path: Path) -> None:
    python, run = sys.executable, tmp_path / "run"
    command = f"{python} -m sidactl distill --teacher nobody | {python} -m sidactl sample | {python} -m sidactl fid"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=os.environ | {"SIDACTL_RUN": str(run)}, timeout=300
    )
    assert done.returncode == 2
    assert done.stdout == ""
    lines = sorted(done.stderr.splitlines())
    assert lines == [
        "error: the pipe is empty: the command before this one gave no artifact. See its message.",
        "error: the pipe is empty: the command before this one gave no artifact. See its message.",
        "error: unknown teacher 'nobody'. See sidactl ls --catalog.",
    ]
    assert not run.exists()


def test_sample_reads_a_dash_and_json_names_the_artifact(distilled: tuple[Path, str]) -> None:
    run, oid = distilled
    done = sidactl("sample", "-", "--seeds", "0-3,9", "--json", run=run, stdin=f"{oid}\n")
    described = json.loads(done.stdout)
    assert described["kind"] == "samples"
    assert described["results"]["num_images"] == 5


def test_every_ref_may_come_from_the_pipe(distilled: tuple[Path, str], tmp_path: Path) -> None:
    run, oid = distilled
    target = tmp_path / "out"
    assert sidactl("export", "-", str(target), run=run, stdin=f"{oid}\n").stdout == f"{target}\n"
    words = ["finetune-sid2a", "--teacher", "tiny-digits", "--generator", "-", "--dry-run"]
    assert json.loads(sidactl(*words, run=run, stdin=f"{oid}\n").stdout)["inputs"]["generator"] == oid


def test_an_edm2_teacher_is_trained_and_planned_with(tmp_path: Path) -> None:
    words = ["train-teacher", "tiny-digits", "--net", "edm2", "--name", "x", "--duration", "256"]
    oid = sidactl(*words, "--batch-size", "64", "--model-channels", "8", run=tmp_path / "run").stdout.strip()
    net: Any = Store.open(tmp_path / "run").resolve("teacher/x").params["net"]
    assert (net["architecture"], net["model_channels"], net["logvar_channels"]) == ("EDM2", 8, 16)
    for mode, scale in (("sid", None), ("sida", 100.0)):
        told = json.loads(
            sidactl("distill", "--teacher", oid, "--mode", mode, "--dry-run", run=tmp_path / "run").stdout
        )
        assert (told["recipe"]["forced_normalization"], told["recipe"]["logvar"]) == ("published", True)
        assert (told["recipe"]["adversarial"] or {}).get("discriminator_scale") == scale


def test_sample_guided_by_a_second_teacher_is_another_question(distilled: tuple[Path, str]) -> None:
    run, _ = distilled
    sidactl("train-teacher", "tiny-digits", "--name", "weak", "--duration", "64", "--batch-size", "32", run=run)
    words = ["sample", "tiny-digits", "--num", "2", "--steps", "2"]
    plain = sidactl(*words, run=run).stdout.strip()
    guided = json.loads(sidactl(*words, "--guide", "weak", "--guidance", "2.0", "--json", run=run).stdout)
    stored = Store.open(run).get(guided["oid"])
    assert stored.inputs["guide"] == Store.open(run).resolve("teacher/weak").oid
    assert (guided["params"]["guidance"], guided["oid"] != plain) == (2.0, True)
    assert sidactl(*words, "--guide", "weak", "--guidance", "2", run=run).stdout.strip() == stored.oid
    assert_one_line(
        sidactl(*words, "--guide", "weak", "--guidance", "nan", run=run, check=None),
        "guidance must be finite, got nan. Pass another --guidance.",
    )


def test_heuns_settings_are_flags_of_sampling_and_scores(distilled: tuple[Path, str]) -> None:
    run, _ = distilled
    flags = ["--steps", "2", "--sigma-max", "40", "--s-churn", "3", "--s-noise", "1.01"]
    made = json.loads(sidactl("sample", "tiny-digits", "--num", "2", "--json", *flags, run=run).stdout)
    assert made["params"]["sampler"] == HeunSpec(num_steps=2, sigma_max=40, S_churn=3, S_noise=1.01).to_json()
    done = sidactl("fid", "tiny-digits", "--num", "2", *flags, run=run)
    told = "drawn by heun --steps 2 --sigma-max 40.0 --s-churn 3.0 --s-noise 1.01, tiny-digits@"
    assert told in done.stderr
    assert told in sidactl("show", "teacher/tiny-digits", run=run).stdout
    assert_one_line(
        sidactl("fid", "tiny-digits", "--rho", "steep", run=run, check=None),
        "--rho must be a number, got 'steep'. Pass another value.",
    )


def test_fid_json_says_how_the_score_was_made(distilled: tuple[Path, str]) -> None:
    run, oid = distilled
    done = sidactl("fid", oid[:10], "--num", "100", "--trials", "2", "--json", run=run)
    told = json.loads(done.stdout)
    score = told["scores"]["FD tiny-digits"]
    assert told["subject"] == oid
    assert told["seeds"] == [[0, 100], [100, 200]]
    assert score["value"] == pytest.approx(sum(score["trials"]) / 2)
    assert score["minimum"] == min(score["trials"])
    assert score["detector"].startswith("tiny-digits@")
    assert "score" in sidactl("show", oid, run=run).stdout


def test_a_score_above_the_limit_is_printed_and_fails_the_command(distilled: tuple[Path, str]) -> None:
    run, oid = distilled
    value = sidactl("fid", oid, "--num", "100", run=run).stdout
    assert sidactl("fid", oid, "--num", "100", "--fail-above", "1e6", run=run).stdout == value
    done = sidactl("fid", oid, "--num", "100", "--fail-above", "0.001", run=run, check=None)
    assert (done.returncode, done.stdout) == (1, value)
    assert done.stderr.splitlines()[-1] == f"error: the score {value.strip()} is above 0.001"
    done = sidactl("fid", oid, "--num", "100", "--fail-above", "nan", run=run, check=None)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.slow
def test_scores_of_two_processes_are_those_of_one_bit_for_bit(distilled: tuple[Path, str], tmp_path: Path) -> None:
    def measured(*launcher: str) -> dict[str, Any]:
        run = shutil.copytree(distilled[0], tmp_path / f"run{len(launcher)}")
        command = [sys.executable, "-m", *launcher, "evaluate", distilled[1], "--num", "2500", "--json"]
        environment = os.environ | {"SIDACTL_RUN": str(run)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)["scores"]
        return told

    torchrun = ("torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "--", "sidactl")
    assert measured(*torchrun) == measured("sidactl")


def test_prec_recall_prints_two_numbers_between_0_and_1(distilled: tuple[Path, str]) -> None:
    run, oid = distilled
    precision, recall = map(float, sidactl("prec-recall", oid, "--num", "100", run=run).stdout.split())
    assert 0 <= precision <= 1
    assert 0 <= recall <= 1


def test_ambiguous_prefix_lists_candidates(distilled: tuple[Path, str], tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    seen: dict[str, str] = {}
    for number in range(2000):
        oid = store.put("run", {}, params={"number": number}).oid
        if oid[:4] in seen:
            break
        seen[oid[:4]] = oid
    else:
        pytest.fail("no two oids share four digits")
    done = sidactl("show", oid[:4], run=tmp_path / "run", check=2)
    assert oid[:12] in done.stderr
    assert seen[oid[:4]][:12] in done.stderr
    assert done.stderr.count("\n") == 1


def test_fetch_teacher_tells_bytes_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    data = golden("networks/edm_ddpmpp_uncond.pkl").read_bytes()
    with serving({"/net.pkl": data}) as site:
        done = sidactl("fetch-teacher", f"{site.url}/net.pkl", run=tmp_path / "run")
    size = units.format_bytes(len(data))
    assert f"fetch-teacher: {size} / {size} (100%), " in done.stderr
    assert Store.open(tmp_path / "run").get(done.stdout.strip()).kind == "teacher"


def test_fetch_teacher_takes_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with serving({"/net.pkl": b"x" * 1501}) as site:
        words = ["fetch-teacher", f"{site.url}/net.pkl", "--max-bytes"]
        done = sidactl(*words, "1.5k", run=tmp_path / "run", check=1)
        assert done.stderr == (
            f"error: net must have at most 1,500 bytes, {site.url}/net.pkl offers 1,501 bytes. "
            "If that is right, pass a larger --max-bytes to fetch-teacher.\n"
        )
        done = sidactl(*words, "0", run=tmp_path / "run", check=2)
        assert done.stderr == "error: --max-bytes must be >= 1, got 0. Pass --max-bytes 1 or more.\n"
        done = sidactl(*words, "1T", run=tmp_path / "run", check=2)
        assert done.stderr.startswith("error: --max-bytes must be a whole number of bytes such as ")
        assert len(site.requests) == 1


def test_a_published_file_is_sampled_in_place_of_an_artifact(tmp_path: Path) -> None:
    path = str(golden("networks/sida_gen_edm.pkl"))
    done = sidactl("sample", path, "--num", "4", "--json", run=tmp_path / "run")
    drawn, store = json.loads(done.stdout), Store.open(tmp_path / "run")
    assert (drawn["results"]["num_images"], drawn["results"]["nfe"]) == (4, 1)
    assert store.resolve("generator/sida_gen_edm").oid == store.get(drawn["oid"]).inputs["net"]
    fetched = sidactl("fetch-teacher", path, run=tmp_path / "run")
    assert fetched.stdout.strip() == store.resolve("generator/sida_gen_edm").oid
    assert sidactl("sample", "sida_gen_edm", "--num", "4", run=tmp_path / "run").stdout.strip() == drawn["oid"]


def test_ls_show_verify_and_gc_agree(distilled: tuple[Path, str]) -> None:
    run, oid = distilled
    listed = json.loads(sidactl("ls", "generator", "--json", run=run).stdout)
    assert oid in [entry["oid"] for entry in listed]
    shown = sidactl(oid, run=run).stdout
    assert shown == sidactl("show", "generator/best", run=run).stdout
    assert shown.startswith(f"generator {oid}\n")
    assert sidactl("verify", run=run).stderr == "no problem found\n"
    assert oid not in sidactl("gc", "--dry-run", run=run).stdout


def test_verify_names_a_damaged_object(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    artifact = store.put("samples", {"a.txt": b"hello"})
    path = store.path(artifact, "a.txt")
    path.chmod(0o644)
    path.write_bytes(b"jello")
    done = sidactl("verify", run=tmp_path / "run", check=1)
    assert done.stdout == (
        f"{artifact.files['a.txt'].sha256}: file a.txt of samples {artifact.oid[:12]}: damaged: its content no longer "
        f"matches its name. Remove it: rm -rf {path}, then repeat the command that made it with --force\n"
    )
    assert done.stderr == "error: 1 problem in the run directory. Each line says what helps.\n"


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("files", "grid.png"),
        ("safetensors", None),
        ("state-dict", None),
        pytest.param("onnx", None, marks=pytest.mark.slow),  # commands/test_export_networks.py draws images with it
    ],
)
def test_export_writes_a_generator_out(
    distilled: tuple[Path, str], tmp_path: Path, form: str, expected: str | None
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxscript", reason="onnx is not installed: pip install 'sidactl[dev]'")
    run, oid = distilled
    target = tmp_path / "out"
    assert sidactl("export", oid, str(target), "--to", form, run=run).stdout == f"{target}\n"
    assert (target / expected).exists() if expected else target.is_file()
    assert_one_line(
        sidactl("export", oid, str(target), "--to", form, run=run, check=None),
        f"{target} exists already. Choose another name, or pass --force to replace it.",
    )


def test_a_network_is_exported_with_its_model_card(distilled: tuple[Path, str], tmp_path: Path) -> None:
    run, oid = distilled
    sidactl("fid", oid, "--num", "100", run=run)
    sidactl("export", oid, str(tmp_path / "g"), run=run)
    card = (tmp_path / "g" / "README.md").read_text()
    assert re.search(r"\| FD tiny-digits \| [\d.]+ \| \| 1 x [\d,]+ \| tiny-digits \| in its training \|", card)
    assert "| FD tiny-digits, its teacher | " in card
    sidactl("export", oid, str(tmp_path / "g.safetensors"), "--to", "safetensors", run=run)
    beside = (tmp_path / "g.safetensors.md").read_text()
    assert beside == card.replace("fetch-teacher model.safetensors", "fetch-teacher g.safetensors")
    teacher = Store.open(run).resolve("teacher/tiny-digits").oid
    for line in (
        f"A generator for sidactl, oid `{oid}`.",
        f"- teacher: tiny-digits (`{teacher}`)",
        "- images seen in training: 512",
        "- licence: Apache-2.0",
        '    "mode": "sida",',
    ):
        assert line in card.splitlines()
    assert "| FD tiny-digits | " in card


def test_export_writes_samples_as_png_and_npz(distilled: tuple[Path, str], tmp_path: Path) -> None:
    import numpy as np

    run, oid = distilled
    samples = sidactl("sample", oid, "--num", "12", run=run).stdout.strip()
    sidactl("export", samples, str(tmp_path / "png"), "--to", "png", run=run)
    told = sidactl("export", samples, str(tmp_path / "x.npz"), "--to", "npz", "--json", run=run).stdout
    assert json.loads(told) == {"path": str(tmp_path / "x.npz")}
    assert len(list((tmp_path / "png").rglob("*.png"))) == 12
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["arr_0"].shape == (12, 8, 8, 1)
        assert arrays["arr_1"].shape == (12,)
    done = sidactl("export", oid, str(tmp_path / "y"), "--to", "png", run=run, check=2)
    assert done.stderr.count("\n") == 1


def test_env_prints_versions(tmp_path: Path) -> None:
    told = json.loads(sidactl("env", "--json", run=tmp_path / "run").stdout)
    assert told["sidactl"] == __version__
    assert told["packages"]["torch"]
    assert not (tmp_path / "run").exists()


def test_catalog_lists_the_built_in_setting_and_what_others_methods_reach() -> None:
    rows = [re.split("  +", line) for line in sidactl("ls", "--catalog").stdout.splitlines()]
    assert ["dataset", "tiny-digits"] in [row[:2] for row in rows]
    assert ["comparison", "scd/edm2-s", "FID 3.07, FID at 2 evaluations 2.5"] in [row[:3] for row in rows]
    shown = sidactl("show", "scd/edm2-s").stdout.splitlines()
    assert shown[0] == "comparison scd/edm2-s, in the catalog, not in the run directory"
    assert shown[-2:] == ["  paper    FID 3.07; 50,000 images", "  paper    FID at 2 evaluations 2.5; 50,000 images"]


def test_error_hint_is_a_sentence_and_message_is_not_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    from sidactl.errors import SidaError

    assert console.fail(SidaError("what must hold, got this", "Do that.")) == 2
    assert capsys.readouterr().err == "error: what must hold, got this. Do that.\n"


# prepare-data


def pictures(folder: Path, count: int) -> Path:
    from PIL import Image

    folder.mkdir()
    for index in range(count):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"{index:03}.png")
    return folder


def test_prepare_data_tells_what_it_left_out(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", 2)
    for name in "abcd":
        (folder / f"{name}.png").write_bytes(b"hello")
    arguments = ("prepare-data", str(folder))
    text = "must be an image, got bytes that Pillow does not know"
    done = sidactl(*arguments, run=tmp_path / "run", check=2)
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        f"error: {folder}/a.png {text}. Mend or remove it, or go on without: prepare-data --skip-bad."
    )
    for _ in range(2):
        done = sidactl(*arguments, "--skip-bad", run=tmp_path / "run")
        assert done.stderr.splitlines()[-1] == (
            f"warning: 4 of 6 images were left out: {folder}/a.png {text}; {folder}/b.png {text}; "
            f"{folder}/c.png {text}; and 1 more"
        )
    listed = json.loads(sidactl(*arguments, "--skip-bad", "--json", run=tmp_path / "run").stdout)
    assert listed["results"]["skipped"] == [[f"{folder}/{name}.png", text] for name in "abcd"]
    assert listed["oid"] == done.stdout.strip()


def test_interrupted_prepare_data_goes_on_with_the_same_command(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", 40)
    # The signal comes from within, at an image that is known.
    script = (
        "import os, signal, sys\n"
        "from sidactl import cli\n"
        "from sidactl.data import transforms\n"
        "encode, calls = transforms.encode_png, []\n"
        "def stopping(pixels):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 25: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return encode(pixels)\n"
        "transforms.encode_png = stopping\n"
        "cli.main(sys.argv[1:])\n"
    )
    arguments = ["prepare-data", str(folder), "--workers", "1", "--run"]
    command = [sys.executable, "-c", script, *arguments, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == "error: interrupted. Repeat the same command to go on."
    (state,) = (tmp_path / "run").glob("live/*/state.json")
    assert json.loads(state.read_text())["state"]["done"] == 24
    oids = [sidactl(*arguments, str(tmp_path / run)).stdout for run in ("run", "other")]
    assert oids[0] == oids[1]
    assert not list((tmp_path / "run/live").iterdir())


def test_prepare_data_makes_statistics_where_asked(tmp_path: Path) -> None:
    done = sidactl("prepare-data", "tiny-digits", "--stats", run=tmp_path / "run")
    stats = Store(tmp_path / "run").resolve("stats/tiny-digits-tiny-digits")
    assert done.stderr.splitlines()[-1] == f"feature statistics: {stats.oid}"
    assert stats.inputs == {"dataset": done.stdout.strip()}
    alone = sidactl("prepare-data", "tiny-digits", "--detector", "tiny-digits", run=tmp_path / "run", check=None)
    assert_one_line(alone, "--detector is for --stats, got it alone. Pass --stats, or leave it out.")


def test_prepare_data_of_classes_without_images(tmp_path: Path) -> None:
    oid = sidactl("prepare-data", "--classes", "7", "--name", "seven", run=tmp_path / "run").stdout.strip()
    described = json.loads(sidactl("show", "dataset/seven", "--json", run=tmp_path / "run").stdout)
    assert described["oid"] == oid
    assert_one_line(
        sidactl("fid", "dataset/seven", run=tmp_path / "run", check=None),
        f"images are needed, got dataset {oid[:12]} of classes alone. Give a dataset with images.",
    )


def test_help_of_distill_has_every_option_once_under_headings_and_those_of_the_mode_alone() -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, click.Group)
    listed = [name for names in train._HEADINGS.values() for name in names.split()]
    assert len(listed) == len(set(listed))
    for name, apart in (("distill", set()), ("finetune-sid2a", {"mode"})):
        command = group.commands[name]
        assert {parameter.name for parameter in command.params} | {"help"} == {*listed} - apart
        shown = CliRunner().invoke(cli.app, [name, "--help"]).output
        assert [line[:-1] for line in shown.splitlines() if line.endswith(":") and line[0] != " "] == [*train._HEADINGS]
        assert "--lambda-adv VALUE" in shown
    shown = CliRunner().invoke(cli.app, ["distill", "--mode", "sid", "--help"]).output
    assert "--lambda-adv" not in shown
    assert "--alpha VALUE" in shown
    for mode in MODES:
        shown = CliRunner().invoke(cli.app, ["distill", "--mode", mode, "--help"]).output
        words = {word for word in shown.split() if word.startswith("--")}
        fields = set().union(*map(names_of, MODES)) - {"teacher", "mode", "dataset"}
        assert {flag_of(name) for name in fields} & words == {flag_of(name) for name in names_of(mode) & fields}
