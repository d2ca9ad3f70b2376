"""The ops that a decoder is made of: one interface, several backends.

`load("auto")` gives the fastest backend that works here; `available()` says which do, and why not.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import triton
from kernels.batch import LoraFactors, LoraSegment, LoraTable, PagedRows, decode_rows
from kernels.bfloat16 import BFloat16Weight, store_bfloat16
from kernels.cpu import CpuOps
from kernels.cpu.training import CpuTrainingOps
from kernels.int4 import Int4Weight, quantise_int4
from kernels.int8_groups import Int8GroupWeight
from kernels.interface import Ops
from kernels.nf4 import Nf4Weight, quantise_nf4
from kernels.quantised import Int8Weight, QuantisedWeight, Weight, quantise_int8, quantise_narrow_int8
from kernels.reference import ReferenceOps
from kernels.stack import (
    AdaptedTokens,
    ForwardContext,
    ForwardLayers,
    FusedLayers,
    KeptLayers,
    LayerStack,
    LayerWeights,
    LinearWeights,
    OutputFactors,
    PagedContext,
    RidingTokens,
    StackFactors,
)
from kernels.training import TrainingOps


class Backend(NamedTuple):
    """One way to run the ops, which may not be possible here."""

    unavailable: Callable[[], str | None]
    """See `Ops.unavailable`."""
    make: Callable[[], Ops]


BACKENDS: dict[str, Backend] = {
    "reference": Backend(ReferenceOps.unavailable, ReferenceOps),
    "cpu": Backend(CpuOps.unavailable, CpuOps),
    "triton": Backend(triton.unavailable, triton.load),
}
"""From slowest to fastest."""

GroupedWeight = Int4Weight | Int8GroupWeight
"""Formats that checkpoints may hold already: parts of a fused weight in them are joined."""

Quantiser = Callable[[Tensor], QuantisedWeight]
"""Makes a quantised weight from one [out, in] in floating point."""


class Quantisers(NamedTuple):
    """Quantisers for weights that tolerate more or less error."""

    expanding: Quantiser
    """For an MLP's gates and ups: half of a layer's weights, and their errors hurt least."""
    layers: Quantiser
    """For the layers' other linears."""
    vocabulary: Quantiser
    """For embeddings and logits, which four bits hurt most."""


QUANTISERS: dict[str, Quantisers] = {
    "int8": Quantisers(quantise_narrow_int8, quantise_int8, quantise_int8),
    "int4": Quantisers(quantise_int4, quantise_int4, quantise_int8),
    "nf4": Quantisers(quantise_nf4, quantise_nf4, quantise_int8),
    "bfloat16": Quantisers(store_bfloat16, store_bfloat16, store_bfloat16),
}
"""By the name of the setting."""


def available() -> dict[str, str | None]:
    """Every backend → the reason why it cannot be used here (None: it can)."""
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def chosen(device: torch.device) -> str:
    """The backend that "auto" takes for tensors on `device`, and for which instruction set it is compiled."""
    return describe(load(device=device))


def describe(ops: Ops) -> str:
    """Name of the backend, and of the instruction set that it is compiled for: `cpu (amx)`."""
    return f"{ops.name} ({ops.variant.name})" if isinstance(ops, CpuOps) else ops.name


def load(name: str = "auto", device: torch.device | None = None) -> Ops:
    """The backend called `name`, or for "auto" the fastest one that works here for tensors on `device` (default: CPU).

    Raises `ValueError` when there is no such backend, or when it cannot run here.
    """
    reasons = available()
    if name == "auto":
        on_gpu = device is not None and device.type == "cuda"
        name = [backend for backend, why in reasons.items() if why is None and (on_gpu or backend != "triton")][-1]
    if name not in BACKENDS:
        raise ValueError(f"no kernel backend {name!r}; there are: auto, {', '.join(BACKENDS)}")
    if (reason := reasons[name]) is not None:
        raise ValueError(f"kernel backend {name!r} cannot be used here: {reason}")
    return BACKENDS[name].make()


def training_ops(serving: Ops) -> TrainingOps:
    """The ops for training beside these, from the same backend where it has some."""
    return CpuTrainingOps(serving) if isinstance(serving, CpuOps) else triton.training_ops(serving)


__all__ = [
    "BACKENDS",
    "QUANTISERS",
    "AdaptedTokens",
    "BFloat16Weight",
    "Backend",
    "ForwardContext",
    "ForwardLayers",
    "FusedLayers",
    "GroupedWeight",
    "Int4Weight",
    "Int8GroupWeight",
    "Int8Weight",
    "KeptLayers",
    "LayerStack",
    "LayerWeights",
    "LinearWeights",
    "LoraFactors",
    "LoraSegment",
    "LoraTable",
    "Nf4Weight",
    "Ops",
    "OutputFactors",
    "PagedContext",
    "PagedRows",
    "QuantisedWeight",
    "Quantiser",
    "Quantisers",
    "RidingTokens",
    "StackFactors",
    "Weight",
    "available",
    "chosen",
    "decode_rows",
    "describe",
    "load",
    "quantise_int4",
    "quantise_int8",
    "quantise_narrow_int8",
    "quantise_nf4",
    "store_bfloat16",
    "training_ops",
]
