"""What an adapter must fit: the base model's linears as a checkpoint names them, and which weights those are."""

from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from runtime.workers.decoder import Decoder
from runtime.workers.layers import Parameter
from runtime.workers.model import Model
from runtime.workers.models.family import Family

_SAMPLES = 256
"""Values of each weight that go into the fingerprint: to read them all would take as long as loading them."""


@dataclass(frozen=True)
class Target:
    """One linear of a layer that an adapter may change."""

    linear: str
    """The decoder's, in which this may be one of several parts."""
    part: str
    start: int
    """First column of the part in the linear's output."""
    in_features: int
    out_features: int


@dataclass(frozen=True)
class LoraBase:
    """One base model, seen by adapters."""

    name: str
    fingerprint: str
    """Equal for the same weights in whatever type they are held; other weights, another fingerprint."""
    layers: str
    """What the full names of its linears begin with, as PEFT writes them: `model.layers`."""
    num_layers: int
    targets: dict[str, Target]
    """By the name within a layer, such as `self_attn.q_proj`."""

    @classmethod
    def of(cls, decoder: Decoder, family: type[Family], name: str) -> "LoraBase":
        """The base that `decoder` is, of that architecture."""
        targets = {}
        for module, (linear_name, part) in family.LORA_TARGETS.items():
            linear = decoder.layers[0].linears[linear_name]
            parts = list(linear.parts)
            start = sum(linear.parts[before] for before in parts[: parts.index(part)])
            targets[module] = Target(linear_name, part, start, linear.in_features, linear.parts[part])
        return cls(name, fingerprint(decoder), family.layers(), decoder.spec.num_layers, targets)

    def module(self, layer: int, linear: str, part: str) -> str:
        """The full name in the checkpoint of a part of a layer's linear."""
        names = {(target.linear, target.part): name for name, target in self.targets.items()}
        return f"{self.layers}.{layer}.{names[linear, part]}"

    @property
    def places(self) -> dict[str, tuple[str, str]]:
        """By the name within a layer → the decoder's (linear, part)."""
        return {name: (target.linear, target.part) for name, target in self.targets.items()}

    @property
    def widest(self) -> int:
        """in + out of all linears of all layers: the size of a rank-1 adapter of everything."""
        return self.num_layers * sum(t.in_features + t.out_features for t in self.targets.values())


def fingerprint(decoder: Model) -> str:
    """A digest of the architecture and of a sample of every weight, rounded to bfloat16."""
    digest = blake2b(repr(decoder.spec).encode(), digest_size=16, person=b"eft-base")
    for name, parameter in sorted(decoder.parameters().items()):
        sample = (_sample(parameter) + 0.0).to(torch.bfloat16).cpu()  # -0.0 is 0.0 in some of the forms
        digest.update(name.encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _sample(parameter: Parameter) -> Tensor:
    """Some of its values, at equal distances: the same ones in whatever type it is held."""
    weight = parameter.value
    places = torch.arange(0, weight.shape.numel(), max(1, weight.shape.numel() // _SAMPLES))[:_SAMPLES]
    if isinstance(weight, Tensor):
        return weight.flatten()[places.to(weight.device)]
    row, column = places // weight.shape[1], places % weight.shape[1]
    return weight.rows(row).gather(1, column.unsqueeze(1)).flatten()
