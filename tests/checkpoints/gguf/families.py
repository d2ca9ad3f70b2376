"""GGUF files of every family, written by the `gguf` package under its own names, rows moved as llama.cpp's converter
(convert_hf_to_gguf.py) moves them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from tests.checkpoints.gguf.files import bpe_vocabulary, permute

ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "mixtral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen2_moe": "QWEN2MOE",
    "qwen3": "QWEN3",
    "qwen3_moe": "QWEN3MOE",
    "phi3": "PHI3",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "gpt2": "GPT2",
    "gpt_neox": "GPTNEOX",
    "olmo2": "OLMO2",
    "granite": "GRANITE",
    "stablelm": "STABLELM",
    "falcon": "FALCON",
    "smollm3": "SMOLLM3",
}
"""model_type → `gguf.MODEL_ARCH`."""
PERMUTED = ("llama", "mistral", "mixtral", "granite", "smollm3")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
HEAD = re.compile(r"(.*_layernorm)\.norms\.(\d+)(\.weight)")


def write_family(path: Path, model: Path) -> Path:
    """Write the model in the Hugging Face directory `model` as GGUF in float32."""
    config = json.loads((model / "config.json").read_text())
    kind = config["model_type"]
    arch = gguf.MODEL_ARCH[ARCHITECTURES[kind]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    layers = config.get("num_hidden_layers") or config["n_layer"]
    _metadata(writer, config, layers)
    names = gguf.get_tensor_name_map(arch, layers)
    for name, values in _converted(kind, config, load_file(model / "model.safetensors")):
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known, f"gguf has no name for {name}"
        writer.add_tensor(known, np.ascontiguousarray(values, dtype=np.float32))
    for name, values in _factors(config).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    for key, value in bpe_vocabulary(model).items():
        writer.add_array(f"tokenizer.ggml.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _converted(kind: str, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, values in tensors.items():
        if match := EXPERT.fullmatch(name):
            stacks.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = values
        elif match := HEAD.fullmatch(name):
            stacks.setdefault(match[1] + match[3], {})[int(match[2])] = values
        elif not name.endswith((".attn.bias", "rotary_emb.inv_freq")):
            yield name, _moved(kind, config, name, values)
    for name, stack in stacks.items():
        yield name, np.stack([stack[index] for index in range(len(stack))])


def _moved(kind: str, config: dict[str, Any], name: str, values: np.ndarray) -> np.ndarray:
    heads = config.get("num_attention_heads") or config.get("n_head")
    if kind in PERMUTED and ".q_proj." in name:
        return permute(values, heads)
    if kind in PERMUTED and ".k_proj." in name:
        return permute(values, config["num_key_value_heads"])
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    if kind == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return values.T
    if kind == "gpt_neox" and ".query_key_value." in name:
        return np.concatenate(np.split(values.reshape(heads, 3, -1, *values.shape[1:]), 3, axis=1)).reshape(
            values.shape
        )
    if kind == "falcon" and ".query_key_value." in name:
        groups = config["num_kv_heads"] if config["new_decoder_architecture"] else 1
        size = config["hidden_size"] // heads
        rows = values.reshape(groups, heads // groups + 2, size, *values.shape[1:])
        parts = (rows[:, :-2], rows[:, [-2]], rows[:, [-1]])
        return np.concatenate([part.reshape(-1, *values.shape[1:]) for part in parts])
    return values


def _metadata(writer: gguf.GGUFWriter, config: dict[str, Any], layers: int) -> None:
    hidden = config.get("hidden_size") or config["n_embd"]
    heads = config.get("num_attention_heads") or config["n_head"]
    size = config.get("head_dim") or hidden // heads
    kind = config["model_type"]
    writer.add_context_length(config.get("max_position_embeddings") or config["n_positions"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    inner = config.get("n_inner") or 4 * hidden if kind == "gpt2" else config.get("ffn_hidden_size")
    writer.add_feed_forward_length(inner or config["intermediate_size"])
    writer.add_head_count(heads)
    groups = config.get("num_key_value_heads") or heads
    if kind == "falcon":
        groups = config["num_kv_heads"] if config["new_decoder_architecture"] else 1
    writer.add_head_count_kv(groups)
    if "head_dim" in config:
        writer.add_key_length(size)
        writer.add_value_length(size)
    for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
        if key in config:
            (writer.add_layer_norm_rms_eps if key.startswith("rms") else writer.add_layer_norm_eps)(config[key])
    rope = config.get("rope_parameters") or {}
    theta = rope.get("full_attention", rope).get("rope_theta", config.get("rope_theta"))
    if theta:
        writer.add_rope_freq_base(theta)
    partial = rope.get("partial_rotary_factor", 1.0 if kind in ("falcon", "gpt2") else None)
    if kind in ("phi3", "stablelm", "gpt_neox"):
        writer.add_rope_dimension_count(int((partial or 1.0) * size))
    if config.get("sliding_window") and kind in ("mistral", "mixtral", "phi3", "gemma2", "gemma3_text"):
        writer.add_sliding_window(config["sliding_window"])
    for key, add in {
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "attention_multiplier": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "logits_scaling": writer.add_logit_scale,
        "use_parallel_residual": writer.add_parallel_residual,
    }.items():
        if config.get(key) is not None:
            add(config[key])
    count = config.get("num_local_experts") or config.get("num_experts")
    if count:
        writer.add_expert_count(count)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if (full := rope.get("full_attention", rope)).get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if rope.get("rope_type") == "longrope":
        original = config["original_max_position_embeddings"]
        scale = config["max_position_embeddings"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(scale) / np.log(original))))


def _factors(config: dict[str, Any]) -> dict[str, list[float]]:
    rope = config.get("rope_parameters") or {}
    return {f"rope_factors_{one}.weight": rope[f"{one}_factor"] for one in ("long", "short") if f"{one}_factor" in rope}
