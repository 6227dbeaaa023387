"""A process that dies by SIGKILL just before its n-th change of the disk: `python -m tests.mortal N WORDS OF SIDACTL`.

With N = 0 it lives, and says at its end how many changes there were. Latents are made by a stand-in of the VAE.
"""

import os
import signal
import sys
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "shutil.rmtree")


def die_before(number: int) -> list[int]:
    """From now on this process is mortal; the count of its changes so far."""
    count = [0]

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        is_exchange = event == "ctypes.dlopen"  # before renameat2 is called
        if event in CHANGES or is_exchange or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    return count


if __name__ == "__main__":
    from sidactl.__main__ import main

    if "--latents" in sys.argv:
        from sidactl.data import codec
        from tests.playback import SmallVae

        codec.stable_diffusion_vae = lambda **options: SmallVae()
    changes = die_before(int(sys.argv.pop(1)))
    try:
        main()
    finally:
        print(f"{changes[0]} changes", file=sys.stderr)
