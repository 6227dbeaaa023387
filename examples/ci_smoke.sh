#!/bin/sh
# A smoke test for the CI of a project that uses sidactl, on a CPU and without a download: SiD, SiDA and SiD2A of
# tiny-digits, each for a few steps, then images and their score; with `edm2` as its argument the same of a small EDM2
# teacher that is trained first. It fails where a command does, or where the score is far from what it should be.
# Expect: 52 s of a slow processor's time (edm2: 74 s). sidactl must be installed; all goes to a folder that is removed.
#
# As a step of a GitHub workflow:
#   - run: pip install torch --index-url https://download.pytorch.org/whl/cpu
#   - run: pip install sidactl && sh ci_smoke.sh
set -eu
SIDACTL_RUN=$(mktemp -d)
export SIDACTL_RUN SIDACTL_OFFLINE=1
trap 'rm -rf "$SIDACTL_RUN"' EXIT

teacher=tiny-digits limit=5
if [ "${1:-}" = edm2 ]; then
    teacher=small-edm2 limit=90
    sidactl train-teacher tiny-digits --name "$teacher" --net edm2 --duration 3200 --model-channels 16
fi
short="--teacher $teacher --batch-size 64 --num-accumulation-rounds 1 --duration 640 --generator-from none
--evaluate-every 640 --evaluate-num 500 --teacher-score none"
sidactl distill --mode sid $short
sidactl distill --mode sida --adversarial-from 256 $short
sidactl finetune-sid2a --adversarial-from 0 --generator "generator/$teacher-sid" $short |
    sidactl sample --num 1000 | sidactl fid --fail-above "$limit"
sidactl verify
