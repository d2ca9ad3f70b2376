"""Gemma 2 and 3 (text): local and global attention in turns, norms before and after, GeGLU, soft caps."""

from dataclasses import replace
from typing import Any, ClassVar

from runtime.workers.models.family import Layers, by_type, lora_targets, positive
from runtime.workers.models.llama import ATTENTION, MLP, Llama
from runtime.workers.models.qwen import QK_NORMS
from runtime.workers.rope import RopeSpec
from runtime.workers.spec import DecoderSpec


class Gemma2(Llama):
    """Scores and logits squashed by tanh; every second layer sees a window (arXiv:2408.00118)."""

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
    """Each so many layers one has no window, where the config does not say which."""
    DEFAULTS: ClassVar[dict[str, Any]] = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        if config.get("use_bidirectional_attention"):
            raise ValueError("use_bidirectional_attention is not supported: tokens are generated one after the other")
        shared = {"head_dim": 256, "sliding_window": 4096, "tie_word_embeddings": True, "query_pre_attn_scalar": 256}
        config = shared | cls.DEFAULTS | config
        return replace(
            super().spec(config | {"rope_parameters": None, "rope_scaling": None}),
            layers=cls.attention_layers(config),
            ropes=cls.ropes(config),
            activation=config.get("hidden_activation") or "gelu_pytorch_tanh",
            norm="rms_plus_one",
            post_norm=True,
            attention_scale=float(config["query_pre_attn_scalar"]) ** -0.5,
            softcap=config["attn_logit_softcapping"] or 0.0,
            logit_softcap=config["final_logit_softcapping"] or 0.0,
            embedding_scale=float(positive(config, "hidden_size")) ** 0.5,
        )

    @classmethod
    def attention_layers(cls, config: dict[str, Any]) -> Layers:
        every = config.get("sliding_window_pattern") or cls.EVERY
        return by_type(config, [(index + 1) % every != 0 for index in range(positive(config, "num_hidden_layers"))])

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
        given = config.get("rope_parameters") or {}
        local = given.get("sliding_attention") or {"rope_theta": config.get("rope_local_base_freq", 10000.0)}
        old = {"rope_theta": config.get("rope_theta", 1e6), **(config.get("rope_scaling") or {})}
        pure = config | {"rope_scaling": None}
        return tuple(
            RopeSpec.from_config(pure | {"rope_parameters": one}) for one in (given.get("full_attention") or old, local)
        )
