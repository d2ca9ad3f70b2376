"""What of a model's shape decides what an adapter for it is: the linears, and how large things are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from runtime.workers.decoder import DecoderSpec


class ModelShape(Struct, frozen=True, kw_only=True):
    """One served model."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    linears: dict[str, tuple[int, int]]
    """A layer's linears by their name in the checkpoint (`self_attn.q_proj`) → (in, out) features."""
    bytes_per_value: int = 4
    """Of activations: 4 in float32, 2 in bfloat16."""
    prefix: str = "model.layers"
    """What the full name of a linear begins with, as PEFT writes it."""


def shape_of(spec: DecoderSpec, targets: Mapping[str, tuple[str, str]], *, bytes_per_value: int) -> ModelShape:
    """The shape of a decoder; `targets` is its architecture's `LORA_TARGETS`."""
    heads, groups = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    sizes = {
        ("qkv", "q"): (spec.hidden_size, heads),
        ("qkv", "k"): (spec.hidden_size, groups),
        ("qkv", "v"): (spec.hidden_size, groups),
        ("out", ""): (heads, spec.hidden_size),
        ("gate_up", "gate"): (spec.hidden_size, spec.intermediate_size),
        ("gate_up", "up"): (spec.hidden_size, spec.intermediate_size),
        ("down", ""): (spec.intermediate_size, spec.hidden_size),
    }
    return ModelShape(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        vocab_size=spec.vocab_size,
        linears={name: sizes[place] for name, place in targets.items()},
        bytes_per_value=bytes_per_value,
    )
