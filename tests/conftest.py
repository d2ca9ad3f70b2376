"""Models that many tests share. Built or fetched once a session, and only when a test asks."""

from pathlib import Path

import pytest

from tests.tiny import make_tiny_llama


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a random two-layer Llama with a ChatML tokenizer. Read only."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct. Mark the tests that use it `real_model`."""
    from runtime.workers.loading.demo import demo_path

    return demo_path()
