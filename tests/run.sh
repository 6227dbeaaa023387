#!/bin/sh
# Runs the test suite in a virtual environment (the active one, or .venv, made if need be); arguments go to pytest.
# Expect: a few minutes on two cores. `sh tests/run.sh -m slow` runs the long tests instead.
set -eu
cd "$(dirname "$0")/.."
. examples/install.sh
install_sidactl dev
exec python -m pytest "$@"
