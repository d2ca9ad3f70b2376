"""Rotary position embedding: how positions turn into angles, and the scalings that stretch contexts.

Sources: rope arXiv:2104.09864; `linear` arXiv:2306.15595; `dynamic` is NTK-aware scaling; `yarn` arXiv:2309.00071;
`longrope` arXiv:2402.13753; `llama3` came with Llama 3.1. A cached key keeps its rotation, so a scaling that
depends on the length of a sequence is chosen once, by the longest context that is served.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeSpec:
    """How positions turn into angles. Field names as in a Hugging Face config, where it has them."""

    theta: float = 10000.0
    rope_type: str = "default"
    partial: float = 1.0
    """The share of a head's dimensions that is turned, from the first on."""
    factor: float = 1.0
    original_max_position: int = 8192
    """The longest sequence of the training that came before the stretching."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    """What sines and cosines are multiplied by; None: as the scaling's paper says."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @classmethod
    def from_config(cls, config: dict[str, Any], *, theta: float = 10000.0, partial: float = 1.0) -> "RopeSpec":
        """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before it).

        `theta` and `partial` are the architecture's defaults. Raises `ValueError` for a kind of scaling that is
        not here, naming those that are.
        """
        given = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
        kind = given.get("rope_type", given.get("type", "default"))
        kind = "longrope" if kind == "su" else kind  # its name before it had one
        if kind not in SCALINGS:
            raise ValueError(f"rope scaling {kind!r} is not supported; supported are: {', '.join(SCALINGS)}")
        max_position = config.get("max_position_embeddings", 8192)
        original = max_position
        if kind != "dynamic":
            own = given.get("original_max_position_embeddings", max_position)
            original = config.get("original_max_position_embeddings") or own
        factor = given.get("factor")
        return cls(
            theta=float(given.get("rope_theta") or config.get("rope_theta") or theta),
            rope_type=kind,
            partial=float(given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or partial),
            factor=float(max_position / original if factor is None else factor),
            original_max_position=int(original),
            low_freq_factor=float(given.get("low_freq_factor", 1.0)),
            high_freq_factor=float(given.get("high_freq_factor", 4.0)),
            attention_factor=given.get("attention_factor"),
            beta_fast=float(given.get("beta_fast") or 32.0),
            beta_slow=float(given.get("beta_slow") or 1.0),
            mscale=float(given.get("mscale") or 0.0),
            mscale_all_dim=float(given.get("mscale_all_dim") or 0.0),
            truncate=bool(given.get("truncate", True)),
            short_factor=tuple(given.get("short_factor") or ()),
            long_factor=tuple(given.get("long_factor") or ()),
        )

    @property
    def reach(self) -> int:
        """The longest context that the scaling was made to stretch to; 0 where the model's own says it."""
        return int(self.original_max_position * self.factor) if self.rope_type in ("linear", "dynamic", "yarn") else 0

    def frequencies(self, head_dim: int, max_len: int) -> tuple[Tensor, float]:
        """Inverse frequencies [turned dimensions / 2] float32, and what sines and cosines are multiplied by,
        for contexts of up to `max_len`."""
        dim = int(head_dim * self.partial)
        inverse = 1.0 / self.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        return SCALINGS[self.rope_type](self, inverse, max_len)

    def table(self, head_dim: int, max_len: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines [max_len, turned dimensions / 2] of every position's angles, computed in float32."""
        inverse, factor = self.frequencies(head_dim, max_len)
        angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inverse).to(device)
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


Scaled = tuple[Tensor, float]


def _default(spec: RopeSpec, inverse: Tensor, max_len: int) -> Scaled:
    return inverse, 1.0


def _linear(spec: RopeSpec, inverse: Tensor, max_len: int) -> Scaled:
    return inverse / spec.factor, 1.0


def _dynamic(spec: RopeSpec, inverse: Tensor, max_len: int) -> Scaled:
    """Up to the original length nothing changes; past it theta grows with the context."""
    dim, original = 2 * len(inverse), spec.original_max_position
    stretch = spec.factor * max(max_len, original) / original - (spec.factor - 1)
    theta = spec.theta * stretch ** (dim / (dim - 2))
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim), 1.0


def _llama3(spec: RopeSpec, inverse: Tensor, max_len: int) -> Scaled:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended."""
    wavelength = 2 * math.pi / inverse
    turns = spec.original_max_position / wavelength
    blend = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * inverse / spec.factor + blend * inverse, 1.0


def _yarn(spec: RopeSpec, inverse: Tensor, max_len: int) -> Scaled:
    """Dimensions that turn often are kept, those that turn seldom stretched, those between blended."""
    half = len(inverse)
    dim = 2 * half

    def dimension(turns: float) -> float:
        """The dimension that makes so many turns over the original length."""
        return dim * math.log(spec.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    stretched = ((torch.arange(half) - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    factor = spec.attention_factor
    if factor is None and spec.mscale and spec.mscale_all_dim:
        factor = _mscale(spec.factor, spec.mscale) / _mscale(spec.factor, spec.mscale_all_dim)
    elif factor is None:
        factor = _mscale(spec.factor, 1.0)
    return inverse / spec.factor * stretched + inverse * (1 - stretched), factor


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(spec: RopeSpec, inverse: Tensor, max_len: int) -> Scaled:
    """A searched divisor for every frequency, one set up to the original length, another past it."""
    original = spec.original_max_position
    name = "long_factor" if max_len > original else "short_factor"
    divisors: tuple[float, ...] = getattr(spec, name)
    if len(divisors) != len(inverse):
        raise ValueError(f"rope scaling's {name} has {len(divisors)} values, and there are {len(inverse)} frequencies")
    factor = spec.attention_factor
    if factor is None:
        factor = 1.0 if spec.factor <= 1 else math.sqrt(1 + math.log(spec.factor) / math.log(original))
    return inverse / torch.tensor(divisors, dtype=torch.float32), factor


SCALINGS: dict[str, Callable[[RopeSpec, Tensor, int], Scaled]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
"""Each kind of scaling: from the plain inverse frequencies and the longest context to what `frequencies` gives."""
