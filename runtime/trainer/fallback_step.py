"""Forward and backward of one micro-batch through transformers' modules, a layer a slice.

What happens inside a layer is not known, so it is not cut; each layer is a graph of its own between detached tensors,
as in `runtime.trainer.step`. A model whose layers need more than the hidden states of the one before is one slice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import Ops
from runtime.trainer.lora import TrainableLora, TrainingAdaptation
from runtime.trainer.loss import Score, cross_entropy
from runtime.trainer.microbatch import MicroBatch
from runtime.trainer.slices import Slice, Sliced, Slices
from runtime.trainer.step import LEAST_ROWS, MOST_ROWS
from runtime.workers.attention import PackedAttention
from runtime.workers.fallback import FallbackDecoder
from runtime.workers.fallback.frames import LayerCall


@dataclass(frozen=True, eq=False)
class _Kept:
    """A stage that was computed: its detached input, and what it made of it."""

    leaf: Tensor
    out: Tensor


class FallbackStep:
    """As `runtime.trainer.step.MicroStep`."""

    def __init__(
        self,
        model: FallbackDecoder,
        ops: Ops,
        lora: TrainableLora,
        batch: MicroBatch,
        *,
        dropout: float = 0.0,
        seed: int = 0,
        checkpointing: bool = True,
    ) -> None:
        self._model = model
        self._ops = ops
        self._batch = batch
        self._checkpointing = checkpointing
        self._attention = PackedAttention(ops, [part.stop - part.start for part in batch.sequences], model.spec)
        every = slice(0, batch.num_tokens)
        self._adaptation = TrainingAdaptation(lora, dropout=dropout, seed=seed, rows=every, num_tokens=batch.num_tokens)
        self._calls: list[LayerCall] = []
        self.score = Score()

    def forward_backward(self, weight: float) -> Slices:
        """See `MicroStep.forward_backward`."""
        hidden = self._embed()
        stages, tokens = self._stages, self._batch.num_tokens
        inputs: list[Tensor] = []
        kept: list[_Kept | None] = []
        for stage in range(stages):
            yield Slice("fallback_layer", tokens, tokens)
            inputs.append(hidden)
            made = self._run(stage, hidden, keep=not self._checkpointing)
            kept.append(None if self._checkpointing else made)
            hidden = made.out.detach()
        grad = torch.zeros_like(hidden)
        yield from self._loss(hidden, grad, weight)
        for stage in reversed(range(stages)):
            below, one = inputs.pop(), kept.pop()
            yield Slice("fallback_backward" if one else "fallback_backward_again", tokens, tokens)
            one = one or self._run(stage, below, keep=True)
            if one.out.requires_grad:
                torch.autograd.backward(one.out, grad)
            if stage and one.leaf.grad is not None:
                grad = one.leaf.grad

    def evaluate(self) -> Slices:
        """Only the `score`."""
        hidden = self._embed()
        tokens = self._batch.num_tokens
        for stage in range(self._stages):
            yield Slice("fallback_layer", tokens, tokens)
            hidden = self._run(stage, hidden, keep=False).out
        yield from self._loss(hidden, None, 0.0)

    @property
    def _stages(self) -> int:
        return self._model.spec.num_layers if self._model.separable else 1

    def _embed(self) -> Tensor:
        with torch.no_grad():
            hidden, self._calls = self._model.embed(self._batch.token_ids, self._batch.positions)
        return hidden

    def _run(self, stage: int, hidden: Tensor, *, keep: bool) -> _Kept:
        # Nothing below the first layer is trained, so its input needs no gradient.
        leaf = hidden.detach().requires_grad_(keep and stage > 0)
        model, batch = self._model, self._batch
        with torch.set_grad_enabled(keep):
            if model.separable:
                call = self._calls[stage]
                out = model.run_layer(stage, leaf, call, self._ops, self._attention, self._adaptation)
            else:
                out = model.forward(batch.token_ids, batch.positions, self._attention, self._adaptation, self._ops)
        return _Kept(leaf, out)

    def _logits(self, hidden: Tensor) -> Tensor:
        """What the last stage gave, [R, hidden] → [R, vocab] float32."""
        return self._model.logits(self._model.finish(hidden) if self._model.separable else hidden)

    def _loss(self, hidden: Tensor, grad: Tensor | None, weight: float) -> Slices:
        start, batch = 0, self._batch
        while start < batch.num_trained:
            done = yield from _some_rows("score" if grad is None else "loss", batch.num_trained - start)
            part = slice(start, start + done)
            rows, targets = batch.rows[part], batch.targets[part]
            leaf = hidden[rows].detach().requires_grad_(grad is not None)
            with torch.set_grad_enabled(grad is not None):
                logits = self._logits(leaf)
            change = logits.detach().clone()
            self.score.add(cross_entropy(change, targets, None if grad is None else weight))
            if grad is not None:
                logits.backward(change)  # type: ignore[no-untyped-call]
                assert leaf.grad is not None
                grad[rows] = leaf.grad
            start += done


def _some_rows(kind: str, left: int) -> Sliced[int]:
    return (yield Slice(kind, min(left, MOST_ROWS), min(LEAST_ROWS, left)))
