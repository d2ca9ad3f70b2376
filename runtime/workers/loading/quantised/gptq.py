"""GPTQ (arXiv:2210.17323) as AutoGPTQ and GPTQModel store it, in four bits.

`qweight` [in / 8, out] int32: eight inputs a word, the first in the lowest bits. `qzeros` [groups, out / 8] int32:
eight outputs a word; in the first version of the format one less than the zero. `scales` [groups, out]. `g_idx` [in]:
the group of each input, which with act-order (`desc_act`) is not in order; such a weight is held in floating point.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from kernels import Weight
from runtime.workers.loading.quantised.nibbles import unpack, weight
from runtime.workers.loading.quantised.scheme import Scheme


def scheme(config: Mapping[str, Any]) -> Scheme:
    """Raises `ValueError` for what is not supported."""
    if config.get("bits") != 4:
        raise ValueError(f"bits is {config.get('bits')!r}; of GPTQ only 4 are supported")
    version = config.get("checkpoint_format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format is {version!r}; supported are: gptq, gptq_v2")
    read = partial(_read, stored_less=1 if version == "gptq" else 0)
    return Scheme("GPTQ", (".qweight",), (".qweight", ".qzeros", ".scales", ".g_idx"), read)


def _read(tensors: Mapping[str, Tensor], *, stored_less: int) -> Weight:
    qweight, qzeros, scales = (_need(tensors, end) for end in (".qweight", ".qzeros", ".scales"))
    values = unpack(qweight.t())
    # A zero of 0 was stored as -1, that is 15.
    zeros = (unpack(qzeros) + stored_less) & 15
    return weight(values, zeros, scales, tensors.get(".g_idx"))


def _need(tensors: Mapping[str, Tensor], end: str) -> Tensor:
    if end not in tensors:
        raise ValueError(f"{end} is missing")
    return tensors[end]
