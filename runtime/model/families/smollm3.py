"""SmolLM3: Llama in which every fourth layer has no position embedding (NoPE)."""

from dataclasses import replace
from typing import Any

from runtime.model.config import ConfigError, flag, integer, items
from runtime.model.families.family import by_type, num_layers
from runtime.model.families.llama import Llama
from runtime.model.spec import DecoderSpec


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
