"""Odds-ratio preference optimisation (arXiv:2403.07691): supervised, with a penalty on the rejected answer's odds."""

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from runtime.trainer.losses.loss import LossInputs, LossValue
from runtime.trainer.losses.pairs import PairLoss, chosen_nll, chosen_of, pair_metrics, rejected_of


@dataclass(frozen=True)
class Orpo(PairLoss):
    """Likelihood of the chosen text, its prompt included as in TRL, and the odds ratio of mean token probabilities."""

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
