"""Token by token text: never half a character, and stop strings wherever the token borders fall."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.checkpoints import open_checkpoint
from runtime.text.detokenizer import MAX_UNREAD, Detokenizer, StopStrings
from runtime.text.tokenizer import Tokenizer


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


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 540), max_size=80), skip=st.booleans(), prompt=st.lists(st.integers(0, 2)))
def test_any_ids_stream_as_they_decode_together(
    tokenizer: Tokenizer, ids: list[int], skip: bool, prompt: list[int]
) -> None:
    """Special tokens, bytes that are no character, and ids without a token (from 512 on) among them."""
    parts = stream(Detokenizer(tokenizer, prompt, skip_special_tokens=skip), ids)
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=skip)


class CountingTokenizer:
    """Counts the ids that are decoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_one(self, id: int, *, skip_special_tokens: bool = True) -> str:
        return self.decode([id], skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("kind", ["special", "no token", "half a character", "text"])
def test_a_token_costs_no_more_late_in_an_output(tokenizer: Tokenizer, kind: str) -> None:
    half = tokenizer.encode("\N{ROCKET}", add_special_tokens=False)[0]
    ids = [{"special": 2, "no token": 600, "half a character": half, "text": 40}[kind]] * 3000
    counting = CountingTokenizer(tokenizer)
    shown = "".join(stream(Detokenizer(counting, [40, 41, 42]), ids))  # type: ignore[arg-type]
    assert counting.decoded <= len(ids) * 2 * (MAX_UNREAD + 2)
    assert shown == tokenizer.decode(ids)


@given(stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4), pieces=st.lists(st.text("abc")))
def test_held_is_the_longest_end_that_begins_a_stop_string(stops: list[str], pieces: list[str]) -> None:
    matcher, text = StopStrings(stops), ""
    for piece in pieces:
        text += piece
        matcher.add(piece)
        ends = [stop[:size] for stop in stops for size in range(len(stop))]
        assert matcher.held == max(len(end) for end in ends if text.endswith(end))


class Counted(str):
    """Counts the characters of it that are looked at."""

    looks = 0

    def __getitem__(self, key: object) -> str:
        Counted.looks += 1
        return super().__getitem__(key)  # type: ignore[index]


def test_long_stop_strings_that_nearly_match_cost_a_few_comparisons_a_character() -> None:
    stops = [Counted("a" * 5000 + str(number)) for number in range(16)]
    matcher = StopStrings(stops)
    Counted.looks = 0
    text = ("a" * 4999 + "b") * 3
    for char in text:
        matcher.add(char)
    assert Counted.looks <= 4 * len(stops) * len(text)
