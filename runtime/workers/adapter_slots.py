"""The adapter versions that are in memory, and how they are applied to a batch in which rows differ."""

from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from kernels import AdaptedTokens, LoraFactors, StackFactors
from runtime.checkpoints.peft import read_adapter
from runtime.model.layers import Linear
from runtime.model.lora import Adapter, BatchAdaptation, LoraPart
from runtime.model.lora_base import LoraBase
from runtime.model.model import Model
from runtime.support.failpoints import failpoint


@dataclass(frozen=True)
class AdapterTokens:
    """Tokens of a batch that are for one adapter version."""

    key: str
    tokens: Tensor | None
    """[n] int64 ascending; None: all of the batch."""


class AdapterSlots:
    """Loaded versions by key. `prepare` may be called from any thread, all else from the engine's.

    An adapter's weights never change once they are here: a new version has a new key.
    """

    def __init__(self, base: LoraBase, decoder: Model, *, max_rank: int) -> None:
        """`base` is what `decoder` is, as a whole; of each adapter it holds what the decoder holds of the base."""
        self._base = base
        self._decoder = decoder
        self._max_rank = max_rank
        self._prepared: dict[str, StackFactors] = {}
        self._loaded: dict[str, StackFactors] = {}
        self._lock = Lock()
        """Guards `_prepared` alone."""

    def prepare(self, key: str, directory: str) -> None:
        """Read an adapter's files (format of PEFT), ready to be loaded. Raises `AdapterInvalid`."""
        failpoint("adapters.prepare", key)
        adapter = read_adapter(Path(directory), self._base, max_rank=self._max_rank)
        factors = self._factors(adapter)
        with self._lock:
            self._prepared[key] = factors

    def load(self, key: str) -> None:
        """Let rows use what was prepared under `key`, from the next step on. Raises `KeyError`."""
        with self._lock:
            factors = self._prepared.pop(key)
        failpoint("adapters.load", key)
        self._loaded[key] = factors

    def unload(self, key: str) -> None:
        """Release an adapter's memory. No row may need it any more. Unknown keys are fine."""
        with self._lock:
            self._prepared.pop(key, None)
        self._loaded.pop(key, None)

    @property
    def keys(self) -> list[str]:
        return list(self._loaded)

    def adaptation(self, tokens: list[AdapterTokens]) -> BatchAdaptation | None:
        """Change to the decoder for one batch; None where all of it is for the base."""
        if not tokens:
            return None
        return BatchAdaptation(
            self._decoder.ops, [AdaptedTokens(part.tokens, self._loaded[part.key]) for part in tokens]
        )

    def _factors(self, adapter: Adapter) -> StackFactors:
        layers = self._decoder.layers
        return StackFactors(
            {
                (layer, name): self._stack(layers[layer].linears[name], parts)
                for (layer, name), parts in adapter.layers.items()
            }
        )

    def _stack(self, linear: Linear, parts: list[LoraPart]) -> LoraFactors:
        device, dtype = self._decoder.device, self._decoder.dtype
        held = [linear.lora(part.part, part.a, part.b) for part in parts]
        scales = torch.cat([torch.full((len(part.a),), part.scale) for part in parts])
        factors = LoraFactors(
            a=torch.cat([a for a, _ in held]).to(device, dtype),
            b=tuple(b.to(device, dtype).contiguous() for _, b in held),
            columns=tuple(linear.weight.starts[part.part] for part in parts),
            scales=scales.to(device, dtype),
        )
        return self._decoder.ops.prepare_lora(factors)
