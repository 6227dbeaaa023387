#!/bin/sh
# The whole road on a laptop without a GPU: distil the built-in teacher of handwritten digits into a one-step generator,
# draw 10,000 images with it, score them, and show where the pictures are.
# Expect: about five minutes on two cores the first time, seconds when repeated; all goes to ./sida-quickstart and
# ./sida-quickstart-generator.
set -eu
cd "$(dirname "$0")/.."
. examples/install.sh
install_sidactl test

export SIDACTL_RUN="${SIDACTL_RUN:-sida-quickstart}"
started=$(date +%s)
generator=$(sidactl distill --teacher tiny-digits --mode sida)
distilled=$(date +%s)
score=$(sidactl sample "$generator" --num 10k | sidactl fid)
teacher=$(sidactl show "$generator" --json | python -c 'import json, sys; print("{:.6g}".format(json.load(sys.stdin)["results"]["teacher_score"]))')
folder=$(sidactl export "$generator" "${SIDACTL_RUN%/}-generator" --force)
echo
echo "distilled in $((distilled - started)) s; generator $generator"
echo "score    FD tiny-digits of 10,000 images, lower is better: $score in one step (its teacher in 35: $teacher)"
echo "picture  $folder/grid.png"
echo "curve    $folder/curve.png"
