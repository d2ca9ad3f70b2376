"""A `config.json` for each family, from a file's metadata. Absent values are llama.cpp's defaults."""

from runtime.checkpoints.gguf.family import GgufConfig, GgufSource, rope_scaling

GEMMA2_27B, GEMMA3_27B = 46, 62
"""Number of layers of the two Gemmas whose scores are scaled by hidden size over heads, and not by the size of a head.
The file has no key for it; llama.cpp decides by the size of the model."""


def llama(source: GgufSource) -> GgufConfig:
    """Llama, and the base of families that only add to it."""
    size, dims = source.head_dim, source.metadata.integer(".rope.dimension_count")
    if dims is not None and dims != size:
        raise source.metadata.error(
            ".rope.dimension_count", f"is {dims}, and only the size of a head ({size}) is possible"
        )
    return {
        **_common(source),
        "rms_norm_eps": source.number(".attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "sliding_window": source.metadata.integer(".attention.sliding_window") or None,
        "attention_bias": source.has("blk.0.attn_q.bias"),
        "mlp_bias": source.has("blk.0.ffn_up.bias"),
    }


def mixtral(source: GgufSource) -> GgufConfig:
    return llama(source) | {
        "num_local_experts": source.metadata.size(".expert_count"),
        "num_experts_per_tok": source.metadata.size(".expert_used_count"),
    }


def granite(source: GgufSource) -> GgufConfig:
    numbers = {
        "attention_multiplier": ".attention.scale",
        "embedding_multiplier": ".embedding_scale",
        "residual_multiplier": ".residual_scale",
        "logits_scaling": ".logit_scale",
    }
    return llama(source) | {name: source.number(key) for name, key in numbers.items()}


def smollm3(source: GgufSource) -> GgufConfig:
    """Llama with every fourth layer without rope."""
    return llama(source) | {"no_rope_layer_interval": 4}


def qwen2(source: GgufSource) -> GgufConfig:
    return llama(source) | {"use_sliding_window": False}


def qwen3(source: GgufSource) -> GgufConfig:
    return llama(source) | {"use_sliding_window": False}


def qwen2_moe(source: GgufSource) -> GgufConfig:
    return _experts(source) | {
        "norm_topk_prob": False,
        "qkv_bias": source.has("blk.0.attn_q.bias"),
        "shared_expert_intermediate_size": source.rows("blk.0.ffn_gate_shexp.weight"),
    }


def qwen3_moe(source: GgufSource) -> GgufConfig:
    return _experts(source) | {"norm_topk_prob": True}


def olmo2(source: GgufSource) -> GgufConfig:
    return llama(source) | {"sliding_window": None}


def phi3(source: GgufSource) -> GgufConfig:
    metadata = source.metadata
    original = metadata.integer(".rope.scaling.original_context_length")
    config = {
        **_common(source),
        "rms_norm_eps": source.number(".attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "sliding_window": metadata.integer(".attention.sliding_window") or None,
        "partial_rotary_factor": _partial(source),
        "original_max_position_embeddings": original or metadata.size(".context_length"),
    }
    scaling = config["rope_scaling"]
    return config | {"rope_scaling": scaling and scaling | {"partial_rotary_factor": config["partial_rotary_factor"]}}


def gemma2(source: GgufSource) -> GgufConfig:
    metadata = source.metadata
    return {
        **_gemma(source, GEMMA2_27B),
        "attn_logit_softcapping": metadata.number(".attn_logit_softcapping"),
        "final_logit_softcapping": metadata.number(".final_logit_softcapping"),
    }


def gemma3(source: GgufSource) -> GgufConfig:
    metadata = source.metadata
    config = _gemma(source, GEMMA3_27B)
    return config | {
        "rope_local_base_freq": source.number(".rope.freq_base_swa", 10000.0),
        "rope_theta": source.number(".rope.freq_base", 1e6),
        "final_logit_softcapping": metadata.number(".final_logit_softcapping"),
    }


def gpt2(source: GgufSource) -> GgufConfig:
    common = _common(source)
    return {
        **_ids(source),
        "vocab_size": common["vocab_size"],
        "n_embd": source.hidden,
        "n_head": source.heads,
        "n_layer": source.layers,
        "n_inner": common["intermediate_size"],
        "n_positions": common["max_position_embeddings"],
        "layer_norm_epsilon": source.number(".attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": common["tie_word_embeddings"],
    }


def gpt_neox(source: GgufSource) -> GgufConfig:
    return {
        **_common(source),
        "layer_norm_eps": source.number(".attention.layer_norm_epsilon"),
        "hidden_act": "gelu",
        "rotary_pct": _partial(source),
        "use_parallel_residual": source.metadata.flag(".use_parallel_residual") is not False,
        "attention_bias": source.has("blk.0.attn_qkv.bias"),
    }


def falcon(source: GgufSource) -> GgufConfig:
    """More than one key/value head: the newer architecture, with a norm for both halves of a layer, or two."""
    new = source.kv_heads > 1
    return {
        **_common(source),
        "num_kv_heads": source.kv_heads,
        "ffn_hidden_size": source.metadata.size(".feed_forward_length"),
        "layer_norm_epsilon": source.number(".attention.layer_norm_epsilon"),
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": 2 if source.has("blk.0.attn_norm_2.weight") else 1,
        "multi_query": not new,
        "parallel_attn": True,
        "bias": source.has("blk.0.attn_qkv.bias"),
        "alibi": False,
        "activation": "gelu",
    }


def stablelm(source: GgufSource) -> GgufConfig:
    return {
        **_common(source),
        "layer_norm_eps": source.number(".attention.layer_norm_epsilon"),
        "hidden_act": "silu",
        "partial_rotary_factor": _partial(source),
        "use_parallel_residual": bool(source.metadata.flag(".use_parallel_residual")),
        "use_qkv_bias": source.has("blk.0.attn_q.bias"),
        "qk_layernorm": source.has("blk.0.attn_q_norm.weight"),
    }


def _common(source: GgufSource) -> GgufConfig:
    metadata = source.metadata
    size, value_size = source.head_dim, metadata.integer(".attention.value_length")
    if value_size is not None and value_size != size:
        raise metadata.error(
            ".attention.value_length", f"is {value_size}, and only the size of a key ({size}) is possible"
        )
    return {
        **_ids(source),
        "vocab_size": source.rows("token_embd.weight"),
        "hidden_size": source.hidden,
        "intermediate_size": metadata.size(".feed_forward_length"),
        "num_hidden_layers": source.layers,
        "num_attention_heads": source.heads,
        "num_key_value_heads": source.kv_heads,
        "head_dim": size,
        "max_position_embeddings": metadata.size(".context_length"),
        "rope_theta": source.number(".rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(source),
        "tie_word_embeddings": not source.has("output.weight"),
    }


def _ids(source: GgufSource) -> GgufConfig:
    return {
        "bos_token_id": source.metadata.integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": source.metadata.integer("tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }


def _experts(source: GgufSource) -> GgufConfig:
    """Qwen's experts: every layer has them."""
    return llama(source) | {
        "use_sliding_window": False,
        "num_experts": source.metadata.size(".expert_count"),
        "num_experts_per_tok": source.metadata.size(".expert_used_count"),
        "moe_intermediate_size": source.rows("blk.0.ffn_gate_exps.weight", axis=1),
    }


def _gemma(source: GgufSource, wide: int) -> GgufConfig:
    size = source.hidden // source.heads if source.layers == wide else source.head_dim
    return llama(source) | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": size,
        "sliding_window": source.metadata.integer(".attention.sliding_window") or 4096,
    }


def _partial(source: GgufSource) -> float:
    """Share of a head that rope rotates."""
    size = source.head_dim
    dims = source.metadata.integer(".rope.dimension_count") or size
    if dims > size:
        raise source.metadata.error(".rope.dimension_count", f"is {dims}, more than the size of a head ({size})")
    return dims / size
