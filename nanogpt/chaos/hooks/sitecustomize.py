"""Python imports this at start when the chaos command puts its directory on PYTHONPATH.

It gives a rank two faults that no signal has by itself: SIGUSR1 makes it exit with code 0, SIGUSR2
makes its loop hang while its other threads go on.
"""

import os
import signal
import sys
import time
from types import FrameType


def _exit(number: int, frame: FrameType | None) -> None:
    os._exit(0)


def _hang(number: int, frame: FrameType | None) -> None:
    while True:
        time.sleep(1)


if any(argument.endswith("rank_worker.py") for argument in sys.orig_argv[:3]):
    signal.signal(signal.SIGUSR1, _exit)
    signal.signal(signal.SIGUSR2, _hang)
