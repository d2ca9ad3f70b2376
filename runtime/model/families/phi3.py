"""Phi-3, 3.5 and 4: Llama with fused checkpoint tensors, longrope, and partial rotary embeddings."""

from dataclasses import replace
from typing import Any, ClassVar

from runtime.model.config import optional_integer, table
from runtime.model.families.family import Family, alike, lora_targets
from runtime.model.families.llama import NORMS, Llama
from runtime.model.rope import RopeSpec
from runtime.model.spec import DecoderSpec


class Phi3(Family):
    """arXiv:2404.14219, arXiv:2412.08905. An adapter changes a fused tensor as a whole, as in the checkpoint."""

    LAYER: ClassVar = {
        **NORMS,
        "self_attn.qkv_proj": ("qkv", ""),
        "self_attn.o_proj": ("out", ""),
        "mlp.gate_up_proj": ("gate_up", ""),
        "mlp.down_proj": ("down", ""),
    }
    LORA_TARGETS: ClassVar = lora_targets(LAYER)

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        config = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096} | config
        return replace(
            Llama.spec(config | {"rope_scaling": None, "rope_parameters": None}),
            layers=alike(config, window=optional_integer(config, "sliding_window")),
            ropes=(RopeSpec.from_config(_longrope(config)),),
            qkv="fused",
            gate_up_fused=True,
        )


def _longrope(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the early checkpoints' other names for longrope replaced."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    scaling = table(config, key)
    if scaling.get("rope_type", scaling.get("type")) in ("su", "yarn"):
        scaling["rope_type"] = "longrope"
    return config | {key: scaling or None}
