"""The work on one micro-batch, for whichever model it is: our decoder, or transformers' modules."""

from typing import Protocol

from kernels.training import TrainingOps
from runtime.trainer.lora import TrainableLora
from runtime.trainer.loss import Score
from runtime.trainer.microbatch import MicroBatch
from runtime.trainer.slices import Slices
from runtime.trainer.step import MicroStep
from runtime.workers.decoder import Decoder
from runtime.workers.model import Model


class Micro(Protocol):
    """See `MicroStep`."""

    score: Score

    def forward_backward(self, weight: float) -> Slices: ...

    def evaluate(self) -> Slices: ...


def micro_step(
    model: Model,
    ops: TrainingOps,
    lora: TrainableLora,
    batch: MicroBatch,
    *,
    dropout: float = 0.0,
    seed: int = 0,
    checkpointing: bool = True,
) -> Micro:
    """Arguments as `MicroStep`'s."""
    if isinstance(model, Decoder):
        return MicroStep(model, ops, lora, batch, dropout=dropout, seed=seed, checkpointing=checkpointing)
    from runtime.trainer.fallback_step import FallbackStep  # imports transformers, as the model has
    from runtime.workers.fallback import FallbackDecoder

    assert isinstance(model, FallbackDecoder)
    return FallbackStep(model, ops, lora, batch, dropout=dropout, seed=seed, checkpointing=checkpointing)
