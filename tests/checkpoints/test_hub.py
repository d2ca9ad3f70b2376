"""Hub ids against a cache laid out as huggingface_hub does it. No network: HF_HUB_OFFLINE is set.

Each case runs in a process of its own, since the library reads its environment when it is imported.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.checkpoints.resolve import UNWANTED, WANTED, is_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parents[2]
OPEN = """
import sys
from runtime.checkpoints import ModelLoadError, open_checkpoint
try:
    checkpoint = open_checkpoint(sys.argv[1], revision=sys.argv[2] or None)
    print(checkpoint.name, checkpoint.source, checkpoint.tokenizer.encode("newt"))
except ModelLoadError as error:
    print("refused:", error)
"""


@pytest.fixture
def home(tiny_model: Path, tmp_path: Path) -> Path:
    """A HF_HOME in which `some-org/tiny` is cached."""
    repository = tmp_path / "home" / "hub" / "models--some-org--tiny"
    shutil.copytree(tiny_model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "home"


def opened(home: Path, model: str, revision: str = "") -> str:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", OPEN, model, revision],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=ROOT,
        env={**environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )
    return done.stdout.strip()


def test_a_cached_model_opens_without_a_network(home: Path) -> None:
    snapshot = home / "hub" / "models--some-org--tiny" / "snapshots" / COMMIT
    assert opened(home, "some-org/tiny").startswith(f"some-org/tiny {snapshot} [")
    assert opened(home, "some-org/tiny", COMMIT).startswith("some-org/tiny ")


def test_a_model_that_is_not_cached_is_refused(home: Path) -> None:
    message = opened(home, "some-org/other")
    assert message.startswith("refused: some-org/other is not in the hub cache")
    assert "HF_HUB_OFFLINE is set" in message
    assert str(home / "hub") in message


def test_a_revision_that_is_not_cached_is_refused(home: Path) -> None:
    assert "some-org/tiny at revision v2 is not in the hub cache" in opened(home, "some-org/tiny", "v2")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("org/name", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("org/name.v1_2", True),
        ("name", False),
        ("./name", False),
        ("../name", False),
        ("a/b/c", False),
        ("org/", False),
        ("org/na me", False),
        ("org/.hidden", False),
        ("https://org/name", False),
        ("örg/name", False),
    ],
)
def test_what_looks_like_a_hub_id(model: str, expected: bool) -> None:
    assert is_hub_id(model) is expected


def test_only_safe_files_of_the_model_itself_are_fetched() -> None:
    from huggingface_hub.utils import filter_repo_objects

    files = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "merges.txt",
        "pytorch_model.bin",
        "modeling_custom.py",
        "model.gguf",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "onnx/model.safetensors",
    ]
    kept = list(filter_repo_objects(files, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    assert kept == files[:8]
