"""GGUF's simple blocks as weights in integers, without loss: 32 inputs, a scale in float16, perhaps a minimum."""

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import GroupedWeight, Int4Weight, Int8GroupWeight
from runtime.checkpoints.gguf.blocks import FORMATS, ByteArray
from runtime.checkpoints.gguf.container import TensorInfo

Q4_0, Q4_1, Q8_0 = 2, 3, 8


def kept(info: TensorInfo, data: ByteArray) -> GroupedWeight | None:
    """A matrix in integers, unchanged; None for another format, or for values that the ops do not take."""
    if info.type not in (Q4_0, Q4_1, Q8_0) or len(info.shape) != 2:
        return None
    out, size = info.shape
    blocks = data.reshape(out, -1, FORMATS[info.type].size)
    scales = _half(blocks, 0)
    if not scales.isfinite().all():
        return None
    if info.type == Q8_0:
        values = torch.from_numpy(blocks[:, :, 2:].view(np.int8).reshape(out, -1).copy())
        return Int8GroupWeight(values, scales, size) if int(values.min()) > -128 else None
    packed = torch.from_numpy(blocks[:, :, -16:].reshape(out, -1).copy())
    # Q4_0 is scale * (q - 8): eight scales are a float16 as one is, unless they are too large for it.
    minimums = _half(blocks, 2) if info.type == Q4_1 else scales * -8
    return Int4Weight(packed, scales, minimums, size) if minimums.isfinite().all() else None


def _half(blocks: NDArray[np.uint8], at: int) -> torch.Tensor:
    """[out, groups]: the float16 at byte `at` of each block."""
    return torch.from_numpy(np.ascontiguousarray(blocks[:, :, at : at + 2]).view(np.float16)[:, :, 0].copy())
