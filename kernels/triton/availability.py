"""Availability of the Triton ops. Apart from the ops themselves, which import Triton."""

import os
import shutil
from importlib.util import find_spec

import torch

INTERPRETED = ("1", "true", "on", "yes", "y")
"""Values that Triton takes for yes, in upper or lower case."""


def interpreted() -> bool:
    """True if Triton runs its kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in INTERPRETED


def unavailable() -> str | None:
    """Reason why these ops cannot run here, or None when they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if not (torch.cuda.is_available() or interpreted()):
        return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    if not interpreted() and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler, with which Triton compiles launchers of kernels: install gcc, or name one in CC"
    return None
