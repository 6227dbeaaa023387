"""Where the process begins: a Ctrl-C while something is still being imported ends it in one line."""

import os
import signal
from types import FrameType


def main() -> None:
    """Runs the command line; see `cli.main`."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    for number, handler in usual.items():
        if signal.getsignal(number) is handler:  # else whoever started us may want it ignored
            signal.signal(number, _stop)
    try:
        from sidactl import cli

        cli.main()
    except KeyboardInterrupt:  # between the lines, or a second one
        _end()
    finally:
        if signal.getsignal(signal.SIGINT) is _stop:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's end would tell a late one with a traceback


def _stop(number: int, frame: FrameType | None) -> None:
    """As Python's own handler; but an import is not interrupted, since libraries take that for an error of theirs."""
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end()  # like a kill, which leaves the run directory valid
        frame = frame.f_back
    raise KeyboardInterrupt


def _end() -> None:
    if os.environ.get("RANK", "0") == "0":
        with open(2, "wb", buffering=0, closefd=False) as stderr:
            stderr.write(b"error: interrupted. Repeat the same command to go on.\n")
    os._exit(130)


if __name__ == "__main__":
    main()
