"""How an adapter changes the decoder: called after every linear, as attention is called in every layer.

Serving applies each row's own adapter, training the one that is being trained, and a base model none.
"""

from typing import Protocol

from torch import Tensor


class Adaptation(Protocol):
    """Called with the layer's index, the linear's name (`decoder.LINEARS`), its input x [T, in] and its output
    y [T, out]; returns what the output should be, [T, out]. May change y in place when no gradients are wanted."""

    def __call__(self, layer: int, linear: str, x: Tensor, y: Tensor) -> Tensor: ...
