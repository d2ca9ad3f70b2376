"""Linears in four bits, eight values in a word of 32 bits: GPTQ (arXiv:2210.17323) and AWQ (arXiv:2306.00978)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import Int4Weight, Weight
from kernels.int4 import GROUP
from runtime.checkpoints.quantised.scheme import Scheme

# -- words and groups ------------------------------------------------------------------------------
#
# Four-bit integers in words, and conversion of groups of inputs of any size to our groups of 32.

PLAIN = (0, 1, 2, 3, 4, 5, 6, 7)


def unpack(words: Tensor, order: Sequence[int] = PLAIN) -> Tensor:
    """[rows, n] int32 → [rows, 8 * n] uint8; the nibble at bits 4 * i of a word is its value number `order[i]`."""
    shifts = torch.tensor([4 * order.index(value) for value in range(8)], dtype=torch.int32)
    return ((words.unsqueeze(2) >> shifts) & 15).to(torch.uint8).flatten(1)


def weight(values: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor | None) -> Weight:
    """The weight [out, in] of scale * (value - zero).

    values [out, in] and zeros [groups, out] are from 0 to 15, scales [groups, out]; `groups` [in] is the group of each
    input; None: in order, all of one size. The result is in int4 if groups are runs of inputs that hold whole groups of
    32, else in float32. Raises `ValueError`.
    """
    out, size = values.shape
    count = len(scales)
    if scales.shape != (count, out) or zeros.shape != scales.shape or not count:
        raise ValueError(f"scales {[*scales.shape]} and zeros {[*zeros.shape]} are not for {out} outputs")
    run = -(-size // count)
    in_order = torch.arange(size) // run
    groups = in_order if groups is None else groups.long()
    if groups.shape != (size,) or not 0 <= int(groups.min()) <= int(groups.max()) < count:
        raise ValueError(f"there are {count} groups, and inputs of others")
    scales, zeros = scales.float(), zeros.float()
    whole = run % GROUP == 0 or count == 1
    if not whole or not torch.equal(groups, in_order):
        return (values.float() - zeros[groups].t()) * scales[groups].t()
    starts = torch.arange(0, size, GROUP)
    of_ours = groups[starts]
    ours = scales[of_ours].t()
    return Int4Weight.of(values, ours, -zeros[of_ours].t() * ours)


# -- GPTQ ------------------------------------------------------------------------------------------
#
# As AutoGPTQ and GPTQModel store it. `qweight` [in / 8, out] int32: eight inputs a word, the first in the lowest bits.
# `qzeros` [groups, out / 8] int32: eight outputs a word; in the first version of the format one less than the zero.
# `scales` [groups, out]. `g_idx` [in]: the group of each input, which with act-order (`desc_act`) is not in order; such
# a weight is held in floating point.


def gptq(config: Mapping[str, Any]) -> Scheme:
    """The scheme for a quantisation config. Raises `ValueError` for what is not supported."""
    if config.get("bits") != 4:
        raise ValueError(f"bits is {config.get('bits')!r}; of GPTQ only 4 are supported")
    version = config.get("checkpoint_format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format is {version!r}; supported are: gptq, gptq_v2")
    read = partial(_read_gptq, stored_less=1 if version == "gptq" else 0)
    return Scheme("GPTQ", (".qweight",), (".qweight", ".qzeros", ".scales", ".g_idx"), read)


def _read_gptq(tensors: Mapping[str, Tensor], *, stored_less: int) -> Weight:
    qweight, qzeros, scales = (_need(tensors, end) for end in (".qweight", ".qzeros", ".scales"))
    values = unpack(qweight.t())
    # A zero of 0 was stored as -1, that is 15.
    zeros = (unpack(qzeros) + stored_less) & 15
    return weight(values, zeros, scales, tensors.get(".g_idx"))


def _need(tensors: Mapping[str, Tensor], end: str) -> Tensor:
    if end not in tensors:
        raise ValueError(f"{end} is missing")
    return tensors[end]


# -- AWQ -------------------------------------------------------------------------------------------
#
# As AutoAWQ stores it for its GEMM kernels. `qweight` [in, out / 8] and `qzeros` [groups, out / 8], int32: eight
# outputs a word, in the order below. `scales` [groups, out].

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output at each nibble of a word, from the lowest bits on."""


def awq(config: Mapping[str, Any]) -> Scheme:
    """The scheme for a quantisation config. Raises `ValueError` for what is not supported."""
    bits = config.get("bits", config.get("w_bit", 4))
    if bits != 4:
        raise ValueError(f"bits is {bits!r}; of AWQ only 4 are supported")
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise ValueError(f"version is {version!r}; of AWQ only gemm is supported")
    return Scheme("AWQ", (".qweight",), (".qweight", ".qzeros", ".scales"), _read_awq)


def _read_awq(tensors: Mapping[str, Tensor]) -> Weight:
    for end in (".qzeros", ".scales"):
        if end not in tensors:
            raise ValueError(f"{end} is missing")
    values, zeros = unpack(tensors[".qweight"], AWQ_ORDER), unpack(tensors[".qzeros"], AWQ_ORDER)
    return weight(values.t().contiguous(), zeros, tensors[".scales"], None)
