"""A process that ends when its parent does, however that ends, and whatever this one is doing."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def die_with(parent: int, *, ignoring: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)) -> None:
    """Have the system kill this process when the thread of process `parent` that made it ends. Exits at once when it
    has ended already.

    `ignoring`: signals that are meant for the parent, which ends its work first. Elsewhere than on Linux nothing kills
    this process: it needs another sign, such as a link that is closed, which a stuck process does not read.
    """
    for number in ignoring:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)
