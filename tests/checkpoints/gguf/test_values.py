"""Every number in a GGUF file's metadata with every kind of wrong value: refused with its name, or served."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import LLM, SamplingParams
from runtime.model.config import ModelLoadError
from tests.checkpoints.gguf.files import write_gguf
from tests.tiny import make_tiny_llama

WRONG: list[Any] = [
    0,
    1,
    3,
    7,
    10**9,
    2**32 - 1,
    0.0,
    -1.0,
    0.5,
    1e30,
    float("nan"),
    float("inf"),
    "",
    "x",
    True,
    [1],
    ["x"],
]
COMMON = (
    ".block_count", ".context_length", ".embedding_length", ".feed_forward_length", ".attention.head_count",
    ".attention.head_count_kv", ".attention.key_length", ".attention.value_length", ".rope.freq_base",
    ".rope.dimension_count", ".attention.layer_norm_rms_epsilon", ".attention.sliding_window", ".expert_count",
    "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.pre",
    "tokenizer.ggml.model", "tokenizer.chat_template",
)  # fmt: skip
ROPES: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {".rope.scaling.type": "linear", ".rope.scaling.factor": 2.0},
    "yarn": {
        ".rope.scaling.type": "yarn",
        ".rope.scaling.factor": 2.0,
        ".rope.scaling.original_context_length": 128,
        ".rope.scaling.attn_factor": 1.0,
    },
}
NAMES_IN_CONFIG = {
    ".rope.freq_base": "rope_theta",
    ".attention.layer_norm_rms_epsilon": "rms_norm_eps",
    ".rope.scaling.factor": "factor",
    ".rope.scaling.type": "rope",
    ".attention.sliding_window": "sliding_window",
    ".context_length": "max_position_embeddings",
    ".feed_forward_length": "intermediate_size",
    ".embedding_length": "hidden_size",
    ".block_count": "num_hidden_layers",
    ".attention.head_count": "num_attention_heads",
    ".attention.head_count_kv": "num_key_value_heads",
    ".rope.scaling.original_context_length": "original_max_position_embeddings",
}
"""Where a family checks what the file says it goes by the name in a config.json."""

OF_TENSORS = ("the checkpoint", "expected shape", "head_dim", "heads of", "has no tensor")
"""Counts and sizes that the tensors do not have are told by them."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("gguf") / "m")


def outcome(file: Path) -> str:
    """ "" where the model answers a request, or what refuses it. Whatever else is raised fails the test."""
    try:
        llm = LLM(str(file), num_blocks=8)
        llm.generate([[5, 6, 7][: max(1, llm.engine.max_len - 1)]], SamplingParams(max_tokens=1, temperature=0))
    except ModelLoadError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("scaling", ROPES)
def test_every_value(model: Path, tmp_path: Path, scaling: str) -> None:
    refused = 0
    for key in (*(COMMON if scaling == "none" else ()), *ROPES[scaling]):
        names = (key, NAMES_IN_CONFIG.get(key, key), *OF_TENSORS)
        for number, value in enumerate(WRONG):
            file = write_gguf(tmp_path / f"{number}.gguf", model, metadata={**ROPES[scaling], key: value})
            message = outcome(file)
            refused += message != ""
            assert not message or any(name in message for name in names), f"{key} = {value!r}: {message}"
    assert refused > 10


def test_tables_in_every_layer_are_left_out(model: Path, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=4, temperature=0)
    plain = write_gguf(tmp_path / "plain.gguf", model)
    tables = {
        f"blk.{layer}.{name}.weight": np.ones(8, np.float32)
        for layer in (0, 1)
        for name in ("attn_rot_embd", "rope_freqs")
    }
    older = write_gguf(tmp_path / "older.gguf", model, extra_tensors=tables)
    one, two = (LLM(str(file), num_blocks=8).generate([[5, 6, 7]], params)[0].token_ids for file in (plain, older))
    assert one == two
