"""Qwen2-MoE and Qwen3-MoE: many small experts in most layers, dense MLPs in the others."""

from dataclasses import replace
from typing import Any, ClassVar

from runtime.workers.models.family import Family, Layers, alike, by_type, lora_targets, positive
from runtime.workers.models.llama import ATTENTION, MLP, NORMS, Llama
from runtime.workers.models.qwen import QK_NORMS
from runtime.workers.spec import DecoderSpec, ExpertsSpec

EXPERTS = {
    "mlp.gate": ("router", ""),
    "mlp.experts.*.gate_proj": ("experts_gate_up", "*.gate"),
    "mlp.experts.*.up_proj": ("experts_gate_up", "*.up"),
    "mlp.experts.*.down_proj": ("experts_down", "*"),
}


class Qwen2Moe(Family):
    """Experts, and one more that sees every token (arXiv:2407.10671). Adapters change attention only: MLPs
    differ from layer to layer."""

    LAYER: ClassVar = {
        **ATTENTION,
        **MLP,
        **NORMS,
        **EXPERTS,
        "mlp.shared_expert.gate_proj": ("shared_gate_up", "gate"),
        "mlp.shared_expert.up_proj": ("shared_gate_up", "up"),
        "mlp.shared_expert.down_proj": ("shared_down", ""),
        "mlp.shared_expert_gate": ("shared_gate", ""),
    }
    LORA_TARGETS: ClassVar = lora_targets(ATTENTION)

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        sliding = bool(config.get("use_sliding_window"))
        config = config if sliding else config | {"sliding_window": None}
        last = config.get("max_window_layers", 28)
        count = positive(config, "num_hidden_layers")
        return replace(
            Llama.spec(config),
            qkv_bias=config.get("qkv_bias", True),
            out_bias=False,
            layers=sparse(by_type(config, [sliding and i % 2 == 0 and i < last for i in range(count)]), config),
            experts=_experts(config, shared_size=config["shared_expert_intermediate_size"]),
        )


class Qwen3Moe(Family):
    """Experts without a shared one, norms of queries and keys (arXiv:2505.09388)."""

    LAYER: ClassVar = {**ATTENTION, **MLP, **NORMS, **EXPERTS, **QK_NORMS}
    LORA_TARGETS: ClassVar = lora_targets(ATTENTION)

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        window = config.get("sliding_window") if config.get("use_sliding_window") else None
        return replace(
            Llama.spec(config),
            qk_norm="head",
            layers=sparse(alike(config, window=window), config),
            experts=_experts(config),
        )


def sparse(layers: Layers, config: dict[str, Any]) -> Layers:
    """The same layers, every `decoder_sparse_step`th with experts, but for those in `mlp_only_layers`."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    return tuple(
        replace(layer, moe=index not in dense and (index + 1) % step == 0) for index, layer in enumerate(layers)
    )


def _experts(config: dict[str, Any], shared_size: int = 0) -> ExpertsSpec:
    return ExpertsSpec(
        count=config.get("num_local_experts") or config["num_experts"],  # transformers 5 writes Qwen3's as the first
        per_token=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        normalise=bool(config.get("norm_topk_prob", False)),
        shared_size=shared_size,
    )
