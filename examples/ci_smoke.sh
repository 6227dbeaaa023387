#!/bin/sh
# A smoke test for the CI of a project that uses sidactl, on a CPU and without a download: SiDA of tiny-digits for a few
# steps of each of its three stages, then images and their score. It fails where a command does, or where the score is
# above $LIMIT, far from what it should be if not given. With `modes` as its argument SiD and SiD2A, too; with `edm2` SiDA of a small EDM2 teacher
# that is trained first. sidactl must be installed; all goes to a folder that is removed.
# Expect: 21 s of a slow processor's time (modes: 42 s, edm2: 40 s).
#
# As a step of a GitHub workflow:
#   - run: pip install torch --index-url https://download.pytorch.org/whl/cpu
#   - run: pip install sidactl && sh ci_smoke.sh
set -eu
SIDACTL_RUN=$(mktemp -d)
export SIDACTL_RUN SIDACTL_OFFLINE=1
trap 'rm -rf "$SIDACTL_RUN"' EXIT

teacher=tiny-digits limit=${LIMIT:-6}
if [ "${1:-}" = edm2 ]; then
    teacher=small-edm2 limit=${LIMIT:-50}  # images that are all alike have 70
    sidactl train-teacher tiny-digits --name "$teacher" --net edm2 --model-channels 16 --duration 3200 --batch-size 32 \
        --lr-rampup 640 --ema-halflife 500
fi
short="--teacher $teacher --batch-size 32 --num-accumulation-rounds 1 --duration 480 --generator-from 64
--evaluate-every 480 --evaluate-num 250 --teacher-score none"
generator=$(sidactl distill --mode sida --adversarial-from 256 $short)
if [ "${1:-}" = modes ]; then
    sid=$(sidactl distill --mode sid $short)
    generator=$(sidactl finetune-sid2a --generator "$sid" --adversarial-from 256 $short --no-score)
fi
sidactl sample "$generator" --num 500 | sidactl fid --fail-above "$limit"
sidactl verify
