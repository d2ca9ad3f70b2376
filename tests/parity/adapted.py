"""Logits of a model with an adapter."""

from pathlib import Path

import torch

from runtime.model.attention import PackedAttention
from runtime.model.decoder import Decoder
from runtime.model.lora_base import LoraBase
from runtime.workers.adapter_slots import AdapterSlots, AdapterTokens


def our_logits(decoder: Decoder, base: LoraBase, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    slots = AdapterSlots(base, decoder, max_rank=64)
    slots.prepare("a", str(adapter))
    slots.load("a")
    attention = PackedAttention(decoder.ops, [len(ids)], decoder.spec)
    with torch.inference_mode():
        hidden = decoder.forward(ids, torch.arange(len(ids)), attention, slots.adaptation([AdapterTokens("a", None)]))
        return slots.change_logits(hidden, decoder.logits(hidden), ["a"] * len(ids))
