"""The compiled kernels in this process: loaded once a variant."""

import ctypes
import functools
from contextlib import suppress

from torch import Tensor

from kernels.cpu.build import BuildError, library
from kernels.cpu.variants import Variant, wanted_variants

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float

_SIGNATURES: dict[str, str] = {
    "eft_linear": "pllllpppfppii",
    "eft_linear_int8": "pllllpppppfppii",
    "eft_linear_int8_narrow": "pllllpppppfppii",
    "eft_linear_int4": "pllllpppfppii",
    "eft_linear_int8_groups": "pllllpppfppii",
    "eft_linear_bfloat16": "pllllpppfppii",
    "eft_dequantise_nf4": "ppllpi",
    "eft_int8_products": "pllplplpi",
    "eft_int8_zeros": "pllpi",
    "eft_int8_rows": "pplplpi",
    "eft_linear_nf4": "pllllppppfppii",
    "eft_lora_apply": "pllplpli",
    "eft_rms_norm": "plllpffpi",
    "eft_layer_norm": "plllppfpi",
    "eft_silu_mul": "pllpi",
    "eft_gelu_mul": "pllipi",
    "eft_gelu": "plipi",
    "eft_rope_and_cache": "plplplpplpppllllii",
    "eft_paged_attention": "plppplplllllflfpii",
    "eft_layers": "pllllllfffpiplpplpplpllplpi",
    "eft_argmax": "pllppi",
    "eft_sample": "plllppppppi",
}
"""Arguments of each op: p pointer, l long, i int, f float."""
_TYPES = {"p": _POINTER, "l": _LONG, "i": _INT, "f": _FLOAT}


def address(x: Tensor | None) -> int:
    """Where the values begin; 0, which is null, where there are none."""
    return 0 if x is None else x.data_ptr()


@functools.cache
def load(variant: Variant) -> ctypes.CDLL:
    """The compiled variant, ready to call. Raises `BuildError`, or `OSError` when it cannot be loaded."""
    kernels = ctypes.CDLL(str(library(variant)))
    for name, arguments in _SIGNATURES.items():
        function = getattr(kernels, name)
        function.argtypes = [_TYPES[letter] for letter in arguments]
        function.restype = None
    if not kernels.eft_allowed():
        raise OSError(f"the system does not let this process use {variant.name}")
    return kernels


def load_wanted() -> tuple[Variant, ctypes.CDLL]:
    """The first of `wanted_variants` that can be had: an older compiler does not know the newest instructions, and an
    older system does not let them be used. Raises as `load` and `wanted_variants` do."""
    first, *slower = wanted_variants()
    try:
        return first, load(first)
    except (BuildError, OSError):
        for variant in slower:
            with suppress(BuildError, OSError):
                return variant, load(variant)
        raise
