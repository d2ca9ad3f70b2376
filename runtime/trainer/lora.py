"""The adapter that is being trained: its parameters, and their effect on the decoder's linears.

LoRA (arXiv:2106.09685) as PEFT has it: A starts uniform, B at zero, dropout before A. One difference: the parts of
a fused linear (query, key and value; gate and up) share a dropout mask, since they share their input. PiSSA and OLoRA
begin with a part of the weight itself and train beside the rest: the base is shared here and does not change, so the
product of the first factors is taken off.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kernels import Ops
from kernels.training import dropout_mask
from runtime.model.dora import row_norms
from runtime.model.layers import Linear
from runtime.model.lora import Adaptation, Adapter, LoraLayers, LoraPart, LoraShape
from runtime.model.lora_base import LoraBase
from runtime.model.model import Model
from runtime.model.split import Split
from runtime.model.token_rows import Embed, embed_with
from runtime.model.vocabulary import RowTargets
from runtime.trainer.dora import add_dora
from runtime.trainer.shards import Held, Shards
from runtime.trainer.token_rows import TrainableVocabulary, rows_of

Targets = Mapping[tuple[int, str], Sequence[str]]
"""(layer index, linear name) → the linear's parts that are trained, in the linear's own order."""

PartSizes = Mapping[tuple[int, str, str], tuple[int, float]]
"""(layer index, linear name, part) → rank and scale of a part, where patterns give it its own; others have the
shape's."""

StartUse = Literal["none", "subtracted", "reference"]
"""Use of a copy of the weights that the adapter begins with: to train beside the base less their product, as PiSSA and
OLoRA do, or as the reference of a loss."""

START = "start/"
"""Prefix of the names of that copy in a capture."""


@dataclass(frozen=True, eq=False)
class AdaptedLinear:
    """The parameters of one linear, as far as this rank holds them. Float32 for any type of the base."""

    linear: Linear
    parts: tuple[str, ...]
    columns: tuple[slice, ...]
    """Columns of each part in the linear's output."""
    scales: tuple[float, ...]
    """Factor of each part's product."""
    a: Tensor
    """[sum of the parts' ranks, in]: the parts' A matrices, one above the other, since all of them see the same
    input."""
    b: tuple[Tensor, ...]
    """[out of the part, its rank] each."""
    m: tuple[Tensor, ...]
    """[out of the part] each: magnitudes (DoRA); empty without."""
    inputs: Split
    """Columns of the whole A that this rank holds."""
    outputs: tuple[Split, ...]
    """Rows of each whole B that this rank holds."""

    def named(self, layer: int, name: str) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by a stable name; `name` is that of the linear."""
        yield f"{layer}.{name}.a", self.a
        for kind, tensors in (("b", self.b), ("m", self.m)):
            if tensors:
                yield from ((f"{layer}.{name}.{kind}.{part}", t) for part, t in zip(self.parts, tensors, strict=True))

    def held(self, layer: int, name: str) -> Iterator[tuple[str, Held]]:
        """The share of each of `named` that this rank holds."""
        for key, tensor in self.named(layer, name):
            if tensor is self.a:
                yield key, Held(self.inputs, 1)
            else:
                yield key, Held(self.outputs[self.parts.index(key.rpartition(".")[2])], 0, tensor.ndim)

    def copy(self) -> "AdaptedLinear":
        """The same with copies of the tensors, which are not trained."""
        b, m = ([tensor.detach().clone() for tensor in tensors] for tensors in (self.b, self.m))
        return replace(self, a=self.a.detach().clone(), b=tuple(b), m=tuple(m))


Linears = dict[tuple[int, str], AdaptedLinear]


class LoraWeights:
    """Weights of one adapter as training applies them, trained or not."""

    vocabulary: TrainableVocabulary | None = None
    """Rows of embedding and head; None where none are trained."""

    def __init__(self, linears: Linears) -> None:
        self.linears = linears
        self._norms: dict[tuple[int, str], list[Tensor]] = {}

    def norms(self, layer: int, name: str) -> list[Tensor]:
        """`row_norms` of each part of a linear. Computed once for as long as the weights do not change (`changed`)."""
        found = self._norms.get((layer, name))
        if found is None:
            found = self._norms[layer, name] = _norms(self.linears[layer, name])
        return found

    def changed(self) -> None:
        """Note that the weights are other ones now."""
        self._norms.clear()


class TrainableLora(LoraWeights):
    """All parameters of one adapter."""

    def __init__(
        self,
        decoder: Model,
        targets: Targets,
        shape: LoraShape,
        *,
        seed: int,
        sizes: PartSizes | None = None,
        rows: RowTargets | None = None,
        initial: str = "uniform",
        start: StartUse = "none",
    ) -> None:
        """Fresh parameters on the decoder's device; the same seed gives the same ones. All ranks at once."""
        super().__init__({})
        self.shape = shape
        self._sizes = sizes
        self.vocabulary = TrainableVocabulary(decoder, rows, seed=seed) if rows is not None and rows.kinds else None
        generator = torch.Generator().manual_seed(seed)
        for (layer, name), parts in targets.items():
            linear = decoder.layers[layer].linears[name]
            own = _sizes_of_parts((layer, name), parts, shape, sizes)
            self.linears[layer, name] = _fresh(linear, parts, own, generator, decoder.device, initial)
        if shape.dora:
            for place, adapted in self.linears.items():
                m = tuple(norms.requires_grad_() for norms in _norms(adapted))
                self.linears[place] = replace(adapted, m=m)
        self._use = start
        self._start = None if start == "none" else LoraWeights(_copies(self.linears))
        self.shards = Shards(decoder.group, self._held(), decoder.device)
        """The part of each parameter that this rank holds."""

    @property
    def reference(self) -> LoraWeights | None:
        """The weights under which a loss with a reference computes it; None: the base without an adapter."""
        return self._start if self._use == "reference" else None

    @property
    def subtracted(self) -> LoraWeights | None:
        """The weights whose product is taken off the base's."""
        return self._start if self._use == "subtracted" else None

    @property
    def is_plain(self) -> bool:
        """True if all that it does to a linear is to add the product of its factors."""
        return self.subtracted is None and not any(linear.m for linear in self.linears.values())

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained tensor by a stable name, layer by layer."""
        for (layer, name), linear in self.linears.items():
            yield from linear.named(layer, name)
        if self.vocabulary is not None:
            yield from self.vocabulary.parameters()

    def _kept(self) -> dict[str, Tensor]:
        """The start's tensors by name."""
        linears = {} if self._start is None else self._start.linears
        return {START + key: t for (layer, name), one in linears.items() for key, t in one.named(layer, name)}

    def _held(self) -> dict[str, Held]:
        held = {key: h for (layer, name), one in self.linears.items() for key, h in one.held(layer, name)}
        for name, values in self._rows().items():
            held[name] = Held(Split.whole(len(values)), 0)
        return held | {key: held[key.removeprefix(START)] for key in self._kept()}

    def _rows(self) -> dict[str, Tensor]:
        """The trained rows of embedding and head by name."""
        return {} if self.vocabulary is None else dict(self.vocabulary.parameters())

    def capture(self) -> dict[str, Tensor]:
        """A copy of every whole parameter, and of the start where it is used, on the CPU. All ranks at once."""
        own = {name: parameter.detach() for name, parameter in self.parameters()}
        return self.shards.gather(own | self._kept())

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of an earlier `capture`, or those to begin with: where the start is used, these are it.
        Raises `ValueError` where they are another adapter's."""
        own, shards, kept = dict(self.parameters()), self.shards, self._kept()
        first = {name: tensors[name.removeprefix(START)] for name in kept if name.removeprefix(START) in tensors}
        given, own = {**first, **tensors}, own | kept
        if not given.keys() & self._rows().keys():  # first weights have none: rows begin as they are
            own = {name: parameter for name, parameter in own.items() if name not in self._rows()}
        if own.keys() != given.keys() or any(shards.shape(name, own[name]) != given[name].shape for name in own):
            raise ValueError("these are the weights of an adapter of another shape")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(shards.pick(name, given[name]))
        self.changed()
        if self._start is not None:
            self._start.changed()

    def layers_of(self, captured: Mapping[str, Tensor]) -> LoraLayers:
        """The result of `capture` as an adapter to serve or to write."""
        targets = {place: linear.parts for place, linear in self.linears.items()}
        return layers_of(captured, targets, self.shape, self._sizes, subtracted=self._use == "subtracted")


def sizes_of(targets: Targets, shape: LoraShape, base: LoraBase) -> PartSizes:
    """Ranks and scales by the patterns of a shape; empty where it has none. Raises `PatternInvalid`."""
    if not (shape.rank_pattern or shape.alpha_pattern):
        return {}
    places = [(layer, name, part) for (layer, name), parts in targets.items() for part in parts]
    return {place: shape.at(base.module(*place)) for place in places}


def _sizes_of_parts(
    linear: tuple[int, str], parts: Sequence[str], shape: LoraShape, sizes: PartSizes | None
) -> list[tuple[int, float]]:
    whole = shape.rank, shape.scale(shape.rank, shape.alpha)
    return [(sizes or {}).get((*linear, part), whole) for part in parts]


def adapter_of(
    captured: Mapping[str, Tensor],
    targets: Targets,
    shape: LoraShape,
    rows: RowTargets | None = None,
    sizes: PartSizes | None = None,
    *,
    subtracted: bool = False,
) -> Adapter:
    """The result of `TrainableLora.capture` for these targets and rows, as an adapter to serve or to write.
    `subtracted`: see `layers_of`."""
    layers = layers_of(captured, targets, shape, sizes, subtracted=subtracted)
    return Adapter(
        shape.doubled() if subtracted else shape,
        layers,
        rows_of(captured, rows) if rows is not None and rows.kinds else None,
    )


def layers_of(
    captured: Mapping[str, Tensor],
    targets: Targets,
    shape: LoraShape,
    sizes: PartSizes | None = None,
    *,
    subtracted: bool = False,
) -> LoraLayers:
    """The result of `TrainableLora.capture` for these targets, as an adapter to serve or to write. `subtracted`: with
    twice the rank, since the product that it began with is taken off, as PEFT converts PiSSA and OLoRA."""

    def parts_of(layer: int, name: str, parts: Sequence[str]) -> Iterator[LoraPart]:
        own = _sizes_of_parts((layer, name), parts, shape, sizes)
        ranks = [rank for rank, _ in own]
        pieces = torch.split(captured[f"{layer}.{name}.a"], ranks)
        before = torch.split(captured[f"{START}{layer}.{name}.a"], ranks) if subtracted else pieces
        for part, a, before_a, (_, scale) in zip(parts, pieces, before, own, strict=True):
            b = captured[f"{layer}.{name}.b.{part}"]
            if subtracted:
                a, b = torch.cat([a, before_a]), torch.cat([b, -captured[f"{START}{layer}.{name}.b.{part}"]], dim=1)
            yield LoraPart(part, a, b, scale, captured.get(f"{layer}.{name}.m.{part}"))

    return {(layer, name): list(parts_of(layer, name, parts)) for (layer, name), parts in targets.items()}


def parameters_of(layers: LoraLayers) -> dict[str, Tensor]:
    """An adapter's weights by the names of the parameters: what `layers_of` gives, the other way round."""
    found: dict[str, Tensor] = {}
    for (layer, name), parts in layers.items():
        found[f"{layer}.{name}.a"] = torch.cat([part.a for part in parts])
        for part in parts:
            found[f"{layer}.{name}.b.{part.part}"] = part.b
            if part.magnitude is not None:
                found[f"{layer}.{name}.m.{part.part}"] = part.magnitude
    return found


def _copies(linears: Linears) -> Linears:
    return {place: linear.copy() for place, linear in linears.items()}


@torch.no_grad()
def _norms(adapted: AdaptedLinear) -> list[Tensor]:
    pieces = zip(adapted.parts, pieces_of(adapted.a, adapted.b), adapted.b, adapted.scales, strict=True)
    return [row_norms(adapted.linear, part, a, b, scale) for part, a, b, scale in pieces]


def _fresh(
    linear: Linear,
    parts: Sequence[str],
    sizes: Sequence[tuple[int, float]],
    generator: torch.Generator,
    device: torch.device,
    initial: str,
) -> AdaptedLinear:
    # Drawn as a whole on every rank, so that any number of ranks begins with the same.
    starts, outputs = linear.weight.starts, [linear.outputs[part] for part in parts]
    shapes = [(held.full, rank) for held, (rank, _) in zip(outputs, sizes, strict=True)]
    a, b = _drawn(initial, linear.in_features, shapes, generator)
    places = zip((starts[part] for part in parts), outputs, strict=True)
    return AdaptedLinear(
        linear=linear,
        parts=tuple(parts),
        columns=tuple(slice(start, start + held.size) for start, held in places),
        scales=tuple(scale for _, scale in sizes),
        a=linear.inputs.pick(a, 1).to(device, copy=True).contiguous().requires_grad_(),
        b=tuple(
            held.pick(one).to(device, copy=True).contiguous().requires_grad_()
            for held, one in zip(outputs, b, strict=True)
        ),
        m=(),
        inputs=linear.inputs,
        outputs=tuple(outputs),
    )


def initial_layers(targets: Targets, base: LoraBase, shape: LoraShape, *, seed: int) -> LoraLayers:
    """The adapter that a fresh `TrainableLora` with the same arguments is, to write where no decoder is."""
    generator = torch.Generator().manual_seed(seed)
    features = {(one.linear, one.part): (one.in_features, one.out_features) for one in base.targets.values()}
    sizes = sizes_of(targets, shape, base)
    captured: dict[str, Tensor] = {}
    for (layer, name), parts in targets.items():
        own = _sizes_of_parts((layer, name), parts, shape, sizes)
        shapes = [(features[name, part][1], rank) for part, (rank, _) in zip(parts, own, strict=True)]
        captured[f"{layer}.{name}.a"], drawn = _drawn("uniform", features[name, parts[0]][0], shapes, generator)
        captured |= {f"{layer}.{name}.b.{part}": b for part, b in zip(parts, drawn, strict=True)}
    return layers_of(captured, targets, shape, sizes)


def _drawn(
    initial: str, in_features: int, shapes: Sequence[tuple[int, int]], generator: torch.Generator
) -> tuple[Tensor, list[Tensor]]:
    """Factors of one linear's parts, float32 on the CPU: A [sum of the ranks, in], and a B of each of `shapes`, which
    are [out, rank]. `initial` is `Recipe.first_weights`; kinds that are made from weights begin at zero here."""
    if initial == "orthogonal":
        return _orthogonal(in_features, shapes, generator)
    ranks = [rank for _, rank in shapes]
    a = torch.empty(sum(ranks), in_features)
    if initial == "gaussian":
        for piece, rank in zip(torch.split(a, ranks), ranks, strict=True):
            piece.normal_(std=1 / rank, generator=generator)
    else:
        bound = 1 / math.sqrt(in_features)  # kaiming_uniform with a = sqrt(5), which is PEFT's
        a.uniform_(-bound, bound, generator=generator)
    return a, [torch.zeros(out, rank) for out, rank in shapes]


def _orthogonal(
    in_features: int, shapes: Sequence[tuple[int, int]], generator: torch.Generator
) -> tuple[Tensor, list[Tensor]]:
    """Odd rows of an orthogonal matrix span A, even ones B, so that B A is zero. For even ranks."""
    a, b = [], []
    for out, rank in shapes:
        rows, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
        a.append(torch.randn(in_features, rank // 2, generator=generator).mm(rows[0::2]).t() / 10)
        b.append(torch.randn(rank // 2, out, generator=generator).t().mm(rows[1::2]) / 10)
    return torch.cat(a), b


class TrainingAdaptation(Adaptation):
    """The hook for a run of tokens of one micro-batch: adds the adapter's output, with gradients, and dropout."""

    def __init__(
        self, lora: LoraWeights, ops: Ops, *, dropout: float, seed: int, rows: slice, known: bool = False
    ) -> None:
        """`rows` are these tokens' places in the micro-batch; `seed` is the micro-batch's. `ops` compute the base's
        linears. `known`: outputs have what the adapter adds already, and only gradients are to be computed."""
        self._lora = lora
        self._ops = ops
        self._subtracted = lora.subtracted if isinstance(lora, TrainableLora) else None
        self._dropout = dropout
        self._seed = seed
        self._rows = rows
        self._known = known

    def embed(self, token_ids: Tensor, embed: Embed) -> Tensor:
        vocabulary = self._lora.vocabulary
        rows = None if vocabulary is None else vocabulary.rows("embedding")
        if vocabulary is None or rows is None:
            return embed(token_ids)
        with torch.no_grad():  # `TrainableVocabulary.add_embedding_grad` has the gradient
            return embed_with(rows, token_ids, embed, known=vocabulary.known)

    def rescales(self, layer: int, linear: str) -> bool:
        adapted = self._lora.linears.get((layer, linear))
        return adapted is not None and bool(adapted.m)

    def __call__(self, layer: int, linear: str, x: Tensor, y: Tensor, base: Tensor | None = None) -> Tensor:
        adapted = self._lora.linears.get((layer, linear))
        if adapted is None:
            return y
        if adapted.m:
            assert base is not None, "the linear asks `rescales`"
            mask = self._mask(layer, linear, x, adapted.inputs) if self._dropout else None
            norms = self._lora.norms(layer, linear)
            left, own = self._left_of(x, base, mask, adapted.linear)
            return add_dora(y, own, left, adapted.columns, adapted.scales, norms, adapted.a, adapted.b, adapted.m)
        return _added(y, x, self.additions(layer, linear, x, slice(0, len(x))))

    def additions(self, layer: int, linear: str, x: Tensor, place: slice) -> "list[_Addition]":
        """The adapter's additions to a linear's output for its tokens, the rows `place` of x [T, in]. Without DoRA."""
        adapted = self._lora.linears.get((layer, linear))
        if adapted is None:
            return []
        mask = self._mask(layer, linear, x, adapted.inputs) if self._dropout else None
        found = [_Addition(place, mask, adapted.columns, adapted.scales, self._known, adapted.a, adapted.b)]
        if self._subtracted is not None:
            before = self._subtracted.linears[layer, linear]
            taken = tuple(-scale for scale in before.scales)
            found.append(_Addition(place, None, before.columns, taken, False, before.a, before.b))
        return found

    def _left_of(self, x: Tensor, base: Tensor, mask: Tensor | None, linear: Linear) -> tuple[Tensor, Tensor]:
        """The part of x that dropout leaves, and its product with the weight, without a bias: PEFT scales that by the
        magnitudes, and adds the rest as it is."""
        if mask is not None:
            left = x * mask
            return left, self._ops.linear(left, linear.weight.value)
        bias = linear.adapted_bias
        return x, base if bias is None else base - bias

    def _mask(self, layer: int, linear: str, x: Tensor, inputs: Split) -> Tensor:
        """[T, in]: 0 with probability `dropout`, else 1 / (1 - dropout). `inputs`: the inputs in x."""
        columns = inputs.pick(torch.arange(inputs.full, dtype=torch.int32, device=x.device))
        return dropout_mask(mask_seed(self._seed, layer, linear), self._rows, columns, self._dropout).to(x.dtype)


def mask_seed(seed: int, layer: int, linear: str) -> int:
    """Seed of the dropout mask of one linear, from the micro-batch's."""
    return mix(seed, layer, sum(linear.encode()))


def mix(*numbers: int) -> int:
    """A seed made of several numbers: neighbouring ones give unrelated seeds."""
    value = 0
    for number in numbers:
        value = ((value ^ number) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & (2**64 - 1)
        value ^= value >> 29
    return value & (2**63 - 1)


def pieces_of(stacked: Tensor, b: Sequence[Tensor], dim: int = 0) -> tuple[Tensor, ...]:
    """Views of what lies together of a linear's parts, as many places of `dim` for each as its B [out, rank] has
    ranks."""
    return torch.split(stacked, [up.shape[1] for up in b], dim)


# -- products --------------------------------------------------------------------------------------


class JointAdaptation(Adaptation):
    """The hook for tokens of several jobs: each one's adapter adds to its own rows. Without DoRA and rows of the
    embedding."""

    def __init__(self, adaptations: Sequence[tuple[slice, TrainingAdaptation]]) -> None:
        """`adaptations` by the rows that are theirs."""
        self._adaptations = adaptations

    def rescales(self, layer: int, linear: str) -> bool:
        return False

    def __call__(self, layer: int, linear: str, x: Tensor, y: Tensor, base: Tensor | None = None) -> Tensor:
        found = [one for rows, own in self._adaptations for one in own.additions(layer, linear, x, rows)]
        return _added(y, x, found) if found else y


@dataclass(frozen=True, eq=False)
class _Addition:
    """A product of factors that is added to some rows of a linear's output."""

    rows: slice
    mask: Tensor | None
    """[rows, in]; None without dropout."""
    columns: Sequence[slice]
    scales: Sequence[float]
    known: bool
    """True if it was added before, and only gradients are to be computed."""
    a: Tensor
    b: Sequence[Tensor]

    def dropped(self, x: Tensor) -> Tensor:
        """Its rows of x, after dropout."""
        own = x[self.rows]
        return own if self.mask is None else own * self.mask


def _added(y: Tensor, x: Tensor, additions: Sequence[_Addition]) -> Tensor:
    """y [T, out] with what is added to it, in place."""
    factors = [factor for one in additions for factor in (one.a, *one.b)]
    added: Tensor = _AddLora.apply(y, x, additions, *factors)  # type: ignore[no-untyped-call]
    return added


class _AddLora(torch.autograd.Function):
    """y += scale * (dropout(x) A^T) B^T for each addition's rows, part by part, each with its own scale and rank, and
    in place: autograd's own ops would copy y for each."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, additions: Sequence[_Addition], *factors: Tensor) -> Tensor:
        """factors: A and Bs of each addition, as autograd needs them."""
        ctx.additions, ctx.shrunks = additions, []
        ctx.save_for_backward(x)
        for one in additions:
            shrunk = one.dropped(x) @ one.a.to(x.dtype).t()
            ctx.shrunks.append(shrunk)
            if one.known:
                continue
            own, smalls = y[one.rows], pieces_of(shrunk, one.b, dim=1)
            for place, small, up, scale in zip(one.columns, smalls, one.b, one.scales, strict=True):
                own[:, place].addmm_(small, up.to(y.dtype).t(), alpha=scale)
        if not all(one.known for one in additions):
            ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        grad_x: Tensor | None = None
        found: list[Tensor] = []
        for one, shrunk in zip(ctx.additions, ctx.shrunks, strict=True):
            grad_shrunk, grad_b = _factor_grads(one, grad[one.rows], shrunk)
            found += [(grad_shrunk.t() @ one.dropped(x)).to(one.a.dtype), *grad_b]
            if not ctx.needs_input_grad[1]:
                continue
            own = grad_shrunk @ one.a.to(grad.dtype)
            if one.mask is not None:
                own *= one.mask
            if grad_x is None and len(own) == len(x):  # a single job's: all rows, as they are
                grad_x = own
            else:
                grad_x = torch.zeros_like(x) if grad_x is None else grad_x
                grad_x[one.rows] += own
        return grad, grad_x, None, *found


def _factor_grads(one: _Addition, grad: Tensor, shrunk: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The gradient of `shrunk` [rows, ranks], and that of each B, from that of an addition's rows [rows, out]."""
    grad_shrunk = torch.empty_like(shrunk)
    grad_b = []
    smalls, grad_smalls = pieces_of(shrunk, one.b, dim=1), pieces_of(grad_shrunk, one.b, dim=1)
    for place, small, grad_small, up, scale in zip(one.columns, smalls, grad_smalls, one.b, one.scales, strict=True):
        part = grad[:, place]
        torch.mm(part, up.to(grad.dtype), out=grad_small)
        grad_small.mul_(scale)
        grad_b.append((part.t() @ small).mul_(scale).to(up.dtype))
    return grad_shrunk, grad_b
