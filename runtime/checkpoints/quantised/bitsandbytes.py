"""bitsandbytes' checkpoints, read without the package: four bits (nf4, fp4; arXiv:2305.14314) and LLM.int8().

Four bits: `weight` [n / 2, 1] uint8, two values a byte, the first in the high half: indices into `quant_map` [16], to
be multiplied by `absmax`, one for each block. With double quantisation absmax is itself indices, into
`nested_quant_map`, times `nested_absmax`, plus an offset. Further parameters are JSON in a tensor. nf4 in blocks of 64
is our own format; the rest becomes floating point.

Eight bits: `weight` [out, in] int8, and `SCB` [out], the largest value of each row. They become groups of
32 inputs that have the scale of their row.
"""

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from kernels import Int8GroupWeight, Nf4Weight, Weight
from kernels.int4 import GROUP
from kernels.nf4 import BLOCK, CODE
from runtime.checkpoints.quantised.scheme import Scheme

STATE = ".weight.quant_state.bitsandbytes__"
FOUR_BITS = (".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map")


def scheme(config: Mapping[str, Any]) -> Scheme:
    """The scheme for a quantisation config. Raises `ValueError` for what is not supported."""
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return Scheme("bitsandbytes", (".SCB",), (".weight", ".SCB", ".weight_format"), _read_eight)
    if not (config.get("load_in_4bit") or config.get("_load_in_4bit")):
        raise ValueError("neither load_in_4bit nor load_in_8bit is set")
    states = (STATE + "nf4", STATE + "fp4")
    return Scheme("bitsandbytes", states, (*FOUR_BITS, *states), _read_four)


def _read_eight(tensors: Mapping[str, Tensor]) -> Weight:
    values, largest = tensors.get(".weight"), tensors[".SCB"]
    if values is None or values.dtype != torch.int8 or values.ndim != 2 or largest.shape != values.shape[:1]:
        raise ValueError("weight must be int8 [out, in], and SCB [out]")
    if ".weight_format" in tensors and int(tensors[".weight_format"]) != 0:
        raise ValueError(f"weight_format is {int(tensors['.weight_format'])}; only 0, by rows, is supported")
    scales = largest.float() / 127
    return Int8GroupWeight.of(values, scales.unsqueeze(1).expand(-1, -(-values.shape[1] // GROUP)))


def _read_four(tensors: Mapping[str, Tensor]) -> Weight:
    state = next(tensor for end, tensor in tensors.items() if end.startswith(STATE))
    try:
        told: dict[str, Any] = json.loads(bytes(state.tolist()))
        shape, size = tuple(told["shape"]), int(told["blocksize"])
        packed, absmax, table = (tensors[end] for end in FOUR_BITS[:3])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its state cannot be read: {error}") from None
    if absmax.dtype == torch.uint8:
        absmax = _nested(tensors, absmax, told)
    flat = packed.flatten()
    indices = torch.stack((flat >> 4, flat & 15), dim=1).flatten()[: prod(shape)]
    blocks = -(-prod(shape) // size)
    if len(indices) != prod(shape) or len(absmax) != blocks or len(table) != 16 or len(shape) != 2:
        raise ValueError(f"{len(indices)} values in {len(absmax)} blocks are not a matrix of shape {list(shape)}")
    if _is_ours(told, table, shape):
        return Nf4Weight(flat.view(shape[0], -1).clone(), absmax.float().view(shape[0], -1), shape[1])
    values = table.float()[indices.int()]
    return (values * absmax.float().repeat_interleave(size)[: len(values)]).view(shape)


def _is_ours(told: Mapping[str, Any], table: Tensor, shape: tuple[int, ...]) -> bool:
    """True for our own format: blocks of 64 that end with the rows, and exactly the values of nf4."""
    blocks = told["blocksize"] == BLOCK and shape[1] % BLOCK == 0
    return blocks and bool(torch.equal(table.float(), torch.tensor(CODE)))


def _nested(tensors: Mapping[str, Tensor], indices: Tensor, told: Mapping[str, Any]) -> Tensor:
    for end in FOUR_BITS[3:]:
        if end not in tensors:
            raise ValueError(f"{end} is missing")
    table, absmax = tensors[FOUR_BITS[4]].float(), tensors[FOUR_BITS[3]].float()
    size = int(told["nested_blocksize"])
    scales = absmax.repeat_interleave(size)[: len(indices)]
    return table[indices.int()] * scales + float(told["nested_offset"])
