"""Forward and backward of one micro-batch, in slices: the layers one after the other, the loss, and back."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.training import TrainingOps
from runtime.trainer.fused_loss import LEAST_ROWS as LEAST_FUSED
from runtime.trainer.fused_loss import MOST_ROWS as MOST_FUSED
from runtime.trainer.fused_loss import fused_cross_entropy, fuses
from runtime.trainer.lora import TrainableLora
from runtime.trainer.loss import Score, Vocabulary
from runtime.trainer.microbatch import MicroBatch
from runtime.trainer.slices import Slice, Slices
from runtime.trainer.stages import Context, LayerStep
from runtime.workers.decoder import Decoder

MOST_ROWS = 128
"""So many rows of logits are held at once."""
LEAST_VOCABULARY, MOST_VOCABULARY = 2048, 8192
LEAST_ROWS = 8
"""And they are made and used so many columns, or rows, at once: BLAS packs what it multiplies, and keeps the room."""


class MicroStep:
    """The work on one micro-batch. `forward_backward` and `evaluate` are generators of slices."""

    def __init__(
        self,
        decoder: Decoder,
        ops: TrainingOps,
        lora: TrainableLora,
        batch: MicroBatch,
        *,
        dropout: float = 0.0,
        seed: int = 0,
        checkpointing: bool = True,
    ) -> None:
        """`seed` decides the dropout masks."""
        self._checkpointing = checkpointing
        self._context = Context(
            decoder=decoder,
            ops=ops,
            lora=lora,
            batch=batch,
            dropout=dropout,
            seed=seed,
            angles=decoder.angles(batch.positions),
            lowest=min((layer for layer, _ in lora.linears), default=0),
        )
        self.score = Score()

    def forward_backward(self, weight: float) -> Slices:
        """Add the gradient of `weight` times the summed loss to the parameters' `grad`. Then `score` is set."""
        context = self._context
        layers: list[LayerStep] = []
        hidden = self._embedded()
        for layer in context.decoder.layers:
            step = LayerStep(context, layer, hidden)
            trained = layer.index >= context.lowest
            hidden = yield from step.forward(keep=trained and not self._checkpointing)
            if trained:
                layers.append(step)
        grad = torch.zeros_like(hidden)
        yield from self._loss(hidden, grad, weight)
        del hidden, step
        while layers:
            grad = yield from layers.pop().backward(grad)

    def evaluate(self) -> Slices:
        """Only the `score`."""
        hidden = self._embedded()
        for layer in self._context.decoder.layers:
            hidden = yield from LayerStep(self._context, layer, hidden).forward(keep=False)
        yield from self._loss(hidden, None, 0.0)

    def _embedded(self) -> Tensor:
        batch = self._context.batch
        return self._context.decoder.embed(batch.token_ids, batch.positions)

    def _loss(self, hidden: Tensor, grad: Tensor | None, weight: float) -> Slices:
        """Score the rows that are trained on; write the gradient of the hidden states into `grad`."""
        if fuses(self._context.decoder, self._context.ops, hidden):
            yield from self._fused_loss(hidden, grad, weight)
            return
        for start in range(0, self._context.batch.num_trained, MOST_ROWS):
            part = slice(start, min(start + MOST_ROWS, self._context.batch.num_trained))
            yield from self._loss_of(part, hidden, grad, weight)

    def _loss_of(self, part: slice, hidden: Tensor, grad: Tensor | None, weight: float) -> Slices:
        """The same for some of these rows; their logits are gone when it is done."""
        context = self._context
        rows, targets = context.batch.rows[part], context.batch.targets[part]
        head = Vocabulary(context.decoder, context.ops, hidden[rows], targets, with_grad=grad is not None)
        size = len(rows).bit_length()

        def score(rows: slice) -> None:
            self.score.add(head.cross_entropy(rows, None if grad is None else weight))

        yield from _all(f"logits/{size}", head.width, LEAST_VOCABULARY, head.logits, most=MOST_VOCABULARY)
        yield from _all("cross_entropy", len(rows), LEAST_ROWS, score)
        if grad is not None:
            kind = f"logits_backward/{size}"
            yield from _all(kind, head.width, LEAST_VOCABULARY, head.backward, most=MOST_VOCABULARY)
            grad[rows] = head.hidden_grad()

    def _fused_loss(self, hidden: Tensor, grad: Tensor | None, weight: float) -> Slices:
        """The same, some rows a slice."""
        context = self._context

        def work(part: slice) -> None:
            rows, targets = context.batch.rows[part], context.batch.targets[part]
            share = None if grad is None else weight
            score, found = fused_cross_entropy(context.decoder, context.ops, hidden[rows], targets, share)
            self.score.add(score)
            if grad is not None and found is not None:
                grad[rows] = found

        kind = "fused_score" if grad is None else "fused_loss"
        yield from _all(kind, context.batch.num_trained, LEAST_FUSED, work, most=MOST_FUSED)


def _all(kind: str, amount: int, least: int, work: Callable[[slice], None], *, most: int | None = None) -> Slices:
    """`work` on all of it, part by part."""
    start = 0
    while start < amount:
        left = min(amount - start, most or amount)
        done = yield Slice(kind, left, min(least, left))
        work(slice(start, start + done))
        start += done
