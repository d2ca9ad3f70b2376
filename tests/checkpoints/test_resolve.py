"""What a model's name is taken for."""

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.checkpoints import ModelLoadError, open_checkpoint

ROOT = Path(__file__).parents[2]


def test_what_was_tried_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError) as caught:
        open_checkpoint("no-such-model")
    for tried in ("'no-such-model'", "'demo'", ".gguf", "config.json", "nothing is at", "org/name"):
        assert tried in str(caught.value)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelLoadError, match="a file of another kind is at"):
        open_checkpoint(str(tmp_path / "pytorch_model.bin"))


def test_a_missing_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"Cannot read the GGUF file .*none\.gguf"):
        open_checkpoint(str(tmp_path / "none.gguf"))


def test_a_home_directory_is_expanded(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    assert open_checkpoint("~/tiny-llama").name == "tiny-llama"


def test_a_revision_is_for_hub_ids_only(tiny_model: Path) -> None:
    for model in (str(tiny_model), "demo"):
        with pytest.raises(ModelLoadError, match="revision 'v1' is for hub ids only"):
            open_checkpoint(model, revision="v1")


def test_a_chat_template_from_a_file(tiny_model: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("[{{ messages[0].content }}]")
    checkpoint = open_checkpoint(str(tiny_model), chat_template=str(template))
    assert checkpoint.tokenizer.render_chat([{"role": "user", "content": "newt"}]) == "[newt]"
    with pytest.raises(ModelLoadError, match=r"Cannot read the chat template .*absent\.jinja"):
        open_checkpoint(str(tiny_model), chat_template=str(tmp_path / "absent.jinja"))
    template.write_text("fine\n{% for %}")
    with pytest.raises(ModelLoadError, match=r"mine\.jinja: The chat template is not valid Jinja: line 2"):
        open_checkpoint(str(tiny_model), chat_template=str(template))


def test_opening_a_directory_and_loading_it_import_nothing_large(tiny_model: Path) -> None:
    """These take longer to import than a small model to load; sympy comes with some of torch's functions. Importing the
    package needs no torch either."""
    code = (
        "import sys; from runtime.checkpoints import open_checkpoint\n"
        "assert 'torch' not in sys.modules\n"
        f"checkpoint = open_checkpoint({str(tiny_model)!r})\n"
        "checkpoint.tokenizer.encode('newt')\n"
        "from runtime.checkpoints.model_loading import load_model\n"
        "from settings.schema import ModelSettings\n"
        "load_model(checkpoint, ModelSettings(model='tiny'))\n"
        "print(*(name in sys.modules for name in ('torch', 'transformers', 'huggingface_hub', 'sympy')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, cwd=ROOT
    )
    assert done.stdout.strip() == "True False False False"
