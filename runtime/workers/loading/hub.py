"""Models by hub id: downloaded by huggingface_hub into its own cache, and from there without a network.

HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to that library, which is imported only here.
"""

import re
from pathlib import Path

from runtime.workers.loading.errors import ModelLoadError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
"""Weights, configuration and tokenizer; no pickles and no code."""
UNWANTED = ["*/*", "consolidated*.safetensors"]
"""Subdirectories and second copies of the weights hold other formats of the same model."""


def is_hub_id(model: str) -> bool:
    """Whether `model` has the form org/name."""
    return _HUB_ID.fullmatch(model) is not None


def fetch(model: str, *, revision: str | None = None) -> Path:
    """The directory of a model's files in the hub cache, downloaded first where they are missing.

    Raises `ModelLoadError` when the model or revision does not exist, needs a token, or cannot be reached
    and is not cached.
    """
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError as error:
        raise ModelLoadError(
            f"{model} is a hub id, and huggingface_hub is not installed: pip install 'eft-server[hub]'."
        ) from error
    which = model if revision is None else f"{model} at revision {revision}"
    try:
        directory = snapshot_download(model, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED)
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
