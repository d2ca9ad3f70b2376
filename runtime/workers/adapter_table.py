"""Loaded adapters by number, at addresses that kernels find on the device: what recorded steps apply.

A recorded launch cannot be given other tensors later. So it reads the addresses of factors from one tensor that stays
in its place; loading and unloading an adapter changes numbers in it, in the order of the device's stream.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kernels import LoraFactors, LoraTable, Ops, StackFactors
from runtime.model.lora import Adaptation
from runtime.model.model import Model

BASE = 0
"""Number of the base model."""
FIRST_CAPACITY = 8
"""Numbers in the first table, the base's included."""

LayerLinear = tuple[int, str]
"""Index of a layer and name of one of its linears."""


class AdapterTable:
    """The numbers of loaded adapters, and for each linear that one of them changes a `LoraTable`."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._parts = max(len(linear.parts) for layer in model.layers for linear in layer.linears.values())
        self._numbers: dict[str, int] = {}
        self._held: list[StackFactors | None] = [None] * FIRST_CAPACITY
        self._places: tuple[LayerLinear, ...] = ()
        self._host = np.zeros((0, FIRST_CAPACITY, 3 + 5 * self._parts), dtype=np.int64)
        self._entries = torch.empty(0)
        self._limits = (0, 0, 0)
        """Largest rank of an A, largest rank of a part, and most outputs of a part."""
        self.generation = 0
        """Changes where what was recorded before can no longer be replayed: for a further linear, or a larger rank."""

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, key: str) -> int | None:
        """Number of an adapter, `BASE` for an empty key; None for one that is not in the table."""
        return BASE if not key else self._numbers.get(key)

    def add(self, key: str, factors: StackFactors) -> None:
        """Take in an adapter that is loaded. One that changes outputs by factors (DoRA), or whose factors are of
        another type than the model's, is left out."""
        if factors.factors or not all(map(self._readable, factors.places.values())):
            return
        number = next((n for n, held in enumerate(self._held) if n != BASE and held is None), len(self._held))
        places = tuple(dict.fromkeys((*self._places, *factors.places)))
        limits = self._limits_with(factors)
        self._numbers[key] = number
        if number == len(self._held):
            self._held += [None] * len(self._held)
        self._held[number] = factors
        if (places, limits, len(self._held)) == (self._places, self._limits, self._host.shape[1]):
            self._write(number)
        else:
            self._places, self._limits = places, limits
            self._rebuild()

    def remove(self, key: str) -> None:
        """Drop an adapter. What is in flight still finds its factors: their memory is used again after it."""
        if (number := self._numbers.pop(key, None)) is not None:
            self._held[number] = None
            self._write(number)

    def adaptation(self, numbers: Tensor) -> "TableAdaptation":
        """Change to the decoder for tokens whose adapters have these numbers [T] int64, which only the device reads."""
        tables = {place: self._table(index, place) for index, place in enumerate(self._places)}
        return TableAdaptation(self._model.ops, tables, numbers)

    def _table(self, index: int, place: LayerLinear) -> LoraTable:
        rank, part_rank, widest = self._limits
        held = tuple(None if one is None else one.places.get(place) for one in self._held)
        return LoraTable(self._entries[index], self._parts, rank, part_rank, widest, held)

    def _readable(self, factors: LoraFactors) -> bool:
        tensors = (factors.a, factors.scales, *factors.b)
        return all(one.dtype is self._model.dtype and one.is_contiguous() for one in tensors)

    def _limits_with(self, factors: StackFactors) -> tuple[int, int, int]:
        found = [
            (len(one.a), max(b.shape[1] for b in one.b), max(len(b) for b in one.b)) for one in factors.places.values()
        ]
        rank, part_rank, widest = (max(sizes) for sizes in zip(self._limits, *found, strict=True))
        return rank, part_rank, widest

    def _rebuild(self) -> None:
        """Allocate the table anew for other places, limits or numbers."""
        self.generation += 1
        self._host = np.zeros((len(self._places), len(self._held), 3 + 5 * self._parts), dtype=np.int64)
        for number, held in enumerate(self._held):
            if held is not None:
                self._fill(number, held)
        self._entries = torch.from_numpy(self._host.copy()).to(self._model.device)

    def _write(self, number: int) -> None:
        self._host[:, number] = 0
        if (held := self._held[number]) is not None:
            self._fill(number, held)
        self._entries[:, number] = torch.from_numpy(self._host[:, number].copy()).to(self._model.device)

    def _fill(self, number: int, held: StackFactors) -> None:
        for index, place in enumerate(self._places):
            if (factors := held.places.get(place)) is not None:
                entry = entry_of(factors)
                self._host[index, number, : len(entry)] = entry


def entry_of(factors: LoraFactors) -> list[int]:
    """The numbers of one adapter in `LoraTable.entries`."""
    entry = [factors.a.data_ptr(), factors.scales.data_ptr(), len(factors.a)]
    first = 0
    for b, column in zip(factors.b, factors.columns, strict=True):
        out, rank = b.shape
        entry += [b.data_ptr(), rank, first, out, column]
        first += rank
    return entry


class TableAdaptation(Adaptation):
    """Each token's own adapter, by its number on the device."""

    def __init__(self, ops: Ops, tables: Mapping[LayerLinear, LoraTable], numbers: Tensor) -> None:
        self._ops = ops
        self._tables = tables
        self._numbers = numbers

    def __call__(self, layer: int, linear: str, x: Tensor, y: Tensor, base: Tensor | None = None) -> Tensor:
        table = self._tables.get((layer, linear))
        return y if table is None else self._ops.lora_apply_table(x, y, table, self._numbers)
