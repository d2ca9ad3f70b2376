"""Mistral and Ministral: Llama whose layers attend within a sliding window, all of them or some."""

from dataclasses import replace
from typing import Any

from runtime.model.config import optional_integer
from runtime.model.families.family import alike, by_type, num_layers
from runtime.model.families.llama import Llama
from runtime.model.spec import DecoderSpec


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
