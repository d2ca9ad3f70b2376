"""SmolLM3: Llama in which every fourth layer knows no positions (NoPE)."""

from dataclasses import replace
from typing import Any

from runtime.workers.models.family import by_type, positive
from runtime.workers.models.llama import Llama
from runtime.workers.spec import DecoderSpec


class SmolLM3(Llama):
    """NoPE layers as in arXiv:2501.18795; windows, where they are on, in those layers only."""

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        config = {"rope_theta": 2e6, "tie_word_embeddings": True} | config
        if not config.get("use_sliding_window"):
            config = config | {"sliding_window": None}
        count, interval = positive(config, "num_hidden_layers"), config.get("no_rope_layer_interval", 4)
        turned = config.get("no_rope_layers") or [(index + 1) % interval != 0 for index in range(count)]
        if len(turned) < count:
            raise ValueError(f"no_rope_layers has {len(turned)} entries for {count} layers")
        layers = by_type(config, [not one for one in turned[:count]])
        ropes = (0 if one else None for one in turned)  # the config's 1 is for rope, in spite of its name
        return replace(
            super().spec(config),
            layers=tuple(replace(layer, rope=rope) for layer, rope in zip(layers, ropes, strict=False)),
        )
