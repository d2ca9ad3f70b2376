"""The compiled kernels in this process: loaded once a variant, on the pool of the OpenMP runtime that torch loaded."""

import ctypes
import functools
from pathlib import Path

import torch

from kernels.cpu.build import library
from kernels.cpu.variants import Variant

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float

_SIGNATURES: dict[str, str] = {
    "eft_linear": "pllllpppfppii",
    "eft_linear_int8": "pllllpppppfppii",
    "eft_linear_int4": "pllllpppppfppii",
    "eft_linear_int8_groups": "pllllppppfppii",
    "eft_linear_bfloat16": "pllllpppfppii",
    "eft_rms_norm": "plllpfpi",
    "eft_silu_mul": "pllpi",
    "eft_rope_and_cache": "plplplpppppllllii",
    "eft_paged_attention": "plppplplllllfpii",
    "eft_argmax": "pllppi",
}
"""Arguments of each op: p pointer, l long, i int, f float."""
_TYPES = {"p": _POINTER, "l": _LONG, "i": _INT, "f": _FLOAT}


@functools.cache
def load(variant: Variant) -> ctypes.CDLL:
    """The compiled variant, ready to call. Raises `BuildError`, or `OSError` when it cannot be loaded."""
    kernels = ctypes.CDLL(str(library(variant)))
    for name, arguments in _SIGNATURES.items():
        function = getattr(kernels, name)
        function.argtypes = [_TYPES[letter] for letter in arguments]
        function.restype = None
    kernels.eft_use_pool.argtypes = [_POINTER]
    kernels.eft_use_pool.restype = None
    kernels.eft_use_pool(pool_entry())
    return kernels


def pool_entry() -> int | None:
    """Address of `GOMP_parallel` in torch's OpenMP runtime, whose threads the kernels run on; None without it.

    A second runtime would mean a second set of threads, each spinning while the other works.
    """
    for path in openmp_runtimes():
        try:
            entry = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(entry, ctypes.c_void_p).value
    return None


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes that this process has loaded; importing torch loads one."""
    assert torch.get_num_threads() > 0
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))
