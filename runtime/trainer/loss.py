"""Cross-entropy over a large vocabulary, a few rows at a time, with its gradient at once.

The logits of all tokens would take more memory than the model: they are made for some rows, turned into the
gradient with respect to the hidden states, and forgotten. Only rows that are trained on are computed at all.
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


def score(decoder: Decoder, hidden: Tensor, targets: Tensor) -> Score:
    """How well hidden [R, hidden], before the final norm, predict targets [R]."""
    with torch.no_grad():
        return _cross_entropy(decoder.logits(hidden), targets)[0]


def score_with_grad(decoder: Decoder, ops: Ops, hidden: Tensor, targets: Tensor, weight: float) -> tuple[Score, Tensor]:
    """The same, and the gradient of `weight` times the summed loss with respect to `hidden` [R, hidden]."""
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        logits = decoder.logits(leaf, ops)
    found, grad = _cross_entropy(logits.detach(), targets, weight)
    logits.backward(grad)  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return found, leaf.grad


def _cross_entropy(logits: Tensor, targets: Tensor, weight: float | None = None) -> tuple[Score, Tensor]:
    """logits [R, vocab] float32, overwritten: by the gradient where a `weight` is given, else by the probabilities."""
    best = logits.amax(-1, keepdim=True)
    index = targets.unsqueeze(1)
    at_target = logits.gather(1, index) - best
    grad = logits.sub_(best).exp_()
    total = grad.sum(-1, keepdim=True)
    found = Score(
        loss=float((total.log() - at_target).double().sum()),
        correct=int((at_target == 0).sum()),
        tokens=len(targets),
    )
    if weight is not None:
        grad.mul_(weight / total)
        grad.scatter_add_(1, index, grad.new_full(index.shape, -weight))
    return found, grad
