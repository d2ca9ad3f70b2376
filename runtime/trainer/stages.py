"""A decoder layer as training runs it: stages, each cut into pieces.

A piece is a small autograd graph of its own between detached tensors, so that the backward pass is made of slices
too. Most stages work token by token, attention sequence by sequence and head by head. Each value that passes from stage
to stage has a name, and so has its gradient. The place of a cut changes nothing but rounding.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kernels.training import KnownOutput, TrainingOps, backward
from runtime.model.attention import PackedAttention
from runtime.model.decoder import Decoder, DecoderLayer
from runtime.model.lora import Adaptation
from runtime.trainer.data.example import MicroBatch
from runtime.trainer.lora import JointAdaptation, LoraWeights, TrainingAdaptation
from runtime.trainer.slices import Slice, Sliced, Slices

# Fewer tokens at once, and reading the weights costs more than computing with them.
LEAST_TOKENS = 64


@dataclass(frozen=True, eq=False)
class JobRows:
    """Tokens of one job in a batch, and the adapter over them."""

    lora: LoraWeights | None
    """None: the model without its adapter."""
    dropout: float
    seed: int
    """Decides the dropout masks."""
    rows: slice
    """Tokens of the job among the batch's."""
    first_row: int = 0
    """Row of the dropout masks of the first token: above 0 for a part of the micro-batch that the masks are of."""

    def adaptation(self, ops: TrainingOps, rows: slice, *, known: bool) -> TrainingAdaptation | None:
        """The hook for some of the batch's tokens, all of them the job's. `known`: see `TrainingAdaptation`."""
        if self.lora is None:
            return None
        shift = self.first_row - self.rows.start
        places = slice(shift + rows.start, shift + rows.stop)
        return TrainingAdaptation(self.lora, ops, dropout=self.dropout, seed=self.seed, rows=places, known=known)


@dataclass(frozen=True, eq=False)
class Context:
    """State that all layers of a pass share."""

    decoder: Decoder
    ops: TrainingOps
    jobs: tuple[JobRows, ...]
    """In the order of their tokens, which are all of the batch's."""
    batch: MicroBatch
    angles: tuple[Tensor, Tensor]
    lowest: int
    """Below this layer nothing is trained, so no gradient is computed."""
    trains_input: bool = False
    """The gradient of the first layer's input is needed too: rows of the embedding are trained."""

    @property
    def stretches(self) -> tuple[slice, ...]:
        """Tokens that are attended to in one piece of work: a sequence, or all of them."""
        return (slice(0, self.batch.num_tokens),) if self.ops.packs else self.batch.sequences

    def adaptation(self, rows: slice, *, known: bool = False) -> Adaptation | None:
        """The hook for some of the batch's tokens; `known`: see `TrainingAdaptation`."""
        found: list[tuple[slice, TrainingAdaptation]] = []
        for job in self.jobs:
            own = slice(max(rows.start, job.rows.start), min(rows.stop, job.rows.stop))
            if own.start >= own.stop or (one := job.adaptation(self.ops, own, known=known)) is None:
                continue
            if own == rows:
                return one
            found.append((slice(own.start - rows.start, own.stop - rows.start), one))
        return JointAdaptation(found) if found else None


@dataclass(frozen=True, eq=False)
class StagePiece:
    """A part of a stage that was computed: from detached inputs to outputs."""

    rows: slice
    """Tokens of the piece among the micro-batch's."""
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def backward(self, grads: Sequence[Tensor]) -> list[Tensor | None]:
        """Adds to the parameters' gradients; returns the inputs', None for inputs that need none."""
        wanting = [(out, grad) for out, grad in zip(self.outputs, grads, strict=True) if out.requires_grad]
        if wanting:
            backward([out for out, _ in wanting], [grad for _, grad in wanting])
        return [tensor.grad for tensor in self.inputs]


@dataclass(eq=False)
class LayerState:
    """State of one layer in one micro-step."""

    layer: DecoderLayer
    values: dict[str, Tensor]
    """Values that pass from stage to stage, for all tokens: `hidden` at first."""
    pieces: dict[str, list[StagePiece]] = field(default_factory=dict)
    """Pieces of the stages that were computed to be used backwards, by the stages' names."""
    grads: dict[str, Tensor] = field(default_factory=dict)
    """Gradients with respect to `values`."""
    known: bool = False
    """True if the layer was computed elsewhere: all of `values` are there, with `gate_up` before the activation."""

    def wants(self, name: str, context: Context) -> bool:
        """True if the gradient of this value is needed."""
        return name != "hidden" or self.layer.index > context.lowest or context.trains_input


class Stage(Protocol):
    """One part of a layer."""

    name: str

    def forward(self, context: Context, state: LayerState, *, keep: bool) -> Slices:
        """Compute its values; with `keep`, its pieces stay for `backward`."""

    def backward(self, context: Context, state: LayerState) -> Slices:
        """From the gradients of its outputs to those of its inputs."""


class TokenStage:
    """A stage in which tokens do not see each other."""

    def __init__(
        self,
        name: str,
        linear: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        run: Callable[..., Tensor | tuple[Tensor, ...]],
    ) -> None:
        """`linear` is the name of the layer's linear that it runs; `run` takes the layer, ops, the inputs and the
        adaptation."""
        self.name = name
        self._linear = linear
        self._inputs = inputs
        self._outputs = outputs
        self._run = run

    def forward(self, context: Context, state: LayerState, *, keep: bool) -> Slices:
        yield from self._make_factor(context, state)
        pieces: list[StagePiece] = []
        start, end = 0, context.batch.num_tokens
        kind, then = (f"{self.name}_kept", f"{self.name}_backward") if keep else (self.name, None)
        while start < end:
            done = yield Slice(kind, end - start, min(LEAST_TOKENS, end - start), then=then)
            pieces.append(self._piece(context, state, slice(start, start + done), keep=keep))
            start += done
        for index, name in enumerate(self._outputs):
            state.values[name] = _joined([piece.outputs[index].detach() for piece in pieces])
        if keep:
            state.pieces[self.name] = pieces

    def backward(self, context: Context, state: LayerState) -> Slices:
        yield from self._make_factor(context, state)
        kept = {piece.rows.start: piece for piece in state.pieces.pop(self.name, [])}
        begun = state.grads.keys() & set(self._inputs)
        start, end = 0, context.batch.num_tokens
        while start < end:
            piece = kept.pop(start, None)
            again = f"{self.name}_again"
            if piece is None:
                left = min(kept, default=end) - start
                again = f"{self.name}_known" if state.known else again
                done = yield Slice(again, left, min(LEAST_TOKENS, left))
            else:
                left = piece.rows.stop - start
                done = yield Slice(f"{self.name}_backward", left, min(LEAST_TOKENS, left), again=again)
            rows = slice(start, start + done)
            if piece is None or piece.rows != rows:
                piece = self._piece(context, state, rows, keep=True)
            found = piece.backward([state.grads[name][rows] for name in self._outputs])
            for name, grad in zip(self._inputs, found, strict=True):
                if grad is not None:
                    _add(state.grads, name, rows, grad, end, begun=name in begun)
            start += done
        for name in self._outputs:
            del state.grads[name]

    def _make_factor(self, context: Context, state: LayerState) -> Slices:
        """Make a weight in integers float, for all pieces: with the first of them it would be too much for a slice."""
        linear, dtype = state.layer.linears.get(self._linear), context.decoder.dtype
        if linear is not None and context.ops.lacks_factor(linear.weight.value, dtype):
            yield Slice(f"factor/{self._linear}", 1)
            context.ops.make_factor(linear.weight.value, dtype)

    def _piece(self, context: Context, state: LayerState, rows: slice, *, keep: bool) -> StagePiece:
        inputs = tuple(
            state.values[name][rows].detach().requires_grad_(keep and state.wants(name, context))
            for name in self._inputs
        )
        ops, known = context.ops, state.known and state.layer.skips(self._linear)
        if known:
            gate_up = state.values["gate_up"][rows] if self._linear == "gate_up" else None
            ops = ops.knowing(KnownOutput(gate_up))
        with torch.set_grad_enabled(keep):
            made = self._run(state.layer, ops, *inputs, context.adaptation(rows, known=known))
        return StagePiece(rows, inputs, made if isinstance(made, tuple) else (made,))


class AttendStage:
    """Attention: from `q`, `k` and `v` to `mixed`. Cut by sequences, where they are not one piece of work, and by
    key/value heads."""

    name = "attend"

    def forward(self, context: Context, state: LayerState, *, keep: bool) -> Slices:
        heads = context.decoder.heads.kv.size
        pieces: list[StagePiece] = []
        for stretch in context.stretches:
            size = _size(stretch)
            kind, then = (f"attend_kept/{size}", f"attend_backward/{size}") if keep else (f"attend/{size}", None)
            head = 0
            while head < heads:
                done = yield Slice(kind, heads - head, then=then)
                pieces.append(self._piece(context, state, stretch, range(head, head + done), keep=keep))
                head += done
        state.values["mixed"] = self._join(context, pieces)
        if keep:
            state.pieces[self.name] = pieces

    def backward(self, context: Context, state: LayerState) -> Slices:
        held, grad = context.decoder.heads, state.grads.pop("mixed")
        counts = {"q": held.q.size, "k": held.kv.size, "v": held.kv.size}
        state.grads |= {name: grad.new_empty(len(grad), count, grad.shape[2]) for name, count in counts.items()}
        head = 0
        for piece in state.pieces.pop(self.name):
            end = head + piece.inputs[1].shape[1]
            first, kind = head, f"attend_backward/{_size(piece.rows)}"
            while head < end:
                whole = head == first
                again = f"{kind}/again"
                done = yield Slice(kind if whole else again, end - head, again=again if whole else None)
                heads = range(head, head + done)
                if not whole or head + done < end:
                    self._use(context, state, self._piece(context, state, piece.rows, heads, keep=True), heads, grad)
                else:
                    self._use(context, state, piece, heads, grad)
                head += done
            head %= held.kv.size

    def _use(self, context: Context, state: LayerState, piece: StagePiece, heads: range, grad: Tensor) -> None:
        queries, groups = _heads(context, heads)
        found = piece.backward([grad[piece.rows, queries]])
        for name, place, value in zip("qkv", (queries, groups, groups), found, strict=True):
            assert value is not None
            state.grads[name][piece.rows, place] = value

    def _piece(self, context: Context, state: LayerState, rows: slice, heads: range, *, keep: bool) -> StagePiece:
        queries, groups = _heads(context, heads)
        places = {"q": queries, "k": groups, "v": groups}
        q, k, v = (state.values[n][rows, at].detach().requires_grad_(keep) for n, at in places.items())
        sequences = (one for one in context.batch.sequences if rows.start <= one.start < rows.stop)
        attention = PackedAttention(context.ops, [one.stop - one.start for one in sequences], context.decoder.spec)
        cos, sin = (table[:, rows] for table in context.angles)
        with torch.set_grad_enabled(keep):
            return StagePiece(rows, (q, k, v), (attention(state.layer.index, q, k, v, cos, sin),))

    def _join(self, context: Context, pieces: list[StagePiece]) -> Tensor:
        """The pieces' outputs, each [some tokens, some heads, D], as one [T, H, D]."""
        made = [piece.outputs[0].detach() for piece in pieces]
        heads = context.decoder.heads.q.size
        if len(made) == 1:
            return made[0]
        mixed = made[0].new_empty(context.batch.num_tokens, heads, made[0].shape[2])
        head = 0
        for piece, part in zip(pieces, made, strict=True):
            mixed[piece.rows, head : head + part.shape[1]] = part
            head = (head + part.shape[1]) % heads
        return mixed


ATTEND = AttendStage()
PROJECT = TokenStage("project", "qkv", ("hidden",), ("q", "k", "v"), DecoderLayer.project)
MIX = TokenStage("mix", "out", ("hidden", "mixed"), ("residual",), DecoderLayer.mix)
EXPAND = TokenStage("expand", "gate_up", ("residual",), ("inner",), DecoderLayer.expand)
EXPAND_BESIDE = TokenStage("expand", "gate_up", ("hidden",), ("inner",), DecoderLayer.expand)
"""Stage of layers whose MLP stands beside attention."""
CONTRACT = TokenStage("contract", "down", ("residual", "inner"), ("out",), DecoderLayer.contract)

SERIAL: tuple[Stage, ...] = (PROJECT, ATTEND, MIX, EXPAND, CONTRACT)
PARALLEL: tuple[Stage, ...] = (PROJECT, ATTEND, MIX, EXPAND_BESIDE, CONTRACT)


class LayerStep:
    """One layer, forwards and backwards. With gradient checkpointing (arXiv:1604.06174) it keeps only its input, and
    is computed again when its gradient is due; without, the pieces are kept, and only one that is too much for its
    slice is computed again in smaller ones."""

    def __init__(
        self, context: Context, layer: DecoderLayer, hidden: Tensor, known: Mapping[str, Tensor] | None = None
    ) -> None:
        """hidden [T, hidden], the layer's input. `known`: see `LayerState.known`; nothing but `backward` follows."""
        self._context = context
        self._state = LayerState(layer, {"hidden": hidden, **(known or {})}, known=known is not None)
        self._stages = PARALLEL if context.decoder.spec.parallel else SERIAL

    def forward(self, *, keep: bool) -> Sliced[Tensor]:
        """The layer's output, [T, hidden]."""
        yield from self._forward(self._stages, keep=keep)
        out = self._state.values.pop("out")
        if not keep:
            self._state.values = {"hidden": self._state.values["hidden"]}
        return out

    def backward(self, grad: Tensor) -> Sliced[Tensor]:
        """From the gradient of the layer's output to that of its input, both [T, hidden]. Once."""
        state = self._state
        if state.known:
            yield from self._complete()
        elif not state.pieces:
            yield from self._forward(self._stages[:-1], keep=True)
        state.grads["out"] = grad
        for stage in reversed(self._stages):
            yield from stage.backward(self._context, state)
        state.values.clear()
        return state.grads.get("hidden", grad)

    def _complete(self) -> Slices:
        """Make what is known ready for `backward`: attention's own sums were not kept."""
        state, context = self._state, self._context
        yield Slice("activate", 1)
        with torch.no_grad():
            state.values["inner"] = context.ops.silu_mul(state.values["gate_up"])
        yield from ATTEND.forward(context, state, keep=True)

    def _forward(self, stages: Iterable[Stage], *, keep: bool) -> Slices:
        for stage in stages:
            yield from stage.forward(self._context, self._state, keep=keep)


def _add(grads: dict[str, Tensor], name: str, rows: slice, grad: Tensor, total: int, *, begun: bool) -> None:
    """Add the gradient from one of a stage's pieces; `begun`: later stages have added to it already."""
    if begun:
        grads[name][rows] += grad
    elif len(grad) == total:
        grads[name] = grad
    else:
        if name not in grads:
            grads[name] = grad.new_empty(total, *grad.shape[1:])
        grads[name][rows] = grad


def _heads(context: Context, heads: range) -> tuple[slice, slice]:
    """Some of the key/value heads: the query heads that share them, and they themselves."""
    held = context.decoder.heads
    group = held.q.size // held.kv.size
    return slice(heads.start * group, heads.stop * group), slice(heads.start, heads.stop)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _size(stretch: slice) -> int:
    """Attention over sequences of one power of two costs alike."""
    length: int = stretch.stop - stretch.start
    return length.bit_length()
