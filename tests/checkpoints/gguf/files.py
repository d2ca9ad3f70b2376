"""GGUF files for the tests, written by the `gguf` package as llama.cpp's converter would."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.numpy import load_file

OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """As `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def gguf_tensors(model: Path) -> dict[str, np.ndarray]:
    """The weights of a Hugging Face directory under llama.cpp's names, in its order of rows."""
    config = json.loads((model / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for name, values in load_file(model / "model.safetensors").items():
        if name in OUTSIDE:
            tensors[OUTSIDE[name]] = values
            continue
        layer, _, inner = name.removeprefix("model.layers.").partition(".")
        inner, _, kind = inner.rpartition(".")
        short = LAYER[inner]
        tensors[f"blk.{layer}.{short}.{kind}"] = permute(values, heads[short]) if short in heads else values
    return tensors


def bpe_vocabulary(model: Path) -> dict[str, list[Any]]:
    """The tokens, kinds and merges of a tokenizer.json, as lists for the metadata."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {entry["content"] for entry in tokenizer["added_tokens"] if entry["special"]}
    return {
        "tokens": tokens,
        "token_type": [3 if token in special else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
    }


def write_gguf(
    path: Path,
    model: Path,
    *,
    quantisation: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, np.ndarray] | None = None,
    architecture: str = "llama",
) -> Path:
    """The model in a Hugging Face directory as a GGUF file.

    `metadata` overrides single keys; None removes one. Keys that start with a dot are the architecture's.
    Matrices are quantised, vectors stay in float32.
    """
    config = json.loads((model / "config.json").read_text())
    fields: dict[str, Any] = {
        ".block_count": config["num_hidden_layers"],
        ".context_length": config["max_position_embeddings"],
        ".embedding_length": config["hidden_size"],
        ".feed_forward_length": config["intermediate_size"],
        ".attention.head_count": config["num_attention_heads"],
        ".attention.head_count_kv": config["num_key_value_heads"],
        ".rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        ".attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.chat_template": json.loads((model / "tokenizer_config.json").read_text())["chat_template"],
        **{f"tokenizer.ggml.{key}": value for key, value in bpe_vocabulary(model).items()},
        **(metadata or {}),
    }
    writer = GGUFWriter(path, architecture)
    for key, value in fields.items():
        if value is not None:
            _add(writer, architecture + key if key.startswith(".") else key, value)
    for name, values in {**gguf_tensors(model), **(extra_tensors or {})}.items():
        if values.ndim == 1 or quantisation == GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quants.quantize(values, quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
