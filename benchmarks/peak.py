"""The machine's peaks, for `benchmarks.kernels`: what its threads do together with nothing but one instruction.

The instructions are compiled as the kernels are (`peak.cpp`), for the variant that these run in.
"""

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from kernels.cpu.build import FLAGS, HERE, find_compiler
from kernels.cpu.variants import Variant

TABLE = 1 << 30
"""Bytes that are read: more than any cache holds."""


@dataclass(frozen=True)
class Peaks:
    """Of all threads together."""

    read: float
    """Bytes a second out of memory."""
    floats: float
    """float32 operations a second, a multiply-add being two."""
    bytes: float
    """8-bit operations a second, a product and its sum being two."""
    wide_bytes: float
    """The same where sums are of 32 bits throughout, for which processors without VNNI take an instruction more."""


def measure(variant: Variant, threads: int) -> Peaks:
    """Takes about two seconds. Raises `RuntimeError` without a compiler."""
    library = compiled(variant)
    table = torch.ones(TABLE // 4)
    part = TABLE // threads // 1024 * 1024
    sink = ctypes.c_float()

    def read(thread: int) -> int:
        library.read_memory(table.data_ptr() + thread * part, part, 1)
        return part

    def floats(thread: int) -> int:
        return 2 * 4_000_000 * int(library.multiply_floats(4_000_000, 0.5, ctypes.byref(sink)))

    def products(thread: int) -> int:
        return 2 * 4_000_000 * int(library.multiply_bytes(4_000_000, 0x01020304, ctypes.byref(sink)))

    def wide(thread: int) -> int:
        return 2 * 4_000_000 * int(library.multiply_wide_bytes(4_000_000, 0x01020304, ctypes.byref(sink)))

    return Peaks(*(_rate(work, threads) for work in (read, floats, products, wide)))


def _rate(work: Callable[[int], int], threads: int) -> float:
    """The best of five: what `work` returns from all threads, a second."""
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            done = sum(pool.map(work, range(threads)))
            best = max(best, done / (time.perf_counter() - start))
    return best


@cache
def compiled(variant: Variant) -> ctypes.CDLL:
    """`peak.cpp`, ready to call. Raises `RuntimeError` without a compiler."""
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("a C++ compiler is needed to measure the machine's peaks")
    source = Path(__file__).parent / "peak.cpp"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peak.so"
        subprocess.run([compiler, *FLAGS, *variant.flags, f"-I{HERE}", str(source), "-o", str(out)], check=True)
        library = ctypes.CDLL(str(out))
    library.read_memory.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
    library.read_memory.restype = ctypes.c_float
    library.multiply_floats.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_void_p]
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.multiply_weights.argtypes = [
        pointer, pointer, number, number, number, pointer, number, number, pointer, ctypes.c_int
    ]  # fmt: skip
    library.multiply_weights.restype = None
    library.multiply_bytes.argtypes = [ctypes.c_long, ctypes.c_int32, ctypes.c_void_p]
    library.multiply_floats.restype = library.multiply_bytes.restype = ctypes.c_long
    library.multiply_wide_bytes.argtypes = library.multiply_bytes.argtypes
    library.multiply_wide_bytes.restype = ctypes.c_long
    return library
