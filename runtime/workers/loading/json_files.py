"""Reading the JSON files of a model directory."""

import json
from pathlib import Path
from typing import Any

from runtime.workers.loading.errors import ModelLoadError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ModelLoadError` when there is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelLoadError(f"Cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # a bad encoding is a ValueError too
        raise ModelLoadError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, got {type(value).__name__}.")
    return value


def read_optional_json_object(path: Path) -> dict[str, Any]:
    """As `read_json_object`, but empty when the file does not exist."""
    return read_json_object(path) if path.is_file() else {}
