"""Data sets of a hub, over a stand-in for the library `datasets` that records how it is called."""

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from runtime.errors import Forbidden, InvalidRequest
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.examples import Reader, RowCounts, split_of
from runtime.trainer.data.files import DataFiles
from runtime.trainer.recipe import Document, recipe_from

ROWS = [{"text": f"newt {number}"} for number in range(10)]


class Library(types.ModuleType):
    """`datasets`, with one data set of ten rows."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.read = 0
        self.failure: Exception | None = None

    def load_dataset(self, *args: Any, **options: Any) -> Any:
        self.calls.append((args, options))
        if args[0] != "org/newts":
            raise FileNotFoundError(f"Dataset {args[0]!r} doesn't exist\non the Hub.")
        return self._stream() if options["streaming"] else ROWS

    def _stream(self) -> Iterator[dict[str, Any]]:
        for row in ROWS:
            self.read += 1
            if self.failure is not None and self.read > 3:
                raise self.failure
            yield row


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setitem(sys.modules, "datasets", library)
    return library


def read(tokenizer: Tokenizer, entry: dict[str, Any], *, hub: bool = True, **keys: Any) -> list[str]:
    entries = [{"path": "org/newts", "type": "completion", **entry}]
    given = {"adapter": "lora", "learning_rate": 1e-4, "datasets": entries, **keys}
    recipe = recipe_from(Document(given), max_lora_rank=64)
    reader = Reader(recipe, tokenizer, DataFiles(hub=hub), tokenizer.eos_ids)
    return [tokenizer.decode(example.token_ids) for example in reader.read("datasets", recipe.datasets, RowCounts())]


def test_a_split_with_its_configuration_and_revision(tokenizer: Tokenizer, library: Library) -> None:
    entry = {"name": "plain", "revision": "v2", "split": "test[:30%]", "data_files": "a.jsonl"}
    assert read(tokenizer, entry) == ["newt 0", "newt 1", "newt 2"]
    options = {"split": "test", "revision": "v2", "streaming": False, "data_files": ["a.jsonl"]}
    assert library.calls == [(("org/newts", "plain"), options)]
    assert read(tokenizer, {"shards": 5, "shards_idx": 1}) != []
    assert len(read(tokenizer, {})) == 10


def test_streamed_data_is_read_as_far_as_the_steps_take(tokenizer: Tokenizer, library: Library) -> None:
    found = read(tokenizer, {}, streaming=True, max_steps=2, micro_batch_size=2)
    assert found == ["newt 0", "newt 1", "newt 2", "newt 3"]
    assert library.read == 4
    packed = read(tokenizer, {}, streaming=True, max_steps=1, sample_packing=True, sequence_len=16)
    assert 1 < len(packed) < 10
    pretraining = {"datasets": None, "pretraining_dataset": [{"path": "org/newts", "type": "pretrain", "skip": 7}]}
    assert read(tokenizer, {}, max_steps=5, **pretraining) == ["newt 7", "newt 8", "newt 9"]
    with pytest.raises(InvalidRequest, match="has no known number of rows"):
        read(tokenizer, {"split": "train[:50%]"}, streaming=True, max_steps=2)


def test_what_the_hub_does_not_give(tokenizer: Tokenizer, library: Library) -> None:
    with pytest.raises(
        InvalidRequest, match="org/toads cannot be fetched: Dataset 'org/toads' doesn't exist on the Hub"
    ):
        read(tokenizer, {"path": "org/toads"})
    library.failure = ConnectionError("the line is dead")
    with pytest.raises(InvalidRequest, match="org/newts cannot be read after row 3: the line is dead"):
        read(tokenizer, {}, streaming=True, max_steps=9)


def test_without_the_library_or_the_setting(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidRequest, match=r"not installed: pip install 'eft-server\[hub\]'") as caught:
        read(tokenizer, {})
    assert caught.value.param == "datasets[0].path"
    with pytest.raises(Forbidden, match=r"where the setting trainer.hub allows it"):
        read(tokenizer, {}, hub=False)


def test_a_file_is_no_data_set_of_a_hub(tokenizer: Tokenizer, library: Library, tmp_path: Any) -> None:
    (tmp_path / "org").mkdir()
    files = DataFiles(roots=[tmp_path], hub=True)
    assert not files.is_hub("org/newts")  # of a folder here
    assert not files.is_hub("other/newts.jsonl")
    assert files.is_hub("other/newts")
    with pytest.raises(InvalidRequest, match=r"datasets\[0\].name is for data sets of a hub"):
        read(tokenizer, {"path": "rows.jsonl", "name": "plain"})


@pytest.mark.parametrize(
    ("split", "expected"), [(None, ("train", None)), ("test", ("test", None)), ("test[5:]", ("test", "train[5:]"))]
)
def test_splits(split: str | None, expected: tuple[str, str | None]) -> None:
    assert split_of(split, param="split") == expected
    with pytest.raises(InvalidRequest, match="a name or a slice"):
        split_of("test[", param="split")
