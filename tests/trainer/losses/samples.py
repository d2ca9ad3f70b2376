"""Losses that the project has not: the one of docs/adding-a-loss.md, and one of each further kind."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from runtime.trainer.losses import Loss, LossInputs, LossValue

PAGE = Path(__file__).parent.parent.parent.parent / "docs" / "adding-a-loss.md"


def documented_dpo() -> type[Loss]:
    """The class that docs/adding-a-loss.md shows, run as it stands there."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(code, str(PAGE), "exec"), names)
    found = names["Dpo"]
    assert issubclass(found, Loss)
    return found


@dataclass(frozen=True)
class OddsRatio(Loss):
    """Pairs without a reference, by means over tokens, with a likelihood term beside, as ORPO's (arXiv:2403.07691)."""

    group_size = 2
    share: float = 0.25

    def __call__(self, inputs: LossInputs) -> LossValue:
        means = inputs.means(inputs.logprobs)
        odds = means - torch.log1p(-means.exp())
        ratio = logsigmoid(odds[0::2] - odds[1::2])
        return LossValue((-means[0::2] - self.share * ratio).sum(), {"nll": -means[0::2].sum()})


@dataclass(frozen=True)
class ClippedPolicy(Loss):
    """A policy gradient over tokens: advantages are weights, the old policy is the reference (arXiv:1707.06347)."""

    needs_reference = True
    clip: float = 0.3

    def units(self, trained: Sequence[int]) -> int:
        return sum(trained)

    def __call__(self, inputs: LossInputs) -> LossValue:
        assert inputs.reference is not None
        ratio = (inputs.logprobs - inputs.reference).exp()
        advantage = inputs.weights.repeat_interleave(torch.tensor(inputs.trained, device=inputs.weights.device))
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        return LossValue(-torch.minimum(ratio * advantage, clipped * advantage).sum(), {"ratio": ratio.sum()})
