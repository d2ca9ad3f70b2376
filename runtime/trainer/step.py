"""Forward and backward of one micro-batch, in slices: the layers one after the other, the loss, and back.

A pass may take micro-batches of several jobs along (`MicroStep.forward_backward`): their tokens are one batch to the
base's linears, and each job's adapter, loss and gradients are those of its own rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels import StackFactors
from kernels.training import TrainingOps
from runtime.model.decoder import Decoder
from runtime.trainer.data.example import MicroBatch, joined_batch
from runtime.trainer.lora import LoraWeights, TrainableLora, mask_seed, mix
from runtime.trainer.losses import Loss, LossTerm, Score, Supervised, apply_losses, score_targets
from runtime.trainer.losses.logprobs import Head, head_of
from runtime.trainer.riding import KeptMemory, Ride
from runtime.trainer.slices import Slice, Sliced, Slices
from runtime.trainer.stages import Context, JobRows, LayerStep
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

    @property
    def joins(self) -> bool: ...

    def begin_ride(self, factors: StackFactors, memory: KeptMemory) -> Ride: ...

    def forward_backward(self, weight: float, beside: Sequence[tuple[Any, float]] = ()) -> Slices: ...

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
        `JobRows`."""
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
        self._job = JobRows(lora, dropout, seed, slice(0, batch.num_tokens), first_row)
        self._context = Context(
            decoder=decoder,
            ops=ops,
            jobs=(self._job,),
            batch=batch,
            angles=decoder.angles(batch.positions),
            lowest=lowest,
            trains_input=trains_input,
        )
        self.ride: Ride | None = None
        """The forward pass, where it is computed beside requests: `forward_backward` only goes back once it is
        complete."""
        self.score = Score()
        self.fraction = 0.0

    @property
    def joins(self) -> bool:
        """True if it can go through the model together with micro-steps of other jobs: all that its adapter does is to
        add products to its rows, and its forward pass is still to do."""
        return self._lora.is_plain and self._vocabulary is None and self.ride is None

    def forward_backward(self, weight: float, beside: Sequence[tuple["MicroStep", float]] = ()) -> Slices:
        """Add the gradient of `weight` times the loss's total to the parameters' `grad`. Then `score` is set.

        `beside`: micro-steps of other jobs on the same decoder, each with its weight, in the same pass. Then all of
        them need `joins`.
        """
        parts: list[tuple[MicroStep, float]] = [(self, weight), *beside]
        micros = [micro for micro, _ in parts]
        context = joined_context([micro._context for micro in micros])
        count = context.decoder.spec.num_layers
        ridden = self.ride if self.ride is not None and self.ride.complete else None
        passes = self._forward_passes - (ridden is not None)
        stages = count * passes + BACKWARD_COST * (count - context.lowest)
        for micro in micros:
            yield from micro._reference(stages)
        if ridden is None:
            layers, hidden = yield from self._kept_forward(context, micros, stages)
        else:
            layers, hidden = self._ridden_layers(ridden), ridden.final
        terms = [micro._term(weight, job.rows.start) for (micro, weight), job in zip(parts, context.jobs, strict=True)]
        scores, grad = yield from apply_losses(terms, self._head(self._lora, hidden), hidden, context.batch)
        for micro, score in zip(micros, scores, strict=True):
            micro.score = score
        assert grad is not None
        del hidden
        while layers:
            grad = yield from layers.pop().backward(grad)
            _advance(micros, BACKWARD_COST / stages)
        if context.trains_input and self._vocabulary is not None:
            self._vocabulary.add_embedding_grad(context.batch.token_ids, grad)

    def _kept_forward(
        self, context: Context, micros: Sequence["MicroStep"], stages: int
    ) -> Sliced[tuple[list[LayerStep], Tensor]]:
        """The trained layers, ready to go back, and the hidden states [T, hidden] after the last one; each layer is one
        of the `stages`."""
        count = context.decoder.spec.num_layers
        layers: list[LayerStep] = []
        inputs = [noisy(m._embedded(m._lora), m._context.batch, m._noise, m._job.seed) for m in micros]
        hidden = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
        # One block for what checkpointing keeps: between the temporaries of layers it would leave holes.
        checkpointing = any(micro._checkpointing for micro in micros)
        kept = hidden.new_empty(count - context.lowest, *hidden.shape) if checkpointing else None
        for layer in context.decoder.layers:
            if kept is not None and layer.index >= context.lowest:
                hidden = kept[layer.index - context.lowest].copy_(hidden)
            step = LayerStep(context, layer, hidden)
            trained = layer.index >= context.lowest
            hidden = yield from step.forward(keep=trained and not checkpointing)
            if trained:
                layers.append(step)
            _advance(micros, 1 / stages)
        return layers, hidden

    def _term(self, weight: float | None, start: int = 0) -> LossTerm:
        return LossTerm(self._loss, self._context.batch, self.reference, weight, start)

    def begin_ride(self, factors: StackFactors, memory: KeptMemory) -> Ride:
        """Set `ride`, the forward pass with these factors as rows of other batches. Without noise."""
        context = self._context
        job = self._job
        seeds = {place: mask_seed(job.seed, *place) for place in self._lora.linears} if job.dropout else {}
        self.ride = Ride(
            self._embedded(self._lora),
            context.batch.sequences,
            memory,
            factors,
            dropout=job.dropout,
            seeds=seeds,
            first_row=job.first_row,
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
        yield from self._reference(stages)
        hidden = yield from self._forward(context, self._lora, stages)
        head = self._head(self._lora, hidden)
        (self.score,), _ = yield from apply_losses([self._term(None)], head, hidden, context.batch)

    @property
    def _forward_passes(self) -> int:
        """Forward passes of the model, that of the reference included where it is due."""
        return 2 if self._loss.needs_reference and self.reference is None else 1

    def _reference(self, stages: int) -> Slices:
        """Set `reference`, for a loss that needs it."""
        if not self._loss.needs_reference or self.reference is not None:
            return
        lora = self._lora.reference
        context = replace(self._context, jobs=(replace(self._job, lora=lora, dropout=0.0),))
        hidden = yield from self._forward(context, lora, stages)
        self.reference = yield from score_targets(self._head(lora, hidden), hidden, context.batch)

    def _forward(self, context: Context, lora: LoraWeights | None, stages: int) -> Sliced[Tensor]:
        """Hidden states [T, hidden] after the last layer, to score alone; each layer is one of the `stages`."""
        hidden = self._embedded(lora)
        for layer in context.decoder.layers:
            hidden = yield from LayerStep(context, layer, hidden).forward(keep=False)
            self.fraction += 1 / stages
        return hidden

    def _embedded(self, lora: LoraWeights | None) -> Tensor:
        """Embeddings [T, hidden]; under the reference new tokens have the rows that they began with."""
        context, vocabulary = self._context, self._vocabulary
        batch = context.batch
        if lora is not self._lora and vocabulary is not None:
            initial = InitialRows(vocabulary.initial, vocabulary.known)
            return context.decoder.embed(batch.token_ids, batch.positions, initial)
        adaptation = context.adaptation(slice(0, batch.num_tokens))
        return context.decoder.embed(batch.token_ids, batch.positions, adaptation)

    def _head(self, lora: LoraWeights | None, hidden: Tensor) -> Head:
        """The head over hidden states; that of the reference has the rows of new tokens as they began."""
        decoder, ops = self._context.decoder, self._context.ops
        if self._vocabulary is None:
            return head_of(decoder, ops, hidden)
        trained = self._vocabulary if lora is self._lora else None
        rows = self._vocabulary.initial.head if trained is None else trained.rows("head")
        return head_of(decoder, ops, hidden, rows, None if trained is None else trained.add_head_grad)


def joined_context(contexts: Sequence[Context]) -> Context:
    """The context of a pass over several batches as one, on the same decoder."""
    first = contexts[0]
    if len(contexts) == 1:
        return first
    batch = joined_batch([context.batch for context in contexts])
    jobs: list[JobRows] = []
    start = 0
    for context in contexts:
        jobs += [replace(job, rows=slice(start + job.rows.start, start + job.rows.stop)) for job in context.jobs]
        start += context.batch.num_tokens
    return replace(
        first,
        jobs=tuple(jobs),
        batch=batch,
        angles=first.decoder.angles(batch.positions),
        lowest=min(context.lowest for context in contexts),
        trains_input=any(context.trains_input for context in contexts),
    )


def _advance(micros: Sequence[MicroStep], part: float) -> None:
    for micro in micros:
        micro.fraction = min(1.0, micro.fraction + part)


# -- offers ----------------------------------------------------------------------------------------
#
# Small micro-batches use the machine badly: each reads all weights, for a few rows. So where several jobs train, a run
# offers each of its micro-batches, and the host that shares out the time has one of the runs take others' along. That
# one computes all of it in its own slices; the others wait meanwhile. Whatever goes wrong in a pass of several ends it,
# and then each of the jobs does its step again by itself: the one that has the error has it alone.

# Tokens of a pass of several jobs, at the most. With more they would gain little, and activations take memory.
MAX_JOINT_TOKENS = 512


class BrokenPass(Exception):
    """A pass of several jobs did not end well; the step's gradients are worth nothing."""


@dataclass(eq=False)
class OfferedMicro:
    """A micro-batch that waits for its pass, or goes through it. Engine thread only."""

    micro: Micro
    weight: float
    """Factor of its loss in the gradient."""
    tokens: int
    beside: Sequence["OfferedMicro"] = field(default=())
    """Other jobs' that this one's run takes along."""
    begun: bool = False
    leader: "OfferedMicro | None" = None
    """The one whose run computes this one's pass too."""
    seconds: float = 0.0
    """Time of the pass so far, for a leader."""
    done: bool = False
    broken: bool = False

    @property
    def waits(self) -> bool:
        """True if another run computes it, and has not ended."""
        return self.leader is not None and not self.done

    @property
    def joint(self) -> bool:
        """True if its pass is one of several jobs."""
        return self.leader is not None or bool(self.beside)

    @property
    def leads(self) -> bool:
        """True while its run computes its pass."""
        return self.begun and self.leader is None and not self.done

    def begin(self, beside: Sequence["OfferedMicro"] = ()) -> None:
        """Let its run compute a pass, with these in it."""
        self.begun, self.beside = True, beside
        for one in beside:
            one.begun, one.leader = True, self

    def slices(self) -> Slices:
        """Its pass; not to be driven before it has begun. Raises `BrokenPass` where one of several failed, or the run
        that computed it has gone."""
        try:
            while not self.begun or self.waits:
                yield Slice("offer", 1)
            if self.broken:
                raise BrokenPass
            if self.leader is None:
                yield from self._lead()
        finally:
            for one in self.beside:
                one.done, one.broken = True, not self.done

    def _lead(self) -> Slices:
        try:
            yield from self.micro.forward_backward(self.weight, [(one.micro, one.weight) for one in self.beside])
        except Exception as error:
            if not self.beside:
                raise
            raise BrokenPass from error
        self.done = True
