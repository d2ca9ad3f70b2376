"""Forward and backward of one micro-batch, in slices.

A layer is three pieces: `project` (token by token), attention (sequence by sequence, head by head), and `finish`
(token by token). Each is a small autograd graph of its own, between detached tensors, so that the backward pass is
made of slices too. With gradient checkpointing (arXiv:1604.06174) a layer keeps only its input, and is computed
again when its gradient is due; without, the graphs are kept, and only one that is too much for its slice is computed
again in smaller ones. Where tokens are cut changes nothing but rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import Ops
from runtime.trainer.lora import TrainableLora, TrainingAdaptation
from runtime.trainer.loss import Score, Vocabulary
from runtime.trainer.microbatch import MicroBatch
from runtime.trainer.slices import Slice, Sliced, Slices
from runtime.workers.attention import PackedAttention
from runtime.workers.decoder import Decoder, DecoderLayer

LEAST_TOKENS = 32
"""Fewer tokens at once, and reading the weights costs more than computing with them."""
WHOLE = 320
"""A kept piece of at most so many tokens is used as it is: it was made to fit. Only a larger one, made when nobody
waited, is cut, and so computed again."""
MOST_ATTENDED = 4096
"""The same for attention, in heads times tokens."""
MOST_ROWS = 128
"""So many rows of logits are held at once."""
LEAST_VOCABULARY = 2048
LEAST_ROWS = 8
"""And they are made and used at least so many columns, or rows, at once."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a layer that was computed: from detached inputs to outputs."""

    rows: slice
    """Of the micro-batch's tokens."""
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def backward(self, grads: tuple[Tensor, ...]) -> list[Tensor]:
        """Adds to the parameters' gradients; returns those of the inputs that want one."""
        torch.autograd.backward(self.outputs, grads)
        return [tensor.grad for tensor in self.inputs if tensor.grad is not None]


@dataclass(eq=False)
class Pass:
    """What a layer's forward pass leaves for its backward pass."""

    hidden: Tensor
    """[T, hidden], the layer's input."""
    projected: list[Piece] = field(default_factory=list)
    attended: list[Piece] = field(default_factory=list)
    """In the order of the sequences, and in each of the heads. Empty lists: to be computed again."""
    finished: list[Piece] = field(default_factory=list)


class MicroStep:
    """The work on one micro-batch. `forward_backward` and `evaluate` are generators of slices."""

    def __init__(
        self,
        decoder: Decoder,
        ops: Ops,
        lora: TrainableLora,
        batch: MicroBatch,
        *,
        dropout: float = 0.0,
        seed: int = 0,
        checkpointing: bool = True,
    ) -> None:
        """`ops` must be differentiable. `seed` decides the dropout masks."""
        self._decoder = decoder
        self._ops = ops
        self._lora = lora
        self._batch = batch
        self._dropout = dropout
        self._seed = seed
        self._checkpointing = checkpointing
        self._cos, self._sin = decoder.angles(batch.positions)
        self._kv_heads = decoder.spec.num_kv_heads
        self._group = decoder.spec.num_heads // decoder.spec.num_kv_heads
        self.score = Score()

    def forward_backward(self, weight: float) -> Slices:
        """Add the gradient of `weight` times the summed loss to the parameters' `grad`. Then `score` is set."""
        passes: list[Pass] = []
        hidden = self._decoder.embed(self._batch.token_ids, self._batch.positions)
        for layer in self._decoder.layers:
            passes.append(Pass(hidden))
            hidden = yield from self._forward(layer, passes[-1], keep=not self._checkpointing)
        grad = torch.zeros_like(hidden)
        yield from self._loss(hidden, grad, weight)
        del hidden
        for layer in reversed(self._decoder.layers):
            grad = yield from self._backward(layer, passes.pop(), grad)

    def evaluate(self) -> Slices:
        """Only the `score`."""
        hidden = self._decoder.embed(self._batch.token_ids, self._batch.positions)
        for layer in self._decoder.layers:
            hidden = yield from self._forward(layer, Pass(hidden), keep=False)
        yield from self._loss(hidden, None, 0.0)

    # -- one layer -----------------------------------------------------------------------------

    def _forward(self, layer: DecoderLayer, passed: Pass, *, keep: bool) -> Sliced[Tensor]:
        """The layer's output [T, hidden]; with `keep`, its pieces stay in `passed`."""
        projected = yield from self._project(layer, passed.hidden, keep=keep)
        attended = yield from self._attend(layer, projected, keep=keep)
        mixed = self._join_heads(attended)
        out = torch.empty_like(passed.hidden)
        start = 0
        while start < self._batch.num_tokens:
            rows = yield from _some_tokens(
                _named("finish", keep), start, self._batch.num_tokens, _later("finish", keep)
            )
            piece = self._finish(layer, passed.hidden, mixed, rows, keep=keep)
            out[rows] = piece.outputs[0].detach()
            if keep:
                passed.finished.append(piece)
            start = rows.stop
        if keep:
            passed.projected, passed.attended = projected, attended
        return out

    def _backward(self, layer: DecoderLayer, passed: Pass, grad: Tensor) -> Sliced[Tensor]:
        """From the gradient of the layer's output to that of its input, both [T, hidden]."""
        if not passed.projected:
            passed.projected = yield from self._project(layer, passed.hidden, keep=True)
            passed.attended = yield from self._attend(layer, passed.projected, keep=True)
        spec, tokens = self._decoder.spec, self._batch.num_tokens
        grad_hidden = torch.empty_like(grad)
        grad_mixed = grad.new_empty(tokens, spec.num_heads, spec.head_dim)
        mixed = self._join_heads(passed.attended)

        def finish(piece: Piece) -> None:
            grad_hidden[piece.rows], grad_mixed[piece.rows] = piece.backward((grad[piece.rows],))

        def project(piece: Piece) -> None:
            for below in piece.backward(tuple(part[piece.rows] for part in grads)):
                grad_hidden[piece.rows] += below

        yield from self._each(
            "finish_backward",
            passed.finished,
            lambda rows: self._finish(layer, passed.hidden, mixed, rows, keep=True),
            finish,
        )
        grads = yield from self._attend_backward(layer, passed.attended, grad_mixed)
        yield from self._each(
            "project_backward",
            passed.projected,
            lambda rows: self._project_rows(layer, passed.hidden, rows, keep=True),
            project,
        )
        return grad_hidden

    def _each(
        self, kind: str, kept: list[Piece], make: Callable[[slice], Piece], use: Callable[[Piece], None]
    ) -> Slices:
        """`use` pieces for all tokens: the kept ones, or where one is too much for its slice, smaller new ones."""
        pieces = {piece.rows.start: piece for piece in kept}
        kept.clear()
        start = 0
        while start < self._batch.num_tokens:
            piece = pieces.pop(start, None)
            end = min(pieces, default=self._batch.num_tokens) if piece is None else piece.rows.stop
            if piece is not None and end - start <= WHOLE:
                yield Slice(kind, end - start, end - start)
                rows = piece.rows
            else:
                rows = yield from _some_tokens(f"{kind}_again", start, end)
            use(piece if piece is not None and piece.rows == rows else make(rows))
            start = rows.stop

    # -- its three pieces ----------------------------------------------------------------------

    def _project(self, layer: DecoderLayer, hidden: Tensor, *, keep: bool) -> Sliced[list[Piece]]:
        pieces = []
        start = 0
        while start < len(hidden):
            rows = yield from _some_tokens(_named("project", keep), start, len(hidden), _later("project", keep))
            pieces.append(self._project_rows(layer, hidden, rows, keep=keep))
            start = rows.stop
        return pieces

    def _project_rows(self, layer: DecoderLayer, hidden: Tensor, rows: slice, *, keep: bool) -> Piece:
        # Nothing below the first layer is trained, so its input needs no gradient.
        leaf = hidden[rows].detach().requires_grad_(keep and layer.index > 0)
        with torch.set_grad_enabled(keep):
            return Piece(rows, (leaf,), layer.project(self._ops, leaf, self._adaptation(rows)))

    def _attend(self, layer: DecoderLayer, projected: list[Piece], *, keep: bool) -> Sliced[list[Piece]]:
        q, k, v = (_joined([piece.outputs[index].detach() for piece in projected]) for index in range(3))
        pieces = []
        for sequence in self._batch.sequences:
            head = 0
            while head < self._kv_heads:
                size = _size(sequence)
                then = f"attend_backward/{size}" if keep else None
                done = yield Slice(f"{_named('attend', keep)}/{size}", self._kv_heads - head, then=then)
                heads, queries = self._heads(head, done)
                inputs = (q[sequence, queries], k[sequence, heads], v[sequence, heads])
                pieces.append(self._attend_heads(layer, sequence, inputs, keep=keep))
                head += done
        return pieces

    def _attend_heads(self, layer: DecoderLayer, sequence: slice, inputs: tuple[Tensor, ...], *, keep: bool) -> Piece:
        """inputs: q, k and v of one sequence and some of the heads."""
        q, k, v = (tensor.detach().requires_grad_(keep) for tensor in inputs)
        attention = PackedAttention(self._ops, [sequence.stop - sequence.start], self._decoder.spec)
        with torch.set_grad_enabled(keep):
            made = attention(layer.index, q, k, v, self._cos[:, sequence], self._sin[:, sequence])
        return Piece(sequence, (q, k, v), (made,))

    def _attend_backward(
        self, layer: DecoderLayer, attended: list[Piece], grad_mixed: Tensor
    ) -> Sliced[tuple[Tensor, ...]]:
        """The gradients of all q, k and v."""
        spec, tokens = self._decoder.spec, self._batch.num_tokens
        counts = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        grads = tuple(grad_mixed.new_empty(tokens, count, spec.head_dim) for count in counts)
        head = 0
        for piece in attended:
            count = piece.inputs[1].shape[1]
            first = 0
            while first < count:
                kind, left = f"attend_backward/{_size(piece.rows)}", count - first
                if count * (piece.rows.stop - piece.rows.start) <= MOST_ATTENDED:
                    done = yield Slice(kind, left, left)
                else:
                    done = yield Slice(f"{kind}/again", left)
                part = piece
                if done < count:
                    inner, inner_queries = self._heads(first, done)
                    q, k, v = piece.inputs
                    part = self._attend_heads(
                        layer, piece.rows, (q[:, inner_queries], k[:, inner], v[:, inner]), keep=True
                    )
                heads, queries = self._heads(head, done)
                found = part.backward((grad_mixed[piece.rows, queries],))
                for target, place, value in zip(grads, (queries, heads, heads), found, strict=True):
                    target[piece.rows, place] = value
                first += done
                head = (head + done) % self._kv_heads
        attended.clear()
        return grads

    def _finish(self, layer: DecoderLayer, hidden: Tensor, mixed: Tensor, rows: slice, *, keep: bool) -> Piece:
        below, found = (tensor[rows].detach().requires_grad_(keep) for tensor in (hidden, mixed))
        with torch.set_grad_enabled(keep):
            out = layer.finish(self._ops, below, found, self._adaptation(rows))
        return Piece(rows, (below, found), (out,))

    def _loss(self, hidden: Tensor, grad: Tensor | None, weight: float) -> Slices:
        """Score the rows that are trained on; write the gradient of the hidden states into `grad`."""
        for start in range(0, self._batch.num_trained, MOST_ROWS):
            part = slice(start, min(start + MOST_ROWS, self._batch.num_trained))
            rows, targets = self._batch.rows[part], self._batch.targets[part]
            head = Vocabulary(self._decoder, self._ops, hidden[rows], targets, with_grad=grad is not None)
            size = _size(part)
            yield from _all(f"logits/{size}", self._decoder.spec.vocab_size, LEAST_VOCABULARY, head.logits)

            def score(rows: slice, head: Vocabulary = head) -> None:
                self.score.add(head.cross_entropy(rows, None if grad is None else weight))

            yield from _all("cross_entropy", len(rows), LEAST_ROWS, score)
            if grad is not None:
                yield from _all(
                    f"logits_backward/{size}", self._decoder.spec.vocab_size, LEAST_VOCABULARY, head.backward
                )
                grad[rows] = head.hidden_grad()

    # -- cutting and joining -------------------------------------------------------------------

    def _adaptation(self, rows: slice) -> TrainingAdaptation:
        tokens = self._batch.num_tokens
        return TrainingAdaptation(self._lora, dropout=self._dropout, seed=self._seed, rows=rows, num_tokens=tokens)

    def _heads(self, first: int, count: int) -> tuple[slice, slice]:
        """Some of the key/value heads, and the query heads that share them."""
        return slice(first, first + count), slice(first * self._group, (first + count) * self._group)

    def _join_heads(self, attended: list[Piece]) -> Tensor:
        """The pieces' outputs, each [sequence, some heads, D], as one [T, H, D]."""
        spec = self._decoder.spec
        if len(attended) == 1:
            return attended[0].outputs[0].detach()
        mixed = attended[0].outputs[0].new_empty(self._batch.num_tokens, spec.num_heads, spec.head_dim)
        head = 0
        for piece in attended:
            made = piece.outputs[0].detach()
            mixed[piece.rows, head : head + made.shape[1]] = made
            head = (head + made.shape[1]) % spec.num_heads
        return mixed


def _all(kind: str, amount: int, least: int, work: Callable[[slice], None]) -> Slices:
    """`work` on all of it, part by part."""
    start = 0
    while start < amount:
        done = yield Slice(kind, amount - start, min(least, amount - start))
        work(slice(start, start + done))
        start += done


def _some_tokens(kind: str, start: int, end: int, then: str | None = None) -> Sliced[slice]:
    """The next rows to do, from `start` and at most to `end`."""
    left = end - start
    done = yield Slice(kind, left, min(LEAST_TOKENS, left), then)
    return slice(start, start + done)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _named(kind: str, keep: bool) -> str:
    """Computing with a graph costs more than without."""
    return f"{kind}_kept" if keep else kind


def _later(kind: str, keep: bool) -> str | None:
    return f"{kind}_backward" if keep else None


def _size(sequence: slice) -> int:
    """Attention over sequences of one power of two costs alike."""
    length: int = sequence.stop - sequence.start
    return length.bit_length()
