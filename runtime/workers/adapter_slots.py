"""The adapter versions that are in memory, and how they are applied to a batch in which rows differ."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from kernels import AdaptedTokens, LoraFactors, StackFactors
from runtime.checkpoints.peft import read_adapter
from runtime.model.decoder import Decoder
from runtime.model.dora import output_factors
from runtime.model.layers import Linear
from runtime.model.lora import Adapter, BatchAdaptation, LoraPart
from runtime.model.lora_base import LoraBase
from runtime.model.model import Model
from runtime.model.token_rows import VocabularyRows
from runtime.support.failpoints import failpoint
from runtime.workers.adapter_table import AdapterTable
from settings.schema import ModelSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""Value of the setting `adapters.lora_dtype` → torch dtype."""


def lora_dtype(asked: str, model: ModelSettings) -> torch.dtype:
    """Data type in which a CPU holds adapters, from the setting `adapters.lora_dtype`."""
    if asked != "auto":
        return DTYPES[asked]
    if model.deterministic:
        return torch.float32
    if model.quantization != "none":
        return torch.int8
    return torch.bfloat16 if model.dtype == "bfloat16" else torch.float32


@dataclass(frozen=True)
class AdapterTokens:
    """Tokens of a batch that are for one adapter version."""

    key: str
    tokens: Tensor | None
    """[n] int64 ascending; None: all of the batch."""


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """One version in memory."""

    factors: StackFactors
    vocabulary: VocabularyRows | None
    """Rows of embedding and head in place of the base's; None: none."""
    num_bytes: int


class AdapterSlots:
    """Loaded versions by key. `prepare` may be called from any thread, all else from the engine's.

    An adapter's weights never change once they are here: a new version has a new key. So those that were unloaded are
    kept, as far as there is memory for them, and `prepare` of such a key reads nothing.
    """

    def __init__(
        self,
        base: LoraBase,
        decoder: Model,
        *,
        max_rank: int,
        dtype: torch.dtype = torch.float32,
        unused_memory: int = 0,
    ) -> None:
        """`base` is what `decoder` is, as a whole; of each adapter it holds what the decoder holds of the base.
        `dtype`: see `Ops.prepare_lora`. `unused_memory`: bytes for adapters that were unloaded."""
        self._dtype = dtype
        self._base = base
        self._decoder = decoder
        self._max_rank = max_rank
        self._prepared: dict[str, LoadedAdapter] = {}
        self._loaded: dict[str, LoadedAdapter] = {}
        self._unused_memory = unused_memory
        self._unused: OrderedDict[str, LoadedAdapter] = OrderedDict()
        """Those that were unloaded, longest ago first."""
        self._table: AdapterTable | None = None
        self._lock = Lock()
        """Guards `_prepared` and `_unused`."""

    def make_table(self) -> AdapterTable:
        """A table of the loaded versions that follows what is loaded, for recorded steps."""
        self._table = AdapterTable(self._decoder)
        for key, loaded in self._loaded.items():
            self._add_to_table(key, loaded)
        return self._table

    def _add_to_table(self, key: str, loaded: LoadedAdapter) -> None:
        if self._table is not None and loaded.vocabulary is None:
            self._table.add(key, loaded.factors)

    def prepare(self, key: str, directory: str) -> None:
        """Read an adapter's files (format of PEFT), ready to be loaded. Raises `AdapterInvalid`."""
        failpoint("adapters.prepare", key)
        if self.revive(key):
            return
        adapter = read_adapter(Path(directory), self._base, max_rank=self._max_rank)
        vocabulary = adapter.vocabulary
        if vocabulary is not None:
            vocabulary = vocabulary.to(self._decoder.device, self._decoder.dtype)
        factors = self._factors(adapter)
        loaded = LoadedAdapter(factors, vocabulary, _num_bytes(factors, vocabulary))
        with self._lock:
            self._prepared[key] = loaded

    def revive(self, key: str) -> bool:
        """Prepare an adapter that was unloaded and is still in memory; False where it is not. Any thread."""
        with self._lock:
            if (unused := self._unused.pop(key, None)) is None:
                return False
            self._prepared[key] = unused
            return True

    def load(self, key: str) -> None:
        """Let rows use what was prepared under `key`, from the next step on. Raises `KeyError`."""
        with self._lock:
            loaded = self._prepared.pop(key)
        failpoint("adapters.load", key)
        self._loaded[key] = loaded
        self._add_to_table(key, loaded)

    def unload(self, key: str) -> None:
        """Release an adapter's memory, or keep it for its next use, also where it was only prepared. No row may need it
        any more. Unknown keys are fine."""
        loaded = self._loaded.pop(key, None)
        if self._table is not None:
            self._table.remove(key)
        with self._lock:
            prepared = self._prepared.pop(key, None)
            loaded = loaded or prepared
            if loaded is None or loaded.num_bytes > self._unused_memory:
                return
            self._unused[key] = loaded
            while sum(one.num_bytes for one in self._unused.values()) > self._unused_memory:
                self._unused.popitem(last=False)

    @property
    def keys(self) -> list[str]:
        return list(self._loaded)

    @property
    def unused_bytes(self) -> int:
        """Bytes of adapters that were unloaded and are kept."""
        with self._lock:
            return sum(one.num_bytes for one in self._unused.values())

    def adaptation(self, tokens: list[AdapterTokens]) -> BatchAdaptation | None:
        """Change to the decoder for one batch; None where all of it is for the base."""
        if not tokens:
            return None
        loaded = [(part.tokens, self._loaded[part.key]) for part in tokens]
        return BatchAdaptation(
            self._decoder.ops,
            [AdaptedTokens(some, one.factors) for some, one in loaded],
            [
                (some, one.vocabulary.embedding)
                for some, one in loaded
                if one.vocabulary is not None and one.vocabulary.embedding is not None
            ],
            known=self._decoder.spec.vocab_size,
        )

    def rescales(self, key: str) -> bool:
        """True if an adapter changes outputs by factors, as DoRA does."""
        loaded = self._loaded.get(key)
        return loaded is not None and bool(loaded.factors.factors)

    # -- rows of the vocabulary ----------------------------------------------------------------

    def vocab_size(self, key: str) -> int:
        """Number of ids that are valid for an adapter, or for the base (an empty key)."""
        loaded, known = self._loaded.get(key), self._decoder.spec.vocab_size
        own = None if loaded is None else loaded.vocabulary
        return known if own is None else max(known, own.size)

    def changes_logits(self, keys: Sequence[str]) -> bool:
        """True if some of these adapters have other logits than those of the base's head."""
        return any(self._changed(key) is not None for key in keys)

    def change_logits(self, hidden: Tensor, logits: Tensor, keys: Sequence[str]) -> Tensor:
        """Logits [R, vocab] float32 of the base's head after hidden states [R, hidden], with those of each row's own
        adapter in their places. Where adapters have more ids, there are more columns, and minus infinity in other
        rows."""
        changed = {key: own for key in dict.fromkeys(keys) if (own := self._changed(key)) is not None}
        if not changed:
            return logits
        assert isinstance(self._decoder, Decoder), "only those have rows"
        further = max(own.size for own in changed.values()) - logits.shape[1]
        if further > 0:
            logits = torch.nn.functional.pad(logits, (0, further), value=-math.inf)
        for key, vocabulary in changed.items():
            if (head := vocabulary.head) is None:
                continue
            rows = torch.tensor([index for index, own in enumerate(keys) if own == key], device=logits.device)
            found = self._decoder.row_logits(hidden[rows], head.rows)
            logits[rows.unsqueeze(1), head.ids] = found
        return logits

    def _changed(self, key: str) -> VocabularyRows | None:
        loaded = self._loaded.get(key)
        own = None if loaded is None else loaded.vocabulary
        if own is None:
            return None
        return own if own.head is not None or own.size > self._decoder.spec.vocab_size else None

    def _factors(self, adapter: Adapter) -> StackFactors:
        places, factors = {}, {}
        # In one order on all ranks, which work out the norms of rows that they share together.
        for (layer, name), parts in sorted(adapter.layers.items()):
            linear = self._decoder.layers[layer].linears[name]
            if adapter.shape.dora:
                factors[layer, name], parts = output_factors(linear, parts, self._decoder.device)
            places[layer, name] = self._stack(linear, parts)
        return StackFactors(places, factors)

    def _stack(self, linear: Linear, parts: list[LoraPart]) -> LoraFactors:
        device, dtype = self._decoder.device, self._decoder.dtype
        held = [linear.lora(part.part, part.a, part.b) for part in parts]
        scales = torch.cat([torch.full((len(part.a),), part.scale) for part in parts])
        factors = LoraFactors(
            a=torch.cat([a for a, _ in held]).to(device, dtype),
            b=tuple(b.to(device, dtype).contiguous() for _, b in held),
            columns=tuple(linear.weight.starts[part.part] for part in parts),
            scales=scales.to(device, dtype),
            # Of whole factors: what ranks hold adds up to what one process holds.
            reach=torch.stack(
                [torch.cat([_reach(part.a) for part in parts]), torch.cat([_reach(part.b.t()) for part in parts])]
            ),
        )
        return self._decoder.ops.prepare_lora(factors, self._dtype)


def _num_bytes(factors: StackFactors, vocabulary: VocabularyRows | None) -> int:
    """Bytes of an adapter as it is held."""
    tensors = [tensor for one in factors.places.values() for tensor in (one.a, *one.b, one.scales)]
    rows = (
        () if vocabulary is None else {id(one): one for one in (vocabulary.embedding, vocabulary.head) if one}.values()
    )
    return sum(tensor.nbytes for tensor in tensors) + sum(one.rows.nbytes + one.ids.nbytes for one in rows)


def _reach(values: Tensor) -> Tensor:
    """values [R, n] → [R]: the largest size in each row."""
    return values.abs().amax(1).float()
