"""Base class of the architectures: checkpoint names as data on a class, and readers of config.json."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from kernels import Weight
from runtime.model.config import Config, count, items, number, optional_integer, text
from runtime.model.mlp import ACTIVATIONS
from runtime.model.spec import LINEARS, DecoderSpec, LayerSpec

# -- computed --------------------------------------------------------------------------------------
#
# Tensors that older checkpoints store and that follow from the configuration: rotary tables, masks, positions.
#
# transformers once kept them as persistent buffers, under the names of the modules that held them. None of them is a
# weight, so a checkpoint with them is the same model as one without.

ATTENTION_MODULES = frozenset({"attn", "attention", "self_attn", "self_attention"})
"""Modules whose own `bias` is a causal mask: their linears have the biases that are learned."""

BUFFERS = frozenset({
    "masked_bias", "causal_mask", "attention_mask", "attn_mask", "mask", "tril", "position_ids", "token_type_ids",
    "cos_cached", "sin_cached", "_cos_cached", "_sin_cached", "freqs_cis", "cos_sin_cache",
})  # fmt: skip

NAMES_OF_ROPE = ("rotary", "rope")


def is_computed(name: str) -> bool:
    """True for a computed tensor, by its name alone, for every architecture."""
    *path, leaf = name.split(".")
    parent = path[-1] if path else ""
    if leaf in BUFFERS or leaf.endswith("inv_freq"):
        return True
    if parent.startswith(NAMES_OF_ROPE):
        return True
    return leaf == "bias" and parent in ATTENTION_MODULES


PartPlace = tuple[str, str]
"""(parameter, part): one of a layer's weights, and one of its parts."""

Layers = tuple[LayerSpec, ...]

MAX_HEAD_DIM = 8192

NUMBER = re.compile(r"\.(\d+)(?=\.|$)")
_PART_NUMBER = re.compile(r"^\d+")


class Family(ABC):
    """An architecture: its decoder's spec, and the place of each tensor of its checkpoints."""

    LAYERS: ClassVar[str] = "model.layers."
    """Prefix of the names of a layer's tensors, before its index."""
    LAYER: ClassVar[Mapping[str, PartPlace]]
    """A layer's tensors, without `.weight` or `.bias` → the place that each fills. A `*` stands for a number in the
    name, and for the same number in the part."""
    OUTSIDE: ClassVar[Mapping[str, str]] = {
        "model.embed_tokens.weight": "embedding.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "head.weight",
    }
    UNUSED: ClassVar[tuple[str, ...]] = ()
    """Ends of the names of tensors that are not needed, besides those of `is_computed`."""
    LORA_TARGETS: ClassVar[Mapping[str, PartPlace]]
    """The names of LAYER that adapters may change: linears that every layer has."""
    TRANSPOSED: ClassVar[bool] = False
    """True where checkpoints store the linears of LORA_TARGETS as [in, out], not [out, in]."""

    @classmethod
    def layers(cls) -> str:
        """Path of the layers in transformers' model; PEFT's names begin with it."""
        return cls.LAYERS.removesuffix(".")

    @classmethod
    def vocabulary(cls) -> tuple[str, str]:
        """Names of the embedding and of the head in transformers' model, as PEFT's names have them. A tied model may
        have no name for its head in OUTSIDE: then it is transformers' own."""
        names = {place: name.removesuffix(".weight") for name, place in cls.OUTSIDE.items()}
        return names["embedding.weight"], names.get("head.weight", "lm_head")

    @classmethod
    @abstractmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        """The decoder's shape from a Hugging Face config. Raises `ValueError` for what is not supported."""

    @classmethod
    def weights(cls, tensors: Iterable[tuple[str, Weight]], spec: DecoderSpec) -> Iterator[tuple[str, str, Weight]]:
        """(name, weight) of a checkpoint → (parameter, part, weight) of the decoder. Tensors that the decoder does not
        need are dropped. Weights in integers are passed on as they are, [out, in]."""
        transposed = {linear for linear, _ in cls.LORA_TARGETS.values()} if cls.TRANSPOSED else set()
        for name, tensor in tensors:
            place = cls.place(name)
            if place is not None and (place[0] != "head.weight" or not spec.tied):
                turn = place[0].endswith(".weight") and place[0].split(".")[-2] in transposed
                yield *place, tensor.t() if turn and isinstance(tensor, Tensor) else tensor

    @classmethod
    def place(cls, name: str) -> PartPlace | None:
        """The place in the decoder of a checkpoint's tensor; None for one that is not needed. An unknown tensor keeps
        its name, and is refused later."""
        if cls.UNUSED and name.endswith(cls.UNUSED):
            return None
        place = cls._inside(name) if name.startswith(cls.LAYERS) else cls._outside(name)
        if place is None and is_computed(name):
            return None
        return place or (name, "")

    @classmethod
    def tensor_name(cls, parameter: str, part: str) -> str:
        """The checkpoint's name for a place in the decoder, for messages."""
        outside = [name for name, place in cls.OUTSIDE.items() if place == parameter]
        if outside:
            return outside[0]
        index, _, inner = parameter.removeprefix("layers.").partition(".")
        inner, _, kind = inner.rpartition(".")
        number = _PART_NUMBER.match(part)
        generic = _PART_NUMBER.sub("*", part) if number else part
        for name, place in cls.LAYER.items():
            if place in ((inner, part), (inner, generic)):
                return f"{cls.LAYERS}{index}.{name.replace('*', number[0] if number else '*')}.{kind}"
        return f"{parameter} ({part})" if part else parameter

    @classmethod
    def _outside(cls, name: str) -> PartPlace | None:
        place = cls.OUTSIDE.get(name)
        return None if place is None else (place, "")

    @classmethod
    def _inside(cls, name: str) -> PartPlace | None:
        """The place in the decoder of a layer's tensor; None for one that is not in LAYER."""
        index, _, inner = name.removeprefix(cls.LAYERS).partition(".")
        inner, _, kind = inner.rpartition(".")
        number = NUMBER.search(inner)
        place = cls.LAYER.get(NUMBER.sub(".*", inner))
        if place is None:
            return None
        parameter, part = place
        return f"layers.{index}.{parameter}.{kind}", part.replace("*", number[1]) if number else part


def lora_targets(layer: Mapping[str, PartPlace]) -> Mapping[str, PartPlace]:
    """The linears among the places of LAYER."""
    return {name: place for name, place in layer.items() if place[0] in LINEARS}


def eps(config: Config, key: str, default: float) -> float:
    """A norm's epsilon: added to the mean square against division by zero. Raises `ConfigError`."""
    return number(config, key, default, at_least=0.0, at_most=1.0)


def activation(config: Config, key: str, default: str, *, gated: bool = True) -> str:
    """The MLP's activation, one that is supported for its kind. Raises `ConfigError`."""
    known = [name for name, ours in ACTIVATIONS.items() if gated or ours != "silu"]
    return text(config, key, default, choices=known)


def head_dim(
    config: Config, hidden: int, heads: int, *, keys: tuple[str, str] = ("hidden_size", "num_attention_heads")
) -> int:
    """The size of a head: `head_dim`, else an equal share of the hidden size. `keys`: the config's names of hidden size
    and number of heads."""
    if (size := optional_integer(config, "head_dim", at_most=MAX_HEAD_DIM)) is not None:
        return size
    if hidden % heads or hidden // heads > MAX_HEAD_DIM:
        raise ValueError(
            f"{keys[0]} must be a multiple of {keys[1]} ({heads}) of at most {MAX_HEAD_DIM * heads}, got {hidden}"
        )
    return hidden // heads


def num_layers(config: Config) -> int:
    """`num_hidden_layers` of a config. Raises `ConfigError`."""
    return count(config, "num_hidden_layers")


def alike(config: Config, *, window: int | None = None) -> Layers:
    """Equal layers, in the number that the config gives."""
    return (LayerSpec(window=window),) * num_layers(config)


def by_type(config: Config, default: Sequence[bool]) -> Layers:
    """Layers with and without the config's sliding window: as `layer_types` says, else as `default`, True for a
    window. Raises `ValueError` for other types of layer."""
    window, types = optional_integer(config, "sliding_window"), items(config, "layer_types")
    sliding = default
    if types is not None:
        if unknown := sorted({str(kind) for kind in types} - {"sliding_attention", "full_attention"}):
            raise ValueError(
                f"layer_types: layer type {unknown[0]!r} is not supported; supported are: full_attention, "
                "sliding_attention"
            )
        sliding = [kind == "sliding_attention" for kind in types]
    if len(sliding) != num_layers(config):
        raise ValueError(f"layer_types has {len(sliding)} entries for {num_layers(config)} layers (num_hidden_layers)")
    return tuple(LayerSpec(window=window if one else None) for one in sliding)
