# Sourced by quickstart.sh and tests/run.sh: `install_sidactl EXTRA` makes a virtual environment if none is active, and
# installs sidactl from this checkout into it, once per version of pyproject.toml.

install_sidactl() {
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        if [ ! -x .venv/bin/python ]; then
            python=${PYTHON:-python3}
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
                echo "error: Python 3.11 or later is needed. Name one with PYTHON=/path/to/python3.11" >&2
                return 2
            }
            "$python" -m venv .venv
        fi
        . .venv/bin/activate
    fi
    stamp="$VIRTUAL_ENV/sidactl-$1.installed"
    wanted=$(cat pyproject.toml tests/constraints.txt | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing sidactl into $VIRTUAL_ENV" >&2
        # torch first and at the pinned version, so that the CPU build is taken where that is what is served.
        python -m pip install --quiet --disable-pip-version-check -c tests/constraints.txt torch
        python -m pip install --quiet --disable-pip-version-check -c tests/constraints.txt -e ".[$1]"
        echo "$wanted" > "$stamp"
    fi
}
