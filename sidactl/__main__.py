"""Where the process begins: a Ctrl-C while something is still being imported ends it in one line."""

# `signal` itself would import enum, and a Ctrl-C meanwhile would be told with a traceback.
import _signal  # type: ignore[import-not-found]  # has no stub
import os

TYPE_CHECKING = False  # as type checkers know it, without an import
if TYPE_CHECKING:
    from types import FrameType


def main() -> None:
    """Runs the command line; see `cli.main`."""
    usual = {_signal.SIGINT: _signal.default_int_handler, _signal.SIGTERM: _signal.SIG_DFL}
    for number, handler in usual.items():
        if _signal.getsignal(number) is handler:  # else whoever started us may want it ignored
            _signal.signal(number, _stop)
    try:
        from sidactl import cli

        cli.main()
    except KeyboardInterrupt:  # between the lines, or a second one
        _end()
    finally:
        if _signal.getsignal(_signal.SIGINT) is _stop:
            _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # Python's end would tell a late one with a traceback


def _stop(number: int, frame: "FrameType | None") -> None:
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
