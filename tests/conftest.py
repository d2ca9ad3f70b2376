"""Models that many tests share. Built or fetched once a session, and only when a test asks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import make_tiny_llama


@pytest.fixture(scope="session", autouse=True)
def _state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test, and no server that one starts, keeps anything in the state directory of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a random two-layer Llama with a ChatML tokenizer. Read only."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct. Mark the tests that use it `real_model`."""
    from runtime.workers.loading.demo import demo_path

    return demo_path()
