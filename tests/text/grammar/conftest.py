"""Tokenizers: the tiny one, and one with the special tokens of all formats."""

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from runtime.checkpoints.hf_tokenizer import load_tokenizer
from runtime.text.grammar import GrammarCompiler
from runtime.text.reasoning import REASONING_FORMATS
from runtime.text.tokenizer import Tokenizer
from runtime.text.tool_calls import FORMATS
from tests.tiny import EOS, make_tiny_tokenizer

ROWS = 600
"""Rows of the embedding: more than there are tokens."""


@pytest.fixture(scope="package")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    ids = make_tiny_tokenizer(folder)
    return load_tokenizer(folder, {"eos_token_id": ids[EOS]}, {}).sized(ROWS)


@pytest.fixture(scope="package")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


@pytest.fixture(scope="package")
def special_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """All texts around calls and reasoning as one token each; those in angle brackets are not special to the library,
    as in Qwen's."""
    backend = Backend.from_str(tokenizer.definition)
    texts = [text for form in (*FORMATS.values(), *REASONING_FORMATS.values()) for text in form.special_texts]
    for text in dict.fromkeys(texts):
        backend.add_tokens([AddedToken(text, special=text.startswith("["), normalized=False)])
    return Tokenizer(backend, eos_ids=tokenizer.eos_ids).sized(ROWS)


@pytest.fixture(scope="package")
def special_compiler(special_tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(special_tokenizer)
