"""Choice of the loader for the operator's `model` setting."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from runtime.checkpoints.checkpoint import Checkpoint
from runtime.model.config import ModelLoadError
from runtime.text.chat_template import ChatTemplateError
from runtime.text.templates import BUILTIN_TEMPLATES, builtin_template

DEMO = "demo"


def open_checkpoint(model: str, *, revision: str | None = None, chat_template: str | None = None) -> Checkpoint:
    """Find and check a model's files; `Checkpoint.tensors` reads its weights.

    `model` is `demo`, a GGUF file, a directory, or a hub id such as `org/name`, tried in this order.
    `revision` is a branch, tag or commit of a hub id. `chat_template` is the name of a built-in template, or the path
    of a Jinja file, to use instead of the model's own template. Raises `ModelLoadError`.
    """
    template = None if chat_template is None else _read_template(chat_template)
    try:
        return _open(model, revision, template)
    except ChatTemplateError as error:
        origin = chat_template if chat_template is not None else model
        raise ModelLoadError(f"{origin}: {error}") from error


def _open(model: str, revision: str | None, template: str | None) -> Checkpoint:
    # Imported where they are used: each imports the libraries of its format.

    path = Path(model).expanduser()
    hub = model != DEMO and not path.exists() and is_hub_id(model)
    if revision is not None and not hub:
        raise ModelLoadError(f"revision {revision!r} is for hub ids only; {model!r} is not one.")
    if model == DEMO:
        from runtime.checkpoints.demo import DEMO_NAME, GENERATION, demo_path
        from runtime.checkpoints.gguf.checkpoint import open_gguf

        return replace(open_gguf(demo_path(), name=DEMO_NAME, chat_template=template), generation=GENERATION)
    if path.suffix.lower() == ".gguf":
        from runtime.checkpoints.gguf.checkpoint import open_gguf

        return open_gguf(path, chat_template=template)
    if path.is_dir():
        from runtime.checkpoints.directory import open_directory

        return open_directory(path, chat_template=template)
    if hub:
        from runtime.checkpoints.directory import open_directory

        return open_directory(fetch(model, revision=revision), name=model, chat_template=template)
    found = "a file of another kind" if path.exists() else "nothing"
    raise ModelLoadError(
        f"{model!r} is not a model. Tried: the name {DEMO!r}; a file that ends in .gguf; a directory with "
        f"config.json and *.safetensors ({found} is at {path}); a hub id of the form org/name; NAME@VERSION of a model "
        "that a job in the state directory has trained."
    )


def _read_template(name: str) -> str:
    """The source of a template: a built-in one by its name, else a file (`./chatml` where a file has such a name)."""
    if (source := builtin_template(name)) is not None:
        return source
    path = Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(BUILTIN_TEMPLATES)
        raise ModelLoadError(
            f"Cannot read the chat template {path}: {error}. It is a file, or one of the built-in {known}."
        ) from error


# -- hub -------------------------------------------------------------------------------------------
#
# Models by hub id: downloaded by huggingface_hub into its own cache, and from there without a network.
#
# HF_HOME, HF_TOKEN and HF_HUB_OFFLINE have that library's meaning; it is imported only here.

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
"""Weights, configuration and tokenizer; no pickles and no code."""
UNWANTED = ["*/*", "consolidated*.safetensors"]
"""Subdirectories and second copies of the weights hold other formats of the same model."""


def is_hub_id(model: str) -> bool:
    """True if `model` has the form org/name."""
    return _HUB_ID.fullmatch(model) is not None


def fetch(model: str, *, revision: str | None = None, files: Sequence[str] = WANTED) -> Path:
    """The directory of a model's files in the hub cache, downloaded first where they are missing.

    `files`: patterns of the names that are downloaded. Raises `ModelLoadError` when the model or revision does not
    exist, needs a token, or cannot be reached and is not cached.
    """
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError as error:
        raise ModelLoadError(
            f"{model} is a hub id, and huggingface_hub is not installed: pip install 'eft-server[hub]'."
        ) from error
    which = model if revision is None else f"{model} at revision {revision}"
    try:
        directory = snapshot_download(model, revision=revision, allow_patterns=[*files], ignore_patterns=UNWANTED)
    except errors.GatedRepoError as error:
        raise ModelLoadError(
            f"{which} is gated: accept its terms on the hub, and set HF_TOKEN to a token of that account."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelLoadError(f"The hub has no revision {revision!r} of {model}.") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"The hub has no model {model}, or it is private: then set HF_TOKEN to a token that may read it."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise ModelLoadError(
            f"{which} is not in the hub cache ({constants.HF_HUB_CACHE}), and {why}. Give the path of a "
            "local directory or GGUF file, or download the model where there is a network."
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ModelLoadError(f"{which} cannot be fetched from the hub: {error}") from error
    return Path(directory)
