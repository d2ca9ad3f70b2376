"""Pairs of answers to one prompt: the chosen one, then the rejected one."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from runtime.trainer.losses.loss import Loss, LossInputs


class PairLoss(Loss):
    """A loss over pairs. Its units are pairs."""

    group_size: ClassVar[int] = 2


def chosen_of(values: Tensor) -> Tensor:
    """[S] → those of the chosen answers, [S / 2]."""
    return values[0::2]


def rejected_of(values: Tensor) -> Tensor:
    """[S] → those of the rejected answers, [S / 2]."""
    return values[1::2]


def pair_metrics(rewards: Tensor, logps: Tensor) -> dict[str, Tensor]:
    """The metrics that TRL reports of pairs, as sums over them, from rewards and log-probabilities [S]."""
    rewards, logps = rewards.detach(), logps.detach()
    margins = chosen_of(rewards) - rejected_of(rewards)
    return {
        "rewards/chosen": chosen_of(rewards).sum(),
        "rewards/rejected": rejected_of(rewards).sum(),
        "rewards/margins": margins.sum(),
        "rewards/accuracies": (margins > 0).sum(),
        "logps/chosen": chosen_of(logps).sum(),
        "logps/rejected": rejected_of(logps).sum(),
    }


def chosen_nll(inputs: LossInputs) -> Tensor:
    """Mean negative log-likelihood of all targets of the chosen answers, those in their prompts included: a scalar."""
    parts = torch.split(inputs.logprobs, list(inputs.trained))[0::2]
    return -torch.cat(parts).mean()


def preference_nll(margins: Tensor, smoothing: float) -> Tensor:
    """Negative log-likelihood of preferences [pairs] whose logits are `margins`, of which a share of `smoothing` is
    expected to be the wrong way round."""
    return -logsigmoid(margins) * (1 - smoothing) - logsigmoid(-margins) * smoothing
