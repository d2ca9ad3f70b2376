"""The ops of training on a GPU: as everywhere, but for the loss, and attention where flash-attn is installed."""

from torch import Tensor

from kernels.quantised import Weight
from kernels.training import TokenLosses, TrainingOps
from kernels.triton.cross_entropy import linear_cross_entropy
from kernels.triton.flash import FlashAttention
from kernels.triton.launch import DEVICE, takes


class TritonTrainingOps(TrainingOps):
    """The loss goes over the vocabulary in chunks."""

    def __init__(self, flash: FlashAttention | None = None) -> None:
        super().__init__()
        self._flash = flash

    @property
    def packs(self) -> bool:
        return self._flash is not None

    def packed_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: list[int],
        scale: float,
        *,
        window: int | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        if self._flash is None or not (q.device.type == DEVICE and self._flash.takes(q)):
            return super().packed_attention(q, k, v, lengths, scale, window=window, softcap=softcap)
        return self._flash.packed(q, k, v, lengths, scale, window=window, softcap=softcap)

    def fuses_loss(self, hidden: Tensor) -> bool:
        return takes(hidden)

    def linear_cross_entropy(
        self,
        hidden: Tensor,
        weight: Weight,
        targets: Tensor,
        shares: Tensor | None,
        *,
        scale: float = 1.0,
        softcap: float = 0.0,
    ) -> TokenLosses:
        if not takes(hidden):
            return super().linear_cross_entropy(hidden, weight, targets, shares, scale=scale, softcap=softcap)
        return linear_cross_entropy(hidden, weight, targets, shares, scale=scale, softcap=softcap)
