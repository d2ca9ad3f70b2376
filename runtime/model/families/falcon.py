"""Falcon: attention and MLP side by side; one key/value head (7B) or a few (40B, 180B, 11B)."""

from dataclasses import replace
from typing import Any, ClassVar

from runtime.workers.models.family import Family, lora_targets, positive
from runtime.workers.models.llama import Llama
from runtime.workers.spec import DecoderSpec


class Falcon(Family):
    """arXiv:2311.16867. The checkpoint stores query, key and value by key/value head."""

    LAYERS: ClassVar = "transformer.h."
    LAYER: ClassVar = {
        "self_attention.query_key_value": ("qkv", ""),
        "self_attention.dense": ("out", ""),
        "mlp.dense_h_to_4h": ("gate_up", "up"),
        "mlp.dense_4h_to_h": ("down", ""),
        "input_layernorm": ("attention_norm", ""),
        "ln_attn": ("attention_norm", ""),
        "post_attention_layernorm": ("mlp_norm", ""),
        "ln_mlp": ("mlp_norm", ""),
    }
    OUTSIDE: ClassVar = {
        "transformer.word_embeddings.weight": "embedding.weight",
        "transformer.ln_f.weight": "norm.weight",
        "transformer.ln_f.bias": "norm.bias",
        "lm_head.weight": "head.weight",
    }
    LORA_TARGETS: ClassVar = lora_targets(LAYER)

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        if config.get("alibi"):
            raise ValueError("Falcon with alibi is not supported; supported is: Falcon with rope (alibi: false)")
        new = bool(config.get("new_decoder_architecture", False))
        parallel = new or bool(config.get("parallel_attn", True))
        groups = config.get("num_kv_heads") if new or not config.get("multi_query", True) else 1
        own = {
            "intermediate_size": config.get("ffn_hidden_size") or 4 * positive(config, "hidden_size"),
            "hidden_act": config.get("activation") or "gelu",
            "num_key_value_heads": groups,
        }
        bias = bool(config.get("bias", False))
        return replace(
            Llama.spec({"tie_word_embeddings": True} | config | own),
            norm_eps=config.get("layer_norm_epsilon", 1e-5),
            qkv="grouped",
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=bias,
            gated=False,
            norm="layer",
            parallel=parallel,
            shared_norm=parallel and not (new and config.get("num_ln_in_parallel_attn") in (None, 2)),
        )
