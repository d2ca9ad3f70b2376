"""What the architectures' files share: checkpoint names as data on a class, and readers of config.json."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from kernels import Weight
from runtime.workers.spec import LINEARS, DecoderSpec, LayerSpec

Place = tuple[str, str]
"""(parameter, part) of a layer: which part of which of its weights."""

Layers = tuple[LayerSpec, ...]

NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


class Family(ABC):
    """An architecture: its decoder's spec, and where each tensor of its checkpoints belongs."""

    LAYERS: ClassVar[str] = "model.layers."
    """What the names of a layer's tensors begin with, before its index."""
    LAYER: ClassVar[Mapping[str, Place]]
    """A layer's tensors, without `.weight` or `.bias`, and what each fills. A `*` stands for a number in the name,
    and for the same number in the part."""
    OUTSIDE: ClassVar[Mapping[str, str]] = {
        "model.embed_tokens.weight": "embedding.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "head.weight",
    }
    UNUSED: ClassVar[tuple[str, ...]] = (".rotary_emb.inv_freq",)
    """Ends of the names of tensors that old checkpoints store and that are computed here."""
    LORA_TARGETS: ClassVar[Mapping[str, Place]]
    """The names of LAYER that adapters may change: linears that every layer has."""

    @classmethod
    def layers(cls) -> str:
        """The path of the layers in transformers' model, with which PEFT begins their names."""
        return cls.LAYERS.removesuffix(".")

    @classmethod
    @abstractmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        """The decoder's shape from a Hugging Face config. Raises `ValueError` for what is not supported."""

    @classmethod
    def weights(cls, tensors: Iterable[tuple[str, Weight]], spec: DecoderSpec) -> Iterator[tuple[str, str, Weight]]:
        """Checkpoint names to (parameter, part) of the decoder; what it does not need is dropped. Weights in
        integers are passed on as they are."""
        for name, tensor in tensors:
            if name.endswith(cls.UNUSED):
                continue
            place = cls._inside(name) if name.startswith(cls.LAYERS) else (cls.OUTSIDE.get(name, name), "")
            if place[0] != "head.weight" or not spec.tied:
                yield *place, tensor

    @classmethod
    def _inside(cls, name: str) -> Place:
        """The place in the decoder of a layer's tensor; one that is not in LAYER keeps its name, to be refused."""
        index, _, inner = name.removeprefix(cls.LAYERS).partition(".")
        inner, _, kind = inner.rpartition(".")
        number = NUMBER.search(inner)
        place = cls.LAYER.get(NUMBER.sub(".*", inner))
        if place is None:
            return name, ""
        parameter, part = place
        return f"layers.{index}.{parameter}.{kind}", part.replace("*", number[1]) if number else part


def lora_targets(layer: Mapping[str, Place]) -> Mapping[str, Place]:
    """Those of LAYER that are linears."""
    return {name: place for name, place in layer.items() if place[0] in LINEARS}


def positive(config: Mapping[str, Any], key: str) -> int:
    """An integer above 0. Raises `ValueError`, or `KeyError` when it is not there."""
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {key} must be an integer above 0, got {value!r}")
    return value


def alike(config: Mapping[str, Any], *, window: int | None = None) -> Layers:
    """As many equal layers as the config has."""
    return (LayerSpec(window=window),) * positive(config, "num_hidden_layers")


def by_type(config: Mapping[str, Any], default: Sequence[bool]) -> Layers:
    """Layers with and without the config's sliding window: as `layer_types` says, else as `default`, True for a
    window. Raises `ValueError` for other types of layer."""
    window, types = config.get("sliding_window"), config.get("layer_types")
    sliding = default
    if types is not None:
        if unknown := sorted({str(kind) for kind in types} - {"sliding_attention", "full_attention"}):
            raise ValueError(
                f"layer type {unknown[0]!r} is not supported; supported are: full_attention, sliding_attention"
            )
        sliding = [kind == "sliding_attention" for kind in types]
    if len(sliding) != positive(config, "num_hidden_layers"):
        raise ValueError(f"layer_types has {len(sliding)} entries for {config['num_hidden_layers']} layers")
    return tuple(LayerSpec(window=window if one else None) for one in sliding)
