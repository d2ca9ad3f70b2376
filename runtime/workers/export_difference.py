"""The difference between an adapter as it is served and the merged model that was written of it."""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from runtime.checkpoints import Checkpoint, open_checkpoint
from runtime.checkpoints.export.merge import MAX_RANK
from runtime.checkpoints.model_loading import load_decoder
from runtime.checkpoints.verification import PROMPTS, greedy
from runtime.model.attention import PackedAttention
from runtime.model.families import find_model
from runtime.model.lora_base import LoraBase
from runtime.model.model import Model
from runtime.workers.adapter_slots import AdapterSlots, AdapterTokens, lora_dtype
from settings.schema import ModelSettings


class Difference(Struct, frozen=True):
    """Logits of what was written against those of the adapter on its base, over some prompts and greedy tokens."""

    largest: float
    """Largest absolute difference of a logit."""
    divergence: float
    """Mean Kullback-Leibler divergence of the next token's distribution, in nats a token."""
    same_tokens: float
    """Share of tokens for which both have the same largest logit."""
    tokens: int
    adapter_dtype: str
    """Type in which the adapter's factors were served: float32, bfloat16 or int8."""


@dataclass(frozen=True, eq=False)
class _Served:
    prompts: list[list[int]]
    """With greedy tokens after them."""
    logits: list[Tensor]


def measure_difference(
    checkpoint: Checkpoint, adapter: Path, written: Path, settings: ModelSettings, asked_dtype: str = "auto"
) -> Difference:
    """Compare a merged export with the adapter on its base as `settings` serve it, the export in float32. One model is
    in memory at a time. `asked_dtype`: the setting `adapters.lora_dtype`. Raises `ModelLoadError` and
    `AdapterInvalid`."""
    dtype = lora_dtype(asked_dtype, settings)
    served = _served(checkpoint, adapter, settings, dtype)
    model = load_decoder(open_checkpoint(str(written)), _exact(settings))
    largest, divergence, same, tokens = 0.0, 0.0, 0, 0
    for ids, expected in zip(served.prompts, served.logits, strict=True):
        got = _logits(model, ids)
        largest = max(largest, float((expected - got).abs().max()))
        log_p, log_q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        same += int((expected.argmax(-1) == got.argmax(-1)).sum())
        tokens += len(ids)
    held = str(dtype).removeprefix("torch.")
    return Difference(largest, divergence / tokens, same / tokens, tokens, held)


def _exact(settings: ModelSettings) -> ModelSettings:
    return msgspec.structs.replace(settings, dtype="float32", quantization="none")


def _served(checkpoint: Checkpoint, adapter: Path, settings: ModelSettings, dtype: torch.dtype) -> _Served:
    model = load_decoder(checkpoint, settings)
    base = LoraBase.of(model, find_model(checkpoint.config), checkpoint.name)
    slots = AdapterSlots(base, model, max_rank=MAX_RANK, dtype=dtype)
    slots.prepare("adapter", str(adapter))
    slots.load("adapter")
    room = model.max_len // 2
    prompts = [
        greedy(lambda ids: _logits(model, ids, slots), checkpoint.tokenizer.encode(text)[:room]) for text in PROMPTS
    ]
    return _Served(prompts, [_logits(model, ids, slots) for ids in prompts])


def _logits(model: Model, ids: list[int], slots: AdapterSlots | None = None) -> Tensor:
    """float32 [T, vocab]; of the adapter in `slots`, where these are given."""
    adaptation = None if slots is None else slots.adaptation([AdapterTokens("adapter", None)])
    attention = PackedAttention(model.ops, [len(ids)], model.spec)
    with torch.inference_mode():
        positions = torch.arange(len(ids), device=model.device)
        hidden = model.forward(torch.tensor(ids, device=model.device), positions, attention, adaptation)
        logits = model.logits(hidden).float()
        return (logits if slots is None else slots.change_logits(hidden, logits, ["adapter"] * len(ids))).cpu()
