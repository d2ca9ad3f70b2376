"""What the decoder's layers are made of: plain tensors plus how a checkpoint's tensors fill them.

A fused layer (query, key and value; gate and up) is filled part by part. What a layer needs to know
to be split over ranks, or to have an adapter added, belongs here, not in the decoder.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import Int4Weight, Int8GroupWeight, Int8Weight, Nf4Weight, Ops, QuantisedWeight, Quantiser, Weight, pages
from kernels.hadamard import turn
from kernels.quantised import quantise_int8, reach_of
from kernels.sharded import is_exact, split_linear
from runtime.workers.group import SOLO, Group
from runtime.workers.split import Split

Parts = Mapping[str, int | Split]
"""A weight's parts by name: the rows of each, and which of them are held here (a number: all)."""

Adapt = Callable[[Tensor, Tensor], Tensor]
"""From a linear's input and output to what an adapter makes of the output; see `adaptation.Adaptation`."""


SAMPLES = 256
"""Values of each weight that say which one it is: to look at them all would take as long as loading them."""


class WeightError(ValueError):
    """A checkpoint's tensor does not fit the layer that it names."""


class Parameter:
    """One weight tensor, made of named parts along its first dimension. Of each a rank may hold some rows, and of
    these some columns."""

    def __init__(
        self,
        parts: Parts,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *,
        columns: Split | None = None,
        group: Group = SOLO,
    ) -> None:
        """`shape` is that of one whole row (empty for a vector), `columns` what is held of it. `group` are those who
        hold the other columns."""
        self.parts = {name: Split.whole(part) if isinstance(part, int) else part for name, part in parts.items()}
        self._shape = shape
        self._columns = columns
        self._group = group
        held = shape if columns is None else (columns.size,)
        rows = sum(part.size for part in self.parts.values())
        self.data = torch.empty((rows, *held), dtype=dtype, device="meta")
        """Takes memory when the first part comes: so a weight that is quantised at once gives back its own before the
        next one comes."""
        self.quantised: QuantisedWeight | None = None
        self.stays = False
        """Whether it will be computed with as it is filled in; then it is in pages of 2 MB."""
        self._sampled: tuple[Tensor, Tensor] | None = None
        self._device = device
        self._held: dict[str, QuantisedWeight] = {}
        """Parts that came in integers, until all are there."""
        self.starts: dict[str, int] = {}
        """First row here of each part."""
        self._missing = set(self.parts)
        start = 0
        for name, part in self.parts.items():
            self.starts[name] = start
            start += part.size

    @classmethod
    def of(cls, data: Tensor) -> "Parameter":
        """A weight that is there already."""
        parameter = cls({"": len(data)}, tuple(data.shape[1:]), data.dtype, data.device)
        parameter.data = data
        parameter._missing.clear()
        return parameter

    def quantise(self, ops: Ops, quantiser: Quantiser) -> None:
        """Hold the weight [out, in] as the quantiser makes it from now on, and no longer in floating point. Ranks that
        hold columns of one weight do this together."""
        self._sampled = self.sample()
        if self._columns is not None and quantiser is quantise_int8:
            self._hold(quantise_int8(self.data, self._group.max(reach_of(turn(self.data)))), ops)
        else:
            self._hold(quantiser(self.data), ops)

    def _hold(self, weight: QuantisedWeight, ops: Ops) -> None:
        exact = self._columns is not None and isinstance(weight, Int8Weight)  # as `kernels.sharded` wants it
        self.quantised = weight if exact else ops.prepare(weight)
        self.data = torch.empty(0, dtype=self.data.dtype, device=self._device)

    @property
    def value(self) -> Weight:
        """The weight as the ops take it."""
        return self.data if self.quantised is None else self.quantised

    def fill(self, part: str, value: Weight, ops: Ops) -> None:
        """Take one whole part, of which only what is held here is read. Those in integers are kept, if all parts have
        them in one form and can be cut where ranks do, and else made float. Raises `WeightError` where it is of
        another shape, and `KeyError` for a part that there is not."""
        split = self.parts[part]
        expected = self.shape_of(part)
        if expected != value.shape:
            raise WeightError(f"expected shape {list(expected)}, got {list(value.shape)}")
        if isinstance(value, Tensor):
            self._put(part, split, value)
        elif (held := cut(value, split, self._columns)) is not None:
            self._held[part] = moved(held, self._device)
        else:
            self._put(part, split, value.dequantise())
        self._missing.discard(part)
        if self._held and not self._missing:
            self._join(ops)

    def _put(self, part: str, split: Split, value: Tensor) -> None:
        if self._columns is not None:
            value = self._columns.pick(value, 1)
        rows = self._floats()[self.starts[part] :]
        for here, there in split.pieces():
            rows[here].copy_(value[there])

    def _floats(self) -> Tensor:
        if self.data.is_meta:
            # Not `empty_like`: of a tensor on "meta" that imports sympy, most of a second.
            shape, dtype = self.data.shape, self.data.dtype
            paged = self.stays and self._device.type == "cpu"
            self.data = pages.empty(shape, dtype) if paged else torch.empty(shape, dtype=dtype, device=self._device)
        return self.data

    def _join(self, ops: Ops) -> None:
        """One weight of all parts: in integers, if all of them are in the same."""
        parts = [self._held.get(name) for name in self.parts]
        joined = join([part for part in parts if part is not None]) if None not in parts else None
        if joined is None:
            for name, part in self._held.items():
                self._floats()[self.starts[name] :][: self.parts[name].size].copy_(part.dequantise())
        else:
            self._hold(joined, ops)
        self._held.clear()

    def shape_of(self, part: str) -> torch.Size:
        """What is expected of a part: its whole shape."""
        return torch.Size((self.parts[part].full, *self._shape))

    @property
    def missing(self) -> list[str]:
        """Parts that no tensor has filled yet."""
        return sorted(self._missing)

    # -- seen as a whole -----------------------------------------------------------------------

    def sample(self) -> tuple[Tensor, Tensor]:
        """Some values of the whole weight at equal distances, as they were before it was quantised: [n] float32, 0
        where they are on other ranks, and which are here [n] bool."""
        if self._sampled is not None:
            return self._sampled
        numel = sum(part.full for part in self.parts.values()) * self._width
        index = torch.arange(0, numel, max(1, numel // SAMPLES))[:SAMPLES]
        rows = Split.joined(list(self.parts.values())).find(index // self._width)
        columns = index % self._width
        if self._columns is not None:
            columns = self._columns.find(columns)
        here = (rows >= 0) & (columns >= 0)
        found = torch.zeros(len(index))
        if here.any():
            row, column = rows[here], columns[here].unsqueeze(1)
            held = self.data.view(len(self.data), -1)[row.to(self._device)] if self.quantised is None else None
            lines = self.quantised.rows(row) if held is None and self.quantised is not None else held
            assert lines is not None
            found[here] = lines.float().cpu().gather(1, column).flatten()
        return found, here

    @property
    def _width(self) -> int:
        return self._shape[0] if self._shape else 1


JOINABLE = (Int4Weight, Int8GroupWeight, Nf4Weight)
"""Kinds of weights that checkpoints hold. All of their tensors go by output first, most by input next."""
LARGEST_GROUP = 64
"""Inputs with one scale: with a multiple of them in a row no group is filled up."""


def moved(weight: QuantisedWeight, device: torch.device) -> QuantisedWeight:
    """The same weight on another device."""
    return _with(weight, {name: tensor.to(device) for name, tensor in _tensors(weight).items()})


def cut(weight: QuantisedWeight, rows: Split, columns: Split | None) -> QuantisedWeight | None:
    """What a rank holds of a weight; None where its columns end within a group that has one scale."""
    if rows.is_whole and columns is None:
        return weight
    if not isinstance(weight, JOINABLE):
        return None
    tensors = {name: rows.pick(tensor) for name, tensor in _tensors(weight).items()}
    if columns is None:
        return _with(weight, tensors)
    if weight.shape[1] % LARGEST_GROUP:
        return None
    (inputs,) = columns.ranges
    held = {}
    for name, tensor in tensors.items():
        each = weight.shape[1] / tensor.shape[1]  # inputs of a column: a part of one, or a group of them
        first, last = inputs.start / each, inputs.stop / each
        if first != int(first) or last != int(last):
            return None
        held[name] = tensor[:, int(first) : int(last)]
    return _with(weight, {**held, "in_features": len(inputs)})


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
    """x [T, in] → [T, out], with one or more output parts fused into one weight [out, in]. Ranks that split it hold
    some of each part's outputs ("column parallel" in arXiv:1909.08053): all see the same x."""

    def __init__(
        self,
        in_features: int,
        parts: Parts,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        group: Group = SOLO,
    ) -> None:
        self.in_features = in_features
        """Of the whole."""
        self.inputs = Split.whole(in_features)
        self.group = group
        self.weight = self._weight(parts, dtype, device)
        self.bias = Parameter(parts, (), dtype, device) if bias else None

    def _weight(self, parts: Parts, dtype: torch.dtype, device: torch.device) -> Parameter:
        return Parameter(parts, (self.in_features,), dtype, device)

    @property
    def outputs(self) -> dict[str, Split]:
        """What is held of each part's outputs."""
        return self.weight.parts

    @property
    def parts(self) -> dict[str, int]:
        """Outputs of each whole part, in the order in which they lie in the weight."""
        return {name: part.full for name, part in self.outputs.items()}

    @property
    def tensors(self) -> tuple[Weight, Tensor | None]:
        """Weight and bias, as the ops take them."""
        return self.weight.value, None if self.bias is None else self.bias.data

    @property
    def parameters(self) -> dict[str, Parameter]:
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}

    def __call__(self, ops: Ops, x: Tensor, adapt: Adapt | None = None) -> Tensor:
        """x as this rank holds it."""
        x = self.group.enter(x)
        y = ops.linear(x, *self.tensors)
        return y if adapt is None else adapt(x, y)

    def add(self, ops: Ops, residual: Tensor, x: Tensor) -> Tensor:
        """residual [T, out] plus this of x."""
        return ops.linear_add(residual, x, *self.tensors)

    def lora(self, part: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """What a rank holds of an adapter's factors a [rank, in] and b [out of the part, rank]."""
        return self.inputs.pick(a, 1), self.outputs[part].pick(b)


class RowLinear(Linear):
    """A linear that ranks split by its inputs ("row parallel"): each sees its slice of x, the outputs are added up,
    and then the bias, once."""

    def __init__(
        self,
        inputs: Split,
        parts: Parts,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        group: Group = SOLO,
    ) -> None:
        self._split = inputs
        super().__init__(inputs.full, parts, bias=bias, dtype=dtype, device=device, group=group)
        self.inputs = inputs

    def _weight(self, parts: Parts, dtype: torch.dtype, device: torch.device) -> Parameter:
        columns = None if self._split.is_whole else self._split
        return Parameter(parts, (self.in_features,), dtype, device, columns=columns, group=self.group)

    def __call__(self, ops: Ops, x: Tensor, adapt: Adapt | None = None) -> Tensor:
        if self.group.size == 1:
            return super().__call__(ops, x, adapt)
        weight, bias = self.tensors
        if adapt is None:
            y = split_linear(ops, x, weight, self.group)
        elif is_exact(weight, x):
            # The first rank's share is the sum itself: where no adapter changes a row, adding zeros keeps its bits.
            y = split_linear(ops, x, weight, self.group)
            y = self.group.sum(adapt(x, y if self.group.rank == 0 else torch.zeros_like(y)))
        else:
            y = self.group.sum(adapt(x, ops.linear(x, weight)))
        return y if bias is None else y + bias

    def later(self, ops: Ops, x: Tensor, adapt: Adapt | None = None) -> Callable[[], Tensor]:
        """Begin a call; what is returned gives its result. Between the two, sums are on their way."""
        weight, bias = self.tensors
        if self.group.size == 1 or is_exact(weight, x):
            return partial(_given, self(ops, x, adapt))
        y = ops.linear(x, weight)
        arrives = self.group.sum_later(y if adapt is None else adapt(x, y))
        return arrives if bias is None else lambda: arrives() + bias

    def add(self, ops: Ops, residual: Tensor, x: Tensor) -> Tensor:
        return super().add(ops, residual, x) if self.group.size == 1 else residual + self(ops, x)


def _given(y: Tensor) -> Tensor:
    return y


class Embedding:
    """Token ids [T] → [T, hidden]; tied models use the same weight [vocab, hidden] for their logits. Ranks that split
    it hold some of the rows each, as `split` says."""

    def __init__(
        self,
        split: Split,
        hidden: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        group: Group = SOLO,
    ) -> None:
        self._split = split
        self._group = group
        self.weight = Parameter({"": split}, (hidden,), dtype, device)

    def __call__(self, token_ids: Tensor) -> Tensor:
        if self._split.is_whole:
            return self._rows(token_ids)
        index = self._split.find(token_ids)
        here = (index >= 0).unsqueeze(1)
        return self._group.sum(self._rows(index.clamp(min=0)).where(here, 0.0))

    def _rows(self, index: Tensor) -> Tensor:
        if self.weight.quantised is not None:
            return self.weight.quantised.rows(index)
        return torch.nn.functional.embedding(index, self.weight.data)
