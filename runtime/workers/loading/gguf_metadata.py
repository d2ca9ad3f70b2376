"""Typed look-ups in the metadata of a GGUF file."""

from pathlib import Path
from typing import Any, TypeVar

from runtime.workers.loading.errors import ModelLoadError

T = TypeVar("T")


class Metadata:
    """The key-value pairs of a file; a value of the wrong type is a `ModelLoadError`, an absent one None.

    A key that starts with a dot belongs to the model's architecture: `.block_count` is
    `llama.block_count`.
    """

    def __init__(self, fields: dict[str, Any], path: Path) -> None:
        self._fields = fields
        self.path = path
        self.architecture = ""
        self.architecture = self.require(self.text("general.architecture"), "general.architecture")

    def integer(self, key: str) -> int | None:
        value = self._get(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise self.error(key, f"must be an integer, got {_brief(value)}")

    def size(self, key: str) -> int:
        """An integer that must be there and above 0."""
        value = self.require(self.integer(key), key)
        if value < 1:
            raise self.error(key, f"must be at least 1, got {value}")
        return value

    def number(self, key: str) -> float | None:
        value = self._get(key)
        if value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise self.error(key, f"must be a number, got {_brief(value)}")

    def flag(self, key: str) -> bool | None:
        value = self._get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self.error(key, f"must be true or false, got {_brief(value)}")

    def text(self, key: str) -> str | None:
        value = self._get(key)
        if value is None or isinstance(value, str):
            return value
        raise self.error(key, f"must be a string, got {_brief(value)}")

    def texts(self, key: str) -> list[str] | None:
        value = self._list(key)
        if value is not None and not all(isinstance(item, str) for item in value):
            raise self.error(key, "must be strings")
        return value

    def numbers(self, key: str) -> list[float] | None:
        """An array of numbers, integers or not."""
        value = self._list(key)
        if value is not None and not all(isinstance(item, int | float) for item in value):
            raise self.error(key, "must be numbers")
        return value

    def require(self, value: T | None, key: str) -> T:
        if value is None:
            raise self.error(key, "is missing")
        return value

    def error(self, key: str, reason: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: {self._full(key)} {reason}.")

    def _list(self, key: str) -> list[Any] | None:
        value = self._get(key)
        if value is None or isinstance(value, list):
            return value
        raise self.error(key, f"must be an array, got {_brief(value)}")

    def _get(self, key: str) -> Any:
        return self._fields.get(self._full(key))

    def _full(self, key: str) -> str:
        return self.architecture + key if key.startswith(".") else key


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"
