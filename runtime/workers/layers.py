"""What the decoder's layers are made of: plain tensors plus how a checkpoint's tensors fill them.

A fused layer (query, key and value; gate and up) is filled part by part. What a layer needs to know
to be split over ranks, or to have an adapter added, belongs here, not in the decoder.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels import Int4Weight, Int8GroupWeight, Int8Weight, Nf4Weight, Ops, QuantisedWeight, Quantiser, Weight


class WeightError(ValueError):
    """A checkpoint's tensor does not fit the layer that it names."""


class Parameter:
    """One weight tensor, made of named parts along its first dimension."""

    def __init__(self, parts: dict[str, int], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """`parts` maps a name to its rows; `shape` is that of one row (empty for a vector)."""
        self.data = torch.empty((sum(parts.values()), *shape), dtype=dtype, device="meta")
        """Takes memory when the first part comes: so a weight that is quantised at once gives back its own before the
        next one comes."""
        self.quantised: QuantisedWeight | None = None
        self._device = device
        self._held: dict[str, QuantisedWeight] = {}
        """Parts that came in integers, until all are there."""
        self._slices: dict[str, slice] = {}
        self._missing = set(parts)
        start = 0
        for name, rows in parts.items():
            self._slices[name] = slice(start, start + rows)
            start += rows

    @classmethod
    def of(cls, data: Tensor) -> "Parameter":
        """A weight that is there already."""
        parameter = cls({"": len(data)}, tuple(data.shape[1:]), data.dtype, torch.device("meta"))
        parameter.data = data
        parameter._missing.clear()
        return parameter

    def quantise(self, ops: Ops, quantiser: Quantiser) -> None:
        """Hold the weight [out, in] as the quantiser makes it from now on, and no longer in floating point."""
        self.quantised = ops.prepare(quantiser(self.data))
        self.data = self.data.new_empty(0)

    @property
    def value(self) -> Weight:
        """The weight as the ops take it."""
        return self.data if self.quantised is None else self.quantised

    def fill(self, part: str, value: Weight, ops: Ops) -> None:
        """Take one part. Those in integers are kept, if all parts have them in one form, and else made float. Raises
        `WeightError` where it is of another shape, and `KeyError` for a part that there is not."""
        place = self._slices[part]
        shape = self.data[place].shape
        if shape != value.shape:
            raise WeightError(f"expected shape {list(shape)}, got {list(value.shape)}")
        if isinstance(value, QuantisedWeight):
            self._held[part] = moved(value, self._device)
        else:
            self._floats()[place].copy_(value)
        self._missing.discard(part)
        if self._held and not self._missing:
            self._join(ops)

    def _floats(self) -> Tensor:
        if self.data.is_meta:
            self.data = torch.empty_like(self.data, device=self._device)
        return self.data

    def _join(self, ops: Ops) -> None:
        """One weight of all parts: in integers, if all of them are in the same."""
        parts = [self._held.get(name) for name in self._slices]
        joined = join([part for part in parts if part is not None]) if None not in parts else None
        if joined is None:
            for name, part in self._held.items():
                self._floats()[self._slices[name]].copy_(part.dequantise())
        else:
            self.quantised, self.data = ops.prepare(joined), torch.empty(0, dtype=self.data.dtype, device=self._device)
        self._held.clear()

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self._slices)

    def shape_of(self, part: str) -> torch.Size:
        """What is expected of a part, as long as the weight is not in integers."""
        return self.data[self._slices[part]].shape

    @property
    def missing(self) -> list[str]:
        """Parts that no tensor has filled yet."""
        return sorted(self._missing)


JOINABLE = (Int4Weight, Int8GroupWeight, Int8Weight, Nf4Weight)
"""Kinds of weights that checkpoints hold. All of their tensors go by output first."""


def moved(weight: QuantisedWeight, device: torch.device) -> QuantisedWeight:
    """The same weight on another device."""
    return _with(weight, {name: tensor.to(device) for name, tensor in _tensors(weight).items()})


def join(weights: list[QuantisedWeight]) -> QuantisedWeight | None:
    """Weights of the same inputs, the outputs of one after those of another; None where they are of different kinds."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if not isinstance(first, JOINABLE) or any(type(weight) is not type(first) for weight in weights):
        return None
    parts = [_tensors(weight) for weight in weights]
    return _with(first, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _tensors(weight: QuantisedWeight) -> dict[str, Tensor]:
    return {name: value for name, value in vars(weight).items() if isinstance(value, Tensor)}


def _with(weight: QuantisedWeight, tensors: dict[str, Any]) -> QuantisedWeight:
    made: Any = weight  # all of them are dataclasses
    changed: QuantisedWeight = replace(made, **tensors)
    return changed


class Linear:
    """x [T, in] → [T, out], with one or more output parts fused into one weight [out, in]."""

    def __init__(
        self,
        in_features: int,
        parts: dict[str, int],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.in_features = in_features
        self.parts = parts
        """Output rows of each part, in the order in which they lie in the weight."""
        self.weight = Parameter(parts, (in_features,), dtype, device)
        self.bias = Parameter(parts, (), dtype, device) if bias else None

    @property
    def tensors(self) -> tuple[Weight, Tensor | None]:
        """Weight and bias, as the ops take them."""
        return self.weight.value, None if self.bias is None else self.bias.data

    @property
    def parameters(self) -> dict[str, Parameter]:
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}

    def __call__(self, ops: Ops, x: Tensor) -> Tensor:
        return ops.linear(x, *self.tensors)


class Embedding:
    """Token ids [T] → [T, hidden]; tied models use the same weight [vocab, hidden] for their logits."""

    def __init__(self, vocab: int, hidden: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = Parameter({"": vocab}, (hidden,), dtype, device)

    def __call__(self, token_ids: Tensor) -> Tensor:
        if self.weight.quantised is not None:
            return self.weight.quantised.rows(token_ids)
        return torch.nn.functional.embedding(token_ids, self.weight.data)
