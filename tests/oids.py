"""Whether two states of the source make the same artifacts: `python -m tests.oids COMMIT [COMMIT]`, a table of oids.

Without a second commit the first is compared with the files as they are. Each runs every kind of command once, short,
in a run directory of its own, and every oid that is then in it must be in the other, too. Minutes on two cores;
`--quickstart` distils the generator of examples/quickstart.sh as well, which takes a quarter of an hour for each.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SHORT = (
    "--duration 96 --batch-size 16 --generator-from none --evaluate-every 32 --evaluate-num 64 --checkpoint-every 32 "
    "--device cpu"
)
SIDA = f"{SHORT} --adversarial-from 32"
COMMANDS: Mapping[str, str] = {
    "teacher": "fetch-teacher tiny-digits",
    "dataset": "prepare-data tiny-digits",
    "classes": "prepare-data --classes 10 --name ten",
    "EDM2 teacher": "train-teacher tiny-digits --net edm2 --name small-edm2 --duration 64 --batch-size 32 --device cpu",
    "sid": f"distill --teacher tiny-digits --mode sid {SHORT} --name sid",
    "sida": f"distill --teacher tiny-digits --mode sida {SIDA}",
    "sid2a": f"finetune-sid2a --teacher tiny-digits --generator generator/sid {SIDA}",
    "sida of EDM2": f"distill --teacher small-edm2 --mode sida {SIDA} --num-accumulation-rounds 2",
    "sida, two processes": f"distill --teacher tiny-digits --mode sida {SIDA} --num-accumulation-rounds 2 --seed 1",
    "samples": "sample generator/sid --num 16 --device cpu",
    "Heun samples": "sample tiny-digits --num 8 --device cpu",
    "FID": "fid generator/sid --num 64 --device cpu",
    "all scores": "evaluate generator/sid --num 64 --device cpu",
}
QUICKSTART = {"quickstart": "distill --teacher tiny-digits --mode sida"}


def oids_of(source: Path, commands: Mapping[str, str], run: Path) -> tuple[dict[str, str], dict[str, str]]:
    """What each command printed, and every artifact of the run directory, by its names or oid, from that source."""
    environment = os.environ | {"PYTHONPATH": str(source), "SIDACTL_RUN": str(run), "OMP_NUM_THREADS": "1"}
    told: dict[str, str] = {}
    for name, words in commands.items():
        start = [sys.executable, "-m"]
        if "two processes" in name:
            start += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        done = subprocess.run(
            [*start, "sidactl", *words.split()], env=environment, cwd=source, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{source}: sidactl {words}\n{done.stderr}")
        told[name] = done.stdout.strip().splitlines()[-1]
    code = "import sidactl; print(*(a.kind + ' ' + a.oid for a, _ in sidactl.ls()), sep='\\n')"
    listed = subprocess.run([sys.executable, "-c", code], env=environment, cwd=source, capture_output=True, text=True)
    kinds = {oid: kind for kind, oid in (line.split() for line in listed.stdout.splitlines())}
    return told, kinds


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each command, and how many artifacts either run directory has; 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="+", metavar="COMMIT", help="one, or two")
    parser.add_argument("--quickstart", action="store_true", help="distil the quickstart's generator, too")
    chosen = parser.parse_args(arguments)
    commands = {**COMMANDS, **(QUICKSTART if chosen.quickstart else {})}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for index, commit in enumerate(chosen.commits):
            source = Path(folder) / f"source-{index}"
            subprocess.run(["git", "clone", "-q", "--shared", str(REPOSITORY), str(source)], check=True)
            subprocess.run(["git", "-C", str(source), "checkout", "-q", commit], check=True)
            found.append(oids_of(source, commands, Path(folder) / f"run-{index}"))
        if len(found) == 1:
            found.append(oids_of(REPOSITORY, commands, Path(folder) / "run-now"))
    (told, kinds), (other_told, other_kinds) = found
    for name in commands:
        verdict = "same" if told[name] == other_told[name] else f"differs: {other_told[name][:16]}"
        print(f"{name:20} {told[name][:16]:16} {verdict}")
    only = {*kinds} ^ {*other_kinds}
    print(f"{len(kinds)} and {len(other_kinds)} artifacts, {len({*kinds} & {*other_kinds})} in both")
    for oid in sorted(only):
        print(f"only in one: {(kinds | other_kinds)[oid]} {oid[:16]}")
    return bool(only or told != other_told)


if __name__ == "__main__":
    sys.exit(main())
