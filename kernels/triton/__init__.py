"""The ops in Triton, for GPUs: one source, compiled for the device when it is first used.

With `TRITON_INTERPRET=1` in the environment before Triton is imported they run on the CPU, slowly: for tests. Triton is
optional, and imported only when this backend is asked for.
"""

import os
from importlib.util import find_spec

import torch

from kernels.interface import Ops
from kernels.training import TrainingOps

INTERPRETED = ("1", "true", "on", "yes", "y")
"""What Triton takes for yes, in any case."""


def unavailable() -> str | None:
    """Why these ops cannot run here, or None when they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if not (torch.cuda.is_available() or interpreted()):
        return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in INTERPRETED


def load() -> Ops:
    """The backend. Raises `ImportError` without Triton."""
    from kernels.triton import flash
    from kernels.triton.ops import TritonOps

    return TritonOps(flash.load())


def training_ops(serving: Ops) -> TrainingOps:
    """The ops for training beside these: with Triton's, a loss that keeps no logits in memory, and
    flash-attn where they have it."""
    if serving.name != "triton":
        return TrainingOps()
    from kernels.triton.ops import TritonOps
    from kernels.triton.training import TritonTrainingOps

    assert isinstance(serving, TritonOps)
    return TritonTrainingOps(serving.flash)
