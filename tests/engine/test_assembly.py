"""What settings mean for the parts that an engine is put together of."""

from pathlib import Path

import pytest
import torch

from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.model_loading import describe_decoder
from runtime.engine import assembly
from runtime.engine.assembly import step_bytes
from runtime.llm import LLM
from runtime.model.attention import block_bytes
from runtime.model.config import ModelLoadError
from runtime.model.group import SOLO
from runtime.model.model import DeviceMemory, Model, device_memory
from settings.load import load
from settings.schema import Settings

GIB = 1 << 30


@pytest.mark.parametrize(
    ("quantization", "asked", "held"),
    [
        ("none", "auto", "torch.float32"),
        ("int8", "auto", "torch.bfloat16"),
        ("int4", "auto", "torch.bfloat16"),
        ("int8", "float32", "torch.float32"),
        ("none", "int8", "torch.int8"),
    ],
)
def test_what_the_cache_holds(tiny_model: Path, quantization: str, asked: str, held: str) -> None:
    llm = LLM(str(tiny_model), quantization=quantization, kv_cache_dtype=asked)
    cache = llm.engine._executor._worker._cache  # type: ignore[attr-defined]
    assert {str(tensor.dtype) for both in cache.layers for tensor in both} == {held}


def planned(model: Path, memory: DeviceMemory, **flags: object) -> tuple[Settings, Model, int]:
    """Settings, the shapes of the model, and the number of blocks that its cache gets."""
    settings = load(env={}, flags={"model": str(model), **flags}).settings
    shapes = describe_decoder(open_checkpoint(str(model)), settings.model, SOLO)
    return settings, shapes, assembly._plan_cache(settings, shapes, memory).num_blocks


def test_a_cache_on_a_gpu_takes_what_its_share_leaves(tiny_model: Path) -> None:
    """Of 2 GiB, of which weights and other processes hold half: all up to the share but what a step needs."""
    memory = DeviceMemory(free=GIB, total=2 * GIB)
    settings, shapes, blocks = planned(tiny_model, memory, gpu_memory_utilization=0.75, max_running=4096)
    each = block_bytes(shapes.kv_shapes, block_size=16, dtype=shapes.dtype)
    left = 3 * GIB // 2 - GIB - step_bytes(settings, shapes)
    assert blocks == left // each
    assert blocks * each > 0.8 * GIB // 2


def test_it_is_no_larger_than_all_sequences(tiny_model: Path) -> None:
    _, shapes, blocks = planned(tiny_model, DeviceMemory(free=100 * GIB, total=140 * GIB), max_running=8)
    assert blocks == 8 * shapes.spec.max_position // 16


def test_a_gpu_without_room_is_refused_with_the_figures(tiny_model: Path) -> None:
    with pytest.raises(
        ModelLoadError, match=f"gpu_memory_utilization is 0.8, of {GIB} bytes; {GIB * 7 // 8} are taken"
    ):
        planned(tiny_model, DeviceMemory(free=GIB // 8, total=GIB))


@pytest.mark.parametrize("flags", [{"num_blocks": 77}, {"kv_memory": "1MiB"}])
def test_sizes_that_are_given_count_on_a_gpu_too(tiny_model: Path, flags: dict[str, object]) -> None:
    _, shapes, blocks = planned(tiny_model, DeviceMemory(free=GIB, total=2 * GIB), **flags)
    each = block_bytes(shapes.kv_shapes, block_size=16, dtype=shapes.dtype)
    assert blocks == (77 if "num_blocks" in flags else (1 << 20) // each)


def test_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 3 * GIB, 8 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    assert device_memory(torch.device("cuda:1")) == DeviceMemory(3 * GIB, 8 * GIB)
    assert asked == [torch.device("cuda:1")]
    assert device_memory(torch.device("cpu")).total is None
