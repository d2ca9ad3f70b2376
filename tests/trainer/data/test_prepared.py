"""Prepared data: what is read back is what was written, or a reason why it is not."""

import errno
import os
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
from runtime.trainer.data.examples import RowCounts, RowRef
from runtime.trainer.data.prepared import (
    PreparedAbsent,
    PreparedData,
    PreparedInvalid,
    data_key,
    digest_of_tokenizer,
    read_prepared,
    write_prepared,
)
from runtime.trainer.recipe import Document, Recipe, recipe_from

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
    for same in ({"learning_rate": 1e-3}, {"lora_r": 4}, {"num_epochs": 3}, {"name": "a"}):
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
