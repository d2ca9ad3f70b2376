"""Qwen2 and 2.5, Qwen3: Llama with biases on queries, keys and values, or with norms of queries and keys."""

from dataclasses import replace
from typing import Any, ClassVar

from runtime.model.config import flag, integer
from runtime.model.families.family import Layers, by_type, num_layers
from runtime.model.families.llama import Llama
from runtime.model.spec import DecoderSpec

QK_NORMS = {"self_attn.q_norm": ("q_norm", ""), "self_attn.k_norm": ("k_norm", "")}


class Qwen2(Llama):
    """Biases on queries, keys and values only (arXiv:2407.10671)."""

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        return replace(super().spec(config), qkv_bias=True, out_bias=False, layers=qwen_layers(config))


class Qwen3(Llama):
    """No biases, but a norm of every query and key (arXiv:2505.09388)."""

    LAYER: ClassVar = {**Llama.LAYER, **QK_NORMS}

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        config = {"head_dim": 128} | config
        return replace(super().spec(config), qk_norm="head", layers=qwen_layers(config))


def qwen_layers(config: dict[str, Any]) -> Layers:
    """Layers with a window from the `max_window_layers`th on, where the config turns windows on at all."""
    config = config if flag(config, "use_sliding_window", False) else config | {"sliding_window": None}
    first = integer(config, "max_window_layers", 28, at_least=0)
    return by_type(config, [index >= first for index in range(num_layers(config))])
