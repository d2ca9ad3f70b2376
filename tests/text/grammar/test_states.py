"""States of grammars: masks, forced tokens, ends, rollback, and the cache of the compiler."""

import json
import random
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InvalidRequest
from runtime.text.grammar import GrammarBuilder, GrammarCompiler, GrammarFailed, choice_part, lark_part, regex_part
from runtime.text.grammar import compiler as compiler_module
from runtime.text.grammar.source import MAX_CHOICES
from runtime.text.tokenizer import Tokenizer
from tests.text.grammar.grammars import text_of
from tests.text.grammar.walks import allowed, walk

SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}, "days": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def grammar_of(compiler: GrammarCompiler, part: Any) -> str:
    builder = GrammarBuilder(compiler.special_id)
    return builder.build(builder.part("body", part))


def test_forced_tokens_up_to_the_end(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    state = compiler.compile(grammar_of(compiler, choice_part(["The newt", "The eft"], "choice"))).start()
    taken = []
    while (id := state.forced()) is not None:
        assert allowed(state, tokenizer.vocab_size) == [id]
        assert state.accept(id)
        taken.append(id)
    assert tokenizer.decode(taken).rstrip() == "The"
    state.follow(tokenizer.encode("The eft"))
    assert state.forced() == tokenizer.eos_ids[0]
    assert allowed(state, tokenizer.vocab_size) == [tokenizer.eos_ids[0]]


@given(seed=st.integers(0, 2**32), data=st.data())
def test_following_any_tokens_is_the_same_as_beginning_anew(
    compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int, data: st.DataObject
) -> None:
    grammar = text_of(compiler, SCHEMA)
    state = compiler.compile(grammar).start()
    walks = [walk(compiler, tokenizer, grammar, seed + n)[0] for n in range(3)]
    for _ in range(6):
        ids = data.draw(st.sampled_from(walks))
        part = ids[: data.draw(st.integers(0, len(ids)))]
        state.follow(part)
        other = compiler.compile(grammar).start()
        other.follow(part)
        assert allowed(state, tokenizer.vocab_size) == allowed(other, tokenizer.vocab_size)
        assert state.forced() == other.forced()


def test_what_is_not_allowed_is_not_accepted(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    state = compiler.compile(text_of(compiler, SCHEMA)).start()
    wrong = tokenizer.encode("The")[0]
    before = allowed(state, tokenizer.vocab_size)
    assert not state.accept(wrong)
    assert not state.accept(tokenizer.eos_ids[0])
    assert allowed(state, tokenizer.vocab_size) == before
    with pytest.raises(GrammarFailed):
        state.follow([wrong])
    with pytest.raises(GrammarFailed):
        state.fill(np.zeros(19, dtype=np.int32))


def test_ids_without_a_token_and_special_tokens_are_never_allowed(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    found = allowed(
        compiler.compile(grammar_of(compiler, regex_part("(?s:.*)", "regex"))).start(), tokenizer.vocab_size
    )
    assert len(found) > 400
    assert set(found) & {0, 1, 2} == set(tokenizer.eos_ids)
    assert max(found) < tokenizer.num_ids < tokenizer.vocab_size


@pytest.mark.parametrize("regex", [r"[a-c]{2,4}", r"\d{3}-\d{4}", "(yes|no)!?", "a/b", r"über \w+"])
def test_regular_expressions(compiler: GrammarCompiler, tokenizer: Tokenizer, regex: str) -> None:
    for seed in range(5):
        ids, finished = walk(compiler, tokenizer, grammar_of(compiler, regex_part(regex, "regex")), seed)
        assert finished
        assert re.fullmatch(regex, tokenizer.decode(ids))


@pytest.mark.parametrize("choices", [["yes"], ["a", "ab", "abc"], ['"', "\\", "\n", "ü", "👍", "<|im_end|>", "/"]])
def test_choices(compiler: GrammarCompiler, tokenizer: Tokenizer, choices: list[str]) -> None:
    for seed in range(10):
        ids, finished = walk(compiler, tokenizer, grammar_of(compiler, choice_part(choices, "choice")), seed)
        assert finished
        assert tokenizer.decode(ids, skip_special_tokens=False) in choices


@pytest.mark.parametrize(
    "grammar", ['root ::= "a" ("b" | "c")*', 'start: "a" ("b" | "c")*', 'start: "a" TAIL\nTAIL: /[bc]*/']
)
def test_both_languages_of_grammars(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: str) -> None:
    for seed in range(5):
        ids, finished = walk(compiler, tokenizer, grammar_of(compiler, lark_part(grammar, "grammar")), seed)
        assert finished
        assert re.fullmatch("a[bc]*", tokenizer.decode(ids))


@pytest.mark.parametrize(
    "part",
    [
        lambda: regex_part("[.*", "field"),
        lambda: regex_part("(?=a)b", "field"),
        lambda: choice_part([], "field"),
        lambda: choice_part([""], "field"),
        lambda: choice_part(["a"] * (MAX_CHOICES + 1), "field"),
        lambda: lark_part("start: other", "field"),
        lambda: lark_part("nonsense", "field"),
        lambda: lark_part("", "field"),
    ],
)
def test_what_is_no_grammar_is_refused(compiler: GrammarCompiler, part: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(grammar_of(compiler, part()), param="field")
    assert caught.value.param == "field"
    assert len(caught.value.message) < 500


def test_expressions_that_explode_are_bounded(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    for regex in ("(a+)+", "((a|b)*a(a|b){30})", "(a{1,100}){1,100}"):
        ids, _ = walk(compiler, tokenizer, grammar_of(compiler, regex_part(regex, "regex")), 0)
        assert re.fullmatch("[ab]*", tokenizer.decode(ids))


def test_the_cache_is_bounded_and_keeps_what_is_used(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    monkeypatch.setattr(compiler_module, "MAX_CACHED", 8)
    other = GrammarCompiler(tokenizer)
    used = text_of(other, {"const": -1})
    first = other.compile(used)
    for n in range(40):
        other.compile(text_of(other, {"const": n}))
        assert other.compile(used) is first
        assert len(other) <= 8
    monkeypatch.setattr(compiler_module, "MAX_CACHED_CHARS", 1)
    other.compile(text_of(other, {"const": 41}))
    assert len(other) == 1


def test_a_model_without_an_end_has_no_grammars(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="no token that ends"):
        GrammarCompiler(tokenizer, eos_ids=[]).compile(text_of(GrammarCompiler(tokenizer), {}))


def test_any_of_several_ends_is_allowed(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, eos_ids=[2, 0])
    state = compiler.compile(grammar_of(compiler, regex_part("a*", "regex"))).start()
    assert {0, 2} <= set(allowed(state, tokenizer.vocab_size))
    assert state.accept(0)
    assert state.forced() == 2


def test_whitespace_in_json_is_limited(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    text = '{\n  "city": "Oslo",\n      "days": 4}'
    state = compiler.compile(text_of(compiler, SCHEMA)).start()
    state.follow(tokenizer.encode(text))
    assert json.loads(text)["days"] == 4
    with pytest.raises(GrammarFailed):
        state.follow(tokenizer.encode("{" + " " * 200 + '"city"'))


def test_states_of_one_grammar_are_apart(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = compiler.compile(text_of(compiler, SCHEMA))
    states = [grammar.start() for _ in range(3)]
    text = tokenizer.encode('{"city": "Oslo", "days": 4}')
    rng = random.Random(0)
    places = [0, 0, 0]
    while min(places) < len(text):
        at = rng.choice([n for n in range(3) if places[n] < len(text)])
        assert text[places[at]] in allowed(states[at], tokenizer.vocab_size)
        assert states[at].accept(text[places[at]])
        places[at] += 1
