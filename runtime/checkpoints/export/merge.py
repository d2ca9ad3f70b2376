"""Addition of an adapter's products to the weights of its base model, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
from runtime.model.token_rows import TokenRows, VocabularyRows
from runtime.model.vocabulary import VocabularyBase
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
    def vocabulary(self) -> VocabularyMerge | None:
        """The adapter's rows of embedding and head on the base's; None where it has none."""
        rows, base = self.adapter.vocabulary, self.base.vocabulary
        return None if rows is None or base is None else VocabularyMerge(rows, base)

    @property
    def transposed(self) -> bool:
        """True where the checkpoint has linears as [in, out]."""
        return find_model(self.checkpoint.config).TRANSPOSED

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the base under its Hugging Face name, with the adapter's change added where it has one.
        Computed in float32 and rounded once, to the base's type. Raises `ModelLoadError`."""
        missing = set(self.parts)
        for name, stored in self._with_rows(self.checkpoint.tensors()):
            part = self.parts.get(self.full_name(name))
            if part is None:
                yield name, stored
                continue
            missing.discard(self.full_name(name))
            yield name, self.merged(name, stored, part)
        if missing:
            raise ModelLoadError(f"{self.checkpoint.name} has no tensor {min(missing)}, which the adapter changes.")

    def described(self) -> Iterator[tuple[str, Tensor]]:
        """As `tensors`, for names, shapes and types, as `Checkpoint.described` has them."""
        return self._with_rows(self.checkpoint.described())

    def _with_rows(self, tensors: Iterator[tuple[str, Weight]]) -> Iterator[tuple[str, Tensor]]:
        """The base's tensors in floats, with the adapter's rows in embedding and head. After the embedding of a tied
        base comes a head of its own where the two differ."""
        own = self.vocabulary
        for name, weight in tensors:
            stored, kind = self.floats(name, weight), self.matrix(name)
            if own is None or kind is None:
                yield name, stored
            elif kind == "head" and own.unties:
                continue  # of a tied base: its embedding is what counts
            else:
                yield name, own.rows_in(kind, stored)
                if kind == "embedding" and own.unties:
                    yield own.head_name, own.rows_in("head", stored)

    def matrix(self, name: str) -> Literal["embedding", "head"] | None:
        """The matrix of the vocabulary that a tensor is; None for others."""
        base = self.base.vocabulary
        if base is None:
            return None
        if base.embedding + ".weight" in (name, self.full_name(name)):
            return "embedding"
        return "head" if base.head + ".weight" in (name, self.full_name(name)) else None

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


@dataclass(frozen=True, eq=False)
class VocabularyMerge:
    """Rows of embedding and head that an adapter has in place of its base's, or beyond them."""

    rows: VocabularyRows
    base: VocabularyBase

    @property
    def size(self) -> int:
        """Number of ids."""
        return max(self.base.size, self.rows.size)

    @property
    def unties(self) -> bool:
        """True if the base's head is its embedding, and the two differ with the adapter."""
        return self.base.tied and not _same(self.rows.embedding, self.rows.head)

    @property
    def head_name(self) -> str:
        return self.base.head + ".weight"

    def check(self) -> None:
        """Raise `ModelLoadError` where a new id has no row in the head: what is served never says it, and no file can
        say so."""
        head, tied = self.rows.head, self.base.tied and not self.unties
        known = 0 if head is None else int((head.ids >= self.base.size).sum())
        if not tied and known < self.size - self.base.size:
            raise ModelLoadError(
                f"The adapter has {self.size - self.base.size} new ids and {known} rows of {self.base.head} for them, "
                "and a model needs a row for each: export it with --format peft."
            )

    def rows_in(self, kind: Literal["embedding", "head"], stored: Tensor) -> Tensor:
        """The matrix [ids, hidden] with the adapter's rows, in the stored type; without values where it has none."""
        rows = self.rows.embedding if kind == "embedding" else self.rows.head
        whole = stored.new_zeros(self.size, stored.shape[1])
        if whole.is_meta:
            return whole
        whole[: len(stored)] = stored
        if rows is not None:
            whole[rows.ids] = rows.rows.to(stored.dtype)
        return whole


def _same(one: TokenRows | None, other: TokenRows | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or (torch.equal(one.ids, other.ids) and torch.equal(one.rows, other.rows))


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
