"""Tiny random models of every family, with and without each option, saved as transformers saves them."""

from pathlib import Path
from typing import Any

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
}
PHI_MINI = {**LONGROPE, "partial_rotary_factor": 0.75, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOWS = ["sliding_attention", "full_attention"] * 2

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral with a window": ("mistral", {"sliding_window": 9}),
    "mistral without": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "ministral": ("ministral", {"sliding_window": 9, "layer_types": WINDOWS}),
    "ministral by default": ("ministral", {"sliding_window": 9}),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral with a window": ("mixtral", {"num_local_experts": 4, "sliding_window": 9}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 40}),
    "qwen2 moe, options": (
        "qwen2_moe",
        {
            **MOE,
            "shared_expert_intermediate_size": 40,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 9,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3 with biases and windows": (
        "qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 9, "layer_types": WINDOWS},
    ),
    "qwen3 moe": ("qwen3_moe", {**MOE, "norm_topk_prob": True, "mlp_only_layers": [1], "head_dim": 24}),
    "qwen3 moe, plain shares": ("qwen3_moe", MOE),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3 with a window": ("phi3", {"sliding_window": 9, "num_key_value_heads": 4}),
    "phi3 longrope, short": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
    "phi4 mini": (
        "phi3",
        {"rope_parameters": PHI_MINI, "original_max_position_embeddings": 128, "tie_word_embeddings": True},
    ),
    "gemma2": ("gemma2", {"sliding_window": 9, "query_pre_attn_scalar": 24, "head_dim": 32}),
    "gemma2 without caps": (
        "gemma2",
        {
            "sliding_window": 9,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": WINDOWS[::-1],
        },
    ),
    "gemma3": ("gemma3_text", {"sliding_window": 9, "num_hidden_layers": 7, "query_pre_attn_scalar": 24}),
    "gemma3 with scaled rope": (
        "gemma3_text",
        {
            "sliding_window": 9,
            "layer_types": WINDOWS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt2, options": (
        "gpt2",
        {"n_inner": 96, "scale_attn_weights": False, "activation_function": "gelu", "tie_word_embeddings": False},
    ),
    "gpt-neox": ("gpt_neox", {}),
    "gpt-neox in sequence": (
        "gpt_neox",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0},
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2 multi-head": ("olmo2", {"num_key_value_heads": 4, "attention_bias": True}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "granite, plain": ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "stablelm": ("stablelm", {}),
    "stablelm, options": (
        "stablelm",
        {"use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True, "num_key_value_heads": 2},
    ),
    "stablelm, biases": ("stablelm", {"use_qkv_bias": True, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "falcon 7b": ("falcon", {}),
    "falcon 40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon 11b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "falcon in sequence": (
        "falcon",
        {"parallel_attn": False, "multi_query": False, "bias": True, "tie_word_embeddings": False},
    ),
    "smollm3": ("smollm3", {}),
    "smollm3 with windows": (
        "smollm3",
        {"no_rope_layers": [1, 0, 0, 1], "use_sliding_window": True, "sliding_window": 9, "attention_bias": True},
    ),
}
"""Name → model_type of transformers, and what differs from the shape below."""

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
"""A head has 16 dimensions where a case does not say otherwise."""

NO_GROUPS = ("gpt2", "gpt_neox", "falcon")
"""Their configs know no key/value heads of that name."""


def make_model(path: Path, model_type: str, options: dict[str, Any]) -> Any:
    """Write a random model to `path`, and return it, with the attention that knows soft caps."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads" or model_type not in NO_GROUPS}
    if model_type in ("gemma2", "gemma3_text", "ministral", "qwen3"):
        shape["head_dim"] = 16
    config = AutoConfig.for_model(model_type, **{**shape, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases start as ones and zeros, which would hide mistakes
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    return model
