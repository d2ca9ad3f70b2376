"""The ops that a decoder is made of: one interface, several backends.

`load("auto")` gives the fastest backend that works here; `available()` says which do, and why not.
"""

from collections.abc import Callable

from torch import Tensor

from kernels.cpu import CpuOps
from kernels.int4 import Int4Weight, quantise_int4
from kernels.interface import LoraFactors, LoraSegment, Ops, PagedRows
from kernels.quantised import Int8Weight, QuantisedWeight, Weight, quantise_int8
from kernels.reference import ReferenceOps

BACKENDS: dict[str, type[Ops]] = {"reference": ReferenceOps, "cpu": CpuOps}
"""From slowest to fastest."""

Quantiser = Callable[[Tensor], QuantisedWeight]
"""From a weight [out, in] in floating point."""

QUANTISERS: dict[str, tuple[Quantiser, Quantiser]] = {
    "int8": (quantise_int8, quantise_int8),
    "int4": (quantise_int4, quantise_int8),
}
"""By the name of the setting: for the layers' linears, and for embeddings and logits, which four bits hurt most."""


def available() -> dict[str, str | None]:
    """Every backend, and why it cannot be used here (None: it can)."""
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def load(name: str = "auto") -> Ops:
    """The backend called `name`, or for "auto" the fastest one that works here.

    Raises `ValueError` when there is no such backend, or when it cannot run here.
    """
    reasons = available()
    if name == "auto":
        name = [backend for backend, reason in reasons.items() if reason is None][-1]
    if name not in BACKENDS:
        raise ValueError(f"no kernel backend {name!r}; there are: auto, {', '.join(BACKENDS)}")
    if (reason := reasons[name]) is not None:
        raise ValueError(f"kernel backend {name!r} cannot be used here: {reason}")
    return BACKENDS[name]()


__all__ = [
    "BACKENDS",
    "QUANTISERS",
    "Int4Weight",
    "Int8Weight",
    "LoraFactors",
    "LoraSegment",
    "Ops",
    "PagedRows",
    "QuantisedWeight",
    "Quantiser",
    "Weight",
    "available",
    "load",
    "quantise_int4",
    "quantise_int8",
]
