#!/bin/sh
# Runs the test suite in a virtual environment (the active one, or .venv, made if need be), in two processes at once.
# Expect: a few minutes on two cores. Arguments go to pytest, which then is alone: `sh tests/run.sh -m slow` runs the
# long tests instead.
set -eu
cd "$(dirname "$0")/.."
. examples/install.sh
install_sidactl dev
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder --durations=25
exec python -m pytest "$@"
