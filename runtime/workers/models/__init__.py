"""Architectures: one small file each, found by the `architectures` entry of a `config.json`."""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Protocol

from torch import Tensor

from runtime.workers.decoder import DecoderSpec
from runtime.workers.models.llama import Llama


class Model(Protocol):
    """What an architecture's file provides."""

    LORA_TARGETS: ClassVar[dict[str, tuple[str, str]]]
    """A layer's linears by their name in the checkpoint (`self_attn.q_proj`) → the decoder's (linear, part)."""

    @staticmethod
    def spec(config: dict[str, Any]) -> DecoderSpec:
        """The decoder's shape from a Hugging Face config. Raises `ValueError` for what is not supported."""

    @staticmethod
    def weights(tensors: Iterable[tuple[str, Tensor]], spec: DecoderSpec) -> Iterator[tuple[str, str, Tensor]]:
        """Checkpoint names to (parameter, part) of the decoder; tensors that it does not need are dropped."""


REGISTRY: dict[str, type[Model]] = {
    "LlamaForCausalLM": Llama,
}


def find_model(config: dict[str, Any]) -> type[Model]:
    """The first of the config's architectures that is registered. Raises `ValueError` listing all that are."""
    names = config.get("architectures") or []
    for name in names:
        if name in REGISTRY:
            return REGISTRY[name]
    asked = ", ".join(map(str, names)) or "none named in config.json"
    raise ValueError(f"architecture not supported: {asked}. Supported are: {', '.join(sorted(REGISTRY))}")
