"""Log-probabilities of target tokens over a large vocabulary, and their gradient: three ways, one interface.

The logits of all tokens would take more memory than the model: they are made for some rows, turned into the
gradient with respect to the hidden states, and forgotten. Only rows that are trained on are computed at all.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels import Ops, QuantisedWeight
from kernels.training import TrainingOps, backward
from runtime.model.decoder import Decoder
from runtime.model.token_rows import TokenRows
from runtime.trainer.data.example import MicroBatch
from runtime.trainer.slices import Slice, Slices


@dataclass(frozen=True, eq=False)
class TargetScores:
    """The R targets of a micro-batch, or some of them, under the model."""

    logprobs: Tensor
    """[R] float32, nats."""
    correct: Tensor
    """[R] bool: True where the target was the likeliest token."""


class ScoreBuffer:
    """The scores of a micro-batch, filled part by part, and the gradient of the hidden states."""

    def __init__(self, hidden: Tensor, batch: MicroBatch, slopes: Tensor | None) -> None:
        """hidden [T, hidden] after the last layer; slopes [R] float32: the derivative of a loss by each
        log-probability, or None where no gradient is due."""
        self.hidden = hidden
        self.batch = batch
        self.slopes = slopes
        self.scores = TargetScores(
            torch.empty(batch.num_trained, device=hidden.device),
            torch.empty(batch.num_trained, dtype=torch.bool, device=hidden.device),
        )
        self.grad = None if slopes is None else torch.zeros_like(hidden)
        """[T, hidden]"""

    def slopes_of(self, part: slice) -> Tensor | None:
        return None if self.slopes is None else self.slopes[part]

    def put(self, part: slice, found: TargetScores) -> None:
        """Store the scores of some rows."""
        self.scores.logprobs[part] = found.logprobs
        self.scores.correct[part] = found.correct

    def put_grad(self, part: slice, grad: Tensor) -> None:
        """Store the gradient [rows, hidden] of some rows' hidden states."""
        assert self.grad is not None, "there are slopes"
        self.grad[self.batch.rows[part]] = grad


class Head(Protocol):
    """The part of a model above its last layer, as a loss sees it."""

    def fill(self, buffer: ScoreBuffer) -> Slices:
        """Compute the scores of all rows, and with slopes the gradient of the hidden states."""


# -- chunked vocabulary ----------------------------------------------------------------------------
#
# Reading the vocabulary's weights takes as long as computing with a few rows, so slices are cut along the vocabulary,
# not along the rows.

# Rows of logits that are held at once, and the fewest that a slice scores.
MOST_ROWS, LEAST_ROWS = 128, 8
# Columns of logits in a slice: BLAS packs its inputs, and keeps the buffers.
LEAST_VOCABULARY, MOST_VOCABULARY = 2048, 8192


AddGrad = Callable[[slice, Tensor], None]
"""Adds the gradient [n, hidden] of some of a head's own rows."""


class ChunkedHead:
    """The decoder's head in slices of its vocabulary. On ranks, each computes its own columns."""

    def __init__(
        self, decoder: Decoder, ops: Ops, rows: TokenRows | None = None, add_grad: AddGrad | None = None
    ) -> None:
        """`rows` stand in place of the decoder's own, and beyond; `add_grad` takes their gradient; None: they are not
        trained."""
        self._decoder = decoder
        self._ops = ops
        self._rows = rows
        self._add_grad = add_grad

    def fill(self, buffer: ScoreBuffer) -> Slices:
        for start in range(0, buffer.batch.num_trained, MOST_ROWS):
            yield from self._fill(buffer, slice(start, min(start + MOST_ROWS, buffer.batch.num_trained)))

    def _fill(self, buffer: ScoreBuffer, part: slice) -> Slices:
        """Fill in some rows; their logits are gone when it is done."""
        rows, slopes = buffer.batch.rows[part], buffer.slopes_of(part)
        targets = buffer.batch.targets[part]
        chunked = self._logits(buffer.hidden[rows], with_grad=slopes is not None)
        size = len(rows).bit_length()

        def score(some: slice) -> None:
            found = chunked.score(some, targets[some], None if slopes is None else slopes[some])
            buffer.put(slice(part.start + some.start, part.start + some.stop), found)

        yield from by_parts(f"logits/{size}", chunked.width, LEAST_VOCABULARY, chunked.logits, most=MOST_VOCABULARY)
        yield from by_parts("logprobs", len(rows), LEAST_ROWS, score)
        if slopes is not None:
            kind = f"logits_backward/{size}"
            yield from by_parts(kind, chunked.width, LEAST_VOCABULARY, chunked.backward, most=MOST_VOCABULARY)
            buffer.put_grad(part, chunked.hidden_grad())

    def _logits(self, hidden: Tensor, *, with_grad: bool) -> "ChunkedLogits":
        if self._rows is None:
            return ChunkedLogits(self._decoder, self._ops, hidden, with_grad=with_grad)
        kind = CopiedLogits if self._rows.covers(self._decoder.spec.vocab_size) else ReplacedLogits
        return kind(self._decoder, self._ops, hidden, self._rows, self._add_grad, with_grad=with_grad)


class ChunkedLogits:
    """The logits of R rows and the gradient of the hidden states below them, some of the vocabulary at a time:
    `logits` for all of it, `score` for all rows, then `backward` for all of it, and `hidden_grad`.

    Of several ranks each makes and uses its own `width` columns; all of them score all rows.
    """

    def __init__(self, decoder: Decoder, ops: Ops, hidden: Tensor, *, with_grad: bool) -> None:
        """hidden [R, hidden] before the final norm."""
        self._decoder = decoder
        self._leaf = hidden.detach().requires_grad_(with_grad)
        with torch.set_grad_enabled(with_grad):
            self._above = decoder.norm(ops, self._leaf)
        self._normed = self._above.detach()
        self._own = torch.empty(len(hidden), self._own_width, device=hidden.device)
        """[R, own] float32: the logits of this rank's tokens."""
        self._logits: Tensor | None = None
        """[R, vocab] float32, once all are there: first the logits, then the gradient with respect to them."""
        head = self._quantised
        self._turned = self._normed if head is None else head.turned(self._normed)
        """The normed hidden states as the head's `factor` meets them."""
        self._grad = torch.zeros_like(self._turned)
        """Its gradient."""

    @property
    def _quantised(self) -> QuantisedWeight | None:
        """The head, where it is not in floating point."""
        head = self._decoder.head
        return head if isinstance(head, QuantisedWeight) else None

    @property
    def width(self) -> int:
        """Columns to make, the same on all ranks."""
        return self._decoder.vocabulary.width

    @property
    def _own_width(self) -> int:
        return self._decoder.vocabulary.split.size

    def logits(self, tokens: slice) -> None:
        """Compute the logits of some of the vocabulary."""
        head, out = self._decoder.head_rows(tokens).t(), self._own[:, tokens]
        if head.dtype is out.dtype:
            torch.mm(self._turned, head, out=out)
        else:
            out.copy_(self._turned @ head)

    def score(self, rows: slice, targets: Tensor, slopes: Tensor | None) -> TargetScores:
        """Score the targets [n] of some rows; with `slopes` [n], their logits become the gradient of the sum of slope
        times log-probability."""
        if self._logits is None:
            self._logits = self._joined()
        spec, logits = self._decoder.spec, self._logits[rows]
        if spec.logit_scale != 1.0:
            logits *= spec.logit_scale
        bend = None
        if spec.logit_softcap:
            torch.tanh(logits.div_(spec.logit_softcap), out=logits)
            bend = 1 - logits.square() if slopes is not None else None
            logits *= spec.logit_softcap
        found = score_logits(logits, targets, slopes)
        if bend is not None:
            logits *= bend
        if slopes is not None and spec.logit_scale != 1.0:
            logits *= spec.logit_scale
        return found

    def _joined(self) -> Tensor:
        """[R, vocab] float32 of all tokens."""
        return self._decoder.vocabulary.join(self._own)

    def backward(self, tokens: slice) -> None:
        """Add the contribution of some of the vocabulary to the gradient below."""
        assert self._logits is not None, "scored before"
        head = self._decoder.head_rows(tokens)
        own = self._decoder.vocabulary.split.pick(self._logits, 1)
        self._grad.addmm_(own[:, tokens].to(head.dtype), head)

    def hidden_grad(self) -> Tensor:
        """[R, hidden]."""
        backward([self._above], [self._whole_grad()])
        assert self._leaf.grad is not None
        return self._leaf.grad

    def _whole_grad(self) -> Tensor:
        """The gradient of the normed hidden states, of all ranks' columns."""
        head = self._quantised
        return self._decoder.group.all_reduce(self._grad if head is None else head.turned_back(self._grad))


class ReplacedLogits(ChunkedLogits):
    """The logits of a head of which some rows are others, or come after the decoder's own. All ranks compute these."""

    def __init__(
        self, decoder: Decoder, ops: Ops, hidden: Tensor, rows: TokenRows, add_grad: AddGrad | None, *, with_grad: bool
    ) -> None:
        self._rows = rows
        self._weight = rows.rows.detach().to(decoder.dtype)
        self._add_grad = add_grad
        self._rows_grad: Tensor | None = None
        """[R, hidden], what the rows add to the gradient of the normed hidden states."""
        super().__init__(decoder, ops, hidden, with_grad=with_grad)

    def _joined(self) -> Tensor:
        joined, ids = super()._joined(), self._rows.ids
        if (further := self._rows.size - joined.shape[1]) > 0:
            joined = torch.nn.functional.pad(joined, (0, further), value=-math.inf)
        joined[:, ids] = (self._normed @ self._weight.t()).float()
        return joined

    def backward(self, tokens: slice) -> None:
        assert self._logits is not None, "scored before"
        if self._rows_grad is None:
            found = self._logits[:, self._rows.ids].to(self._weight.dtype)
            self._logits[:, self._rows.ids] = 0.0  # so that the decoder's own rows add nothing
            self._rows_grad = found @ self._weight
            if self._add_grad is not None:
                self._add_grad(slice(0, len(self._weight)), found.t() @ self._normed)
        super().backward(tokens)

    def _whole_grad(self) -> Tensor:
        assert self._rows_grad is not None, "after `backward`"
        return super()._whole_grad() + self._rows_grad


class CopiedLogits(ChunkedLogits):
    """The logits of a whole head in place of the decoder's own, alike on all ranks."""

    def __init__(
        self, decoder: Decoder, ops: Ops, hidden: Tensor, rows: TokenRows, add_grad: AddGrad | None, *, with_grad: bool
    ) -> None:
        self._rows = rows
        self._add_grad = add_grad
        super().__init__(decoder, ops, hidden, with_grad=with_grad)

    @property
    def _quantised(self) -> None:
        return None

    @property
    def width(self) -> int:
        return self._rows.size

    @property
    def _own_width(self) -> int:
        return self._rows.size

    def logits(self, tokens: slice) -> None:
        self._own[:, tokens] = (self._normed @ self._part(tokens).t()).float()

    def _joined(self) -> Tensor:
        return self._own

    def backward(self, tokens: slice) -> None:
        assert self._logits is not None, "scored before"
        weight = self._part(tokens)
        found = self._logits[:, tokens].to(weight.dtype)
        self._grad.addmm_(found, weight)
        if self._add_grad is not None:
            self._add_grad(tokens, found.t() @ self._normed)

    def _part(self, tokens: slice) -> Tensor:
        return self._rows.rows.detach()[tokens].to(self._decoder.dtype)

    def _whole_grad(self) -> Tensor:
        return self._grad


def score_logits(logits: Tensor, targets: Tensor, slopes: Tensor | None) -> TargetScores:
    """Score targets [R] by logits [R, vocab] float32, which are overwritten: with `slopes` [R] by the gradient of the
    sum of slope times log-probability, else by likelihoods."""
    best = logits.amax(-1, keepdim=True)
    index = targets.unsqueeze(1)
    at_target = logits.gather(1, index) - best
    logits.sub_(best).exp_()
    total = logits.sum(-1, keepdim=True)
    if slopes is not None:
        column = slopes.unsqueeze(1)
        logits.mul_(column.neg() / total)
        logits.scatter_add_(1, index, column)
    return TargetScores((at_target - total.log()).squeeze(1), (at_target == 0).squeeze(1))


# -- fused op --------------------------------------------------------------------------------------
#
# One op goes from hidden states to log-probabilities and their gradient, and keeps no logits.
#
# On a GPU a slice is one call over some rows, which reads the vocabulary's weights three times. With fewer than
# `LEAST_FUSED_ROWS` that takes longer than computing with them; with more than `MOST_FUSED_ROWS` the op's own chunk of
# logits grows large (64 MiB in bfloat16). Between them `Pacer` cuts to what requests allow. By arithmetic, not
# measured: the least rows, with a vocabulary of 128k and a hidden size of 4096, are 0.8 TFLOP, a millisecond or two of
# an H100.

LEAST_FUSED_ROWS, MOST_FUSED_ROWS = 256, 4096


class FusedHead:
    """The decoder's head as `TrainingOps.linear_cross_entropy`, some rows a slice. The same values as `ChunkedHead`."""

    def __init__(self, decoder: Decoder, ops: TrainingOps) -> None:
        self._decoder = decoder
        self._ops = ops

    def fill(self, buffer: ScoreBuffer) -> Slices:
        kind = "fused_logprobs" if buffer.slopes is None else "fused_logprobs_backward"
        yield from by_parts(
            kind,
            buffer.batch.num_trained,
            LEAST_FUSED_ROWS,
            lambda part: self._fill(buffer, part),
            most=MOST_FUSED_ROWS,
        )

    def _fill(self, buffer: ScoreBuffer, part: slice) -> None:
        rows, slopes, spec = buffer.batch.rows[part], buffer.slopes_of(part), self._decoder.spec
        leaf = buffer.hidden[rows].detach().requires_grad_(slopes is not None)
        with torch.set_grad_enabled(slopes is not None):
            above = self._decoder.norm(self._ops, leaf)
        found = self._ops.linear_cross_entropy(
            above.detach(),
            self._decoder.head,
            buffer.batch.targets[part],
            None if slopes is None else -slopes,
            scale=spec.logit_scale,
            softcap=spec.logit_softcap,
        )
        buffer.put(part, TargetScores(-found.loss, found.correct))
        if found.grad is not None:
            backward([above], [found.grad])
            assert leaf.grad is not None
            buffer.put_grad(part, leaf.grad)


def head_of(
    decoder: Decoder,
    ops: TrainingOps,
    hidden: Tensor,
    rows: TokenRows | None = None,
    add_grad: AddGrad | None = None,
) -> Head:
    """The fused head where the op takes such hidden states and this rank has the whole vocabulary; else the chunked.
    `rows` and `add_grad`: see `ChunkedHead`."""
    if rows is not None:
        return ChunkedHead(decoder, ops, rows, add_grad)
    if decoder.group.size == 1 and ops.fuses_loss(hidden):
        return FusedHead(decoder, ops)
    return ChunkedHead(decoder, ops)


# -- transformers' head ----------------------------------------------------------------------------


class LogitsHead:
    """A differentiable function from hidden states to logits, some rows a slice."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        """`logits`: [R, hidden] → [R, vocab] float32."""
        self._logits = logits

    def fill(self, buffer: ScoreBuffer) -> Slices:
        kind = "head" if buffer.slopes is None else "head_backward"
        count = buffer.batch.num_trained
        yield from by_parts(kind, count, LEAST_ROWS, lambda part: self._fill(buffer, part), most=MOST_ROWS)

    def _fill(self, buffer: ScoreBuffer, part: slice) -> None:
        slopes = buffer.slopes_of(part)
        leaf = buffer.hidden[buffer.batch.rows[part]].detach().requires_grad_(slopes is not None)
        with torch.set_grad_enabled(slopes is not None):
            logits = self._logits(leaf)
        change = logits.detach().clone()
        buffer.put(part, score_logits(change, buffer.batch.targets[part], slopes))
        if slopes is not None:
            backward([logits], [change])
            assert leaf.grad is not None
            buffer.put_grad(part, leaf.grad)


def by_parts(kind: str, amount: int, least: int, work: Callable[[slice], None], *, most: int | None = None) -> Slices:
    """`work` on all of `amount`, a part a slice, each of at most `most`."""
    start = 0
    while start < amount:
        left = min(amount - start, most or amount)
        done = yield Slice(kind, left, min(least, left))
        work(slice(start, start + done))
        start += done
