"""What serving and training need of a model, whether it is our decoder or transformers' own modules."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kernels import Ops
from runtime.workers.adaptation import Adaptation
from runtime.workers.attention import Attention
from runtime.workers.group import Group
from runtime.workers.layers import Linear, Parameter
from runtime.workers.spec import DecoderSpec
from runtime.workers.vocabulary import Vocabulary


class Layer(Protocol):
    @property
    def index(self) -> int: ...

    @property
    def linears(self) -> Mapping[str, Linear]: ...


class Model(Protocol):
    """See `runtime.workers.decoder.Decoder`, where each of these is described."""

    @property
    def spec(self) -> DecoderSpec: ...

    @property
    def ops(self) -> Ops: ...

    @property
    def max_len(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def group(self) -> Group: ...

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]: ...

    @property
    def layers(self) -> Sequence[Layer]: ...

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: Attention,
        adaptation: Adaptation | None = None,
        *,
        wanted: Tensor | None = None,
    ) -> Tensor: ...

    def logits(self, hidden: Tensor, ops: Ops | None = None) -> Tensor:
        """`hidden` are rows of what `forward` gave."""
        ...

    def own_logits(self, hidden: Tensor, ops: Ops | None = None) -> Tensor: ...

    def parameters(self) -> dict[str, Parameter]: ...
