"""Rope scaling out of a GGUF file: its parameters, or those that led to the factors that the file has."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.workers.loading.gguf_metadata import Metadata
from runtime.workers.loading.gguf_models.source import Source, shortest

ROPE_FACTORS = "rope_freqs.weight"
"""Not a weight: what Llama 3's rope scaling divides each frequency by, float32 [head_dim / 2]."""
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""Nor are these: longrope's divisors."""
FACTORS = (ROPE_FACTORS, LONG, SHORT)


def rope_scaling(source: Source) -> dict[str, Any] | None:
    """What `rope_scaling` is in a config.json. Raises `ModelLoadError` for what cannot be told from the file."""
    metadata = source.metadata
    if ROPE_FACTORS in source.factors:
        return _llama3_scaling(metadata, source.head_dim, source.factors[ROPE_FACTORS])
    if LONG in source.factors or SHORT in source.factors:
        return _longrope(source)
    kind = metadata.text(".rope.scaling.type") or "none"
    factor = metadata.number(".rope.scaling.factor") or metadata.number(".rope.scale_linear") or 1.0
    if kind == "linear" or (kind == "none" and metadata.number(".rope.scale_linear")):
        return None if factor == 1.0 else {"rope_type": "linear", "factor": shortest(factor)}
    if kind == "none":
        return None
    original = metadata.integer(".rope.scaling.original_context_length")
    if (metadata.number(".rope.scaling.attn_factor") or 1.0) != 1.0:
        raise metadata.error(".rope.scaling.attn_factor", f"is not 1, which is not supported with {kind!r}")
    return {  # the model registry says which kinds it knows
        "rope_type": kind,
        "factor": shortest(factor),
        "original_max_position_embeddings": original or metadata.size(".context_length"),
    }


def _llama3_scaling(metadata: Metadata, head_dim: int, factors: NDArray[np.float32]) -> dict[str, Any]:
    """Llama 3.1's parameters from the factors that they led to.

    The file has the factors alone. The largest is the parameter `factor`; the others have the same values
    in every Llama 3 model so far, and if they had not, the factors would differ from what they give.
    """
    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": float(f"{factors.max(initial=1.0):.6g}"),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": metadata.integer(".rope.scaling.original_context_length") or 8192,
    }
    theta = metadata.number(".rope.freq_base") or 10000.0
    expected = [_llama3_factor(theta ** (2 * i / head_dim), scaling) for i in range(head_dim // 2)]
    if factors.shape != (head_dim // 2,) or not np.allclose(factors, expected, rtol=1e-3):
        raise metadata.error(ROPE_FACTORS, "does not follow Llama 3's rope scaling, the only one supported here")
    return scaling


def _llama3_factor(scale: float, scaling: Mapping[str, Any]) -> float:
    """What the frequency 1 / `scale` is divided by."""
    turns: float = scaling["original_max_position_embeddings"] / (2 * math.pi * scale)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = min(max((turns - low) / (high - low), 0.0), 1.0)
    divisor: float = 1.0 / ((1.0 - blend) / scaling["factor"] + blend)
    return divisor


def _longrope(source: Source) -> dict[str, Any]:
    metadata = source.metadata
    for name in (LONG, SHORT):
        if name not in source.factors:
            raise metadata.error(name, "is missing, and its counterpart is there")
    factor = metadata.number(".rope.scaling.attn_factor")
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": [shortest(float(value)) for value in source.factors[LONG]],
        "short_factor": [shortest(float(value)) for value in source.factors[SHORT]],
        "original_max_position_embeddings": metadata.size(".rope.scaling.original_context_length"),
    }
    return scaling if factor is None else scaling | {"attention_factor": factor}
