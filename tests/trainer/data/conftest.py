"""Tokenizers of the tiny model, with chat templates of several kinds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.checkpoints.hf_tokenizer import load_tokenizer
from runtime.text.tokenizer import Tokenizer

MakeTokenizer = Callable[[str | None], Tokenizer]


@pytest.fixture(scope="session")
def make_tokenizer(tiny_model: Path) -> MakeTokenizer:
    """The tiny model's tokenizer with this template; None: with its own, which is ChatML."""
    return lambda template: load_tokenizer(tiny_model, {}, {}, chat_template=template)


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: MakeTokenizer) -> Tokenizer:
    return make_tokenizer(None)
