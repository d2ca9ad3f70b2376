"""Defaults of a request's sampling fields: the model's `generation_config.json`, as vLLM reads it.

The settings `model.generation_config` and `model.override_generation_config` name another file, none, or single values.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.messages import DefaultedParams, SamplingDefaults, bounds_of
from runtime.model.config import ModelLoadError, read_json_object
from runtime.support.logs import get_logger

FILE = "generation_config.json"
AUTO, NONE = "auto", "none"

SUPPORTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "eos_token_id")

_log = get_logger(__name__)


_RANGES = bounds_of(DefaultedParams)


def sampling_defaults(own: Mapping[str, Any], source: str, override: str | None) -> SamplingDefaults:
    """The defaults of a model whose own generation config is `own`.

    `source` is "auto", "none", a folder with a generation_config.json, or such a file; `override` a JSON object. A
    limit of new tokens is a default where it comes from the model, and holds for every request where the operator has
    set it. Raises `ModelLoadError`, naming the key, its value and the expected one.
    """
    path = None if source in (AUTO, NONE) else _file(Path(source).expanduser())
    config = read_json_object(path) if path is not None else own if source == AUTO else {}
    origin = "the model's generation config" if path is None else str(path)
    given = _parse_override(override)
    values = {name: value for name, value in _read(config, origin).items() if name not in given}
    values |= _read(given, "override_generation_config")
    eos = values.pop("eos_token_id", [])
    limit = values.pop("max_new_tokens", None)
    defaults = SamplingDefaults(
        **values,
        max_tokens=limit,
        max_tokens_limit=limit if path is not None or "max_new_tokens" in given else None,
        # The tokenizer already has the model's own.
        eos_ids=tuple(eos) if path is not None or "eos_token_id" in given else (),
    )
    if defaults != SamplingDefaults():
        _log.info("sampling_defaults", origin=origin if config else "override_generation_config", **defaults.changed)
    return defaults


def _file(path: Path) -> Path:
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ModelLoadError(f"generation_config is {path}, and there is no file {file}; it can also be: auto, none.")
    return file


def _parse_override(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"override_generation_config is not valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise ModelLoadError(f"override_generation_config must be a JSON object, got {text[:100]}")
    for name in given:
        if name not in SUPPORTED:
            raise ModelLoadError(
                f"override_generation_config has no key {name[:100]!r}; supported are: {', '.join(SUPPORTED)}."
            )
    return given


def _read(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The supported keys and their values, checked. A null counts as absent."""
    return {name: _checked(name, config[name], origin) for name in SUPPORTED if config.get(name) is not None}


def _checked(name: str, value: Any, origin: str) -> Any:
    if name == "eos_token_id":
        ids = value if isinstance(value, list) else [value]
        if all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in ids):
            return ids
        raise _error(origin, name, "a token id, or a list of them", value)
    # A comparison instead of isfinite: an integer of 400 digits does not fit in a float.
    number = isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
    if name in ("top_k", "max_new_tokens"):
        least = -1 if name == "top_k" else 1
        if number and value == int(value) and least <= value < 2**31:
            return int(value)
        raise _error(origin, name, f"a whole number of at least {least}", value)
    bounds = _RANGES[name]
    if number and bounds.holds(value):
        return float(value)
    expected = f"a number {bounds}" if bounds.above else f"a number from {bounds.least:g} to {bounds.most:g}"
    raise _error(origin, name, expected, value)


def _error(origin: str, name: str, expected: str, value: object) -> ModelLoadError:
    return ModelLoadError(
        f"{origin}: {name} must be {expected}, got {str(value)[:100]}. --generation-config none does without the file."
    )
