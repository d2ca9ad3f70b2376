"""The machine's peaks, for `benchmarks.kernels`: what its threads do together with nothing but one instruction.

The instructions are compiled as the kernels are (`peak.cpp`), for the variant that these run in.
"""

import ctypes
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch

from kernels.cpu.build import FLAGS, HERE, find_compiler
from kernels.cpu.variants import Variant

TABLE = 1 << 30
"""Bytes that are read: more than any cache holds."""
COUNT = 4_000_000
"""Rounds of a loop of arithmetic."""


Kind = Literal["read", "floats", "bytes", "wide_bytes"]
"""Bytes a second out of memory; float32 operations, a multiply-add being two; 8-bit operations, a product and its sum
being two; the same where sums are of 32 bits throughout, for which processors without VNNI take an instruction more."""

_LOOPS: dict[Kind, tuple[str, float]] = {
    "floats": ("multiply_floats", 0.5),
    "bytes": ("multiply_bytes", 0x01020304),
    "wide_bytes": ("multiply_wide_bytes", 0x01020304),
}
"""Of `peak.cpp`, and what they multiply with."""


class Machine:
    """What all threads do together, a second. Measured anew each time it is asked for, in 10 to 50 ms: a machine that
    others share is not the same a moment later."""

    def __init__(self, variant: Variant, threads: int) -> None:
        """Raises `RuntimeError` without a compiler."""
        self._library = compiled(variant)
        self._threads = threads
        self._table = torch.ones(TABLE // 4)
        self._pool = ThreadPoolExecutor(threads)
        self._sink = ctypes.c_float()

    def rate(self, kind: Kind) -> float:
        work = self._read if kind == "read" else partial(self._compute, kind)
        start = time.perf_counter()
        done = sum(self._pool.map(work, range(self._threads)))
        return done / (time.perf_counter() - start)

    def peak(self, kind: Kind) -> float:
        """The best of five."""
        return max(self.rate(kind) for _ in range(5))

    def _read(self, thread: int) -> int:
        part = TABLE // self._threads // 1024 * 1024
        self._library.read_memory(self._table.data_ptr() + thread * part, part, 1)
        return part

    def _compute(self, kind: Kind, _: int) -> int:
        loop, operand = _LOOPS[kind]
        return 2 * COUNT * int(getattr(self._library, loop)(COUNT, operand, ctypes.byref(self._sink)))


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
        pointer, pointer, number, number, number, pointer, number, pointer, ctypes.c_int
    ]  # fmt: skip
    library.multiply_weights.restype = None
    library.multiply_bytes.argtypes = [ctypes.c_long, ctypes.c_int32, ctypes.c_void_p]
    library.multiply_floats.restype = library.multiply_bytes.restype = ctypes.c_long
    library.multiply_wide_bytes.argtypes = library.multiply_bytes.argtypes
    library.multiply_wide_bytes.restype = ctypes.c_long
    return library
