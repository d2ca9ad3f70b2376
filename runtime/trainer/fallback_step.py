"""Forward and backward of one micro-batch through transformers' modules, a layer a slice.

The inside of a layer is unknown, so it is not cut; each layer is a graph of its own between detached tensors,
as in `runtime.trainer.step`. A model whose layers need more than the hidden states of the one before is one slice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import Ops, StackFactors
from kernels.training import backward
from runtime.model.attention import PackedAttention
from runtime.model.fallback import FallbackDecoder
from runtime.model.fallback.linears import LayerCall
from runtime.model.lora import Adaptation
from runtime.trainer.data.example import MicroBatch
from runtime.trainer.lora import TrainableLora, TrainingAdaptation
from runtime.trainer.losses import Loss, Score, Supervised, apply_loss, score_targets
from runtime.trainer.losses.logprobs import LogitsHead
from runtime.trainer.riding import KeptMemory, Ride
from runtime.trainer.slices import Slice, Sliced, Slices
from runtime.trainer.step import BACKWARD_COST, noisy


@dataclass(frozen=True, eq=False)
class _Kept:
    """A stage that was computed: its detached input, and its output."""

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
        loss: Loss | None = None,
        dropout: float = 0.0,
        seed: int = 0,
        checkpointing: bool = True,
        reference: Tensor | None = None,
        noise: float = 0.0,
    ) -> None:
        self._model = model
        self._loss = loss or Supervised()
        self._head = LogitsHead(self._logits)
        self._ops = ops
        self._batch = batch
        self._checkpointing = checkpointing
        self._noise, self._seed = noise, seed
        self.reference = reference
        """[R] log-probabilities under the model without its adapter, for a loss that needs them: given or computed."""
        self._attention = PackedAttention(ops, [part.stop - part.start for part in batch.sequences], model.spec)
        every = slice(0, batch.num_tokens)
        self._adaptation = TrainingAdaptation(lora, ops, dropout=dropout, seed=seed, rows=every)
        refers = lora.reference
        self._reference_adaptation = (
            None if refers is None else TrainingAdaptation(refers, ops, dropout=0.0, seed=seed, rows=every)
        )
        self._calls: list[LayerCall] = []
        self.ride: Ride | None = None
        """None: transformers' modules do not run beside requests."""
        self.score = Score()
        self.fraction = 0.0

    def begin_ride(self, factors: StackFactors, memory: KeptMemory) -> Ride:
        """See `MicroStep.begin_ride`. Raises `TypeError`."""
        raise TypeError("modules of transformers do not run as rows of other batches")

    @property
    def joins(self) -> bool:
        """False: each runs transformers' modules by itself."""
        return False

    def forward_backward(self, weight: float, beside: Sequence[tuple[Any, float]] = ()) -> Slices:
        """See `MicroStep.forward_backward`. Nothing goes `beside`."""
        stages, tokens = self._stages, self._batch.num_tokens
        passes = stages * (self._forward_passes + BACKWARD_COST)
        reference = yield from self._reference(passes)
        hidden = noisy(self._embed(), self._batch, self._noise, self._seed)
        inputs: list[Tensor] = []
        kept: list[_Kept | None] = []
        for stage in range(stages):
            yield Slice("fallback_layer", tokens, tokens)
            inputs.append(hidden)
            made = self._run(stage, hidden, self._adaptation, keep=not self._checkpointing)
            kept.append(None if self._checkpointing else made)
            hidden = made.out.detach()
            self.fraction += 1 / passes
        self.score, grad = yield from apply_loss(
            self._loss, self._head, hidden, self._batch, reference=reference, weight=weight
        )
        for stage in reversed(range(stages)):
            below, one = inputs.pop(), kept.pop()
            yield Slice("fallback_backward" if one else "fallback_backward_again", tokens, tokens)
            one = one or self._run(stage, below, self._adaptation, keep=True)
            if one.out.requires_grad:
                assert grad is not None
                backward([one.out], [grad])
            if stage and one.leaf.grad is not None:
                grad = one.leaf.grad
            self.fraction += BACKWARD_COST / passes

    def evaluate(self) -> Slices:
        """Only the `score`."""
        passes = self._stages * self._forward_passes
        reference = yield from self._reference(passes)
        hidden = yield from self._forward(self._adaptation, passes)
        self.score, _ = yield from apply_loss(
            self._loss, self._head, hidden, self._batch, reference=reference, weight=None
        )

    @property
    def _forward_passes(self) -> int:
        """Forward passes of the model, that of the reference included where it is due."""
        return 2 if self._loss.needs_reference and self.reference is None else 1

    def _reference(self, passes: int) -> Sliced[Tensor | None]:
        """Log-probabilities [R] under the reference, for a loss that needs them."""
        if not self._loss.needs_reference or self.reference is not None:
            return self.reference
        hidden = yield from self._forward(self._reference_adaptation, passes)
        self.reference = yield from score_targets(self._head, hidden, self._batch)
        return self.reference

    def _forward(self, adaptation: Adaptation | None, passes: int) -> Sliced[Tensor]:
        """Output of the last stage [T, hidden], to score alone; each stage is one of the `passes`."""
        hidden = self._embed()
        tokens = self._batch.num_tokens
        for stage in range(self._stages):
            yield Slice("fallback_layer", tokens, tokens)
            hidden = self._run(stage, hidden, adaptation, keep=False).out
            self.fraction += 1 / passes
        return hidden

    @property
    def _stages(self) -> int:
        return self._model.spec.num_layers if self._model.separable else 1

    def _embed(self) -> Tensor:
        with torch.no_grad():
            hidden, self._calls = self._model.embed(self._batch.token_ids, self._batch.positions)
        return hidden

    def _run(self, stage: int, hidden: Tensor, adaptation: Adaptation | None, *, keep: bool) -> _Kept:
        # Nothing below the first layer is trained, so its input needs no gradient.
        leaf = hidden.detach().requires_grad_(keep and stage > 0)
        model, batch = self._model, self._batch
        with torch.set_grad_enabled(keep):
            if model.separable:
                call = self._calls[stage]
                out = model.run_layer(stage, leaf, call, self._ops, self._attention, adaptation)
            else:
                out = model.forward(batch.token_ids, batch.positions, self._attention, adaptation, self._ops)
        return _Kept(leaf, out)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits of the last stage's output, [R, hidden] → [R, vocab] float32."""
        return self._model.logits(self._model.finish(hidden) if self._model.separable else hidden)
