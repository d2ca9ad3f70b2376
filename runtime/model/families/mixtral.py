"""Mixtral: Mistral whose MLPs are mixtures of experts."""

from dataclasses import replace
from typing import Any, ClassVar

from runtime.workers.models.family import Family, lora_targets, positive
from runtime.workers.models.llama import ATTENTION, NORMS, Llama
from runtime.workers.spec import DecoderSpec, ExpertsSpec, LayerSpec


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
        layer = LayerSpec(window=config.get("sliding_window"), moe=True)
        return replace(
            Llama.spec(config),
            layers=(layer,) * positive(config, "num_hidden_layers"),
            experts=ExpertsSpec(
                count=config.get("num_local_experts", 8),
                per_token=config.get("num_experts_per_tok", 2),
                intermediate_size=config["intermediate_size"],
                normalise=True,
            ),
        )
