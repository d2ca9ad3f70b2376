"""A local directory in Hugging Face's form: config.json, tokenizer files and safetensors."""

from functools import partial
from pathlib import Path

from runtime.workers.loading.checkpoint import Checkpoint
from runtime.workers.loading.errors import ModelLoadError
from runtime.workers.loading.hf_tokenizer import load_tokenizer
from runtime.workers.loading.json_files import read_json_object, read_optional_json_object
from runtime.workers.loading.quantised import find_scheme, weights
from runtime.workers.loading.safetensors_files import find_weights


def open_directory(path: Path, *, name: str | None = None, chat_template: str | None = None) -> Checkpoint:
    """Check a model directory and read everything but its weights. `name` defaults to the directory's.

    `chat_template` is the source of a template to use instead of the model's own. Raises `ModelLoadError`.
    """
    if not (path / "config.json").is_file():
        raise ModelLoadError(f"{path} holds no config.json, so it is not a model directory.{_hint(path)}")
    config = read_json_object(path / "config.json")
    try:
        scheme = find_scheme(config)
    except ModelLoadError as error:
        raise ModelLoadError(f"{path}: {error}") from None
    files = find_weights(path)
    generation = read_optional_json_object(path / "generation_config.json")
    tokenizer = load_tokenizer(path, config, generation, chat_template=chat_template)
    return Checkpoint(
        name=name or path.resolve().name,
        source=path,
        config=config,
        tokenizer=tokenizer,
        reader=files.tensors if scheme is None else partial(weights, files, scheme),
    )


def _hint(path: Path) -> str:
    files = sorted(file.name for file in path.glob("*.gguf"))
    if (path / "adapter_config.json").is_file():
        return " It holds a LoRA adapter; name its base model instead."
    return f" To load a GGUF file, name the file: {path / files[0]}" if files else ""
