"""The ops in Triton, for GPUs: one source, compiled for the device when it is first used.

With `TRITON_INTERPRET=1` in the environment before Triton is imported they run on the CPU, slowly: for tests. Triton is
optional, and imported only when this backend is loaded.
"""

from kernels.interface import Ops
from kernels.training import TrainingOps
from kernels.triton.availability import unavailable

__all__ = ["load", "training_ops", "unavailable"]


def load() -> Ops:
    """The backend. Raises `ImportError` without Triton."""
    from kernels.triton import flash
    from kernels.triton.ops import TritonOps

    return TritonOps(*flash.load())


def training_ops(serving: Ops) -> TrainingOps:
    """The ops for training beside these: with Triton's, a loss that keeps no logits in memory, and
    flash-attn where they have it."""
    if serving.name != "triton":
        return TrainingOps()
    from kernels.triton.ops import TritonOps
    from kernels.triton.training import TritonTrainingOps

    assert isinstance(serving, TritonOps)
    return TritonTrainingOps(serving.flash)
