"""The command line. One small file per command; nothing here imports torch before a model is loaded."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run `eft` and return the exit code. With the process's own arguments (None) the process may end in here."""
    if argv is None and sys.argv[1:2] == ["serve"]:
        # Until the server handles it: nothing is open yet, and the first process of a container has no other handler.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    from runtime.cli.app import run

    code = run(argv)
    if argv is None and "torch" in sys.modules:
        _end(code)
    return code


def _end(code: int) -> None:
    """End the process as the interpreter does, but without taking the interpreter apart.

    A load that was given up may still compute on a daemon thread. In an interpreter that is taken apart, the thread is
    unwound at its next use of Python, through C++ that must not throw, and the process aborts. Triton's bindings would
    also print what they leak.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # ends idle pools, whose threads would never be joined, first
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
