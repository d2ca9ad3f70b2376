"""What the families of GGUF files share: names as data, and how rows go back to where they were."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runtime.workers.loading.gguf_models.source import Source

if TYPE_CHECKING:
    from torch import Tensor

    from kernels import GroupedWeight

Config = dict[str, Any]
"""The keys and values of a Hugging Face config.json."""
Undo = Callable[["Tensor", Config], "Tensor"]
"""A tensor as the file has it, to how Hugging Face has it."""

_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class GgufFamily:
    """One architecture of GGUF, as one of Hugging Face's."""

    architecture: str
    """In Hugging Face's config.json."""
    config: Callable[[Source], Config]
    outside: Mapping[str, str]
    prefix: str = "model.layers."
    layer: Mapping[str, str]
    """A layer's tensors, without `.weight` or `.bias`, in GGUF → in Hugging Face. A `*` in a name: the tensor holds
    one for every expert or head along its first dimension."""
    undo: Mapping[str, Undo] = field(default_factory=dict)
    """By the name within a layer."""
    undo_all: Undo | None = None
    """For every vector, norms that is."""

    def knows(self, name: str) -> bool:
        if name in self.outside:
            return True
        match = _LAYER_NAME.fullmatch(name)
        return match is not None and match[2] in self.layer

    def tensors(self, name: str, tensor: "Tensor", config: Config) -> Iterator[tuple[str, "Tensor"]]:
        """One of the file's tensors, which it `knows`, under Hugging Face's names and with its order of rows."""
        if self.undo_all is not None and tensor.ndim == 1:
            tensor = self.undo_all(tensor, config)
        if name in self.outside:
            yield self.outside[name], tensor
            return
        match = _LAYER_NAME.fullmatch(name)
        assert match is not None
        layer, short, kind = match.groups()
        if short in self.undo:
            tensor = self.undo[short](tensor, config)
        full = f"{self.prefix}{layer}.{self.layer[short]}.{kind}"
        if "*" in full:
            yield from ((full.replace("*", str(index)), part) for index, part in enumerate(tensor))
        else:
            yield full, tensor

    def weight(self, name: str, weight: "GroupedWeight", config: Config) -> tuple[str, "GroupedWeight"]:
        """A matrix in integers, likewise: only whole rows of it can be moved, and what is stored transposed is not."""
        import torch

        if name in self.outside:
            return self.outside[name], weight
        match = _LAYER_NAME.fullmatch(name)
        assert match is not None
        layer, short, kind = match.groups()
        if short in self.undo:
            weight = weight.reordered(self.undo[short](torch.arange(weight.shape[0]), config).flatten())
        return f"{self.prefix}{layer}.{self.layer[short]}.{kind}", weight
