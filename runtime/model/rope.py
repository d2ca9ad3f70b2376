"""Rotary position embedding: angles of positions, and the scalings that stretch contexts.

Sources: rope arXiv:2104.09864; `linear` arXiv:2306.15595; `dynamic` is NTK-aware scaling; `yarn` arXiv:2309.00071;
`longrope` arXiv:2402.13753; `llama3` came with Llama 3.1. A cached key keeps its rotation, so a scaling that
depends on the length of a sequence is chosen once, by the longest context that is served.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.model.config import MAX_NUMBER, MIN_FACTOR, flag, integer, items, number, optional_number, table

MIN_THETA = 2.0
"""Smallest base of the angles' powers; its logarithm is a divisor."""


@dataclass(frozen=True)
class RopeSpec:
    """The map from positions to angles. Field names as in a Hugging Face config, where it has them."""

    theta: float = 10000.0
    rope_type: str = "default"
    partial: float = 1.0
    """Share of a head's dimensions that is rotated, from the first on."""
    factor: float = 1.0
    original_max_position: int = 8192
    """Longest sequence, in tokens, of the training before the stretching."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    """Factor of sines and cosines; None: as in the scaling's paper."""
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

        `theta` and `partial` are the architecture's defaults. Null counts as absent: transformers writes every key of a
        scaling, also those of other kinds. Raises `ValueError` naming the key, and for an unknown kind of scaling the
        supported ones.
        """
        older, newer = table(config, "rope_scaling"), table(config, "rope_parameters")
        given = older | newer
        if kinds := [key for key, value in given.items() if isinstance(value, dict)]:
            raise ValueError(f"rope_parameters.{kinds[0]}: rope by kind of layer is not supported by this architecture")
        kind = given.get("rope_type", given.get("type"))
        kind = "default" if kind is None else "longrope" if kind == "su" else kind  # its name before it had one
        if not isinstance(kind, str) or kind not in SCALINGS:
            raise ValueError(f"rope_type: rope scaling {kind!r} is not supported; supported are: {KINDS}")
        longest = integer(config, "max_position_embeddings", 8192)
        original = longest
        if kind != "dynamic":
            stretched = {"original_max_position_embeddings": longest} | _set(given) | _set(config)
            least = 2 if kind == "longrope" else 1  # whose logarithm is divided by
            original = integer(stretched, "original_max_position_embeddings", at_least=least)

        def where(key: str) -> str:
            return "rope_scaling." if key in older and key not in newer else "rope_parameters."

        def optional(key: str, *, at_least: float = MIN_FACTOR, at_most: float = MAX_NUMBER) -> float | None:
            return optional_number(given, key, at_least=at_least, at_most=at_most, where=where(key))

        def divisors(key: str) -> tuple[float, ...]:
            found = enumerate(items(given, key, where=where(key)) or ())
            return tuple(number({f"{key}[{at}]": one}, f"{key}[{at}]", at_least=MIN_FACTOR) for at, one in found)

        factor = optional("factor")
        if factor is None and kind in NEED_FACTOR:
            raise ValueError(f"{where('rope_type')}factor is missing; rope scaling {kind!r} needs a number")
        angles = optional("rope_theta", at_least=MIN_THETA) or optional_number(config, "rope_theta", at_least=MIN_THETA)
        share = optional("partial_rotary_factor", at_most=1.0)
        share = share or optional_number(config, "partial_rotary_factor", at_least=MIN_FACTOR, at_most=1.0)
        found = cls(
            theta=angles or theta,
            rope_type=kind,
            partial=share or partial,
            factor=longest / original if factor is None else factor,
            original_max_position=original,
            low_freq_factor=optional("low_freq_factor") or 1.0,
            high_freq_factor=optional("high_freq_factor") or 4.0,
            attention_factor=optional("attention_factor"),
            beta_fast=optional("beta_fast", at_least=0.0) or 32.0,
            beta_slow=optional("beta_slow", at_least=0.0) or 1.0,
            mscale=optional("mscale", at_least=0.0) or 0.0,
            mscale_all_dim=optional("mscale_all_dim", at_least=0.0) or 0.0,
            truncate=True if given.get("truncate") is None else flag(given, "truncate", True, where=where("truncate")),
            short_factor=divisors("short_factor"),
            long_factor=divisors("long_factor"),
        )
        if kind == "llama3" and found.low_freq_factor >= found.high_freq_factor:
            raise ValueError(
                f"{where('low_freq_factor')}low_freq_factor must be below high_freq_factor "
                f"({found.high_freq_factor:g}), got {found.low_freq_factor:g}"
            )
        return found

    @property
    def reach(self) -> int:
        """Longest context, in tokens, that the scaling was made for; 0 where the model's own `max_position` is the
        limit."""
        return int(self.original_max_position * self.factor) if self.rope_type in ("linear", "dynamic", "yarn") else 0

    def frequencies(self, head_dim: int, max_len: int) -> tuple[Tensor, float]:
        """Inverse frequencies [rotated dimensions / 2] float32, and the factor of sines and cosines, for contexts of up
        to `max_len` tokens."""
        dim = int(head_dim * self.partial)
        inverse = 1.0 / self.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        return SCALINGS[self.rope_type](self, inverse, max_len)

    def table(self, head_dim: int, max_len: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines [max_len, rotated dimensions / 2] of every position's angles, computed in float32."""
        inverse, factor = self.frequencies(head_dim, max_len)
        angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inverse).to(device)
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def _set(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without nulls."""
    return {key: value for key, value in config.items() if value is not None}


Scaled = tuple[Tensor, float]


def _default(spec: RopeSpec, inverse: Tensor, max_len: int) -> Scaled:
    return inverse, 1.0


def _linear(spec: RopeSpec, inverse: Tensor, max_len: int) -> Scaled:
    return inverse / spec.factor, 1.0


def _dynamic(spec: RopeSpec, inverse: Tensor, max_len: int) -> Scaled:
    """Up to the original length nothing changes; past it theta grows with the context."""
    dim, original = 2 * len(inverse), spec.original_max_position
    if dim <= 2:
        raise ValueError("rope scaling 'dynamic' needs heads of which more than 2 dimensions are turned")
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
    """Dimensions with many rotations are kept, dimensions with few are stretched, and the ones between are blended."""
    half = len(inverse)
    dim = 2 * half

    def dimension(turns: float) -> float:
        """The dimension that makes this number of turns over the original length."""
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
        raise ValueError(f"rope scaling: {name} has {len(divisors)} values, and there are {len(inverse)} frequencies")
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
"""Kind of scaling → function of the plain inverse frequencies and the longest context that gives the result of
`frequencies`."""

KINDS = ", ".join(SCALINGS)
NEED_FACTOR = ("linear", "dynamic", "llama3")
"""Scalings that require a factor. Without one the others stretch from the original length to the longest."""
