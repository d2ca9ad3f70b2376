"""Direct preference optimisation (arXiv:2305.18290), and the losses that came out of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from runtime.trainer.losses.loss import LossInputs, LossValue
from runtime.trainer.losses.pairs import PairLoss, chosen_nll, chosen_of, pair_metrics, preference_nll, rejected_of


@dataclass(frozen=True)
class Dpo(PairLoss):
    """A weighted sum of terms, each a function of the log-ratios of model and reference."""

    needs_reference: ClassVar[bool] = True

    beta: float = 0.1
    """Scale of rewards: how dearly a move away from the reference is paid for."""
    label_smoothing: float = 0.0
    """Share of the pairs that are expected to be the wrong way round."""
    sigmoid: float = 1.0
    """Weight of each term."""
    hinge: float = 0.0
    ipo: float = 0.0
    robust: float = 0.0
    sigmoid_norm: float = 0.0
    nca_pair: float = 0.0
    sppo_hard: float = 0.0
    apo_zero: float = 0.0
    apo_down: float = 0.0
    sft: float = 0.0

    def __call__(self, inputs: LossInputs) -> LossValue:
        assert inputs.reference is not None
        change = inputs.logprobs - inputs.reference
        ratios = inputs.sums(change)
        log_ratios = _Ratios(ratios, inputs.means(change), self.beta, self.label_smoothing)
        losses = torch.zeros_like(chosen_of(ratios))
        for name, term in TERMS.items():
            if weight := getattr(self, name):
                losses = losses + weight * term(log_ratios)
        if self.sft:  # a mean over tokens, the same for every pair
            losses = losses + self.sft * chosen_nll(inputs)
        return LossValue(losses.sum(), pair_metrics(self.beta * ratios, inputs.sums(inputs.logprobs)))


class _Ratios:
    """Log-ratios of model and reference of pairs, each [pairs]."""

    def __init__(self, sums: Tensor, means: Tensor, beta: float, smoothing: float) -> None:
        """Sums and means over each answer, [S]."""
        self.beta, self.smoothing = beta, smoothing
        self.chosen, self.rejected = chosen_of(sums), rejected_of(sums)
        self.margin = self.chosen - self.rejected
        self.mean_margin = chosen_of(means) - rejected_of(means)


def _sigmoid(ratios: _Ratios) -> Tensor:
    return preference_nll(ratios.beta * ratios.margin, ratios.smoothing)


def _hinge(ratios: _Ratios) -> Tensor:
    """SLiC (arXiv:2309.06657)."""
    return torch.relu(1 - ratios.beta * ratios.margin)


def _ipo(ratios: _Ratios) -> Tensor:
    """IPO (arXiv:2310.12036), equation 17, over means of the answers' tokens."""
    return (ratios.mean_margin - 1 / (2 * ratios.beta)).square()


def _robust(ratios: _Ratios) -> Tensor:
    """Unbiased where labels are flipped at random (arXiv:2403.00409)."""
    margin, smoothing = ratios.beta * ratios.margin, ratios.smoothing
    return (smoothing * logsigmoid(-margin) - (1 - smoothing) * logsigmoid(margin)) / (1 - 2 * smoothing)


def _sigmoid_norm(ratios: _Ratios) -> Tensor:
    """DPO over means of the answers' tokens (arXiv:2411.15124)."""
    return -logsigmoid(ratios.beta * ratios.mean_margin)


def _nca_pair(ratios: _Ratios) -> Tensor:
    """Noise-contrastive alignment (arXiv:2402.05369)."""
    chosen, rejected = ratios.beta * ratios.chosen, ratios.beta * ratios.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _sppo_hard(ratios: _Ratios) -> Tensor:
    """Self-play against hard labels (arXiv:2405.00675)."""
    return (ratios.chosen - 0.5 / ratios.beta).square() + (ratios.rejected + 0.5 / ratios.beta).square()


def _apo_zero(ratios: _Ratios) -> Tensor:
    """Anchored (arXiv:2408.06266), where the chosen answers are better than the model's."""
    return 1 - torch.sigmoid(ratios.beta * ratios.chosen) + torch.sigmoid(ratios.beta * ratios.rejected)


def _apo_down(ratios: _Ratios) -> Tensor:
    """Anchored (arXiv:2408.06266), where the chosen answers are worse than the model's."""
    return torch.sigmoid(ratios.beta * ratios.chosen) + 1 - torch.sigmoid(ratios.beta * ratios.margin)


TERMS: Mapping[str, Callable[[_Ratios], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "sigmoid_norm": _sigmoid_norm,
    "nca_pair": _nca_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}
"""Losses of single pairs, by TRL's names. `sft` is the further term of them that looks at the chosen answer alone."""
