"""Llama 2, 3 and 3.x, SmolLM2, TinyLlama, Yi (every model with the architecture LlamaForCausalLM), and three that are
Llama with other numbers or other places of its norms: Granite 3, SmolLM3 and OLMo 2."""

from dataclasses import replace
from typing import Any, ClassVar

from runtime.model.config import (
    MAX_COUNT,
    MIN_FACTOR,
    ConfigError,
    count,
    flag,
    integer,
    items,
    number,
    optional_integer,
)
from runtime.model.families.family import Family, activation, alike, by_type, eps, head_dim, lora_targets, num_layers
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
QK_NORMS = {"self_attn.q_norm": ("q_norm", ""), "self_attn.k_norm": ("k_norm", "")}


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


class Granite(Llama):
    """arXiv:2408.13359 (maximal update parametrisation)."""

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        return replace(
            super().spec(config),
            attention_scale=number(config, "attention_multiplier", 1.0, at_least=MIN_FACTOR),
            embedding_scale=number(config, "embedding_multiplier", 1.0, at_least=MIN_FACTOR),
            residual_scale=number(config, "residual_multiplier", 1.0, at_least=0.0),
            logit_scale=1.0 / number(config, "logits_scaling", 1.0, at_least=MIN_FACTOR),
        )


class SmolLM3(Llama):
    """NoPE layers as in arXiv:2501.18795; windows, where they are on, in those layers only."""

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        config = {"rope_theta": 2e6, "tie_word_embeddings": True} | config
        if not flag(config, "use_sliding_window", False):
            config = config | {"sliding_window": None}
        count, interval = num_layers(config), integer(config, "no_rope_layer_interval", 4)
        turned = items(config, "no_rope_layers") or [(index + 1) % interval != 0 for index in range(count)]
        if len(turned) < count:
            raise ValueError(f"no_rope_layers has {len(turned)} entries for {count} layers (num_hidden_layers)")
        if any(one not in (0, 1) for one in turned):
            raise ConfigError("no_rope_layers", turned, "a list of 0 and 1")
        layers = by_type(config, [not one for one in turned[:count]])
        ropes = (0 if one else None for one in turned)  # the config's 1 is for rope, in spite of its name
        return replace(
            super().spec(config),
            layers=tuple(replace(layer, rope=rope) for layer, rope in zip(layers, ropes, strict=False)),
        )


class Olmo2(Llama):
    """arXiv:2501.00656."""

    LAYER: ClassVar = {
        **ATTENTION,
        **MLP,
        **QK_NORMS,
        "post_attention_layernorm": ("attention_post_norm", ""),
        "post_feedforward_layernorm": ("mlp_post_norm", ""),
    }

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        spec = super().spec({"rms_norm_eps": 1e-5} | config)
        return replace(spec, mlp_bias=False, pre_norm=False, post_norm=True, qk_norm="projection")
