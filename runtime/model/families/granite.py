"""Granite 3: Llama whose embeddings, scores, residuals and logits are multiplied by numbers from the config."""

from dataclasses import replace
from typing import Any

from runtime.model.config import MIN_FACTOR, number
from runtime.model.families.llama import Llama
from runtime.model.spec import DecoderSpec


class Granite(Llama):
    """arXiv:2408.13359 (maximal update parametrisation)."""

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        return replace(
            super().spec(config),
            attention_scale=number(config, "attention_multiplier", 1.0, at_least=MIN_FACTOR),
            embedding_scale=number(config, "embedding_multiplier", 1.0, at_least=MIN_FACTOR),
            residual_scale=number(config, "residual_multiplier", 1.0, at_least=0.0),
            logit_scale=1.0 / number(config, "logits_scaling", 1.0, at_least=MIN_FACTOR),
        )
