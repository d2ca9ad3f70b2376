"""Our entry in transformers' table of attention functions. What it does is set from outside, for one call."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "eft"
"""The value of `attn_implementation`."""


class Attend(Protocol):
    """Called for every attention module with q [T, H, D], k [T, G, D] and v [T, G, Dv], after rope, what scores are to
    be multiplied by, and whatever else the module hands to its attention function; returns [T, H, Dv]."""

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, options: Mapping[str, Any]
    ) -> Tensor: ...


_attend: Attend | None = None


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Until the end of the block, modules attend by `attend`. Blocks do not nest."""
    global _attend
    if _attend is not None:
        raise RuntimeError("attention of a transformers model was set twice")
    _attend = attend
    try:
        yield
    finally:
        _attend = None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [1, H, T, D], key and value [1, G, T, D] → [1, T, H, D]."""
    if _attend is None:
        raise RuntimeError("a transformers model that attends by our function was called outside of `attending`")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return _attend(module, q, k, v, scale, options).unsqueeze(0), None


AttentionInterface.register(NAME, _attention)
