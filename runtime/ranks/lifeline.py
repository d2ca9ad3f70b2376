"""A process that ends when its parent does, however that ends, and whatever this one is doing."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def die_with(parent: int) -> None:
    """Have the system kill this process when the thread of process `parent` that made it ends. Exits at once when it
    has ended already. Elsewhere than on Linux only the closed link tells, which a process that is stuck does not
    read."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the parent, which first lets requests finish
        signal.signal(number, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)
