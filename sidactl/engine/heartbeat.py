"""Whether the other processes of a run are alive: each gives a sign now and then, and watches for those of the next.

That is asked apart from the work, in which one process may well prepare or download for hours while the others wait.
"""

import os
import socket
import sys
import threading
from contextlib import suppress
from datetime import timedelta

from sidactl.errors import EXIT_FAILED, SidaError
from sidactl.text import visible

VARIABLE = "SIDACTL_HANG_TIMEOUT"

DEFAULT_SEC = 300
"""longer than anything holds Python's lock, without which no sign is given; short beside the hours that runs take"""

LONGEST = timedelta(days=1)
"""for which processes wait for each other's work, too"""

_SIGNS = 10
"""given within the time: so many must be missing, since one may come late, and a tenth more is soon enough"""

_LEFT = -(1 << 62)
"""added to the count of signs it makes it negative for good"""

_LEAVING_SEC = 5.0
"""a last sign takes milliseconds; that it cannot be given shall not keep a process from ending"""


def seconds_of(text: str) -> int:
    """The time without a sign after which a process counts as hung."""
    longest = int(LONGEST.total_seconds())
    if not (text.isdecimal() and 1 <= int(text) <= longest):
        raise SidaError(
            f"the hang timeout must be a whole number of seconds from 1 to {longest}, got {text!r}",
            f"Pass --hang-timeout {DEFAULT_SEC}, or leave it out.",
        )
    return int(text)


class Watch:
    """Ends this process with a line once the next one has given no sign for the time in the environment.

    The next one alone is asked, by number and around, so that the load on the store does not grow with the square of
    the processes, and a single one tells of it: the launcher ends the others, or their connections to it break.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._timeout_sec = seconds_of(os.environ.get(VARIABLE, str(DEFAULT_SEC)))
        self._over = threading.Event()
        self._heard = (rank + 1) % size, 0, ""
        self._asks = False
        # Two threads, since a store whose own process is stopped keeps whoever asks it waiting.
        self._signs = threading.Thread(target=self._give_signs, daemon=True)
        self._signs.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def end(self) -> None:
        """This process has done its work: it watches no more, and no more signs of it are missed."""
        self._over.set()
        self._signs.join(_LEAVING_SEC)

    def _give_signs(self) -> None:
        # Here, since the command line imports this module.
        from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

        try:
            # A connection of its own: on that of the process group others wait.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            client = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=LONGEST)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives the processes
            store = PrefixStore(f"sidactl/{attempt}", client)
            store.set(f"of {self._rank}", f" (host {socket.gethostname()}, pid {os.getpid()})")
            next_one = (self._rank + 1) % self._size
            while not self._over.wait(self._timeout_sec / _SIGNS):
                self._asks = True
                store.add(str(self._rank), 1)
                num_signs = store.add(str(next_one), 0)
                who = store.get(f"of {next_one}").decode() if num_signs else ""
                self._heard = next_one, num_signs, who
                self._asks = False
                if num_signs < 0:
                    next_one = (next_one + 1) % self._size  # in the end oneself
            store.add(str(self._rank), _LEFT)
        except DistError:  # where the store has ended so has its process, of which the work itself tells
            self._over.set()

    def _watch(self) -> None:
        # Counted and not timed: while this process is stopped as well, or its machine sleeps, nothing is missed.
        last, num_missed = self._heard, 0
        while num_missed <= _SIGNS:
            if self._over.wait(self._timeout_sec / _SIGNS):
                return
            last, num_missed = self._heard, 0 if self._heard != last else num_missed + 1
        next_one, _, who = self._heard
        message = f"process {next_one}{who} of {self._size} has given no sign"
        if self._asks:
            is_launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            message = (
                f"{'torchrun' if is_launched else 'process 0'}, where the processes meet ({place}), has not answered"
            )
        who = f"process {self._rank}: " if self._rank else ""
        line = (
            f"{who}error: {message} for {self._timeout_sec} s, so this one ends. Repeat the same command, and training "
            "goes on from its last checkpoint; a longer --hang-timeout is more patient."
        )
        with suppress(OSError, ValueError):
            if sys.stderr.isatty():
                sys.stderr.write("\x1b[?25h")  # a display has hidden the cursor
            print(visible(line), file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)  # the main thread waits within torch for what will not come, and hears no exception
