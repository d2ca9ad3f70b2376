"""Tiny random models of architectures that have no family here, and that differ in their attention."""

from pathlib import Path
from typing import Any

from tests.tiny import VOCAB_SIZE, make_tiny_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
EXPERTS = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}

CASES: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 9},  # windows with rope, whole contexts without, parallel blocks, scaled logits
    "deepseek_v3": {**MLA, **EXPERTS},  # values narrower than keys, experts
    "gpt_bigcode": {},  # one key/value head, learned positions, one fused linear
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 80},  # layers deep inside, positions with an offset
    "phi": {},  # rope on a part of every head, biases everywhere
}
"""model_type of transformers → what differs from the shape."""


def make_fallback(path: Path, model_type: str, **options: Any) -> Any:
    """Write a random model and the tiny tokenizer to `path`, and return the model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **CASES.get(model_type, {}), **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    model.save_pretrained(path)
    make_tiny_tokenizer(path)
    return model
