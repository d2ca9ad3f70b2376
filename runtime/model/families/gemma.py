"""Gemma 2 and 3 (text): alternating local and global attention, norms before and after, GeGLU, soft caps."""

from dataclasses import replace
from typing import Any, ClassVar

from runtime.model.config import MIN_FACTOR, integer, number, optional_integer, optional_number, table
from runtime.model.families.family import Layers, activation, by_type, lora_targets, num_layers
from runtime.model.families.llama import ATTENTION, MLP, QK_NORMS, Llama
from runtime.model.rope import MIN_THETA, RopeSpec
from runtime.model.spec import DecoderSpec

GELU = "gelu_pytorch_tanh"


def softcap(config: dict[str, Any], key: str) -> float:
    """A soft cap of the config; 0 for none, where the key is null or 0."""
    return 0.0 if config[key] == 0 else optional_number(config, key, at_least=MIN_FACTOR) or 0.0


class Gemma2(Llama):
    """Scores and logits squashed by tanh; every second layer has a window (arXiv:2408.00118)."""

    LAYER: ClassVar = {
        **ATTENTION,
        **MLP,
        "input_layernorm": ("attention_norm", ""),
        "post_attention_layernorm": ("attention_post_norm", ""),
        "pre_feedforward_layernorm": ("mlp_norm", ""),
        "post_feedforward_layernorm": ("mlp_post_norm", ""),
    }
    LORA_TARGETS: ClassVar = lora_targets(LAYER)
    EVERY: ClassVar = 2
    """Period in layers: the last of each period has no window, where the config does not list the layers' types."""
    DEFAULTS: ClassVar[dict[str, Any]] = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        if config.get("use_bidirectional_attention") not in (None, False):
            raise ValueError("use_bidirectional_attention is not supported: tokens are generated one after the other")
        shared = {"head_dim": 256, "sliding_window": 4096, "tie_word_embeddings": True, "query_pre_attn_scalar": 256}
        config = shared | cls.DEFAULTS | config
        named = config.get("hidden_activation")
        return replace(
            super().spec(config | {"rope_parameters": None, "rope_scaling": None}),
            layers=cls.attention_layers(config),
            ropes=cls.ropes(config),
            activation=GELU if named is None else activation(config, "hidden_activation", GELU),
            norm="rms_plus_one",
            post_norm=True,
            attention_scale=number(config, "query_pre_attn_scalar", at_least=MIN_FACTOR) ** -0.5,
            softcap=softcap(config, "attn_logit_softcapping"),
            logit_softcap=softcap(config, "final_logit_softcapping"),
            embedding_scale=float(integer(config, "hidden_size")) ** 0.5,
        )

    @classmethod
    def attention_layers(cls, config: dict[str, Any]) -> Layers:
        every = optional_integer(config, "sliding_window_pattern") or cls.EVERY
        return by_type(config, [(index + 1) % every != 0 for index in range(num_layers(config))])

    @classmethod
    def ropes(cls, config: dict[str, Any]) -> tuple[RopeSpec, ...]:
        return (RopeSpec.from_config(config),)


class Gemma3(Gemma2):
    """Five local layers to one global, each kind with rope of its own; norms of queries and keys instead of the
    caps (arXiv:2503.19786)."""

    LAYER: ClassVar = {**Gemma2.LAYER, **QK_NORMS}
    EVERY: ClassVar = 6
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "max_position_embeddings": 131072,
    }

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        return replace(super().spec(config), qk_norm="head")

    @classmethod
    def attention_layers(cls, config: dict[str, Any]) -> Layers:
        layers = super().attention_layers(config)
        return tuple(replace(layer, rope=0 if layer.window is None else 1) for layer in layers)

    @classmethod
    def ropes(cls, config: dict[str, Any]) -> tuple[RopeSpec, ...]:
        """Ropes by kind of layer, as in transformers 5, or as before it: one scaled, and a local one that never is."""
        given = table(config, "rope_parameters")
        pure = config | {"rope_scaling": None}
        local = table(given, "sliding_attention") or {
            "rope_theta": number(config, "rope_local_base_freq", 10000.0, at_least=MIN_THETA)
        }
        whole = table(given, "full_attention") or {
            "rope_theta": optional_number(config, "rope_theta", at_least=MIN_THETA) or 1e6,
            **table(config, "rope_scaling"),
        }
        return tuple(RopeSpec.from_config(pure | {"rope_parameters": one}) for one in (whole, local))
