"""The examples of a recipe's datasets: read, formatted, tokenised and fitted to the length, with a count of each."""

import hashlib
from array import array
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from msgspec import Struct

from runtime.errors import InvalidRequest
from runtime.tokenizer import Tokenizer
from runtime.trainer.data.files import DataFile, DataFiles
from runtime.trainer.data.formats import Format, guess, make_format
from runtime.trainer.data.problems import RowProblem, Rows
from runtime.trainer.data.readers import Row, read_rows
from runtime.trainer.data.split import row_range
from runtime.trainer.examples import Example
from runtime.trainer.recipe import Dataset, Recipe

_LOADERS = {"json": "json", "jsonl": "jsonl", "csv": "csv", "parquet": "parquet"}
"""Paths that name a format; the files are in data_files then."""


class Counts(Struct, kw_only=True):
    """What became of the rows that were read."""

    rows: int = 0
    used: int = 0
    truncated: int = 0
    """Of those used."""
    too_long: int = 0
    too_short: int = 0
    untrained: int = 0
    """Without a token to train on."""
    duplicates: int = 0


class Reader:
    """Reads the datasets of one recipe."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, files: DataFiles, ends: Collection[int]) -> None:
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._files = files
        self._ends = ends
        self._shared = list(range(tokenizer.vocab_size))
        """One object an id. Each list of the tokenizer's has objects of its own, of four times the size."""

    def read(self, group: str, entries: Sequence[Dataset], counts: Counts) -> list[Example]:
        """The examples of `entries`, which stand under the key `group`, in the order of the files.

        Raises `BadRows` listing rows that cannot be used, `InvalidRequest` and `Forbidden`.
        """
        rows = Rows()
        found: list[Example] = []
        for index, entry in enumerate(entries):
            found += self._entry(f"{group}[{index}]", entry, counts, rows)
        rows.check()
        return found

    def _entry(self, param: str, entry: Dataset, counts: Counts, rows: Rows) -> Iterator[Example]:
        files, kind = self._locate(param, entry)

        def numbered() -> Iterator[tuple[DataFile, int, Row | RowProblem]]:
            return chain.from_iterable(
                ((file, number, row) for number, row in read_rows(file, kind, param=f"{param}.path")) for file in files
            )

        first, last = row_range(entry.split, lambda: sum(1 for _ in numbered()), param=f"{param}.split")
        before, form = counts.rows, None
        for file, number, row in islice(numbered(), first, last):
            counts.rows += 1
            try:
                if isinstance(row, RowProblem):
                    raise row
                form = form or self._format(param, entry, row)
                example = self._fitted(form(row), counts)
            except RowProblem as problem:
                rows.add(param, file.name, number, problem)
                continue
            if example is not None:
                yield example
        if counts.rows == before:
            raise InvalidRequest(f"{param}: there are no rows in {entry.path}.", param=param, code="invalid_data")

    def _locate(self, param: str, entry: Dataset) -> tuple[list[DataFile], str | None]:
        """The files of an entry, and their format where it is given."""
        if entry.path in _LOADERS:
            if not entry.files:
                raise InvalidRequest(
                    f"{param}.data_files is missing: path is the format {entry.path}, not a file.",
                    param=f"{param}.data_files",
                )
            kind = entry.ds_type or _LOADERS[entry.path]
            return [self._files.find(name, param=f"{param}.data_files") for name in entry.files], kind
        if entry.files:
            names = [f"{entry.path.rstrip('/')}/{name}" for name in entry.files]
            return [self._files.find(name, param=f"{param}.data_files") for name in names], entry.ds_type
        return [self._files.find(entry.path, param=f"{param}.path")], entry.ds_type

    def _format(self, param: str, entry: Dataset, row: dict[str, Any]) -> Format:
        kind = guess(row, entry) if entry.type == "auto" else entry.type
        if kind.startswith("chat_template") and self._tokenizer.chat_template is None:
            raise InvalidRequest(
                f"{param}.type is {kind}, but the served model has no chat template: start the server with one "
                "(--chat-template FILE), or train on texts (alpaca, prompt_completion, completion).",
                param=f"{param}.type",
            )
        return make_format(kind, entry, self._recipe, self._tokenizer, self._ends)

    def _fitted(self, example: Example, counts: Counts) -> Example | None:
        """The example as it is trained on, or None, counted, when it is not."""
        limit, truncated = self._recipe.sequence_len, False
        if len(example) > limit:
            if self._recipe.excess_length_strategy == "raise":
                raise RowProblem(f"has {len(example)} tokens, more than sequence_len ({limit})")
            if self._recipe.excess_length_strategy == "drop":
                counts.too_long += 1
                return None
            example = Example(example.token_ids[:limit], example.trained[:limit])
            truncated = True
        if len(example) < self._recipe.min_sample_len:
            counts.too_short += 1
            return None
        if not any(example.trained):
            counts.untrained += 1
            return None
        counts.truncated += truncated
        return Example([self._shared[id] for id in example.token_ids], example.trained)


def without_duplicates(examples: Sequence[Example], seen: set[bytes]) -> list[Example]:
    """The first of each that are equal, token for token and in what is trained on; `seen` is added to."""
    kept = []
    for example in examples:
        key = _digest(example)
        if key not in seen:
            seen.add(key)
            kept.append(example)
    return kept


def _digest(example: Example) -> bytes:
    words = array("q", example.token_ids).tobytes() + bytes(example.trained)
    return hashlib.blake2b(words, digest_size=16).digest()
