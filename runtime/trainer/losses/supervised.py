"""Supervised fine-tuning: cross-entropy of the targets, a mean over tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.trainer.data.example import MicroBatch
from runtime.trainer.losses.loss import Loss, LossInputs, LossValue


@dataclass(frozen=True)
class Supervised(Loss):
    """Negative log-likelihood in nats, each sequence times its weight. Its units are tokens."""

    def __call__(self, inputs: LossInputs) -> LossValue:
        return LossValue(-(inputs.logprobs.double() * _of_tokens(inputs.weights, inputs.trained)).sum())

    def units(self, trained: Sequence[int]) -> int:
        return sum(trained)

    def slopes(self, batch: MicroBatch) -> Tensor:
        return -_of_tokens(batch.weights, batch.trained)


def _of_tokens(weights: Tensor, trained: Sequence[int]) -> Tensor:
    """The sequences' weights [S] for each of their targets, [R]."""
    return weights.repeat_interleave(torch.tensor(trained, device=weights.device), output_size=sum(trained))
