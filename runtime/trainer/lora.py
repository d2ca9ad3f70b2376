"""The adapter that is being trained: its parameters, and their effect on the decoder's linears.

LoRA (arXiv:2106.09685) as PEFT has it: A starts uniform, B at zero, dropout before A. One difference: the parts of
a fused linear (query, key and value; gate and up) share a dropout mask, since they share their input.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.training import dropout_mask
from runtime.model.layers import Linear
from runtime.model.lora import Adaptation, Adapter, LoraLayers, LoraPart, LoraShape
from runtime.model.lora_base import LoraBase
from runtime.model.model import Model
from runtime.model.split import Split
from runtime.model.token_rows import Embed, embed_with
from runtime.model.vocabulary import RowTargets
from runtime.trainer.shards import Held, Shards
from runtime.trainer.token_rows import TrainableVocabulary, rows_of

Targets = Mapping[tuple[int, str], Sequence[str]]
"""(layer index, linear name) → the linear's parts that are trained, in the linear's own order."""


@dataclass(frozen=True, eq=False)
class AdaptedLinear:
    """The parameters of one linear, as far as this rank holds them. Float32 for any type of the base."""

    parts: tuple[str, ...]
    columns: tuple[slice, ...]
    """Columns of each part in the linear's output."""
    a: Tensor
    """[parts * rank, in]: the parts' A matrices, one above the other, since all of them see the same input."""
    b: tuple[Tensor, ...]
    """[out of the part, rank] each."""
    inputs: Split
    """Columns of the whole A that this rank holds."""
    outputs: tuple[Split, ...]
    """Rows of each whole B that this rank holds."""


class TrainableLora:
    """All parameters of one adapter."""

    def __init__(
        self, decoder: Model, targets: Targets, shape: LoraShape, *, seed: int, rows: RowTargets | None = None
    ) -> None:
        """Fresh parameters on the decoder's device; the same seed gives the same ones. All ranks at once."""
        self.shape = shape
        self.vocabulary = TrainableVocabulary(decoder, rows, seed=seed) if rows is not None and rows.kinds else None
        """Rows of embedding and head; None where none are trained."""
        self.scale = shape.scale(shape.rank, shape.alpha)
        generator = torch.Generator().manual_seed(seed)
        self.linears: dict[tuple[int, str], AdaptedLinear] = {}
        for (layer, name), parts in targets.items():
            linear = decoder.layers[layer].linears[name]
            self.linears[layer, name] = _fresh(linear, parts, shape.rank, generator, decoder.device)
        self.shards = Shards(decoder.group, self._held(), decoder.device)
        """The part of each parameter that this rank holds."""

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained tensor by a stable name, layer by layer."""
        for (layer, name), linear in self.linears.items():
            yield f"{layer}.{name}.a", linear.a
            for part, b in zip(linear.parts, linear.b, strict=True):
                yield f"{layer}.{name}.b.{part}", b
        if self.vocabulary is not None:
            yield from self.vocabulary.parameters()

    def _held(self) -> dict[str, Held]:
        held: dict[str, Held] = {}
        for (layer, name), linear in self.linears.items():
            held[f"{layer}.{name}.a"] = Held(linear.inputs, 1)
            for part, split in zip(linear.parts, linear.outputs, strict=True):
                held[f"{layer}.{name}.b.{part}"] = Held(split, 0)
        for name, values in [] if self.vocabulary is None else self.vocabulary.parameters():
            held[name] = Held(Split.whole(len(values)), 0)
        return held

    def capture(self) -> dict[str, Tensor]:
        """A copy of every whole parameter, on the CPU. All ranks at once."""
        return self.shards.gather({name: parameter.detach() for name, parameter in self.parameters()})

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of an earlier `capture`. Raises `ValueError` where they are another adapter's."""
        own, shards = dict(self.parameters()), self.shards
        if own.keys() != tensors.keys() or any(shards.shape(name, own[name]) != tensors[name].shape for name in own):
            raise ValueError("these are the weights of an adapter of another shape")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(shards.pick(name, tensors[name]))

    def layers_of(self, captured: Mapping[str, Tensor]) -> LoraLayers:
        """The result of `capture` as an adapter to serve or to write."""
        return layers_of(captured, {place: linear.parts for place, linear in self.linears.items()}, self.shape)


def adapter_of(
    captured: Mapping[str, Tensor], targets: Targets, shape: LoraShape, rows: RowTargets | None = None
) -> Adapter:
    """The result of `TrainableLora.capture` for these targets and rows, as an adapter to serve or to write."""
    own = rows_of(captured, rows) if rows is not None and rows.kinds else None
    return Adapter(shape, layers_of(captured, targets, shape), own)


def layers_of(captured: Mapping[str, Tensor], targets: Targets, shape: LoraShape) -> LoraLayers:
    """The result of `TrainableLora.capture` for these targets, as an adapter to serve or to write."""
    rank, scale = shape.rank, shape.scale(shape.rank, shape.alpha)
    return {
        (layer, name): [
            LoraPart(
                part=part,
                a=captured[f"{layer}.{name}.a"][index * rank : (index + 1) * rank],
                b=captured[f"{layer}.{name}.b.{part}"],
                scale=scale,
            )
            for index, part in enumerate(parts)
        ]
        for (layer, name), parts in targets.items()
    }


def _fresh(
    linear: Linear, parts: Sequence[str], rank: int, generator: torch.Generator, device: torch.device
) -> AdaptedLinear:
    # Drawn as a whole on every rank, so that any number of ranks begins with the same.
    a = _draw_a(len(parts) * rank, linear.in_features, generator)
    starts, outputs = linear.weight.starts, [linear.outputs[part] for part in parts]
    places = zip((starts[part] for part in parts), outputs, strict=True)
    return AdaptedLinear(
        parts=tuple(parts),
        columns=tuple(slice(start, start + held.size) for start, held in places),
        a=linear.inputs.pick(a, 1).to(device, copy=True).contiguous().requires_grad_(),
        b=tuple(torch.zeros(held.size, rank, device=device, requires_grad=True) for held in outputs),
        inputs=linear.inputs,
        outputs=tuple(outputs),
    )


def _draw_a(rows: int, in_features: int, generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(in_features)  # kaiming_uniform with a = sqrt(5), which is PEFT's
    return torch.empty(rows, in_features).uniform_(-bound, bound, generator=generator)


def initial_layers(targets: Targets, base: LoraBase, shape: LoraShape, *, seed: int) -> LoraLayers:
    """The adapter that a fresh `TrainableLora` with the same arguments is, to write where no decoder is."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {(one.linear, one.part): (one.in_features, one.out_features) for one in base.targets.values()}
    captured: dict[str, Tensor] = {}
    for (layer, name), parts in targets.items():
        in_features = sizes[name, parts[0]][0]
        captured[f"{layer}.{name}.a"] = _draw_a(len(parts) * shape.rank, in_features, generator)
        for part in parts:
            captured[f"{layer}.{name}.b.{part}"] = torch.zeros(sizes[name, part][1], shape.rank)
    return layers_of(captured, targets, shape)


class TrainingAdaptation(Adaptation):
    """The hook for a run of tokens of one micro-batch: adds the adapter's output, with gradients, and dropout."""

    def __init__(self, lora: TrainableLora, *, dropout: float, seed: int, rows: slice) -> None:
        """`rows` are these tokens' places in the micro-batch; `seed` is the micro-batch's."""
        self._lora = lora
        self._dropout = dropout
        self._seed = seed
        self._rows = rows

    def embed(self, token_ids: Tensor, embed: Embed) -> Tensor:
        vocabulary = self._lora.vocabulary
        rows = None if vocabulary is None else vocabulary.rows("embedding")
        if vocabulary is None or rows is None:
            return embed(token_ids)
        with torch.no_grad():  # `TrainableVocabulary.add_embedding_grad` has the gradient
            return embed_with(rows, token_ids, embed, known=vocabulary.known)

    def __call__(self, layer: int, linear: str, x: Tensor, y: Tensor) -> Tensor:
        adapted = self._lora.linears.get((layer, linear))
        if adapted is None:
            return y
        mask = self._mask(layer, linear, x, adapted.inputs) if self._dropout else None
        added: Tensor = _AddLora.apply(y, x, mask, adapted.columns, self._lora.scale, adapted.a, *adapted.b)  # type: ignore[no-untyped-call]
        return added

    def _mask(self, layer: int, linear: str, x: Tensor, inputs: Split) -> Tensor:
        """[T, in]: 0 with probability `dropout`, else 1 / (1 - dropout). `inputs`: the inputs in x."""
        columns = inputs.pick(torch.arange(inputs.full, dtype=torch.int32, device=x.device))
        seed = mix(self._seed, layer, sum(linear.encode()))
        return dropout_mask(seed, self._rows, columns, self._dropout).to(x.dtype)


def mix(*numbers: int) -> int:
    """A seed made of several numbers: neighbouring ones give unrelated seeds."""
    value = 0
    for number in numbers:
        value = ((value ^ number) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & (2**64 - 1)
        value ^= value >> 29
    return value & (2**63 - 1)


class _AddLora(torch.autograd.Function):
    """y += scale * (dropout(x) A^T) B^T, part by part and in place: autograd's own ops would copy y for each."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        mask: Tensor | None,
        columns: Sequence[slice],
        scale: float,
        a: Tensor,
        *b: Tensor,
    ) -> Tensor:
        dropped = x if mask is None else x * mask
        shrunk = dropped @ a.to(x.dtype).t()
        for place, small, up in zip(columns, shrunk.chunk(len(b), dim=1), b, strict=True):
            y[:, place].addmm_(small, up.to(y.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, mask, shrunk, a, *b)
        ctx.columns, ctx.scale = columns, scale
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, mask, shrunk, a, *b = ctx.saved_tensors
        dropped = x if mask is None else x * mask
        grad_b = []
        grad_shrunk = torch.empty_like(shrunk)
        pieces = zip(ctx.columns, shrunk.chunk(len(b), dim=1), grad_shrunk.chunk(len(b), dim=1), b, strict=True)
        for place, small, grad_small, up in pieces:
            part = grad[:, place]
            torch.mm(part, up.to(grad.dtype), out=grad_small)
            grad_b.append((part.t() @ small).mul_(ctx.scale).to(up.dtype))
        grad_shrunk.mul_(ctx.scale)
        grad_a = (grad_shrunk.t() @ dropped).to(a.dtype)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = grad_shrunk @ a.to(grad.dtype)
            if mask is not None:
                grad_x *= mask
        return grad, grad_x, None, None, None, grad_a, *grad_b
