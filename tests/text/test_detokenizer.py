"""Token by token text: never half a character, and stop strings wherever the token borders fall."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.detokenizer import Detokenizer
from runtime.tokenizer import Tokenizer
from runtime.workers.loading import open_checkpoint


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return open_checkpoint(str(tiny_model)).tokenizer


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    parts = []
    for token in ids:
        parts.append(detokenizer.add(token))
        if detokenizer.stopped_by is not None:
            break
    return [*parts, detokenizer.flush()]


text = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=60)


@settings(max_examples=150, deadline=None)
@given(text=text)
def test_deltas_add_up_and_are_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    """The tiny tokenizer spells rare characters in single bytes, so most borders are inside one."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = stream(Detokenizer(tokenizer, tokenizer.encode("What is it? "), stop=()), ids)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


@settings(max_examples=150, deadline=None)
@given(text=text, stop=st.lists(st.text("abc é", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_cut_where_they_would_in_the_whole_text(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, [], stop=tuple(stop))
    shown = "".join(stream(detokenizer, ids))
    if detokenizer.stopped_by is None:
        assert shown == text
        assert not any(s in text for s in stop)
    else:
        assert text.startswith(shown + detokenizer.stopped_by)
        assert not any(s in shown for s in stop)


def test_text_that_might_become_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, [], stop=("END",))
    ids = [tokenizer.encode(c, add_special_tokens=False)[0] for c in "xENEND!"]
    shown = [detokenizer.add(i) for i in ids[:3]]
    assert shown == ["x", "", ""]
    assert detokenizer.add(ids[3]) == "EN"
    assert [detokenizer.add(i) for i in ids[4:6]] == ["", ""]
    assert detokenizer.stopped_by == "END"
    assert detokenizer.flush() == ""


def test_a_stop_string_can_be_included(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, [], stop=("cd",), include_stop=True)
    ids = [tokenizer.encode(c, add_special_tokens=False)[0] for c in "abcde"]
    assert "".join(stream(detokenizer, ids)) == "abcd"


def test_half_a_character_at_the_end_is_what_decoding_gives(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok \N{ROCKET}", add_special_tokens=False)[:-1]
    parts = stream(Detokenizer(tokenizer, []), ids)
    assert "".join(parts) == tokenizer.decode(ids)
    assert not any("\ufffd" in part for part in parts[:-1])


def test_before_min_tokens_a_stop_string_is_text(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, [], stop=("b",))
    ids = [tokenizer.encode(c, add_special_tokens=False)[0] for c in "abab"]
    assert [detokenizer.add(i, may_stop=n >= 3) for n, i in enumerate(ids, 1)][:3] == ["a", "b", "a"]
    assert detokenizer.stopped_by == "b"
