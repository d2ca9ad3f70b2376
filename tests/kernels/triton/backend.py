"""The Triton ops for tests: on the GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

import kernels
from tests.kernels import rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

with pytest.MonkeyPatch.context() as _patch:
    if DEVICE == "cpu":
        _patch.setenv("TRITON_INTERPRET", "1")  # read where a kernel is defined: only while they are imported
    UNAVAILABLE = kernels.available()["triton"]
    if UNAVAILABLE is not None:
        pytest.skip(f"triton kernels: {UNAVAILABLE}", allow_module_level=True)
    TRITON = kernels.load("triton")
    TRAINING = kernels.triton.training_ops(TRITON)
    from kernels.triton.attention import SPLIT  # noqa: F401
    from kernels.triton.launch import DEVICE as _TAKEN
    from kernels.triton.ops import TritonOps  # noqa: F401
    from kernels.triton.training import TritonTrainingOps  # noqa: F401

    assert _TAKEN == DEVICE, "kernels.triton was imported before this module, so nothing would be tested"
    import triton.experimental.gluon  # noqa: F401  Triton imports it at a first launch, and needs the variable for it

REFERENCE = kernels.load("reference")


def random(*shape: int, seed: int) -> torch.Tensor:
    return rows.random(*shape, seed=seed).to(DEVICE)
