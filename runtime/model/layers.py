"""Building blocks of the decoder's layers: plain tensors, and their filling from a checkpoint's tensors.

A fused layer (query, key and value; gate and up) is filled part by part. The data for splitting a layer over ranks, or
for adding an adapter, belongs here, not in the decoder.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels import Int4Weight, Int8GroupWeight, Int8Weight, Nf4Weight, Ops, QuantisedWeight, Quantiser, Weight, pages
from kernels.hadamard import turn
from kernels.quantised import quantise_int8, reach_of
from kernels.sharded import is_exact, split_linear
from runtime.model.group import SOLO, Group
from runtime.model.split import Split

Parts = Mapping[str, int | Split]
"""A weight's parts by name: the number of rows, all held here, or a `Split` with the rows that are held here."""


class Adapt(Protocol):
    """The change that adapters make to one linear; see `runtime.model.lora.Adaptation`."""

    @property
    def rescales(self) -> bool:
        """True if it needs the linear's output apart from a residual stream."""

    def __call__(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """From the linear's input, its output, to which a residual stream may have been added, and its output alone, to
        the adapted output."""


SAMPLES = 256
"""Number of values of each weight in its fingerprint: reading all values would take as long as loading them."""


class WeightError(ValueError):
    """A checkpoint's tensor does not fit the layer that it names."""


class Parameter:
    """One weight tensor, made of named parts along its first dimension. A rank may hold some rows of each part, and
    some columns of these."""

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
        """Describe the weight, without memory. `shape` is that of one whole row (empty for a vector), `columns` the
        part of it that is held. The other ranks of `group` hold the other columns."""
        self.parts = {name: Split.whole(part) if isinstance(part, int) else part for name, part in parts.items()}
        self._shape = shape
        self._columns = columns
        self._group = group
        held = shape if columns is None else (columns.size,)
        rows = sum(part.size for part in self.parts.values())
        self.data = torch.empty((rows, *held), dtype=dtype, device="meta")
        """Allocated when the first part is filled: a weight that is quantised at once frees its memory before the next
        one is allocated."""
        self.quantised: QuantisedWeight | None = None
        self.stays = False
        """True if the weight is used in the form in which it is filled; then it is in pages of 2 MB."""
        self._sampled: tuple[Tensor, Tensor] | None = None
        self._device = device
        self._held: dict[str, QuantisedWeight] = {}
        """Parts filled in integers, kept until all parts are filled."""
        self.starts: dict[str, int] = {}
        """First row of each part in `data`."""
        self._missing = set(self.parts)
        start = 0
        for name, part in self.parts.items():
            self.starts[name] = start
            start += part.size

    @classmethod
    def of(cls, data: Tensor) -> "Parameter":
        """A parameter of an existing tensor."""
        parameter = cls({"": len(data)}, tuple(data.shape[1:]), data.dtype, data.device)
        parameter.data = data
        parameter._missing.clear()
        return parameter

    def quantise(self, ops: Ops, quantiser: Quantiser) -> QuantisedWeight:
        """Replace the weight [out, in] in floating point by the quantiser's result, and return that. Ranks that hold
        columns of one weight call this together."""
        self._sampled = self.sample()
        if self._columns is not None and quantiser is quantise_int8:
            weight: QuantisedWeight = quantise_int8(self.data, self._group.max(reach_of(turn(self.data))))
        else:
            weight = quantiser(self.data)
        self._hold(weight, ops)
        return weight

    def restore(self, weight: Weight, sample: tuple[Tensor, Tensor] | None, ops: Ops) -> None:
        """Fill the whole weight at once, with the result of `quantise` and the `sample` from before it, or in floating
        point. Raises `WeightError` for a wrong shape."""
        expected = (self.data.shape[0], *self.data.shape[1:])
        if tuple(weight.shape) != expected:
            raise WeightError(f"expected shape {list(expected)}, got {list(weight.shape)}")
        if isinstance(weight, Tensor):
            self._floats().copy_(weight)
        else:
            self._sampled = sample
            self._hold(weight, ops)
        self._missing.clear()

    def _hold(self, weight: QuantisedWeight, ops: Ops) -> None:
        exact = self._columns is not None and isinstance(weight, Int8Weight)  # as `kernels.sharded` requires
        self.quantised = weight if exact else ops.prepare(weight)
        self.data = torch.empty(0, dtype=self.data.dtype, device=self._device)

    @property
    def value(self) -> Weight:
        """The weight as the ops take it."""
        return self.data if self.quantised is None else self.quantised

    @property
    def num_bytes(self) -> int:
        """Bytes of what is held here."""
        return self.data.nbytes if self.quantised is None else self.quantised.num_bytes

    def fill(self, part: str, value: Weight, ops: Ops) -> None:
        """Fill one part from its whole tensor, of which only the share of this rank is read. Integers are kept if all
        parts have one form and can be cut at the ranks' borders; else they become floats. Raises `WeightError` for a
        wrong shape, and `KeyError` for an unknown part."""
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
        """Join all parts into one weight: in integers, if all parts have the same form."""
        parts = [self._held.get(name) for name in self.parts]
        joined = join([part for part in parts if part is not None]) if None not in parts else None
        if joined is None:
            for name, part in self._held.items():
                self._floats()[self.starts[name] :][: self.parts[name].size].copy_(part.dequantise())
        else:
            self._hold(joined, ops)
        self._held.clear()

    def shape_of(self, part: str) -> torch.Size:
        """Expected shape of a part's whole tensor."""
        return torch.Size((self.parts[part].full, *self._shape))

    def rows(self, first: int, last: int) -> Tensor:
        """Held rows from `first` to `last` of a matrix, float32."""
        if self.quantised is not None:
            return self.quantised.rows(torch.arange(first, last, device=self._device))
        return self.data[first:last].float()

    @property
    def missing(self) -> list[str]:
        """Parts that no tensor has filled yet."""
        return sorted(self._missing)

    # -- seen as a whole -----------------------------------------------------------------------

    def sample(self) -> tuple[Tensor, Tensor]:
        """Some values of the whole weight at equal distances, from before it was quantised: [n] float32, 0 for values
        of other ranks, and a mask [n] bool of the values that are held here."""
        if self._sampled is not None:
            return self._sampled
        index = torch.arange(0, self.num_values, max(1, self.num_values // SAMPLES))[:SAMPLES]
        rows = Split.joined(list(self.parts.values())).find(index // self._width)
        columns = index % self._width
        if self._columns is not None:
            columns = self._columns.find(columns)
        here = (rows >= 0) & (columns >= 0)
        found = torch.zeros(len(index))
        if here.any():
            row, column = rows[here], columns[here]
            if self.quantised is None:
                values = self.data.view(len(self.data), -1)[row.to(self._device), column.to(self._device)]
            else:
                values = self.quantised.rows(row).gather(1, column.unsqueeze(1)).flatten()
            found[here] = values.float().cpu()
        return found, here

    @property
    def num_values(self) -> int:
        """Values of the whole weight, on all ranks."""
        return sum(part.full for part in self.parts.values()) * self._width

    @property
    def _width(self) -> int:
        return self._shape[0] if self._shape else 1


JOINABLE = (Int4Weight, Int8GroupWeight, Nf4Weight)
"""Kinds of weights that checkpoints hold. The first dimension of all of their tensors is the output, the next of most
the input."""
LARGEST_GROUP = 64
"""Largest number of inputs that share a scale: with a multiple of it in a row no group is padded."""


def moved(weight: QuantisedWeight, device: torch.device) -> QuantisedWeight:
    """The same weight on another device."""
    return _with(weight, {name: tensor.to(device) for name, tensor in _tensors(weight).items()})


def cut(weight: QuantisedWeight, rows: Split, columns: Split | None) -> QuantisedWeight | None:
    """A rank's share of a weight; None where its columns end within a group that has one scale."""
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
    """Concatenate weights of the same inputs along their outputs; None where they are of different kinds."""
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
    some of each part's outputs ("column parallel" in arXiv:1909.08053): all get the same x."""

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
        """Inputs of the whole linear."""
        self.inputs = Split.whole(in_features)
        self.group = group
        self.weight = self._weight(parts, dtype, device)
        self.bias = Parameter(parts, (), dtype, device) if bias else None

    def _weight(self, parts: Parts, dtype: torch.dtype, device: torch.device) -> Parameter:
        return Parameter(parts, (self.in_features,), dtype, device)

    @property
    def outputs(self) -> dict[str, Split]:
        """The held outputs of each part."""
        return self.weight.parts

    @property
    def parts(self) -> dict[str, int]:
        """Number of outputs of each whole part, in the order of the weight's rows."""
        return {name: part.full for name, part in self.outputs.items()}

    @property
    def tensors(self) -> tuple[Weight, Tensor | None]:
        """Weight and bias, as the ops take them."""
        return self.weight.value, None if self.bias is None else self.bias.data

    @property
    def adapted_bias(self) -> Tensor | None:
        """The bias [out] in the outputs that `Adapt` gets."""
        return None if self.bias is None else self.bias.data

    @property
    def parameters(self) -> dict[str, Parameter]:
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}

    def __call__(self, ops: Ops, x: Tensor, adapt: Adapt | None = None) -> Tensor:
        """x, as this rank holds it → y, this rank's outputs; `adapt` changes y."""
        x = self.group.copy_to_tp(x)
        y = ops.linear(x, *self.tensors)
        return y if adapt is None else adapt(x, y, y)

    def residual_add(self, ops: Ops, residual: Tensor, x: Tensor, adapt: Adapt | None = None) -> Tensor:
        """residual [T, out] plus the linear's output for x; `adapt` changes the sum, since what adapters do is add."""
        if adapt is not None and adapt.rescales:
            base = ops.linear(x, *self.tensors)
            return adapt(x, residual + base, base)
        y = ops.linear_add(residual, x, *self.tensors)
        return y if adapt is None else adapt(x, y, y)

    @property
    def fuses_norm(self) -> bool:
        """True if the linear and the norm before it may be one op. With several ranks, gradients are reduced between
        the two."""
        return self.group.size == 1 or not torch.is_grad_enabled()

    def lora(self, part: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's share of an adapter's factors a [rank, in] and b [out of the part, rank]."""
        return self.inputs.pick(a, 1), self.outputs[part].pick(b)


class RowLinear(Linear):
    """A linear that ranks split by its inputs ("row parallel"): each gets its slice of x. The outputs are summed, and
    the bias is added once."""

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

    @property
    def adapted_bias(self) -> Tensor | None:
        return super().adapted_bias if self.group.size == 1 else None

    def __call__(self, ops: Ops, x: Tensor, adapt: Adapt | None = None) -> Tensor:
        return self.begin(ops, x, adapt)()

    def begin(self, ops: Ops, x: Tensor, adapt: Adapt | None = None) -> Callable[[], Tensor]:
        """Begin a call; calling the result returns its output. The all-reduce runs in between, unless the ranks add
        integers."""
        if self.group.size == 1:
            return partial(_given, super().__call__(ops, x, adapt))
        weight, bias = self.tensors
        if is_exact(ops, weight, x):
            y = split_linear(ops, x, weight, self.group)
            if adapt is not None:
                # The first rank's share is the sum itself: where no adapter changes a row, adding zeros keeps its bits.
                share = y if self.group.rank == 0 else torch.zeros_like(y)
                y = self.group.sum(adapt(x, share, share))
            arrives: Callable[[], Tensor] = partial(_given, y)
        else:
            y = ops.linear(x, weight)
            arrives = self.group.sum_later(y if adapt is None else adapt(x, y, y))
        return arrives if bias is None else lambda: arrives() + bias

    def residual_add(self, ops: Ops, residual: Tensor, x: Tensor, adapt: Adapt | None = None) -> Tensor:
        return self.begin_residual_add(ops, residual, x, adapt)()

    def begin_residual_add(
        self, ops: Ops, residual: Tensor, x: Tensor, adapt: Adapt | None = None
    ) -> Callable[[], Tensor]:
        """Begin `residual_add`, as `begin`."""
        if self.group.size == 1:
            return partial(_given, super().residual_add(ops, residual, x, adapt))
        arrives = self.begin(ops, x, adapt)
        return lambda: residual + arrives()


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
