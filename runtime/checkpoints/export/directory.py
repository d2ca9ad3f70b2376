"""Writer of a model directory in Hugging Face's form."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.safetensors_files import INDEX, SINGLE
from runtime.support.durable import write_file, write_with
from runtime.text.own_tokens import OwnText

MAX_SHARD = 5 * 10**9
"""Largest size of a file of weights in bytes, as on the hub."""

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
"""Files of a model directory that are copied as they are."""

TEMPLATE = "chat_template.jinja"
"""File of a chat template. transformers reads it before the template in `tokenizer_config.json`."""
_TEMPLATE_TOKENS = {"bos_token", "eos_token", "unk_token", "pad_token"}


def write_model(folder: Path, checkpoint: Checkpoint, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write configuration, tokenizer and weights into an existing folder. Raises `OSError`."""
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    dtype = write_weights(folder, tensors)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if checkpoint.source.is_dir():
        for name in COPIED:
            if (checkpoint.source / name).is_file():
                shutil.copyfile(checkpoint.source / name, folder / name)
    else:
        config.setdefault("model_type", _model_type(config))
        _write_tokenizer(folder, checkpoint)
    _write_json(folder / "config.json", config)


def write_own(folder: Path, checkpoint: Checkpoint, own: OwnText) -> None:
    """Give a model directory the tokens, template and ends of answers of the checkpoint's tokenizer, in place of the
    base's, where the adapter has its own. Raises `OSError`."""
    tokenizer = checkpoint.tokenizer
    if own.tokens or own.eos_id is not None:
        _change_tokenizer(folder, checkpoint)
    if own.template is not None:
        (folder / TEMPLATE).unlink(missing_ok=True)
        write_file(folder / TEMPLATE, own.template.encode())
    if own == OwnText():
        return
    path = folder / "generation_config.json"
    generation = msgspec.json.decode(path.read_bytes()) if path.is_file() else dict(checkpoint.generation)
    path.unlink(missing_ok=True)
    _write_json(path, {**generation, "eos_token_id": list(dict.fromkeys([*tokenizer.eos_ids, *own.end_ids]))})


_REBUILT = (
    "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt",
    "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip
"""Files that say of tokens what `tokenizer.json` says, which would say it differently."""
_OF_TOKENS = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "auto_map")
"""Keys of `tokenizer_config.json` of the same kind."""


def _change_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    path, tokenizer = folder / "tokenizer_config.json", checkpoint.tokenizer
    config = msgspec.json.decode(path.read_bytes()) if path.is_file() else {}
    for name in _REBUILT:
        (folder / name).unlink(missing_ok=True)
    kept = {key: value for key, value in config.items() if key not in (*_OF_TOKENS, *_TEMPLATE_TOKENS)}
    tokens = {name: text for name, text in tokenizer.template_tokens.items() if name in _TEMPLATE_TOKENS}
    write_file(folder / "tokenizer.json", tokenizer.definition.encode())
    _write_json(path, {**kept, **tokens, "tokenizer_class": "PreTrainedTokenizerFast"})


def write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]], *, max_shard: int = MAX_SHARD) -> torch.dtype:
    """Write tensors as one safetensors file, or as shards with an index; one shard is in memory at a time. Returns the
    type of most values. Raises `OSError`."""
    shards: list[list[str]] = []
    counts: dict[torch.dtype, int] = {}
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards)}"
        write_with(path, lambda temporary: save_file(held, temporary, metadata={"format": "pt"}))
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > max_shard:
            flush()
            size = 0
        held[name] = tensor.contiguous().clone()
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    _name_shards(folder, shards, total)
    return max(counts, key=lambda dtype: counts[dtype])


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _write_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """A tokenizer that the base's file holds in another form."""
    tokenizer = checkpoint.tokenizer
    write_file(folder / "tokenizer.json", tokenizer.definition.encode())
    tokens = {name: text for name, text in tokenizer.template_tokens.items() if name in _TEMPLATE_TOKENS}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": checkpoint.config.get("max_position_embeddings"),
        **tokens,
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    _write_json(folder / "tokenizer_config.json", config)
    generation = dict(checkpoint.generation) | {"eos_token_id": list(tokenizer.eos_ids)}
    if tokenizer.bos_id is not None:
        generation["bos_token_id"] = tokenizer.bos_id
    _write_json(folder / "generation_config.json", generation)


def _model_type(config: dict[str, Any]) -> str:
    """transformers' name of the kind of model."""
    import transformers

    kind: Any = getattr(transformers, config["architectures"][0])
    return str(kind.config_class.model_type)


def _write_json(path: Path, value: Any) -> None:
    write_file(path, msgspec.json.format(msgspec.json.encode(value)) + b"\n")
