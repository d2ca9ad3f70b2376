"""How the adapters of a batch change the decoder, while serving."""

from torch import Tensor

from kernels import AdaptedTokens, LoraSegment, Ops


class BatchAdaptation:
    """The `Adaptation` of one step: every row's own adapter. Changes outputs in place; not for training."""

    def __init__(self, ops: Ops, adapted: list[AdaptedTokens]) -> None:
        self._ops = ops
        self.adapted = adapted

    def __call__(self, layer: int, linear: str, x: Tensor, y: Tensor) -> Tensor:
        place = (layer, linear)
        segments = [
            LoraSegment(tokens, adapter.places[place]) for tokens, adapter in self.adapted if place in adapter.places
        ]
        return self._ops.lora_apply(x, y, segments) if segments else y
