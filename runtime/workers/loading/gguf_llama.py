"""GGUF's `llama` architecture in Hugging Face's terms: configuration, tensor names, order of rows.

Conventions as in llama.cpp's convert_hf_to_gguf.py, which made the file, undone.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.workers.loading.errors import ModelLoadError
from runtime.workers.loading.gguf_container import TensorInfo
from runtime.workers.loading.gguf_metadata import Metadata

ARCHITECTURE = "llama"
ROPE_FACTORS = "rope_freqs.weight"
"""Not a weight: what Llama 3's rope scaling divides each frequency by, float32 [head_dim / 2]."""

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def hf_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; None for one that this architecture does not have."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in LAYER:
        return None
    return f"model.layers.{match[1]}.{LAYER[match[2]]}.{match[3]}"


def interleaved_heads(name: str, config: Mapping[str, Any]) -> int | None:
    """Number of heads whose rows llama.cpp has reordered in this tensor; None where it has not.

    Its rope turns neighbouring pairs of rows, Hugging Face's turns row i with row i + head_dim / 2, so the
    converter interleaves the two halves of every head of q and k.
    """
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in ("attn_q", "attn_k"):
        return None
    heads: int = config["num_attention_heads" if match[2] == "attn_q" else "num_key_value_heads"]
    return heads


def hf_config(
    metadata: Metadata, tensors: Mapping[str, TensorInfo], rope_factors: NDArray[np.float32] | None
) -> dict[str, Any]:
    """The `config.json` of the model in a file. Raises `ModelLoadError` for what cannot be served."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise metadata.error("token_embd.weight", "must be a tensor of two dimensions")
    heads, hidden = metadata.size(".attention.head_count"), metadata.size(".embedding_length")
    head_dim = metadata.integer(".attention.key_length") or hidden // heads
    for key in (".attention.value_length", ".rope.dimension_count"):
        size = metadata.integer(key)
        if size is not None and size != head_dim:
            raise metadata.error(key, f"is {size}, and only the size of a head ({head_dim}) is supported")
    context = metadata.size(".context_length")
    window = metadata.integer(".attention.sliding_window")
    epsilon = metadata.require(
        metadata.number(".attention.layer_norm_rms_epsilon"), ".attention.layer_norm_rms_epsilon"
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": metadata.size(".feed_forward_length"),
        "num_hidden_layers": metadata.size(".block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer(".attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        # Within its window a sliding-window model attends as any other does.
        "max_position_embeddings": min(context, window) if window else context,
        "rms_norm_eps": _shortest(epsilon),
        "rope_theta": _shortest(metadata.number(".rope.freq_base") or 10000.0),
        "rope_scaling": _rope_scaling(metadata, head_dim, rope_factors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "bos_token_id": metadata.integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.integer("tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }


def _rope_scaling(metadata: Metadata, head_dim: int, factors: NDArray[np.float32] | None) -> dict[str, Any] | None:
    if factors is not None:
        return _llama3_scaling(metadata, head_dim, factors)
    kind = metadata.text(".rope.scaling.type") or "none"
    factor = metadata.number(".rope.scaling.factor") or metadata.number(".rope.scale_linear") or 1.0
    if kind == "linear" or (kind == "none" and metadata.number(".rope.scale_linear")):
        return None if factor == 1.0 else {"rope_type": "linear", "factor": _shortest(factor)}
    if kind == "none":
        return None
    original = metadata.integer(".rope.scaling.original_context_length")
    return {  # the model registry says which kinds it knows
        "rope_type": kind,
        "factor": _shortest(factor),
        "original_max_position_embeddings": original or metadata.size(".context_length"),
    }


def _llama3_scaling(metadata: Metadata, head_dim: int, factors: NDArray[np.float32]) -> dict[str, Any]:
    """Llama 3.1's parameters from the factors that they led to.

    The file has the factors alone. The largest is the parameter `factor`; the others have the same values
    in every Llama 3 model so far, and if they had not, the factors would differ from what they give.
    """
    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": float(f"{factors.max(initial=1.0):.6g}"),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": metadata.integer(".rope.scaling.original_context_length") or 8192,
    }
    theta = metadata.number(".rope.freq_base") or 10000.0
    expected = [_llama3_factor(theta ** (2 * i / head_dim), scaling) for i in range(head_dim // 2)]
    if factors.shape != (head_dim // 2,) or not np.allclose(factors, expected, rtol=1e-3):
        raise metadata.error(ROPE_FACTORS, "does not follow Llama 3's rope scaling, the only one supported here")
    return scaling


def _llama3_factor(scale: float, scaling: Mapping[str, Any]) -> float:
    """What the frequency 1 / `scale` is divided by."""
    turns: float = scaling["original_max_position_embeddings"] / (2 * math.pi * scale)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = min(max((turns - low) / (high - low), 0.0), 1.0)
    divisor: float = 1.0 / ((1.0 - blend) / scaling["factor"] + blend)
    return divisor


def _shortest(value: float) -> float:
    """The decimal number that was meant: a float32 of 1e-5 reads 9.999999747378752e-06 as a float64."""
    return float(str(np.float32(value)))


def check_shapes(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], origin: str) -> None:
    """Raise `ModelLoadError` where q or k cannot be split into heads."""
    for name, info in tensors.items():
        heads = interleaved_heads(name, config)
        if heads is not None and info.shape[0] != heads * config["head_dim"]:
            raise ModelLoadError(
                f"{origin}: {name} has {info.shape[0]} rows; {heads} heads of {config['head_dim']} need "
                f"{heads * config['head_dim']}."
            )
