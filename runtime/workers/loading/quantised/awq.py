"""AWQ (arXiv:2306.00978) as AutoAWQ stores it for its GEMM kernels, in four bits.

`qweight` [in, out / 8] and `qzeros` [groups, out / 8], int32: eight outputs a word, in the order below. `scales`
[groups, out].
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kernels import Weight
from runtime.workers.loading.quantised.nibbles import unpack, weight
from runtime.workers.loading.quantised.scheme import Scheme

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output at each nibble of a word, from the lowest bits on."""


def scheme(config: Mapping[str, Any]) -> Scheme:
    """Raises `ValueError` for what is not supported."""
    bits = config.get("bits", config.get("w_bit", 4))
    if bits != 4:
        raise ValueError(f"bits is {bits!r}; of AWQ only 4 are supported")
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise ValueError(f"version is {version!r}; of AWQ only gemm is supported")
    return Scheme("AWQ", (".qweight",), (".qweight", ".qzeros", ".scales"), _read)


def _read(tensors: Mapping[str, Tensor]) -> Weight:
    for end in (".qzeros", ".scales"):
        if end not in tensors:
            raise ValueError(f"{end} is missing")
    values, zeros = unpack(tensors[".qweight"], ORDER), unpack(tensors[".qzeros"], ORDER)
    return weight(values.t().contiguous(), zeros, tensors[".scales"], None)
