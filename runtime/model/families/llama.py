"""Llama 2, 3 and 3.x, SmolLM2, TinyLlama, Yi: every model with the architecture LlamaForCausalLM."""

from typing import Any, ClassVar

from runtime.model.config import MAX_COUNT, count, flag, integer, optional_integer
from runtime.model.families.family import Family, activation, alike, eps, head_dim, lora_targets
from runtime.model.rope import RopeSpec
from runtime.model.spec import DecoderSpec

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
        heads, hidden = count(config, "num_attention_heads"), integer(config, "hidden_size")
        bias = flag(config, "attention_bias", False)
        return DecoderSpec(
            vocab_size=integer(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=integer(config, "intermediate_size"),
            num_heads=heads,
            num_kv_heads=optional_integer(config, "num_key_value_heads", at_most=MAX_COUNT) or heads,
            head_dim=head_dim(config, hidden, heads),
            max_position=integer(config, "max_position_embeddings", 2048, at_least=2),
            norm_eps=eps(config, "rms_norm_eps", 1e-6),
            tied=flag(config, "tie_word_embeddings", False),
            layers=alike(config),
            ropes=(RopeSpec.from_config(config),),
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=flag(config, "mlp_bias", False),
            activation=activation(config, "hidden_act", "silu"),
        )
