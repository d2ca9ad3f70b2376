"""The ops of training on a GPU: as everywhere, but for the loss."""

from torch import Tensor

from kernels.quantised import Weight
from kernels.training import TokenLosses, TrainingOps
from kernels.triton.cross_entropy import linear_cross_entropy
from kernels.triton.launch import takes


class TritonTrainingOps(TrainingOps):
    """The loss goes over the vocabulary in chunks."""

    def fuses_loss(self, hidden: Tensor) -> bool:
        return takes(hidden)

    def linear_cross_entropy(
        self,
        hidden: Tensor,
        weight: Weight,
        targets: Tensor,
        share: float | None,
        *,
        scale: float = 1.0,
        softcap: float = 0.0,
    ) -> TokenLosses:
        if not takes(hidden):
            return super().linear_cross_entropy(hidden, weight, targets, share, scale=scale, softcap=softcap)
        return linear_cross_entropy(hidden, weight, targets, share, scale=scale, softcap=softcap)
