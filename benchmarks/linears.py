"""Linears of `benchmarks.kernels`: weights that are cold, multiplied one after the other without Python in between."""

import ctypes
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.peak import Kind, compiled
from kernels import QUANTISERS, Quantisers, Weight, pages
from kernels.cpu import CpuOps

SHAPES = {
    "qkv": (960, 576),
    "out": (576, 576),
    "gate_up": (3072, 576),
    "down": (576, 1536),
    "logits": (49152, 576),
}
"""SmolLM2-135M's linears, [out, in]."""
COLD = 1 << 30
"""Bytes of copies of a weight that are gone through in turn: more than any cache holds."""
PASS = 0.05
"""Seconds that one timing takes, if there are weights for so many: threads that slept and rows that left the cache
while the machine's peak was measured cost half a millisecond of them."""


def repeated(timed: Callable[[int], float], *, most: int) -> Callable[[], float]:
    """timed(calls) gives the seconds of a call, the mean of so many; what is returned does it with as many as take
    `PASS`, `most` at most. The first one is left out."""
    timed(1)
    calls = max(1, min(most, int(PASS / timed(1))))
    return lambda: timed(calls)


@dataclass(frozen=True)
class WeightType:
    """How weights are made (None: left as they are), and which of the peaks binds their products."""

    quantisers: Quantisers | None
    peak: Kind

    def make(self, ops: CpuOps, weight: torch.Tensor, shape: str) -> Weight:
        """As it is served where it is called `shape`, but for int4's logits, which are int8 there."""
        if self.quantisers is None:
            return weight
        quantise = self.quantisers.expanding if shape == "gate_up" else self.quantisers.layers
        return ops.prepare(quantise(weight))


TYPES = {
    "float32": WeightType(None, "floats"),
    "bfloat16": WeightType(QUANTISERS["bfloat16"], "floats"),
    "int8": WeightType(QUANTISERS["int8"], "wide_bytes"),
    "int4": WeightType(QUANTISERS["int4"], "bytes"),
}
"""bfloat16 is how weights are stored: products are of float32."""


class ColdLinear:
    """A linear with copies of its weight."""

    def __init__(self, ops: CpuOps, kind: str, shape: str) -> None:
        self.size = SHAPES[shape]
        weight = TYPES[kind].make(ops, torch.randn(self.size), shape)
        self.num_bytes: int = weight.nbytes if isinstance(weight, torch.Tensor) else weight.num_bytes
        self._library = compiled(ops.variant)
        self._weights = [_copied(weight) for _ in range(1 + COLD // self.num_bytes)]
        pairs = [ops.op_of(copied) for copied in self._weights]
        self._op = ctypes.cast(pairs[0][0], ctypes.c_void_p)  # type: ignore[arg-type]
        self._addresses = array("q", (address for _, addresses in pairs for address in addresses))
        self._next = 0

    def timer(self, rows: int) -> Callable[[], float]:
        """Gives seconds of one product with `rows` rows, the mean over some weights, each time it is called."""
        out, size = self.size
        x, y = torch.randn(rows, size), torch.empty(rows, out)
        return repeated(lambda calls: self._timed(x, y, calls), most=len(self._weights))

    def _timed(self, x: torch.Tensor, y: torch.Tensor, calls: int) -> float:
        """Seconds for each of the next weights."""
        first = self._next if self._next + calls <= len(self._weights) else 0
        self._next = first + calls
        address = self._addresses.buffer_info()[0] + first * 3 * self._addresses.itemsize
        start = time.perf_counter()
        self._library.multiply_weights(
            self._op,
            x.data_ptr(),
            *x.shape,
            y.shape[1],
            address,
            calls,
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return (time.perf_counter() - start) / calls


def _copied(weight: Weight) -> Weight:
    """The same in memory of its own, as weights that are served lie in."""
    if isinstance(weight, torch.Tensor):
        return pages.empty(weight.shape, weight.dtype).copy_(weight)
    made: Any = weight  # all of them are dataclasses
    copied: Weight = replace(
        made, **{name: _copied(x) for name, x in vars(weight).items() if isinstance(x, torch.Tensor)}
    )
    return copied
