"""Cross-entropy over a large vocabulary, a few rows at a time, and its gradient.

The logits of all tokens would take more memory than the model: they are made for some rows, turned into the
gradient with respect to the hidden states, and forgotten. Only rows that are trained on are computed at all. Reading
the vocabulary's weights takes as long as computing with a few rows, so slices are cut along the vocabulary, not along
the rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import Ops
from runtime.workers.decoder import Decoder


@dataclass(slots=True)
class Score:
    """Sums over the tokens that were scored."""

    loss: float = 0.0
    """Nats."""
    correct: int = 0
    """Tokens that were the likeliest one."""
    tokens: int = 0

    def add(self, other: "Score") -> None:
        self.loss += other.loss
        self.correct += other.correct
        self.tokens += other.tokens

    @property
    def mean(self) -> float:
        return self.loss / max(1, self.tokens)

    @property
    def accuracy(self) -> float:
        return self.correct / max(1, self.tokens)


class Vocabulary:
    """The logits of R rows and what their gradient does to the hidden states, some of the vocabulary at a time:
    `logits` for all of it, `cross_entropy` for all rows, then `backward` for all of it, and `hidden_grad`.

    Of several ranks each makes and uses its own `width` columns; all of them score all rows.
    """

    def __init__(self, decoder: Decoder, ops: Ops, hidden: Tensor, targets: Tensor, *, with_grad: bool) -> None:
        """hidden [R, hidden] before the final norm, targets [R] token ids."""
        self._decoder = decoder
        self._targets = targets
        self._leaf = hidden.detach().requires_grad_(with_grad)
        with torch.set_grad_enabled(with_grad):
            self._above = decoder.norm(ops, self._leaf)
        self._normed = self._above.detach()
        own = decoder.vocabulary.split
        self._own = torch.empty(len(hidden), own.size, device=hidden.device)
        """[R, own] float32: the logits of this rank's tokens."""
        self._logits: Tensor | None = None
        """[R, vocab] float32, once all are there: first the logits, then the gradient with respect to them."""
        self._grad = torch.zeros_like(self._normed)

    @property
    def width(self) -> int:
        """Columns to make, the same on all ranks."""
        return self._decoder.vocabulary.width

    def logits(self, tokens: slice) -> None:
        """Compute those of some of the vocabulary."""
        head, out = self._decoder.head_rows(tokens).t(), self._own[:, tokens]
        if head.dtype is out.dtype:
            torch.mm(self._normed, head, out=out)
        else:
            out.copy_(self._normed @ head)

    def cross_entropy(self, rows: slice, weight: float | None) -> Score:
        """Score some rows; with a `weight`, their logits become the gradient of `weight` times the summed loss."""
        if self._logits is None:
            self._logits = self._decoder.vocabulary.join(self._own)
        spec, logits = self._decoder.spec, self._logits[rows]
        if spec.logit_scale != 1.0:
            logits *= spec.logit_scale
        slope = None
        if spec.logit_softcap:
            torch.tanh(logits.div_(spec.logit_softcap), out=logits)
            slope = 1 - logits.square() if weight is not None else None
            logits *= spec.logit_softcap
        found = cross_entropy(logits, self._targets[rows], weight)
        if weight is not None and slope is not None:
            logits *= slope
        if weight is not None and spec.logit_scale != 1.0:
            logits *= spec.logit_scale
        return found

    def backward(self, tokens: slice) -> None:
        """Add what some of the vocabulary gives to the gradient below."""
        assert self._logits is not None, "scored before"
        head = self._decoder.head_rows(tokens)
        own = self._decoder.vocabulary.split.pick(self._logits, 1)
        self._grad.addmm_(own[:, tokens].to(head.dtype), head)

    def hidden_grad(self) -> Tensor:
        """[R, hidden]."""
        self._above.backward(self._decoder.group.add_up(self._grad))  # type: ignore[no-untyped-call]
        assert self._leaf.grad is not None
        return self._leaf.grad


def cross_entropy(logits: Tensor, targets: Tensor, weight: float | None) -> Score:
    """logits [R, vocab] float32, overwritten: by the gradient where a `weight` is given, else by the likelihoods."""
    best = logits.amax(-1, keepdim=True)
    index = targets.unsqueeze(1)
    at_target = logits.gather(1, index) - best
    logits.sub_(best).exp_()
    total = logits.sum(-1, keepdim=True)
    if weight is not None:
        logits.mul_(weight / total)
        logits.scatter_add_(1, index, logits.new_full(index.shape, -weight))
    return Score(
        loss=float((total.log() - at_target).double().sum()),
        correct=int((at_target == 0).sum()),
        tokens=len(targets),
    )
