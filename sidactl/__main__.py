"""Where the process begins: a Ctrl-C while the command line is still being imported ends it in one line."""

import os
import signal
from types import FrameType


def main() -> None:
    """Runs the command line; see `cli.main`."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    # Whoever started us may want a signal ignored.
    guarded = {number: handler for number, handler in usual.items() if signal.getsignal(number) is handler}
    for number in guarded:
        signal.signal(number, _end)
    try:
        from sidactl import cli

        for number, handler in guarded.items():
            signal.signal(number, handler)
        cli.main()
    except KeyboardInterrupt:  # between the lines, or a second one
        _end(signal.SIGINT, None)
    finally:
        if signal.SIGINT in guarded:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's end would tell a late one with a traceback


def _end(number: int, frame: FrameType | None) -> None:
    """Nothing is begun yet that would have to be ended well."""
    if os.environ.get("RANK", "0") == "0":
        with open(2, "wb", buffering=0, closefd=False) as stderr:
            stderr.write(b"error: interrupted. Repeat the same command to go on.\n")
    os._exit(130)


if __name__ == "__main__":
    main()
