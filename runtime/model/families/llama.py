"""Llama 2, 3 and 3.x, SmolLM2, TinyLlama, Yi: everything that calls itself LlamaForCausalLM."""

from typing import Any, ClassVar

from runtime.workers.models.family import Family, alike, lora_targets, positive
from runtime.workers.rope import RopeSpec
from runtime.workers.spec import DecoderSpec

ATTENTION = {
    "self_attn.q_proj": ("qkv", "q"),
    "self_attn.k_proj": ("qkv", "k"),
    "self_attn.v_proj": ("qkv", "v"),
    "self_attn.o_proj": ("out", ""),
}
MLP = {
    "mlp.gate_proj": ("gate_up", "gate"),
    "mlp.up_proj": ("gate_up", "up"),
    "mlp.down_proj": ("down", ""),
}
NORMS = {
    "input_layernorm": ("attention_norm", ""),
    "post_attention_layernorm": ("mlp_norm", ""),
}


class Llama(Family):
    """RMSNorm, rope, grouped-query attention, SwiGLU (arXiv:2302.13971, arXiv:2407.21783)."""

    LAYER: ClassVar = {**ATTENTION, **MLP, **NORMS}
    LORA_TARGETS: ClassVar = lora_targets(LAYER)

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        heads, hidden = positive(config, "num_attention_heads"), positive(config, "hidden_size")
        bias = bool(config.get("attention_bias", False))
        return DecoderSpec(
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            max_position=config.get("max_position_embeddings", 2048),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tied=bool(config.get("tie_word_embeddings", False)),
            layers=alike(config),
            ropes=(RopeSpec.from_config(config),),
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            activation=config.get("hidden_act", "silu"),
        )
