"""What a family's configuration is read from: the file's metadata, and which tensors there are."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.workers.loading.gguf_container import TensorInfo
from runtime.workers.loading.gguf_metadata import Metadata


@dataclass(frozen=True, eq=False)
class Source:
    """One file."""

    metadata: Metadata
    tensors: Mapping[str, TensorInfo]
    """The model's weights."""
    factors: Mapping[str, NDArray[np.float32]]
    """What rope scaling divides frequencies by, by the name of the tensor."""

    def has(self, name: str) -> bool:
        return name in self.tensors

    def rows(self, name: str, *, axis: int = 0) -> int:
        """Size of a tensor's dimension. Raises `ModelLoadError`."""
        info = self.tensors.get(name)
        if info is None or len(info.shape) <= axis:
            raise self.metadata.error(name, f"must be a tensor of at least {axis + 1} dimensions")
        return info.shape[axis]

    @property
    def heads(self) -> int:
        return self.metadata.size(".attention.head_count")

    @property
    def kv_heads(self) -> int:
        return self.metadata.integer(".attention.head_count_kv") or self.heads

    @property
    def hidden(self) -> int:
        return self.metadata.size(".embedding_length")

    @property
    def head_dim(self) -> int:
        return self.metadata.integer(".attention.key_length") or self.hidden // self.heads

    @property
    def layers(self) -> int:
        return self.metadata.size(".block_count")

    def number(self, key: str) -> float:
        """A number that must be there."""
        return shortest(self.metadata.require(self.metadata.number(key), key))


def shortest(value: float) -> float:
    """The decimal number that was meant: a float32 of 1e-5 reads 9.999999747378752e-06 as a float64."""
    return float(str(np.float32(value)))
