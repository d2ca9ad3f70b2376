"""Base of the families of GGUF files: names as data, and functions that restore the order of rows."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.checkpoints.gguf.container import Metadata, TensorInfo
from runtime.model.config import ModelLoadError

if TYPE_CHECKING:
    from torch import Tensor

    from kernels import GroupedWeight


# -- source ----------------------------------------------------------------------------------------
#
# The source of a family's configuration: the file's metadata and its tensors.


@dataclass(frozen=True, eq=False)
class GgufSource:
    """One file."""

    metadata: Metadata
    tensors: Mapping[str, TensorInfo]
    """The model's weights."""
    factors: Mapping[str, NDArray[np.float32]]
    """Name of a tensor → rope scaling's divisors of frequencies."""

    def has(self, name: str) -> bool:
        return name in self.tensors

    def rows(self, name: str, *, axis: int = 0) -> int:
        """Size of a tensor's dimension. Raises `ModelLoadError` where it is missing."""
        info = self.tensors.get(name)
        if info is None or len(info.shape) <= axis:
            raise self.metadata.error(name, f"must be a tensor of at least {axis + 1} dimensions")
        return info.shape[axis]

    @property
    def heads(self) -> int:
        return self.metadata.size(".attention.head_count")

    @property
    def kv_heads(self) -> int:
        groups = self.metadata.integer(".attention.head_count_kv")
        return self.heads if groups is None else self.metadata.size(".attention.head_count_kv")

    @property
    def hidden(self) -> int:
        return self.metadata.size(".embedding_length")

    @property
    def head_dim(self) -> int:
        if self.metadata.integer(".attention.key_length") is not None:
            return self.metadata.size(".attention.key_length")
        if self.hidden % self.heads:
            raise self.metadata.error(
                ".embedding_length", f"is {self.hidden}, not a multiple of {self.heads} heads (.attention.head_count)"
            )
        return self.hidden // self.heads

    @property
    def layers(self) -> int:
        return self.metadata.size(".block_count")

    def number(self, key: str, default: float | None = None) -> float:
        """A number, required unless it has a default. Raises `ModelLoadError`."""
        value = self.metadata.number(key)
        return shortest(self.metadata.require(default if value is None else value, key))


def shortest(value: float) -> float:
    """The shortest decimal number for a float32: 1e-5 in float32 reads 9.999999747378752e-06 as a float64."""
    return float(str(np.float32(value)))


GgufConfig = dict[str, Any]
"""The keys and values of a Hugging Face config.json."""
Undo = Callable[["Tensor", GgufConfig], "Tensor"]
"""(tensor in the file's form, config) → the tensor in Hugging Face's form."""

_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class GgufFamily:
    """One architecture of GGUF, in terms of Hugging Face's."""

    architecture: str
    """Name of the architecture in Hugging Face's config.json."""
    config: Callable[[GgufSource], GgufConfig]
    outside: Mapping[str, str]
    prefix: str = "model.layers."
    layer: Mapping[str, str]
    """Names of a layer's tensors, without `.weight` or `.bias`: GGUF → Hugging Face. A `*` in a name: the tensor holds
    one for every expert or head along its first dimension."""
    undo: Mapping[str, Undo] = field(default_factory=dict)
    """Name within a layer → the tensor's `Undo`."""
    undo_all: Undo | None = None
    """The `Undo` of every vector, that is of norms."""

    def knows(self, name: str) -> bool:
        if name in self.outside:
            return True
        match = _LAYER_NAME.fullmatch(name)
        return match is not None and match[2] in self.layer

    def tensors(self, name: str, tensor: "Tensor", config: GgufConfig) -> Iterator[tuple[str, "Tensor"]]:
        """One of the file's tensors, for which `knows` is true, under Hugging Face's names and with its order of
        rows."""
        if self.undo_all is not None and tensor.ndim == 1:
            tensor = self.undo_all(tensor, config)
        if (undo := self._undo_of(name)) is not None:
            tensor = undo(tensor, config)
        full = self.full_name(name)
        if "*" in full:
            yield from ((full.replace("*", str(index)), part) for index, part in enumerate(tensor))
        else:
            yield full, tensor

    def full_name(self, name: str) -> str:
        """Hugging Face's name of one of the file's tensors, for which `knows` is true."""
        if name in self.outside:
            return self.outside[name]
        match = _LAYER_NAME.fullmatch(name)
        assert match is not None
        return f"{self.prefix}{match[1]}.{self.layer[match[2]]}.{match[3]}"

    def file_name(self, name: str) -> str | None:
        """The file's name of a tensor with Hugging Face's name; None for one that it does not have."""
        outside = {theirs: ours for ours, theirs in self.outside.items()}
        if name in outside:
            return outside[name]
        index, _, inner = name.removeprefix(self.prefix).partition(".")
        module, _, kind = inner.rpartition(".")
        short = {theirs: ours for ours, theirs in self.layer.items()}.get(module)
        return f"blk.{index}.{short}.{kind}" if short and name.startswith(self.prefix) else None

    def file_form(self, name: str, tensor: "Tensor", config: GgufConfig) -> "Tensor":
        """The inverse of `tensors` for one whole tensor: from Hugging Face's order of rows to the file's. `name` is the
        file's."""
        import torch

        if self.undo_all is not None and tensor.ndim == 1:
            return tensor + 1
        undo = self._undo_of(name)
        if undo is None:
            return tensor
        if undo is transposed:
            return transposed(tensor, config)
        if undo is as_row:
            return tensor.reshape(-1)
        order = undo(torch.arange(len(tensor), device=tensor.device), config).flatten()
        return torch.empty_like(tensor).index_copy_(0, order, tensor)

    def lora_b(self, name: str, b: "Tensor", config: GgufConfig) -> "Tensor":
        """`file_form` for the factor [out, rank] of a change to a linear: its rows are those of the weight."""
        return b if self._undo_of(name) is transposed else self.file_form(name, b, config)

    def weight(self, name: str, weight: "GroupedWeight", config: GgufConfig) -> tuple[str, "GroupedWeight"]:
        """As `tensors` for a matrix in integers: only whole rows can be moved; a matrix that the file stores transposed
        is not moved."""
        import torch

        if (undo := self._undo_of(name)) is not None:
            weight = weight.reordered(undo(torch.arange(weight.shape[0]), config).flatten())
        return self.full_name(name), weight

    def _undo_of(self, name: str) -> Undo | None:
        """The `Undo` of one of the file's tensors, by its name; None for tensors outside of layers."""
        match = _LAYER_NAME.fullmatch(name)
        return None if match is None else self.undo.get(match[2])


# -- rows ------------------------------------------------------------------------------------------
#
# Inverses of the converter's changes to the order of rows. Every function is an `Undo`.


def interleaved_q(tensor: "Tensor", config: GgufConfig) -> "Tensor":
    """Undo the interleaving of q and k. Rope of llama.cpp's `llama` rotates neighbouring pairs of rows, Hugging Face's
    rotates row i with row i + head_dim / 2, so the converter interleaves the two halves of every head."""
    return _interleaved(tensor, config["num_attention_heads"], config["head_dim"])


def interleaved_k(tensor: "Tensor", config: GgufConfig) -> "Tensor":
    """Rows of keys in Hugging Face's order: as `interleaved_q`, by the number of KV heads."""
    return _interleaved(tensor, config["num_key_value_heads"], config["head_dim"])


def _interleaved(tensor: "Tensor", heads: int, size: int) -> "Tensor":
    _check(tensor, heads * size, f"{heads} heads of {size}")
    return tensor.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)


def by_head(tensor: "Tensor", config: GgufConfig) -> "Tensor":
    """GPT-NeoX: from all queries, all keys, all values to a query, a key and a value of each head in turn."""
    heads = config["num_attention_heads"]
    size = config["hidden_size"] // heads
    _check(tensor, 3 * heads * size, f"queries, keys and values of {heads} heads of {size}")
    return tensor.reshape(3, heads, size, -1).transpose(0, 1).reshape(tensor.shape)


def by_group(tensor: "Tensor", config: GgufConfig) -> "Tensor":
    """Falcon: from all queries, all keys, all values to each key/value head's queries, its key, and its value."""
    import torch

    heads, groups = config["num_attention_heads"], config["num_kv_heads"]
    size = config["hidden_size"] // heads
    _check(tensor, (heads + 2 * groups) * size, f"{heads} queries and {groups} keys and values of {size}")
    q, k, v = torch.split(tensor, [heads * size, groups * size, groups * size])
    parts = [part.reshape(groups, -1, size, *tensor.shape[1:]) for part in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(tensor.shape)


def transposed(tensor: "Tensor", config: GgufConfig) -> "Tensor":
    """GPT-2's weights are [in, out]; biases are vectors."""
    return tensor.t() if tensor.ndim == 2 else tensor


def less_one(tensor: "Tensor", config: GgufConfig) -> "Tensor":
    """Gemma's norms multiply by one plus their weight, and the file has the sum."""
    return tensor - 1


def as_row(tensor: "Tensor", config: GgufConfig) -> "Tensor":
    """A linear with one output, which the file may have as a vector."""
    return tensor.reshape(1, -1)


def _check(tensor: "Tensor", rows: int, what: str) -> None:
    if tensor.shape[0] != rows:
        raise ModelLoadError(f"it has {tensor.shape[0]} rows; {what} need {rows}.")


# -- rope ------------------------------------------------------------------------------------------
#
# Rope scaling from a GGUF file: its parameters, or the parameters that give the factors in the file.

ROPE_FACTORS = "rope_freqs.weight"
"""Not a weight: the divisors of frequencies in Llama 3's rope scaling, float32 [head_dim / 2]."""
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""Not weights either: longrope's divisors of frequencies."""
FACTORS = (ROPE_FACTORS, LONG, SHORT)


def rope_scaling(source: GgufSource) -> dict[str, Any] | None:
    """The value of `rope_scaling` for a config.json. Raises `ModelLoadError` where the file does not determine it."""
    metadata = source.metadata
    if ROPE_FACTORS in source.factors:
        return _llama3_scaling(metadata, source.head_dim, source.factors[ROPE_FACTORS])
    if LONG in source.factors or SHORT in source.factors:
        return _longrope(source)
    kind = metadata.text(".rope.scaling.type") or "none"
    factor = metadata.number(".rope.scaling.factor") or metadata.number(".rope.scale_linear") or 1.0
    if kind == "linear" or (kind == "none" and metadata.number(".rope.scale_linear")):
        return None if factor == 1.0 else {"rope_type": "linear", "factor": shortest(factor)}
    if kind == "none":
        return None
    original = metadata.integer(".rope.scaling.original_context_length")
    if (metadata.number(".rope.scaling.attn_factor") or 1.0) != 1.0:
        raise metadata.error(".rope.scaling.attn_factor", f"is not 1, which is not supported with {kind!r}")
    return {  # the model registry checks the kind
        "rope_type": kind,
        "factor": shortest(factor),
        "original_max_position_embeddings": original or metadata.size(".context_length"),
    }


def _llama3_scaling(metadata: Metadata, head_dim: int, factors: NDArray[np.float32]) -> dict[str, Any]:
    """Llama 3.1's parameters, recovered from the factors.

    The file has the factors alone. The largest is the parameter `factor`. The other parameters have the same values in
    every Llama 3 model so far; with other values, the factors would differ from the expected ones.
    """
    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": float(f"{factors.max(initial=1.0):.6g}"),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": metadata.integer(".rope.scaling.original_context_length") or 8192,
    }
    theta = metadata.number(".rope.freq_base")
    theta = 10000.0 if theta is None else theta
    if not 1.0 < theta < math.inf:
        raise metadata.error(".rope.freq_base", f"must be a number above 1, got {theta}")
    expected = [_llama3_factor(theta ** (2 * i / head_dim), scaling) for i in range(head_dim // 2)]
    if factors.shape != (head_dim // 2,) or not np.allclose(factors, expected, rtol=1e-3):
        raise metadata.error(ROPE_FACTORS, "does not follow Llama 3's rope scaling, the only one supported here")
    return scaling


def _llama3_factor(scale: float, scaling: Mapping[str, Any]) -> float:
    """Divisor of the frequency 1 / `scale`."""
    turns: float = scaling["original_max_position_embeddings"] / (2 * math.pi * scale)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = min(max((turns - low) / (high - low), 0.0), 1.0)
    divisor: float = 1.0 / ((1.0 - blend) / scaling["factor"] + blend)
    return divisor


def _longrope(source: GgufSource) -> dict[str, Any]:
    metadata = source.metadata
    for name in (LONG, SHORT):
        if name not in source.factors:
            raise metadata.error(name, "is missing, and its counterpart is there")
    factor = metadata.number(".rope.scaling.attn_factor")
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": [shortest(float(value)) for value in source.factors[LONG]],
        "short_factor": [shortest(float(value)) for value in source.factors[SHORT]],
        "original_max_position_embeddings": metadata.size(".rope.scaling.original_context_length"),
    }
    return scaling if factor is None else scaling | {"attention_factor": factor}
