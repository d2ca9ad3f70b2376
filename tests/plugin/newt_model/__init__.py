"""An architecture in a package of its own: Llama with parallel layers, other tensor names, and half-turned heads."""

from dataclasses import replace
from typing import Any, ClassVar

from runtime.model.families.family import Family, lora_targets
from runtime.model.families.llama import Llama
from runtime.model.rope import RopeSpec
from runtime.model.spec import DecoderSpec


class Newt(Family):
    LAYERS: ClassVar = "pond."
    LAYER: ClassVar = {
        "swim": ("qkv", ""),
        "rest": ("out", ""),
        "gate": ("gate_up", "gate"),
        "up": ("gate_up", "up"),
        "down": ("down", ""),
        "norm": ("attention_norm", ""),
    }
    OUTSIDE: ClassVar = {"spawn.weight": "embedding.weight", "shore.weight": "norm.weight"}
    LORA_TARGETS: ClassVar = lora_targets(LAYER)

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        return replace(
            Llama.spec(config | {"tie_word_embeddings": True}),
            ropes=(RopeSpec.from_config(config, partial=0.5),),
            qkv="grouped",
            parallel=True,
            shared_norm=True,
        )
