"""Rows that llama.cpp's converter has moved, moved back. Every function is an `Undo`."""

from typing import TYPE_CHECKING, Any

from runtime.workers.loading.errors import ModelLoadError

if TYPE_CHECKING:
    from torch import Tensor

Config = dict[str, Any]


def interleaved_q(tensor: "Tensor", config: Config) -> "Tensor":
    """Rope of llama.cpp's `llama` turns neighbouring pairs of rows, Hugging Face's turns row i with row
    i + head_dim / 2, so the converter interleaves the two halves of every head of q and k."""
    return _interleaved(tensor, config["num_attention_heads"], config["head_dim"])


def interleaved_k(tensor: "Tensor", config: Config) -> "Tensor":
    return _interleaved(tensor, config["num_key_value_heads"], config["head_dim"])


def _interleaved(tensor: "Tensor", heads: int, size: int) -> "Tensor":
    _check(tensor, heads * size, f"{heads} heads of {size}")
    return tensor.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)


def by_head(tensor: "Tensor", config: Config) -> "Tensor":
    """GPT-NeoX: from all queries, all keys, all values to a query, a key and a value of each head in turn."""
    heads = config["num_attention_heads"]
    size = config["hidden_size"] // heads
    _check(tensor, 3 * heads * size, f"queries, keys and values of {heads} heads of {size}")
    return tensor.reshape(3, heads, size, -1).transpose(0, 1).reshape(tensor.shape)


def by_group(tensor: "Tensor", config: Config) -> "Tensor":
    """Falcon: from all queries, all keys, all values to each key/value head's queries, its key, and its value."""
    import torch

    heads, groups = config["num_attention_heads"], config["num_kv_heads"]
    size = config["hidden_size"] // heads
    _check(tensor, (heads + 2 * groups) * size, f"{heads} queries and {groups} keys and values of {size}")
    q, k, v = torch.split(tensor, [heads * size, groups * size, groups * size])
    parts = [part.reshape(groups, -1, size, *tensor.shape[1:]) for part in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(tensor.shape)


def transposed(tensor: "Tensor", config: Config) -> "Tensor":
    """GPT-2's weights are [in, out]; biases are vectors."""
    return tensor.t() if tensor.ndim == 2 else tensor


def less_one(tensor: "Tensor", config: Config) -> "Tensor":
    """Gemma's norms multiply by one plus their weight, and the file has the sum."""
    return tensor - 1


def as_row(tensor: "Tensor", config: Config) -> "Tensor":
    """A linear with one output, which the file may have as a vector."""
    return tensor.reshape(1, -1)


def _check(tensor: "Tensor", rows: int, what: str) -> None:
    if tensor.shape[0] != rows:
        raise ModelLoadError(f"it has {tensor.shape[0]} rows; {what} need {rows}.")
