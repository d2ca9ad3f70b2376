"""From what the operator wrote as the model to the loader for it."""

from pathlib import Path

from runtime.chat_template import ChatTemplateError
from runtime.workers.loading.checkpoint import Checkpoint
from runtime.workers.loading.errors import ModelLoadError

DEMO = "demo"


def open_checkpoint(model: str, *, revision: str | None = None, chat_template: str | None = None) -> Checkpoint:
    """Find and check a model's files; its weights are read by `Checkpoint.tensors`.

    `model` is `demo`, a GGUF file, a directory, or a hub id such as `org/name`, tried in this order.
    `revision` is a branch, tag or commit of a hub id. `chat_template` is the path of a Jinja file to use
    instead of the model's own template. Raises `ModelLoadError`.
    """
    template = None if chat_template is None else _read_template(Path(chat_template).expanduser())
    try:
        return _open(model, revision, template)
    except ChatTemplateError as error:
        origin = chat_template if chat_template is not None else model
        raise ModelLoadError(f"{origin}: {error}") from error


def _open(model: str, revision: str | None, template: str | None) -> Checkpoint:
    # Imported where they are used: each brings in the libraries of its format.
    from runtime.workers.loading.hub import is_hub_id

    path = Path(model).expanduser()
    hub = model != DEMO and not path.exists() and is_hub_id(model)
    if revision is not None and not hub:
        raise ModelLoadError(f"revision {revision!r} is for hub ids only; {model!r} is not one.")
    if model == DEMO:
        from runtime.workers.loading.demo import DEMO_NAME, demo_path
        from runtime.workers.loading.gguf import open_gguf

        return open_gguf(demo_path(), name=DEMO_NAME, chat_template=template)
    if path.suffix.lower() == ".gguf":
        from runtime.workers.loading.gguf import open_gguf

        return open_gguf(path, chat_template=template)
    if path.is_dir():
        from runtime.workers.loading.directory import open_directory

        return open_directory(path, chat_template=template)
    if hub:
        from runtime.workers.loading.directory import open_directory
        from runtime.workers.loading.hub import fetch

        return open_directory(fetch(model, revision=revision), name=model, chat_template=template)
    found = "a file of another kind" if path.exists() else "nothing"
    raise ModelLoadError(
        f"{model!r} is not a model. Tried: the name {DEMO!r}; a file that ends in .gguf; a directory with "
        f"config.json and *.safetensors ({found} is at {path}); a hub id of the form org/name."
    )


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"Cannot read the chat template {path}: {error}") from error
