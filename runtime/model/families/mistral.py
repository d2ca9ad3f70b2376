"""Mistral and Ministral: Llama whose layers attend within a sliding window, all of them or some. Mixtral: Mistral whose
MLPs are mixtures of experts."""

from dataclasses import replace
from typing import Any, ClassVar

from runtime.model.config import count, integer, optional_integer
from runtime.model.families.family import Family, alike, by_type, lora_targets, num_layers
from runtime.model.families.llama import ATTENTION, NORMS, Llama
from runtime.model.spec import DecoderSpec, ExpertsSpec, LayerSpec


class Mistral(Llama):
    """One window for all layers, or none (arXiv:2310.06825)."""

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        return replace(
            super().spec(config), layers=alike(config, window=optional_integer(config, "sliding_window", 4096))
        )


class Ministral(Llama):
    """The config lists the layers that have the window."""

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        config = {"sliding_window": 4096} | config
        return replace(super().spec(config), layers=by_type(config, [True] * num_layers(config)))


class Mixtral(Family):
    """Two of eight experts a token, their shares adding up to 1 (arXiv:2401.04088)."""

    LAYER: ClassVar = {
        **ATTENTION,
        **NORMS,
        "block_sparse_moe.gate": ("router", ""),
        "block_sparse_moe.experts.*.w1": ("experts_gate_up", "*.gate"),
        "block_sparse_moe.experts.*.w3": ("experts_gate_up", "*.up"),
        "block_sparse_moe.experts.*.w2": ("experts_down", "*"),
    }
    LORA_TARGETS: ClassVar = lora_targets(LAYER)

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        config = {"rope_theta": 1e6, "rms_norm_eps": 1e-5} | config
        layer = LayerSpec(window=optional_integer(config, "sliding_window"), moe=True)
        experts = count(config, "num_local_experts", 8)
        return replace(
            Llama.spec(config),
            layers=(layer,) * num_layers(config),
            experts=ExpertsSpec(
                count=experts,
                per_token=count(config, "num_experts_per_tok", 2),
                intermediate_size=integer(config, "intermediate_size"),
                normalise=True,
            ),
        )
