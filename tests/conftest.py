"""Models that many tests share. Built or fetched once a session, and only when a test asks."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

from tests.tiny import make_tiny_llama

with pytest.MonkeyPatch.context() as _patch, contextlib.suppress(ImportError):
    # Triton's own functions are made for the interpreter or for a device when it is imported, which transformers may do
    # at any time. The tests of our kernels need the former; nothing else here uses Triton.
    if not os.path.exists("/dev/nvidiactl"):
        _patch.setenv("TRITON_INTERPRET", "1")
    import triton.language  # noqa: F401


# How long an example takes says what else the machine does; fixtures are read only, so examples may share them.
# The same examples each time judge a change by what it changed; --hypothesis-profile=search looks for new ones.
_CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("eft", deadline=None, suppress_health_check=_CHECKS, derandomize=True)
settings.register_profile("search", deadline=None, suppress_health_check=_CHECKS, max_examples=500)
settings.load_profile("eft")


LONG_FILES = (
    "trainer/launched/test_jobs.py",
    "api/test_largest_bodies.py",
    "end_to_end/test_training.py",
    "model/test_sharded_families.py",
    "api/test_schema.py",
    "workers/parallel/test_torchrun.py",
    "end_to_end/test_batches.py",
    "end_to_end/test_recipes.py",
    "end_to_end/test_adapter_tokens.py",
    "parity/test_smollm2_greedy.py",
    "end_to_end/test_preferences.py",
    "end_to_end/test_state.py",
    "end_to_end/test_evaluation.py",
    "checkpoints/export/test_smollm2_export.py",
    "benchmarks/test_peers.py",
)
"""Files that take longest, below this folder, the longest first. They begin first, so that no worker is left alone with
one at the end (`make test` has xdist keep this order)."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the files, and leave tests that take minutes to those who ask for them: `-m slow`."""
    places = {Path(__file__).parent / file: place for place, file in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    if "slow" in config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: run it with -m slow"))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def _state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test, and no server that one starts, keeps anything in the state directory of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _interrupts() -> None:
    """Tests that press Ctrl-C can be run in the background, where a shell has SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _logs_as_they_were() -> Iterator[None]:
    """What a test configures for its logs is not there for the next one."""
    root = logging.getLogger()
    handlers, level, config = root.handlers[:], root.level, structlog.get_config()
    config["processors"] = list(config["processors"])
    yield
    structlog.configure(**config)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a random two-layer Llama with a ChatML tokenizer. Read only."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct. Mark the tests that use it `real_model`."""
    from runtime.checkpoints.demo import demo_path

    return demo_path()
