"""What settings mean for the parts that an engine is put together of."""

from pathlib import Path

import pytest

from runtime.llm import LLM


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
