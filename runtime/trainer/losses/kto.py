"""Kahneman-Tversky optimisation (arXiv:2402.01306): single answers, each labelled as desirable or not."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from runtime.trainer.losses.loss import Loss, LossInputs, LossValue


@dataclass(frozen=True)
class Kto(Loss):
    """Units are labelled answers. Each is followed by its prompt with another row's answer, of weight 0, by which the
    divergence from the reference is estimated. The sign of the answer's own weight is its label."""

    group_size: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = True

    beta: float = 0.1
    """Scale of rewards: how dearly a move away from the reference is paid for."""
    desirable_weight: float = 1.0
    """Weight of the losses of desirable answers."""
    undesirable_weight: float = 1.0

    def __call__(self, inputs: LossInputs) -> LossValue:
        assert inputs.reference is not None
        ratios = inputs.sums(inputs.logprobs - inputs.reference)
        own, label = ratios[0::2], inputs.weights[0::2] > 0
        divergence = ratios[1::2].detach().mean().clamp(min=0)
        sign = torch.where(label, 1.0, -1.0)
        weight = torch.where(label, self.desirable_weight, self.undesirable_weight)
        losses = weight * (1 - torch.sigmoid(self.beta * sign * (own - divergence)))
        return LossValue(losses.sum(), *self._metrics(inputs, own.detach(), label, divergence))

    def _metrics(
        self, inputs: LossInputs, ratios: Tensor, label: Tensor, divergence: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Sums over the answers of either kind, and the numbers of those."""
        logps = inputs.sums(inputs.logprobs.detach())[0::2]
        metrics, counts = {"kl": divergence * len(label)}, dict[str, int]()
        for kind, some in (("chosen", label), ("rejected", ~label)):
            found = {f"rewards/{kind}": self.beta * ratios[some].sum(), f"logps/{kind}": logps[some].sum()}
            metrics |= found
            counts |= dict.fromkeys(found, int(some.sum()))
        return metrics, counts

    def summary(self, metrics: dict[str, float]) -> dict[str, float]:
        """With `rewards/margins`, where there are answers of both kinds."""
        means = metrics.get("rewards/chosen"), metrics.get("rewards/rejected")
        if means[0] is None or means[1] is None:
            return metrics
        return {**metrics, "rewards/margins": means[0] - means[1]}
