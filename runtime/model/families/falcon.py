"""Falcon: attention and MLP side by side; one key/value head (7B) or a few (40B, 180B, 11B)."""

from dataclasses import replace
from typing import Any, ClassVar

from runtime.model.config import MAX_COUNT, flag, integer, optional_integer
from runtime.model.families.family import Family, activation, eps, lora_targets
from runtime.model.families.llama import Llama
from runtime.model.spec import DecoderSpec


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
        if flag(config, "alibi", False):
            raise ValueError("Falcon with alibi is not supported; supported is: Falcon with rope (alibi: false)")
        new = flag(config, "new_decoder_architecture", False)
        parallel = new or flag(config, "parallel_attn", True)
        groups = (
            optional_integer(config, "num_kv_heads", at_most=MAX_COUNT)
            if new or not flag(config, "multi_query", True)
            else 1
        )
        named = config.get("activation")
        own = {
            "intermediate_size": optional_integer(config, "ffn_hidden_size") or 4 * integer(config, "hidden_size"),
            "hidden_act": "gelu" if named is None else activation(config, "activation", "gelu", gated=False),
            "num_key_value_heads": groups,
        }
        bias = flag(config, "bias", False)
        norms = optional_integer(config, "num_ln_in_parallel_attn", at_most=2)
        return replace(
            Llama.spec({"tie_word_embeddings": True} | config | own),
            norm_eps=eps(config, "layer_norm_epsilon", 1e-5),
            qkv="grouped",
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=bias,
            gated=False,
            norm="layer",
            parallel=parallel,
            shared_norm=parallel and not (new and norms in (None, 2)),
        )
