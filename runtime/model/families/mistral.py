"""Mistral and Ministral: Llama whose layers attend within a sliding window, all of them or some."""

from dataclasses import replace
from typing import Any

from runtime.workers.models.family import alike, by_type, positive
from runtime.workers.models.llama import Llama
from runtime.workers.spec import DecoderSpec


class Mistral(Llama):
    """One window for all layers, or none (arXiv:2310.06825)."""

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        return replace(super().spec(config), layers=alike(config, window=config.get("sliding_window", 4096)))


class Ministral(Llama):
    """The config says which layers have the window."""

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        config = {"sliding_window": 4096} | config
        return replace(super().spec(config), layers=by_type(config, [True] * positive(config, "num_hidden_layers")))
