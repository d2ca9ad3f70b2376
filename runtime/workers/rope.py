"""Rotary position embedding: the table of angles, with the scalings of the Llama family.

Source: arXiv:2104.09864; `linear` is position interpolation (arXiv:2306.15595); `llama3` is the
frequency-dependent scaling that Llama 3.1 introduced.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeSpec:
    """How positions turn into angles. Field names as in a Hugging Face config."""

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RopeSpec":
        """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before it).

        Raises `ValueError` for a kind of scaling that is not here, naming those that are.
        """
        scaling = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in FREQUENCIES:
            raise ValueError(f"rope scaling {kind!r} is not supported; supported are: {', '.join(FREQUENCIES)}")
        return cls(
            theta=float(scaling.get("rope_theta", config.get("rope_theta", 10000.0))),
            rope_type=kind,
            factor=float(scaling.get("factor", 1.0)),
            low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
            high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
            original_max_position=int(
                scaling.get("original_max_position_embeddings", config.get("max_position_embeddings", 8192))
            ),
        )

    def table(self, head_dim: int, max_len: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines [max_len, head_dim / 2] of every position's angles, computed in float32."""
        inverse = 1.0 / self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        inverse = FREQUENCIES[self.rope_type](self, inverse)
        angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inverse).to(device)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _linear(spec: RopeSpec, inverse: Tensor) -> Tensor:
    return inverse / spec.factor


def _llama3(spec: RopeSpec, inverse: Tensor) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended."""
    wavelength = 2 * math.pi / inverse
    turns = spec.original_max_position / wavelength
    blend = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * inverse / spec.factor + blend * inverse


FREQUENCIES = {"default": lambda spec, inverse: inverse, "linear": _linear, "llama3": _llama3}
"""Each kind of scaling: from the plain inverse frequencies [head_dim / 2] to the scaled ones."""
