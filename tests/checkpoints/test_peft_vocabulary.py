"""Rows of embedding and head in PEFT's files that cannot be right: each is refused with the file and the reason."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.adapters.versions import stage
from runtime.checkpoints.peft import CONFIG, WEIGHTS, AdapterInvalid, read_adapter
from runtime.model.families.llama import Llama
from runtime.model.lora_base import LoraBase
from tests.adapter_files import make_adapter
from tests.parity.llama import load
from tests.tiny import VOCAB_SIZE

EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
DELTA = "token_adapter.trainable_tokens_delta"
WIDTH = 64


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> LoraBase:
    return LoraBase.of(load(tiny_model)[0], Llama, "tiny")


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("plain") / "a")


@pytest.fixture
def written(plain: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the plain adapter with further tensors and fields of its configuration."""
    import msgspec

    def write(tensors: dict[str, Tensor], **config: Any) -> Path:
        given = msgspec.json.decode((plain / CONFIG).read_bytes())
        (tmp_path / CONFIG).write_bytes(msgspec.json.encode({**given, **config}))
        save_file({**load_file(plain / WEIGHTS), **tensors}, tmp_path / WEIGHTS)
        return tmp_path

    return write


def rows(count: int, width: int = WIDTH) -> Tensor:
    return torch.ones(count, width)


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        ({f"{EMBEDDING}.{DELTA}": rows(1)}, {}, "has rows of model.embed_tokens.*no trainable_token_indices"),
        (
            {f"{EMBEDDING}.{DELTA}": rows(2)},
            {"trainable_token_indices": [1]},
            r"expected shape \[1, 64\], got \[2, 64\]",
        ),
        (
            {f"{EMBEDDING}.{DELTA}": rows(1, 32)},
            {"trainable_token_indices": [1]},
            r"expected shape \[1, 64\], got \[1, 32\]",
        ),
        (
            {f"{EMBEDDING}.{DELTA}": rows(1).int()},
            {"trainable_token_indices": [1]},
            "is torch.int32; float32, float16 or bfloat16",
        ),
        (
            {f"{EMBEDDING}.{DELTA}": rows(1) * torch.inf},
            {"trainable_token_indices": [1]},
            "values that are not finite",
        ),
        (
            {f"{EMBEDDING}.{DELTA}": rows(2)},
            {"trainable_token_indices": [1, VOCAB_SIZE + 1]},
            f"goes up to {VOCAB_SIZE + 1}, and leaves out some of the ids from {VOCAB_SIZE}",
        ),
        (
            {f"{EMBEDDING}.weight": rows(VOCAB_SIZE - 1)},
            {"modules_to_save": ["embed_tokens"]},
            rf"expected shape \[{VOCAB_SIZE} or more, 64\], got \[{VOCAB_SIZE - 1}, 64\]",
        ),
        (
            {f"{HEAD}.weight": rows(VOCAB_SIZE + 2)},
            {"modules_to_save": ["lm_head"]},
            f"lm_head has the id {VOCAB_SIZE + 1}, and the embedding of the adapter and its base has {VOCAB_SIZE}",
        ),
        (
            {f"{EMBEDDING}.weight": rows(VOCAB_SIZE), f"{EMBEDDING}.{DELTA}": rows(1)},
            {"modules_to_save": ["embed_tokens"], "trainable_token_indices": [VOCAB_SIZE]},
            f"has {VOCAB_SIZE}, beyond {VOCAB_SIZE} rows",
        ),
        ({}, {"trainable_token_indices": {"embed_tokens": []}}, "must be different ids"),
        ({f"{EMBEDDING}.lora_embedding_A": rows(1)}, {}, "which is for no linear"),
    ],
)
def test_what_cannot_be_right(
    written: Callable[..., Path], base: LoraBase, tensors: dict[str, Tensor], config: dict[str, Any], says: str
) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        read_adapter(written(tensors, **config), base, max_rank=64)
    assert re.search(says, caught.value.message), caught.value.message


def test_whole_matrices_of_a_resized_base_are_read_without_a_word_in_the_configuration(
    written: Callable[..., Path], base: LoraBase
) -> None:
    """As PEFT writes them beside plain LoRA, where the embedding was resized."""
    read = read_adapter(
        written({f"{EMBEDDING}.weight": rows(VOCAB_SIZE + 3), f"{HEAD}.weight": rows(VOCAB_SIZE + 3)}),
        base,
        max_rank=64,
    )
    assert read.vocabulary is not None
    assert read.vocabulary.size == VOCAB_SIZE + 3
    assert read.vocabulary.head is not None


def test_the_memory_of_rows_is_limited_where_an_adapter_is_published(
    written: Callable[..., Path], base: LoraBase, tmp_path: Path
) -> None:
    source = written({f"{HEAD}.weight": rows(VOCAB_SIZE)}, modules_to_save=["lm_head"])
    needed = VOCAB_SIZE * WIDTH * 4
    with pytest.raises(AdapterInvalid, match=rf"take {needed} bytes.*max_vocabulary_bytes allows {needed - 1}"):
        stage(source, tmp_path / "1", base, lambda *_: b"{}", max_rank=8, max_vocabulary=needed - 1)
    stage(source, tmp_path / "2", base, lambda *_: b"{}", max_rank=8, max_vocabulary=needed)
