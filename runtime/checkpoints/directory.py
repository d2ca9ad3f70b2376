"""Local directories in Hugging Face's form: config.json, tokenizer files and safetensors."""

from functools import partial
from pathlib import Path

from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.hf_tokenizer import load_tokenizer
from runtime.checkpoints.quantised import find_scheme, weights
from runtime.checkpoints.safetensors_files import find_weights
from runtime.model.config import ConfigError, ModelLoadError, architectures, read_json_object, read_optional_json_object
from runtime.support.peft_files import CONFIG


def open_directory(path: Path, *, name: str | None = None, chat_template: str | None = None) -> Checkpoint:
    """Check a model directory and read everything but its weights. `name` defaults to the directory's.

    `chat_template` is the source of a template to use instead of the model's own. Raises `ModelLoadError`.
    """
    if not (path / "config.json").is_file():
        raise ModelLoadError(f"{path} holds no config.json, so it is not a model directory.{_hint(path)}")
    config = read_json_object(path / "config.json")
    try:
        architectures(config)
        scheme = find_scheme(config)
    except (ConfigError, ModelLoadError) as error:
        raise ModelLoadError(f"{path / 'config.json'}: {error}") from None
    files = find_weights(path)
    generation = read_optional_json_object(path / "generation_config.json")
    tokenizer = load_tokenizer(path, config, generation, chat_template=chat_template)
    return Checkpoint(
        name=name or path.resolve().name,
        source=path,
        config=config,
        tokenizer=tokenizer,
        reader=files.tensors if scheme is None else partial(weights, files, scheme),
        describer=files.described if scheme is None else None,
        files=files,
        generation=generation,
    )


def _hint(path: Path) -> str:
    files = sorted(file.name for file in path.glob("*.gguf"))
    if (path / CONFIG).is_file():
        return " It holds a LoRA adapter; name its base model instead."
    return f" To load a GGUF file, name the file: {path / files[0]}" if files else ""
