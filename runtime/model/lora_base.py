"""The base model of an adapter: its linears as a checkpoint names them, and a fingerprint of its weights."""

from dataclasses import dataclass, fields, is_dataclass
from hashlib import blake2b
from typing import Any

import torch

from runtime.model.decoder import Decoder
from runtime.model.families.family import Family
from runtime.model.model import Model
from runtime.model.spec import DecoderSpec
from runtime.model.vocabulary import VocabularyBase


@dataclass(frozen=True)
class Target:
    """One linear of a layer that an adapter may change."""

    linear: str
    """Name of the decoder's linear, in which this may be one of several parts."""
    part: str
    start: int
    """First column of the part in the linear's output."""
    in_features: int
    out_features: int


@dataclass(frozen=True)
class LoraBase:
    """One base model, as adapters need it."""

    name: str
    fingerprint: str
    """Digest of the weights: equal for the same weights held in any type, different for other weights."""
    layers: str
    """Prefix of the full names of its linears, as PEFT writes them: `model.layers`."""
    num_layers: int
    targets: dict[str, Target]
    """Name within a layer, such as `self_attn.q_proj` → the linear."""
    vocabulary: VocabularyBase | None = None
    """Embedding and head; None where adapters may not bring rows of them."""

    @classmethod
    def of(cls, decoder: Decoder, family: type[Family], name: str) -> "LoraBase":
        """The base of which `decoder` is the whole or a rank's share, of the architecture `family`. Called on all ranks
        together."""
        return cls.described(decoder, family, name, fingerprint(decoder))

    @classmethod
    def described(cls, decoder: Decoder, family: type[Family], name: str, fingerprint: str) -> "LoraBase":
        """As `of`, for a decoder whose weights are elsewhere and have this fingerprint."""
        targets = {}
        for module, (linear_name, part) in family.LORA_TARGETS.items():
            linear = decoder.layers[0].linears[linear_name]
            parts = list(linear.parts)
            start = sum(linear.parts[before] for before in parts[: parts.index(part)])
            targets[module] = Target(linear_name, part, start, linear.in_features, linear.parts[part])
        vocabulary = vocabulary_base(decoder.spec, family, bytes_per_value=decoder.dtype.itemsize)
        return cls(name, fingerprint, family.layers(), decoder.spec.num_layers, targets, vocabulary)

    def module(self, layer: int, linear: str, part: str) -> str:
        """The full name in the checkpoint of a part of a layer's linear."""
        names = {(target.linear, target.part): name for name, target in self.targets.items()}
        return f"{self.layers}.{layer}.{names[linear, part]}"

    @property
    def places(self) -> dict[str, tuple[str, str]]:
        """Name within a layer → the decoder's (linear, part)."""
        return {name: (target.linear, target.part) for name, target in self.targets.items()}

    @property
    def widest(self) -> int:
        """in + out of all linears of all layers: the size of a rank-1 adapter of everything."""
        return self.num_layers * sum(t.in_features + t.out_features for t in self.targets.values())


def vocabulary_base(spec: DecoderSpec, family: type[Family], *, bytes_per_value: int) -> VocabularyBase:
    """Embedding and head of a decoder of the architecture `family`."""
    return VocabularyBase(*family.vocabulary(), spec.tied, spec.vocab_size, spec.hidden_size, bytes_per_value)


def fingerprint(decoder: Model) -> str:
    """A digest of the architecture and of a sample of every weight, rounded to bfloat16. The same on all ranks, and
    for any number of them; the same for any form in which the weights are held."""
    named = sorted(decoder.parameters().items())
    samples = [parameter.sample() for _, parameter in named]
    values = torch.cat([found for found, _ in samples]).to(torch.bfloat16).float().to(decoder.device)
    here = torch.cat([held for _, held in samples]).to(decoder.device)
    for other, held in zip(decoder.group.gather(values), decoder.group.gather(here.float()), strict=True):
        values = torch.where(here, values, other)
        here = here | (held > 0)
    values = values.cpu() + 0.0  # -0.0 is 0.0 in some of the forms
    digest = blake2b(repr(_non_defaults(decoder.spec)).encode(), digest_size=16, person=b"eft-base")
    for (name, _), sample in zip(named, torch.split(values, [len(found) for found, _ in samples]), strict=True):
        digest.update(name.encode() + sample.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _non_defaults(value: Any) -> Any:
    """The fields of a spec that differ from their defaults: a field added by a later release changes nothing for older
    models."""
    if not is_dataclass(value):
        return tuple(map(_non_defaults, value)) if isinstance(value, tuple) else value
    differing = [field for field in fields(value) if getattr(value, field.name) != field.default]
    return type(value).__name__, *((field.name, _non_defaults(getattr(value, field.name))) for field in differing)
