"""Models that many tests share. Built or fetched once a session, and only when a test asks."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.tiny import make_tiny_llama

with pytest.MonkeyPatch.context() as _patch, contextlib.suppress(ImportError):
    # Triton's own functions are made for the interpreter or for a device when it is imported, which transformers may do
    # at any time. The tests of our kernels need the former; nothing else here uses Triton.
    if not os.path.exists("/dev/nvidiactl"):
        _patch.setenv("TRITON_INTERPRET", "1")
    import triton.language  # noqa: F401


# How long an example takes says what else the machine does; fixtures are read only, so examples may share them.
settings.register_profile(
    "eft", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("eft")


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
