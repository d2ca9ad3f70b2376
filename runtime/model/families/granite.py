"""Granite 3: Llama whose embeddings, scores, residuals and logits are multiplied by numbers from the config."""

from dataclasses import replace
from typing import Any

from runtime.workers.models.llama import Llama
from runtime.workers.spec import DecoderSpec


class Granite(Llama):
    """arXiv:2408.13359 (maximal update parametrisation)."""

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        return replace(
            super().spec(config),
            attention_scale=float(config.get("attention_multiplier", 1.0)),
            embedding_scale=float(config.get("embedding_multiplier", 1.0)),
            residual_scale=float(config.get("residual_multiplier", 1.0)),
            logit_scale=1.0 / float(config.get("logits_scaling", 1.0)),
        )
