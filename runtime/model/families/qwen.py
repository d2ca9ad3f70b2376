"""Qwen2 and 2.5, Qwen3: Llama with biases on queries, keys and values, or with norms of queries and keys. Qwen2-MoE and
Qwen3-MoE have many small experts in most layers, and dense MLPs in the others."""

from dataclasses import replace
from typing import Any, ClassVar

from runtime.model.config import ConfigError, count, flag, integer, items, optional_integer
from runtime.model.families.family import Family, Layers, alike, by_type, lora_targets, num_layers
from runtime.model.families.llama import ATTENTION, MLP, NORMS, QK_NORMS, Llama
from runtime.model.spec import DecoderSpec, ExpertsSpec


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


# -- mixtures of experts ---------------------------------------------------------------------------


EXPERTS = {
    "mlp.gate": ("router", ""),
    "mlp.experts.*.gate_proj": ("experts_gate_up", "*.gate"),
    "mlp.experts.*.up_proj": ("experts_gate_up", "*.up"),
    "mlp.experts.*.down_proj": ("experts_down", "*"),
}


class Qwen2Moe(Family):
    """Experts, and a shared one for every token (arXiv:2407.10671). Adapters change attention only: MLPs differ from
    layer to layer."""

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
        sliding = flag(config, "use_sliding_window", False)
        config = config if sliding else config | {"sliding_window": None}
        last = integer(config, "max_window_layers", 28, at_least=0)
        windows = [sliding and index % 2 == 0 and index < last for index in range(num_layers(config))]
        return replace(
            Llama.spec(config),
            qkv_bias=flag(config, "qkv_bias", True),
            out_bias=False,
            layers=sparse(by_type(config, windows), config),
            experts=_experts(config, shared_size=integer(config, "shared_expert_intermediate_size")),
        )


class Qwen3Moe(Family):
    """Experts without a shared one, norms of queries and keys (arXiv:2505.09388)."""

    LAYER: ClassVar = {**ATTENTION, **MLP, **NORMS, **EXPERTS, **QK_NORMS}
    LORA_TARGETS: ClassVar = lora_targets(ATTENTION)

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        window = optional_integer(config, "sliding_window") if flag(config, "use_sliding_window", False) else None
        return replace(
            Llama.spec(config),
            qk_norm="head",
            layers=sparse(alike(config, window=window), config),
            experts=_experts(config),
        )


def sparse(layers: Layers, config: dict[str, Any]) -> Layers:
    """The same layers, every `decoder_sparse_step`th with experts, except the layers in `mlp_only_layers`."""
    step, dense = integer(config, "decoder_sparse_step", 1), items(config, "mlp_only_layers") or []
    if not all(isinstance(index, int) for index in dense):
        raise ConfigError("mlp_only_layers", dense, "a list of layers' numbers")
    return tuple(
        replace(layer, moe=index not in dense and (index + 1) % step == 0) for index, layer in enumerate(layers)
    )


def _experts(config: dict[str, Any], shared_size: int = 0) -> ExpertsSpec:
    # transformers 5 writes Qwen3's number under the first of these names.
    names = [name for name in ("num_local_experts", "num_experts") if config.get(name) is not None]
    if not names:
        raise ValueError("num_experts (or num_local_experts) must be an integer above 0, and is missing")
    experts = count(config, names[0])
    return ExpertsSpec(
        count=experts,
        per_token=count(config, "num_experts_per_tok"),
        intermediate_size=integer(config, "moe_intermediate_size"),
        normalise=flag(config, "norm_topk_prob", False),
        shared_size=shared_size,
    )
