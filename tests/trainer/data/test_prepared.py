"""Prepared data: what is read back is what was written, or a reason why it is not."""

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.adapters.card import Prompt
from runtime.checkpoints.hf_tokenizer import load_tokenizer
from runtime.text.templates import builtin_template
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.example import Example
from runtime.trainer.data.examples import Reader, RowCounts, RowRef
from runtime.trainer.data.files import DataFiles
from runtime.trainer.data.prepared import (
    UNREAD,
    PreparedAbsent,
    PreparedCache,
    PreparedData,
    PreparedInvalid,
    contents_of,
    data_key,
    digest_of_tokenizer,
    link_or_copy,
    read_prepared,
    write_prepared,
)
from runtime.trainer.recipe import Document, Recipe, recipe_from
from runtime.trainer.recipe.schema import keys_of

VOCAB = 512

EXAMPLES = st.lists(
    st.lists(st.tuples(st.integers(0, VOCAB - 1), st.booleans()), min_size=1, max_size=30).map(
        lambda pairs: Example([id for id, _ in pairs], [trained for _, trained in pairs])
    ),
    max_size=5,
)


def data(train: list[Example], test: list[Example]) -> PreparedData:
    counts = RowCounts(rows=9, used=len(train), too_long=1, named={"too_long": [RowRef("a.jsonl", 3, 700)]})
    return PreparedData(
        train=train,
        test=test,
        generation=[*test, *train][:2],
        train_counts=counts,
        test_counts=RowCounts(),
        prompt=Prompt(format="chat", system="Be a newt."),
        warnings=["datasets[0]: a warning"],
        notes=["a note – with a dash"],
    )


@given(train=EXAMPLES, test=EXAMPLES)
def test_what_is_read_is_what_was_written(tmp_path_factory: pytest.TempPathFactory, train: Any, test: Any) -> None:
    path = tmp_path_factory.mktemp("job") / "examples.bin"
    written = data(train, test)
    write_prepared(path, "key", written)
    assert read_prepared(path, "key", vocab_size=VOCAB) == written
    write_prepared(path, "key", data(test, train))  # in place of the other
    assert read_prepared(path, "key", vocab_size=VOCAB) == data(test, train)
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_ids_are_shared(tmp_path: Path) -> None:
    """One object an id, as after tokenising: a list of objects of its own would take four times the memory."""
    write_prepared(tmp_path / "a", "key", data([Example([400, 401, 400], [False, True, True])], []))
    (example,) = read_prepared(tmp_path / "a", "key", vocab_size=VOCAB).train
    assert example.token_ids[0] is example.token_ids[2]


def full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a"
    write_prepared(path, "key", data([Example([1, 2, 3], [False, True, True])], [Example([4], [True])]))
    return path.read_bytes()


def test_no_byte_can_change_unnoticed(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "a"
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        with pytest.raises(PreparedInvalid):
            read_prepared(path, "key", vocab_size=VOCAB)


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: b"",
        lambda whole: whole[:20],
        lambda whole: whole[:-1],
        lambda whole: whole + b"\0",
        lambda whole: whole[:15] + (2**32 - 1).to_bytes(4, "little") + whole[19:],
    ],
    ids=["empty", "header", "cut", "longer", "huge header"],
)
def test_a_damaged_file_is_refused(tmp_path: Path, whole: bytes, change: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a"
    path.write_bytes(change(whole))
    with pytest.raises(PreparedInvalid, match="damaged"):
        read_prepared(path, "key", vocab_size=VOCAB)


def test_other_files_are_refused(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "a"
    with pytest.raises(PreparedAbsent):
        read_prepared(path, "key", vocab_size=VOCAB)
    path.write_bytes(whole)
    with pytest.raises(PreparedInvalid, match="another tokenizer, template or recipe"):
        read_prepared(path, "another", vocab_size=VOCAB)
    with pytest.raises(PreparedInvalid, match="damaged"):
        read_prepared(path, "key", vocab_size=3)  # ids that the model does not have


def test_a_full_disk_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prepared(tmp_path / "a", "key", data([], []))
    before = (tmp_path / "a").read_bytes()
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_prepared(tmp_path / "a", "key", data([Example([1], [True])], []))
    assert [one.name for one in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == before


# -- keys ------------------------------------------------------------------------------------------


def recipe(**keys: Any) -> Recipe:
    basic = {"adapter": "lora", "learning_rate": 1e-4, "datasets": [{"path": "a.jsonl"}]}
    return recipe_from(Document({**basic, **keys}), max_lora_rank=64)


def test_the_key_has_what_examples_are_made_of(tokenizer: Tokenizer) -> None:
    def key_of(*given: Any) -> str:
        made, digest, ends = given
        return data_key(made, digest, tokenizer, ends)

    key = key_of(recipe(), "digest", [1, 2])
    assert key_of(recipe(), "digest", [2, 1]) == key
    unread = ({"val_set_size": 2}, {"sample_packing": True}, {"group_by_length": True}, {"seed": 7})
    for same in ({"learning_rate": 1e-3}, {"lora_r": 4}, {"num_epochs": 3}, {"name": "a"}, *unread):
        assert key_of(recipe(**same), "digest", [1, 2]) == key, same
    others = [
        {"sequence_len": 256},
        {"train_on_inputs": True},
        {"min_sample_len": 3},
        {"excess_length_strategy": "truncate"},
        {"datasets": [{"path": "b.jsonl"}]},
        {"datasets": [{"path": "a.jsonl", "roles_to_train": ["user"]}]},
        {"test_datasets": [{"path": "a.jsonl"}]},
        {"default_system_message": "Be a newt."},
        {"dataset_exact_deduplication": True},
        {"shuffle_before_merging_datasets": True},
        {"shuffle_before_merging_datasets": True, "seed": 7},
        {"streaming": True, "max_steps": 5},
        {"streaming": True, "max_steps": 6},
    ]
    keys = {key, key_of(recipe(), "another", [1, 2]), key_of(recipe(), "digest", [1])}
    keys |= {key_of(recipe(**other), "digest", [1, 2]) for other in others}
    assert len(keys) == 3 + len(others)
    zephyr = builtin_template("zephyr")
    assert zephyr is not None
    assert data_key(recipe(), "digest", tokenizer.with_template(zephyr), [1, 2]) not in keys


def test_the_digest_of_a_tokenizer(tiny_model: Path) -> None:
    """The same for one that was loaded again; another for another template, end or special text."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

    def loaded(template: str | None = None, **config: Any) -> Tokenizer:
        return load_tokenizer(tiny_model, {}, config, chat_template=template)

    digest = digest_of_tokenizer(loaded())
    assert digest_of_tokenizer(loaded()) == digest
    digests = {digest, digest_of_tokenizer(loaded(template)), digest_of_tokenizer(loaded(template + " "))}
    digests |= {digest_of_tokenizer(loaded(eos_token_id=5))}
    assert len(digests) == 4


# -- cache -----------------------------------------------------------------------------------------


def example_data(id: int, tokens: int = 100) -> PreparedData:
    return data([Example([id] * tokens, [True] * tokens)], [])


def test_entries_are_kept_and_those_used_longest_ago_go(tmp_path: Path) -> None:
    write_prepared(tmp_path / "one", "key", example_data(0))
    size = (tmp_path / "one").stat().st_size
    cache = PreparedCache(tmp_path / "prepared", 3 * size, 3600.0)
    for number, name in enumerate("abc"):
        cache.add(name, "key", example_data(number), source=None)
        os.utime(cache.entry(name), (time.time() - 100 + number,) * 2)
    assert cache.take("a", "key", VOCAB) == example_data(0)  # used last now
    (tmp_path / "prepared" / "x.bin.partial-1").write_bytes(b"0")  # of a process that was killed
    cache.add("d", "key", example_data(3), source=None)
    assert sorted(path.name for path in (tmp_path / "prepared").iterdir()) == ["a.bin", "c.bin", "d.bin"]
    assert cache.usage() == (3, 3 * size)
    cache.add("e", "key", example_data(4, size), source=None)  # larger than all may be
    assert not cache.entry("e").exists()
    assert cache.take("e", "key", VOCAB) is None
    os.utime(cache.entry("c"), (time.time() - 4000,) * 2)
    assert cache.prune(dry_run=True) == cache.prune() == ["c.bin"]
    assert not cache.entry("c").exists()


def test_a_cache_of_no_bytes_keeps_nothing(tmp_path: Path) -> None:
    cache = PreparedCache(tmp_path / "prepared", 0, 3600.0)
    cache.add("a", "key", example_data(1), source=None)
    assert (cache.usage(), cache.prune()) == ((0, 0), [])
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize("fault", ["cut", "changed", "another key"])
def test_a_damaged_entry_is_deleted_and_never_used(tmp_path: Path, fault: str) -> None:
    cache = PreparedCache(tmp_path / "prepared", 10_000, 3600.0)
    cache.add("a", "key", example_data(1), source=None)
    whole = cache.entry("a").read_bytes()
    if fault == "cut":
        cache.entry("a").write_bytes(whole[:-1])
    elif fault == "changed":
        cache.entry("a").write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
    assert cache.take("a", "other" if fault == "another key" else "key", VOCAB) is None
    assert not cache.entry("a").exists()


def test_a_second_name_or_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"rows")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").stat().st_ino == (tmp_path / "b").stat().st_ino

    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("os.link", no_links)
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"rows"
    assert (tmp_path / "a").stat().st_ino != (tmp_path / "b").stat().st_ino
    with pytest.raises(FileNotFoundError):
        link_or_copy(tmp_path / "absent", tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_contents_are_those_of_the_files(tmp_path: Path) -> None:
    made = recipe(datasets=[{"path": "a.jsonl"}], test_datasets=[{"path": "b.jsonl"}])
    (tmp_path / "a.jsonl").write_text("one")
    (tmp_path / "b.jsonl").write_text("two")
    files = DataFiles(roots=[tmp_path])
    first = contents_of(made, files)
    assert first is not None
    assert first.unchanged()
    uploads = DataFiles({"a.jsonl": tmp_path / "a.jsonl", "b.jsonl": tmp_path / "b.jsonl"})
    assert contents_of(made, uploads) == first  # wherever they are
    unused = DataFiles({**uploads.uploads, "c.jsonl": tmp_path / "a.jsonl"})
    assert contents_of(made, unused) != first  # the notes name it
    (tmp_path / "a.jsonl").write_text("ONE")
    assert not first.unchanged()
    second = contents_of(made, DataFiles(roots=[tmp_path]))
    assert second is not None
    assert second.name("key") != first.name("key")
    assert second.name("key") != second.name("other")
    (tmp_path / "b.jsonl").unlink()
    assert not second.unchanged()
    assert contents_of(made, DataFiles(roots=[tmp_path])) is None
    assert contents_of(recipe(streaming=True, max_steps=1), files) is None
    assert contents_of(recipe(datasets=[{"path": "owner/set"}]), DataFiles(hub=True)) is None


class _Watched:
    """A recipe that notes which of its keys are read."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self._recipe, name)


@pytest.mark.parametrize(
    ("rows", "keys"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {}),
        ({"instruction": "a", "output": "b"}, {"datasets": [{"path": "a.jsonl", "type": "alpaca"}]}),
        ({"text": "a b c d"}, {"datasets": [{"path": "a.jsonl", "type": "completion"}]}),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"rl": "dpo", "datasets": [{"path": "a.jsonl", "type": "chat_template.argilla"}]},
        ),
    ],
    ids=["chats", "instructions", "texts", "pairs"],
)
def test_all_keys_that_a_reader_reads_are_in_the_key(
    tmp_path: Path, tokenizer: Tokenizer, rows: Any, keys: dict[str, Any]
) -> None:
    """A key that is not would give a job the examples of another one's."""
    (tmp_path / "a.jsonl").write_text(json.dumps(rows) + "\n")
    watched: Any = _Watched(recipe(**keys))
    reader = Reader(watched, tokenizer, DataFiles(roots=[tmp_path]), tokenizer.eos_ids)
    assert reader.read("datasets", watched.datasets, RowCounts())
    where_they_count = {"seed", "max_steps", "effective_batch", "sample_packing", "rl"}
    assert watched.read <= set(keys_of("data")) - UNREAD | where_they_count
