"""Forward and backward of one micro-batch, in slices: the layers one after the other, the loss, and back."""

import math
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from kernels import StackFactors
from kernels.training import TrainingOps
from runtime.model.decoder import Decoder
from runtime.trainer.data.example import MicroBatch
from runtime.trainer.lora import TrainableLora, mask_seed, mix
from runtime.trainer.losses import Loss, Score, Supervised, apply_loss, score_targets
from runtime.trainer.losses.logprobs import Head, head_of
from runtime.trainer.riding import KeptMemory, Ride
from runtime.trainer.slices import Sliced, Slices
from runtime.trainer.stages import Context, LayerStep
from runtime.trainer.token_rows import InitialRows

# Cost of a layer's backward pass, in forward passes of it.
BACKWARD_COST = 2


class Micro(Protocol):
    """See `MicroStep`."""

    score: Score
    fraction: float
    """Share of it that is done, from 0 to 1."""
    reference: Tensor | None
    ride: Ride | None

    def begin_ride(self, factors: StackFactors, memory: KeptMemory) -> Ride: ...

    def forward_backward(self, weight: float) -> Slices: ...

    def evaluate(self) -> Slices: ...


def noisy(hidden: Tensor, batch: MicroBatch, alpha: float, seed: int) -> Tensor:
    """Input of the first layer [T, hidden] with the uniform noise of NEFTune (arXiv:2310.05914), whose bound is `alpha`
    / sqrt(tokens of the sequence * hidden size). 0: none."""
    if not alpha:
        return hidden
    generator = torch.Generator(hidden.device).manual_seed(mix(seed, 0x4E4F495345))
    noise = torch.rand(hidden.shape, device=hidden.device, generator=generator).mul_(2).sub_(1)
    for part in batch.sequences:
        noise[part] *= alpha / math.sqrt((part.stop - part.start) * hidden.shape[1])
    return hidden + noise.to(hidden.dtype)


class MicroStep:
    """The work on one micro-batch. `forward_backward` and `evaluate` are generators of slices."""

    def __init__(
        self,
        decoder: Decoder,
        ops: TrainingOps,
        lora: TrainableLora,
        batch: MicroBatch,
        *,
        loss: Loss | None = None,
        dropout: float = 0.0,
        seed: int = 0,
        checkpointing: bool = True,
        reference: Tensor | None = None,
        noise: float = 0.0,
        first_row: int = 0,
    ) -> None:
        """`loss`: supervised by default; `seed` decides the dropout masks and the noise; `reference` [R] are the
        targets' log-probabilities without the adapter, where they are known; `noise`: see `noisy`; `first_row`: see
        `Context`."""
        self._loss = loss or Supervised()
        self._checkpointing = checkpointing
        self._noise = noise
        self._lora = lora
        self.reference = reference
        """[R] log-probabilities under the model without its adapter, or with the one that it went on from, for a loss
        that needs them: given or computed."""
        vocabulary = lora.vocabulary
        trains_input = vocabulary is not None and vocabulary.rows("embedding") is not None
        lowest = 0 if trains_input else min((layer for layer, _ in lora.linears), default=0)
        self._vocabulary = vocabulary
        self._context = Context(
            decoder=decoder,
            ops=ops,
            lora=lora,
            batch=batch,
            dropout=dropout,
            seed=seed,
            angles=decoder.angles(batch.positions),
            lowest=lowest,
            trains_input=trains_input,
            first_row=first_row,
        )
        self.ride: Ride | None = None
        """The forward pass, where it is computed beside requests: `forward_backward` only goes back once it is
        complete."""
        self.score = Score()
        self.fraction = 0.0

    def forward_backward(self, weight: float) -> Slices:
        """Add the gradient of `weight` times the loss's total to the parameters' `grad`. Then `score` is set."""
        context = self._context
        count = context.decoder.spec.num_layers
        ridden = self.ride if self.ride is not None and self.ride.complete else None
        passes = self._forward_passes - (ridden is not None)
        stages = count * passes + BACKWARD_COST * (count - context.lowest)
        reference = yield from self._reference(stages)
        if ridden is None:
            layers, hidden = yield from self._kept_forward(stages)
        else:
            layers, hidden = self._ridden_layers(ridden), ridden.final
        head = self._head(context, hidden)
        self.score, grad = yield from apply_loss(
            self._loss, head, hidden, context.batch, reference=reference, weight=weight
        )
        assert grad is not None
        del hidden
        while layers:
            grad = yield from layers.pop().backward(grad)
            self.fraction += BACKWARD_COST / stages
        if context.trains_input and self._vocabulary is not None:
            self._vocabulary.add_embedding_grad(context.batch.token_ids, grad)

    def _kept_forward(self, stages: int) -> Sliced[tuple[list[LayerStep], Tensor]]:
        """The trained layers, ready to go back, and the hidden states [T, hidden] after the last one; each layer is one
        of the `stages`."""
        context = self._context
        count = context.decoder.spec.num_layers
        layers: list[LayerStep] = []
        hidden = noisy(self._embedded(context), context.batch, self._noise, context.seed)
        # One block for what checkpointing keeps: between the temporaries of layers it would leave holes.
        kept = hidden.new_empty(count - context.lowest, *hidden.shape) if self._checkpointing else None
        for layer in context.decoder.layers:
            if kept is not None and layer.index >= context.lowest:
                hidden = kept[layer.index - context.lowest].copy_(hidden)
            step = LayerStep(context, layer, hidden)
            trained = layer.index >= context.lowest
            hidden = yield from step.forward(keep=trained and not self._checkpointing)
            if trained:
                layers.append(step)
            self.fraction += 1 / stages
        return layers, hidden

    def begin_ride(self, factors: StackFactors, memory: KeptMemory) -> Ride:
        """Set `ride`, the forward pass with these factors as rows of other batches. Without noise."""
        context = self._context
        seeds = {place: mask_seed(context.seed, *place) for place in self._lora.linears} if context.dropout else {}
        self.ride = Ride(
            self._embedded(context),
            context.batch.sequences,
            memory,
            factors,
            dropout=context.dropout,
            seeds=seeds,
            first_row=context.first_row,
        )
        return self.ride

    def _ridden_layers(self, ride: Ride) -> list[LayerStep]:
        """The trained layers as a ride has computed them."""
        context = self._context
        heads, size = context.decoder.heads, context.decoder.spec.head_dim
        layers = []
        for layer in context.decoder.layers[context.lowest :]:
            hidden, qkv, residual, gate_up = ride.kept.layer(layer.index)
            counts = [heads.q.size, heads.kv.size, heads.kv.size]
            q, k, v = torch.split(qkv.view(len(qkv), -1, size), counts, dim=1)
            known = {"q": q, "k": k, "v": v, "residual": residual, "gate_up": gate_up}
            layers.append(LayerStep(context, layer, hidden, known))
        return layers

    def evaluate(self) -> Slices:
        """Only the `score`."""
        context = self._context
        stages = context.decoder.spec.num_layers * self._forward_passes
        reference = yield from self._reference(stages)
        hidden = yield from self._forward(context, stages)
        head = self._head(context, hidden)
        self.score, _ = yield from apply_loss(self._loss, head, hidden, context.batch, reference=reference, weight=None)

    @property
    def _forward_passes(self) -> int:
        """Forward passes of the model, that of the reference included where it is due."""
        return 2 if self._loss.needs_reference and self.reference is None else 1

    def _reference(self, stages: int) -> Sliced[Tensor | None]:
        """Log-probabilities [R] under the reference, for a loss that needs them."""
        if not self._loss.needs_reference or self.reference is not None:
            return self.reference
        context = replace(self._context, lora=self._lora.reference, dropout=0.0)
        hidden = yield from self._forward(context, stages)
        head = self._head(context, hidden)
        self.reference = yield from score_targets(head, hidden, context.batch)
        return self.reference

    def _forward(self, context: Context, stages: int) -> Sliced[Tensor]:
        """Hidden states [T, hidden] after the last layer, to score alone; each layer is one of the `stages`."""
        hidden = self._embedded(context)
        for layer in context.decoder.layers:
            hidden = yield from LayerStep(context, layer, hidden).forward(keep=False)
            self.fraction += 1 / stages
        return hidden

    def _embedded(self, context: Context) -> Tensor:
        batch, vocabulary = context.batch, self._vocabulary
        if context.lora is not self._lora and vocabulary is not None:
            initial = InitialRows(vocabulary.initial, vocabulary.known)
            return context.decoder.embed(batch.token_ids, batch.positions, initial)
        adaptation = context.adaptation(slice(0, batch.num_tokens))
        return context.decoder.embed(batch.token_ids, batch.positions, adaptation)

    def _head(self, context: Context, hidden: Tensor) -> Head:
        """The head over hidden states; that of the reference has the rows of new tokens as they began."""
        if self._vocabulary is None:
            return head_of(context.decoder, context.ops, hidden)
        trained = self._vocabulary if context.lora is self._lora else None
        rows = self._vocabulary.initial.head if trained is None else trained.rows("head")
        return head_of(context.decoder, context.ops, hidden, rows, None if trained is None else trained.add_head_grad)
