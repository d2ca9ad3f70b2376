"""Runs the tests of clients in their own environments, each against a server with a real model.

Most use the demo model. LangChain's tests want calls with exact arguments and structured answers, for which 135 million
parameters are too few: they use a model of 500 million, which is fetched first (hundreds of megabytes).
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints.gguf.real_ggufs import QWEN
from tests.end_to_end.process import ServerProcess

HERE = Path(__file__).parent
PYTHON = Path(os.environ.get("EFT_CLIENTS", "/nonexistent")) / "bin" / "python"
NODE_MODULES = HERE / "node" / "node_modules"
MODEL = "model-under-test"
LARGER = ("test_langchain",)
"""Modules whose tests need the larger model."""

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables that lead clients to the server; its model is the parameter: demo, or qwen."""
    model = str(QWEN.path()) if request.param == "qwen" else request.param
    flags = {"served_model_name": MODEL, "max_model_len": 8192}
    with ServerProcess(model, tmp_path_factory.mktemp("clients") / "state", **flags) as server:
        yield {**os.environ, "EFT_URL": server.url, "EFT_MODEL_NAME": MODEL, "NO_PROXY": "127.0.0.1"}


def output_of(command: list[str], environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    return done.stdout


def modules() -> list[pytest.param]:
    stems = sorted(path.stem for path in (HERE / "python").glob("test_*.py"))
    return [
        pytest.param("qwen", stem, id=stem, marks=pytest.mark.slow)
        if stem in LARGER
        else pytest.param("demo", stem, id=stem)
        for stem in stems
    ]


@pytest.mark.skipif(not PYTHON.exists(), reason="clients are not installed: .ci/clients")
@pytest.mark.parametrize(("environment", "module"), modules(), indirect=["environment"])
def test_python(environment: dict[str, str], module: str) -> None:
    """`-c` and `--confcutdir` keep this project's own configuration out."""
    options = ["-q", "-c", os.devnull, "--rootdir", ".", "--confcutdir", ".", "-p", "no:cacheprovider"]
    command = [str(PYTHON), "-m", "pytest", *options, "-o", "asyncio_mode=auto", f"{module}.py"]
    assert " passed" in output_of(command, environment, HERE / "python")


@pytest.mark.skipif(not NODE_MODULES.exists(), reason="clients are not installed: .ci/clients")
@pytest.mark.parametrize("environment", ["demo"], indirect=True)
def test_node(environment: dict[str, str]) -> None:
    node = shutil.which("node")
    assert node is not None
    output_of([node, "--test", "clients.test.mjs"], environment, HERE / "node")
