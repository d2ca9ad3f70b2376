"""The type that adapters are held in to be served, and what becomes of those that are unloaded."""

from pathlib import Path

import pytest
import torch

from kernels.cpu import CpuOps
from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.model_loading import load_decoder
from runtime.checkpoints.peft import AdapterInvalid
from runtime.model.attention import PackedAttention
from runtime.model.families import find_model
from runtime.model.lora_base import LoraBase
from runtime.workers.adapter_slots import AdapterSlots, AdapterTokens, lora_dtype
from settings.schema import ModelSettings
from tests.adapter_files import make_adapter
from tests.tiny import make_tiny_llama


@pytest.mark.parametrize(
    ("asked", "model", "expected"),
    [
        ("auto", ModelSettings(), torch.float32),
        ("auto", ModelSettings(dtype="bfloat16"), torch.bfloat16),
        ("auto", ModelSettings(quantization="int8"), torch.int8),
        ("auto", ModelSettings(quantization="nf4"), torch.int8),
        ("auto", ModelSettings(quantization="int8", deterministic=True), torch.float32),
        ("bfloat16", ModelSettings(deterministic=True), torch.bfloat16),
    ],
)
def test_the_type_follows_the_base(asked: str, model: ModelSettings, expected: torch.dtype) -> None:
    assert lora_dtype(asked, model) is expected


@pytest.mark.skipif(CpuOps.unavailable() is not None, reason="an op of the C++ kernels")
def test_integers_change_less_than_those_of_the_base(tmp_path: Path) -> None:
    """Logits of an adapter held in int8, on a base in int8, are nearer to those of the one in float32 than these are to
    the ones on a base in float32."""
    make_tiny_llama(tmp_path / "model")
    adapter = make_adapter(tmp_path / "model", tmp_path / "adapter")
    exact = logits(tmp_path / "model", adapter, "none", torch.float32)
    quantised = logits(tmp_path / "model", adapter, "int8", torch.float32)
    both = logits(tmp_path / "model", adapter, "int8", torch.int8)
    assert not torch.equal(both, quantised)
    assert (both - quantised).square().mean() < 0.5 * (quantised - exact).square().mean()


def logits(model: Path, adapter: Path, quantization: str, held: torch.dtype) -> torch.Tensor:
    checkpoint = open_checkpoint(str(model))
    decoder = load_decoder(
        checkpoint,
        ModelSettings(model=str(model), quantization=quantization, kernels="cpu"),  # type: ignore[arg-type]
    )
    base = LoraBase.of(decoder, find_model(checkpoint.config), checkpoint.name)
    slots = AdapterSlots(base, decoder, max_rank=64, dtype=held)
    slots.prepare("a", str(adapter))
    slots.load("a")
    ids = torch.arange(40) * 7 % 500
    with torch.inference_mode():
        attention = PackedAttention(decoder.ops, [len(ids)], decoder.spec)
        adaptation = slots.adaptation([AdapterTokens("a", None)])
        return decoder.logits(decoder.forward(ids, torch.arange(len(ids)), attention, adaptation))


def test_an_unloaded_adapter_is_kept_as_far_as_there_is_memory(tmp_path: Path) -> None:
    """The next load of one that is kept reads no files; the one unloaded longest ago goes first."""
    make_tiny_llama(tmp_path / "model")
    folder = make_adapter(tmp_path / "model", tmp_path / "adapter")
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    decoder = load_decoder(checkpoint, ModelSettings(model=str(tmp_path / "model")))
    base = LoraBase.of(decoder, find_model(checkpoint.config), checkpoint.name)

    def loaded(unused_memory: int, keys: str) -> AdapterSlots:
        slots = AdapterSlots(base, decoder, max_rank=64, unused_memory=unused_memory)
        for key in keys:
            slots.prepare(key, str(folder))
            slots.load(key)
        for key in keys:
            slots.unload(key)
        return slots

    size = loaded(2**40, "a").unused_bytes
    assert size > 0
    for memory, kept in ((0, ""), (size, "c"), (2 * size, "bc"), (3 * size, "abc")):
        slots = loaded(memory, "abc")
        assert slots.keys == []
        assert slots.unused_bytes == len(kept) * size
        for key in "abc":
            if key in kept:
                slots.prepare(key, str(tmp_path / "nothing"))
                slots.load(key)
            else:
                with pytest.raises(AdapterInvalid):
                    slots.prepare(key, str(tmp_path / "nothing"))
        assert slots.keys == list(kept)
        assert slots.unused_bytes == 0
