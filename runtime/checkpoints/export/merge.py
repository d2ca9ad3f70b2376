"""Addition of an adapter's products to the weights of its base model, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels import QuantisedWeight, Weight
from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.model_loading import describe_decoder
from runtime.checkpoints.peft.files import read_adapter
from runtime.model.config import ModelLoadError
from runtime.model.families import find_model
from runtime.model.group import SOLO
from runtime.model.lora import Adapter, LoraPart
from runtime.model.lora_base import LoraBase
from settings.schema import ModelSettings

MAX_RANK = 4096
"""Largest rank that is exported: any that a file can hold in a reasonable size."""


@dataclass(frozen=True, eq=False)
class Merge:
    """An adapter and its base model, checked against each other."""

    checkpoint: Checkpoint
    base: LoraBase
    adapter: Adapter
    parts: Mapping[str, LoraPart]
    """Name of a tensor in the checkpoint → the factors that change it."""

    @property
    def transposed(self) -> bool:
        """True where the checkpoint has linears as [in, out]."""
        return find_model(self.checkpoint.config).TRANSPOSED

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the base under its Hugging Face name, with the adapter's change added where it has one.
        Computed in float32 and rounded once, to the base's type. Raises `ModelLoadError`."""
        missing = set(self.parts)
        for name, weight in self.checkpoint.tensors():
            stored = self.floats(name, weight)
            part = self.parts.get(self.full_name(name))
            if part is None:
                yield name, stored
                continue
            missing.discard(self.full_name(name))
            yield name, self.merged(name, stored, part)
        if missing:
            raise ModelLoadError(f"{self.checkpoint.name} has no tensor {min(missing)}, which the adapter changes.")

    def merged(self, name: str, stored: Tensor, part: LoraPart) -> Tensor:
        """The stored tensor, [out, in] or transposed, with the part's product added, and its outputs brought to the
        part's magnitudes, in the stored type."""
        product = delta(part)
        if self.transposed:
            product = product.t()
        if product.shape != stored.shape:
            raise ModelLoadError(f"{name} is {list(stored.shape)}, and the adapter's product {list(product.shape)}.")
        whole = stored.float() + product
        if part.magnitude is not None:
            inputs = 0 if self.transposed else 1
            factor = part.magnitude.float() / torch.linalg.vector_norm(whole, dim=inputs)
            whole *= factor.unsqueeze(inputs)
        return whole.to(stored.dtype)

    def full_name(self, name: str) -> str:
        """The name with the prefix that checkpoints of a model without its head leave out."""
        prefix = self.base.layers.partition(".")[0] + "."
        return name if name.startswith(prefix) else prefix + name

    def floats(self, name: str, weight: Weight) -> Tensor:
        """A tensor in floats. Raises `ModelLoadError` for one that the base stores in integers: what is merged into
        rounded weights is rounded again, and then no longer what was trained."""
        if isinstance(weight, QuantisedWeight):
            raise ModelLoadError(
                f"{self.checkpoint.name} stores {name} in integers, so nothing can be merged into it without loss. "
                "Give the model that it was quantised from as the base (--model)."
            )
        return weight


def delta(part: LoraPart) -> Tensor:
    """scale * B A, float32 [out, in]."""
    return (part.b.float() @ part.a.float()) * part.scale


def open_merge(checkpoint: Checkpoint, adapter: Path) -> Merge:
    """Read the adapter in a folder of PEFT's, and check that it fits the base. Raises `ModelLoadError` and
    `AdapterInvalid`."""
    decoder = describe_decoder(checkpoint, ModelSettings(device="cpu", dtype="float32"), SOLO)
    base = LoraBase.described(decoder, find_model(checkpoint.config), checkpoint.name, "")
    read = read_adapter(adapter, base, max_rank=MAX_RANK)
    parts = {
        f"{base.module(layer, linear, part.part)}.weight": part
        for (layer, linear), found in read.layers.items()
        for part in found
    }
    return Merge(checkpoint, base, read, parts)
