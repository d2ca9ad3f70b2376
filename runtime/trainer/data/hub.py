"""Data sets of a hub, by id: fetched by the library `datasets` (extra `hub`) into its own cache.

Without a network they are read from there. Code that comes with a data set is never run.

HF_HOME, HF_TOKEN and HF_HUB_OFFLINE have that library's meaning.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from runtime.errors import InvalidRequest
from runtime.trainer.data.readers import DataRow, Numbered

MAX_REASON = 300
"""Characters of the library's message that an error repeats."""


@dataclass(frozen=True)
class HubDataset:
    """One split of a data set."""

    name: str
    """Its id, as the recipe has it."""
    config: str | None
    revision: str | None
    split: str
    data_files: tuple[str, ...]
    streams: bool
    """Fetched row by row, as far as it is read, instead of whole."""
    param: str
    """Key of the recipe, for errors."""

    def __iter__(self) -> Iterator[Numbered]:
        """The rows with their numbers, from 1. Raises `InvalidRequest`."""
        rows = iter(self._loaded)
        number = 0
        while True:
            try:
                row: DataRow = dict(next(rows))
            except StopIteration:
                return
            except Exception as error:  # of the network, or of a file that is not what it says
                raise self._problem(f"cannot be read after row {number}: {_shown(error)}") from error
            number += 1
            yield number, row

    @cached_property
    def _loaded(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise self._problem(
                "is a data set of a hub, and the library `datasets` is not installed: pip install 'eft-server[hub]'"
            ) from None
        chosen: dict[str, Any] = {"data_files": list(self.data_files)} if self.data_files else {}
        try:
            return datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=self.streams, **chosen
            )
        except Exception as error:  # it has no base class for its errors, and those of the network are others'
            raise self._problem(f"cannot be fetched: {_shown(error)}") from error

    def _problem(self, what: str) -> InvalidRequest:
        return InvalidRequest(f"{self.name} {what}.", param=self.param, code="data_not_found")


def _shown(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:MAX_REASON].rstrip(".")
