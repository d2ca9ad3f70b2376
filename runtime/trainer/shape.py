"""The part of a model's shape that decides the shape of its adapters: the linears, and sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec import Struct

from runtime.trainer.recipe import Recipe
from runtime.trainer.recipe.preference import beta_of

if TYPE_CHECKING:
    from runtime.model.lora_base import LoraBase
    from runtime.model.spec import DecoderSpec


class ModelShape(Struct, frozen=True, kw_only=True):
    """One served model."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    linears: dict[str, tuple[int, int]]
    """A layer's linears by their name in the checkpoint (`self_attn.q_proj`) → (in, out) features."""
    bytes_per_value: int = 4
    """Bytes of an activation: 4 in float32, 2 in bfloat16."""
    prefix: str = "model.layers"
    """Prefix of the full name of a linear, as PEFT writes it."""


def watchdog_threshold(recipe: Recipe, vocab_size: int) -> float:
    """Loss above which a run is lost: the recipe's, else one nat more than that of guessing evenly among all tokens.
    That of ipo begins at 1 / (2 beta)², so it is four times that where that is more."""
    guessing = math.log(vocab_size) + 1
    if recipe.rl == "ipo":
        guessing = max(guessing, 1 / beta_of(recipe) ** 2)
    return recipe.loss_watchdog_threshold or guessing


def shape_of_base(spec: DecoderSpec, base: LoraBase, *, bytes_per_value: int) -> ModelShape:
    """The shape of a model that is loaded."""
    return ModelShape(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        vocab_size=spec.vocab_size,
        linears={name: (target.in_features, target.out_features) for name, target in base.targets.items()},
        bytes_per_value=bytes_per_value,
        prefix=base.layers,
    )


def shape_of(
    spec: DecoderSpec, targets: Mapping[str, tuple[str, str]], *, bytes_per_value: int, prefix: str = "model.layers"
) -> ModelShape:
    """The shape of a decoder; `targets` is its architecture's `LORA_TARGETS`, `prefix` its `layers()`."""
    heads, groups, inner = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.intermediate_size
    hidden = spec.hidden_size
    sizes = {
        ("qkv", "q"): (hidden, heads),
        ("qkv", "k"): (hidden, groups),
        ("qkv", "v"): (hidden, groups),
        ("qkv", ""): (hidden, heads + 2 * groups),
        ("out", ""): (heads, hidden),
        ("gate_up", "gate"): (hidden, inner),
        ("gate_up", "up"): (hidden, inner),
        ("gate_up", ""): (hidden, 2 * inner),
        ("down", ""): (inner, hidden),
    }
    return ModelShape(
        num_layers=spec.num_layers,
        hidden_size=hidden,
        intermediate_size=inner,
        vocab_size=spec.vocab_size,
        linears={name: sizes[place] for name, place in targets.items()},
        bytes_per_value=bytes_per_value,
        prefix=prefix,
    )
