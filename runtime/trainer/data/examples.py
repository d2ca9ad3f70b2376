"""The examples of a recipe's datasets: read, formatted, tokenised and fitted to the length, with a count of each."""

import hashlib
import random
import re
import time
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

from msgspec import Struct, field

from runtime.errors import InvalidRequest
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.example import Example, RowProblem, Rows
from runtime.trainer.data.files import DataFile, DataFiles
from runtime.trainer.data.formats import Format, guess, make_format
from runtime.trainer.data.preferences import PREFERENCE_TEXTS, make_preferences
from runtime.trainer.data.readers import DataRow, HubDataset, Numbered, read_rows
from runtime.trainer.recipe import Dataset, Recipe

# -- split -----------------------------------------------------------------------------------------
#
# Slices of a dataset, as in `train[:20%]`.

T = TypeVar("T")
Source = tuple[str, Callable[[], Iterator[Numbered]]]
"""A name for messages, and the rows of a file or of a data set."""

_SPLIT = re.compile(r"train(?:\[(-?[0-9]{1,12}%?)?:(-?[0-9]{1,12}%?)?\])?")


def row_range(split: str | None, count: Callable[[], int], *, param: str) -> tuple[int, int | None]:
    """First row and the one after the last (None: to the end) of a slice; `count` counts all rows.

    A local file is one split, so its name is `train`. Raises `InvalidRequest`.
    """
    if split is None:
        return 0, None
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise InvalidRequest(
            f"split must be train or a slice of it, such as train[:20%] or train[100:200], got {split[:64]!r}: a "
            "file has no other splits.",
            param=param,
        )
    first, last = (bound and _bound(bound, count) for bound in match.groups())
    return first or 0, last if last is None else int(last)


_HUB_SPLIT = re.compile(r"([\w.-]+)(\[.*\])?")


def split_of(split: str | None, *, param: str) -> tuple[str, str | None]:
    """The name of a hub's split, and the slice of it, as `row_range` takes it. Raises `InvalidRequest`."""
    match = _HUB_SPLIT.fullmatch(split or "train")
    if match is None:
        raise InvalidRequest(
            f"split must be a name or a slice, such as train or test[:20%], got {str(split)[:64]!r}.", param=param
        )
    return match[1], None if match[2] is None else f"train{match[2]}"


def _bound(text: str, count: Callable[[], int]) -> int:
    if text.endswith("%"):
        share = int(text[:-1])
        total = count()
        return min(total, max(0, round(total * ((share if share >= 0 else 100 + share) / 100))))
    number = int(text)
    return number if number >= 0 else max(0, count() + number)


MAX_TOKENS = 64 * 1024**2
"""Tokens of all rows together: a job holds them in memory, some 16 bytes each."""

_LOADERS = {"json": "json", "jsonl": "jsonl", "csv": "csv", "parquet": "parquet"}
"""Paths that name a format; the files are in data_files then."""
_TEXTS = ("alpaca", "prompt_completion", "completion")
MAX_NAMED = 10
"""Rows of a kind that are listed by number."""
FIRST_REPORT_SECONDS = 2.0
"""Time of reading after which the number of rows is reported, and again and again…"""
MAX_REPORT_SECONDS = 30.0
"""…up to this far apart, where it takes long."""


class RowRef(Struct, frozen=True):
    """A row that was left out or cut, for the plan."""

    file: str
    row: int
    """From 1."""
    tokens: int


class RowCounts(Struct, kw_only=True):
    """Numbers of rows that were read, by outcome."""

    rows: int = 0
    used: int = 0
    truncated: int = 0
    """Used rows that were cut."""
    too_long: int = 0
    too_short: int = 0
    untrained: int = 0
    """Rows without a token to train on."""
    ties: int = 0
    """Pairs of equal answers."""
    duplicates: int = 0
    cut: int = 0
    """Rows of texts that became several examples, for their length."""
    named: dict[str, list[RowRef]] = field(default_factory=dict)
    """The first rows of each of `truncated`, `too_long`, `too_short`, `untrained` and `ties`."""

    def note(self, what: str, file: str, row: int, tokens: int) -> None:
        """Count a row as `what`."""
        setattr(self, what, getattr(self, what) + 1)
        listed = self.named.setdefault(what, [])
        if len(listed) < MAX_NAMED:
            listed.append(RowRef(file, row, tokens))


@dataclass(frozen=True)
class ReadDataset:
    """An entry of the recipe that was read, for warnings and notes about it."""

    param: str
    """`datasets[0]`."""
    entry: Dataset
    format: Format
    num_examples: int


class Reader:
    """Reads the datasets of one recipe."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Tokenizer,
        files: DataFiles,
        ends: Collection[int],
        on_rows: Callable[[int, int], None] | None = None,
    ) -> None:
        """`on_rows` is called with the numbers of rows and of tokens so far, every few seconds."""
        self._on_rows = on_rows
        self._rows = 0
        self._began = self._reported = time.monotonic()
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._files = files
        self._ends = ends
        self._shared = list(range(tokenizer.vocab_size))
        """One object an id. Each list of the tokenizer's has objects of its own, of four times the size."""
        self.datasets: list[ReadDataset] = []
        """Entries that were read, in order."""
        self._tokens = 0

    def read(self, group: str, entries: Sequence[Dataset], counts: RowCounts) -> list[Example]:
        """The examples of `entries`, which stand under the key `group`, in the order of the files.

        Raises `BadRows` listing rows that cannot be used, `InvalidRequest` and `Forbidden`.
        """
        rows = Rows()
        found: list[Example] = []
        for index, entry in enumerate(entries):
            found += self._entry(f"{group}[{index}]", entry, counts, rows)
        rows.check()
        return found

    def _entry(self, param: str, entry: Dataset, counts: RowCounts, rows: Rows) -> list[Example]:
        sources, part = self._locate(param, entry)

        def numbered() -> Iterator[tuple[str, int, DataRow | RowProblem]]:
            return chain.from_iterable(((name, number, row) for number, row in rows()) for name, rows in sources)

        first, last = row_range(part, lambda: sum(1 for _ in numbered()), param=f"{param}.split")
        before, form, found = counts.rows, None, list[Example]()
        tokens = self._tokens
        for file, number, row in self._sharded(entry, lambda: islice(numbered(), first, last)):
            counts.rows += 1
            self._report()
            try:
                if isinstance(row, RowProblem):
                    raise row
                form = form or self._format(param, entry, row)
                examples = self._examples(form, row, counts, file, number)
            except RowProblem as problem:
                rows.add(param, file, number, problem)
                continue
            for example in examples:
                self._count(example, param)
            found += examples
            if self._is_enough(len(found), self._tokens - tokens):
                break
        if counts.rows == before:
            where = f"shard {entry.shards_idx} of {entry.shards} of {entry.path}" if entry.shards else entry.path
            raise InvalidRequest(f"{param}: there are no rows in {where}.", param=param, code="invalid_data")
        if form is not None:
            self.datasets.append(ReadDataset(param, entry, form, len(found)))
        if self._recipe.shuffle_before_merging_datasets:
            random.Random(f"{param} of {self._recipe.seed}").shuffle(found)
        return found

    def _report(self) -> None:
        self._rows += 1
        if self._on_rows is None:
            return
        now = time.monotonic()
        pause = min(MAX_REPORT_SECONDS, max(FIRST_REPORT_SECONDS, (now - self._began) / 10))
        if now - self._reported >= pause:
            self._reported = now
            self._on_rows(self._rows, self._tokens)

    def _sharded(self, entry: Dataset, rows: Callable[[], Iterator[T]]) -> Iterator[T]:
        """The rows of one of the pieces into which an entry is cut, in the order of the files."""
        if entry.shards is None:
            return rows()
        total = sum(1 for _ in rows())
        order = list(range(total))
        random.Random(f"shards of {self._recipe.seed}").shuffle(order)
        cuts = (total * entry.shards_idx // entry.shards, total * (entry.shards_idx + 1) // entry.shards)
        chosen = frozenset(order[slice(*cuts)])
        return (row for index, row in enumerate(rows()) if index in chosen)

    def _examples(self, form: Format, row: DataRow, counts: RowCounts, file: str, number: int) -> list[Example]:
        """The examples of a row that are trained on; all others are counted."""
        group = form(row)
        if len(group) > 1:
            return self._fitted(group, counts, file, number)
        pieces = form.pieces(group[0], self._recipe.sequence_len)
        if len(pieces) > 1:
            counts.note("cut", file, number, len(group[0]))
        return [example for piece in pieces for example in self._fitted([piece], counts, file, number)]

    def _count(self, example: Example, param: str) -> None:
        self._tokens += len(example)
        if self._tokens > MAX_TOKENS:
            raise InvalidRequest(
                f"The data has more than {MAX_TOKENS} tokens, and a job holds them all in memory: train on a part of "
                'the rows, such as split: "train[:50%]".',
                param=param,
                code="invalid_data",
            )

    def _is_enough(self, examples: int, tokens: int) -> bool:
        """True if a recipe that streams its data has as much of an entry as its steps take."""
        recipe = self._recipe
        if not recipe.streaming or recipe.max_steps is None:
            return False
        places = recipe.max_steps * recipe.effective_batch
        return tokens >= places * recipe.sequence_len if recipe.sample_packing else examples >= places

    def _locate(self, param: str, entry: Dataset) -> tuple[list[Source], str | None]:
        """The sources of an entry, and the slice of its rows."""
        if self._files.is_hub(entry.path):
            name, part = split_of(entry.split, param=f"{param}.split")
            if self._recipe.streaming and (entry.shards is not None or any(mark in (part or "") for mark in "%-")):
                raise InvalidRequest(
                    f"{param}: data that is streamed has no known number of rows: give split as numbers from the "
                    "start, such as train[:10000], and no shards.",
                    param=f"{param}.split",
                )
            data = HubDataset(
                name=entry.path,
                config=entry.name,
                revision=entry.revision,
                split=name,
                data_files=entry.files,
                streams=self._recipe.streaming,
                param=f"{param}.path",
            )
            return [(entry.path, lambda: iter(data))], part
        for key in ("name", "revision"):
            if getattr(entry, key) is not None:
                raise InvalidRequest(
                    f"{param}.{key} is for data sets of a hub; {entry.path} is a file.", param=f"{param}.{key}"
                )
        files, kind = self._find(param, entry)
        return [(file.name, partial(read_rows, file, kind, param=f"{param}.path")) for file in files], entry.split

    def _find(self, param: str, entry: Dataset) -> tuple[list[DataFile], str | None]:
        """The files of an entry, and their format where it is given."""
        if entry.path in _LOADERS and not entry.files:
            raise InvalidRequest(
                f"{param}.data_files is missing: path is the format {entry.path}, not a file.",
                param=f"{param}.data_files",
            )
        key = f"{param}.data_files" if entry.files else f"{param}.path"
        found = [file for name in names_of(entry) for file in self._files.find_all(name, param=key)]
        return found, entry.ds_type or _LOADERS.get(entry.path)

    def _format(self, param: str, entry: Dataset, row: dict[str, Any]) -> Format:
        preferences = self._recipe.rl is not None
        kind = guess(row, entry) if entry.type == "auto" and not preferences else entry.type
        rendered = isinstance(kind, str) and kind.startswith("chat_template")
        if preferences:
            rendered = kind not in PREFERENCE_TEXTS
        if rendered and self._tokenizer.chat_template is None:
            texts = ", ".join(PREFERENCE_TEXTS if preferences else _TEXTS)
            raise InvalidRequest(
                f"{param}.type is {kind}, but the served model has no chat template: start the server with one "
                "(--chat-template FILE), name one that goes with the adapter (chat_template: chatml), or train on "
                f"texts ({texts}).",
                param=f"{param}.type",
            )
        if preferences:
            assert isinstance(kind, str), "checked with the recipe"
            return make_preferences(kind, entry, self._recipe, self._tokenizer, self._ends)
        return make_format(kind, entry, self._recipe, self._tokenizer, self._ends)

    def _fitted(self, group: Sequence[Example], counts: RowCounts, file: str, number: int) -> list[Example]:
        """The examples of a row as they are trained on; none, and the row counted, where one of them is not."""
        limit, length = self._recipe.sequence_len, max(map(len, group))
        truncated = length > limit
        if truncated:
            if self._recipe.excess_length_strategy == "raise":
                raise RowProblem(f"has {length} tokens, more than sequence_len ({limit})")
            if self._recipe.excess_length_strategy == "drop":
                counts.note("too_long", file, number, length)
                return []
        fitted = [self._cut(example, limit) for example in group]
        if (shortest := min(map(len, fitted))) < self._recipe.min_sample_len:
            counts.note("too_short", file, number, shortest)
            return []
        if not all(any(example.trained) for example in fitted):
            counts.note("untrained", file, number, length)
            return []
        if len(fitted) == 2 and fitted[0] == fitted[1]:
            counts.note("ties", file, number, length)
            return []
        if truncated:
            counts.note("truncated", file, number, length)
        return fitted

    def _cut(self, example: Example, limit: int) -> Example:
        ids = [self._shared[id] for id in example.token_ids[:limit]]
        return Example(ids, example.trained[:limit], example.weight)


def names_of(entry: Dataset) -> list[str]:
    """The files of an entry, as `DataFiles.find` takes them."""
    if not entry.files:
        return [entry.path]
    folder = "" if entry.path in _LOADERS else entry.path.rstrip("/") + "/"
    return [folder + name for name in entry.files]


def without_duplicates(examples: Sequence[Example], seen: set[bytes], group_size: int = 1) -> list[Example]:
    """The first of each group that are equal, token for token and in what is trained on; `seen` is added to."""
    kept: list[Example] = []
    for start in range(0, len(examples), group_size):
        group = examples[start : start + group_size]
        key = b"".join(map(_digest, group))
        if key not in seen:
            seen.add(key)
            kept += group
    return kept


def _digest(example: Example) -> bytes:
    words = array("q", example.token_ids).tobytes() + bytes(example.trained) + array("d", [example.weight]).tobytes()
    return hashlib.blake2b(words, digest_size=16).digest()
