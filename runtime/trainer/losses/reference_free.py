"""Losses of pairs without a reference: contrastive (CPO, arXiv:2401.08417), by mean token log-probability (SimPO,
arXiv:2405.14734), and by odds ratio (ORPO, arXiv:2403.07691)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from runtime.trainer.losses.loss import LossInputs, LossValue
from runtime.trainer.losses.pairs import PairLoss, chosen_nll, chosen_of, pair_metrics, preference_nll, rejected_of


@dataclass(frozen=True)
class Cpo(PairLoss):
    """Sums of log-probabilities are rewards; the likelihood of the chosen answer stands beside."""

    by_token: ClassVar[bool] = False
    """True to take means of the answers' tokens."""

    beta: float = 0.1
    """Scale of rewards."""
    label_smoothing: float = 0.0
    """Share of the pairs that are expected to be the wrong way round."""
    sft: float = 1.0
    """Weight of the chosen answers' negative log-likelihood, a mean over tokens."""

    def __call__(self, inputs: LossInputs) -> LossValue:
        logps = inputs.means(inputs.logprobs) if self.by_token else inputs.sums(inputs.logprobs)
        margins = self.beta * (chosen_of(logps) - rejected_of(logps)) - self.target_margin
        total = preference_nll(margins, self.label_smoothing).sum()
        metrics = pair_metrics(self.beta * logps, logps)
        if self.sft:
            nll = chosen_nll(inputs) * len(margins)
            total = total + self.sft * nll
            metrics["nll_loss"] = nll.detach()
        return LossValue(total, metrics)

    @property
    def target_margin(self) -> float:
        """Margin of rewards that is aimed at."""
        return 0.0


@dataclass(frozen=True)
class Simpo(Cpo):
    """Means of log-probabilities are rewards, with a margin that the chosen one is to have."""

    by_token: ClassVar[bool] = True

    gamma: float = 0.5

    @property
    def target_margin(self) -> float:
        return self.gamma


@dataclass(frozen=True)
class Orpo(PairLoss):
    """Likelihood of the chosen text, its prompt included as in TRL, with a penalty on the rejected answer's odds: the
    odds ratio of mean token probabilities."""

    beta: float = 0.1
    """Weight of the odds ratio (lambda in the paper)."""

    def __call__(self, inputs: LossInputs) -> LossValue:
        means = inputs.means(inputs.logprobs)
        # A token whose probability rounds to 1 has infinite odds: so close to it, their gradient is cut off.
        odds = means - torch.log(-torch.expm1(means.clamp(max=-1e-7)))
        log_odds = chosen_of(odds) - rejected_of(odds)
        ratio = logsigmoid(log_odds)
        nll = chosen_nll(inputs)
        pairs = len(log_odds)
        metrics = {
            **pair_metrics(self.beta * means, means),
            "nll_loss": nll.detach() * pairs,
            "log_odds_ratio": ratio.detach().sum(),
            "log_odds_chosen": log_odds.detach().sum(),
        }
        return LossValue(nll * pairs - self.beta * ratio.sum(), metrics)
