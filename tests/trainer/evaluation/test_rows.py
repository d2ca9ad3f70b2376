"""Prompts and answers that are cut from tokenised examples."""

from pathlib import Path
from typing import Any

import pytest

from runtime.checkpoints.hf_tokenizer import load_tokenizer
from runtime.errors import InvalidRequest
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.example import Example
from runtime.trainer.evaluation.rows import GenerationRow, generation_rows
from runtime.trainer.recipe import Document, Recipe, recipe_from


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model, {}, {})


def recipe(**keys: Any) -> Recipe:
    basic = {"adapter": "lora", "learning_rate": 1e-4, "datasets": [{"path": "a.jsonl"}], "val_set_size": 1}
    return recipe_from(Document({**basic, "do_causal_lm_eval": True, **keys}), max_lora_rank=64)


def example(mask: str, first: int = 100, **more: Any) -> Example:
    """Tokens 100, 101, …; `x` is trained on."""
    return Example([first + at for at in range(len(mask))], [sign == "x" for sign in mask], **more)


def rows(tokenizer: Tokenizer, *examples: Example, **keys: Any) -> list[GenerationRow]:
    return generation_rows(recipe(**keys), examples, tokenizer, max_len=64)


def test_the_last_answer_is_asked_for(tokenizer: Tokenizer) -> None:
    assert rows(tokenizer, example("..xx..xxx.")) == [GenerationRow(list(range(100, 106)), [106, 107, 108])]


def test_an_end_of_turn_alone_is_no_answer(tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_ids[0]
    ids = [100, 101, 102, 103, end, 104, end]
    trained = [False, False, False, True, True, False, True]
    assert rows(tokenizer, Example(ids, trained)) == [GenerationRow([100, 101, 102], [103, end])]


def test_of_preferences_the_better_answer(tokenizer: Tokenizer) -> None:
    pairs = [example("..xx"), example("..xx", 200), example("...x", 300), example("...x", 400)]
    found = rows(tokenizer, *pairs, rl="dpo")
    assert [row.prompt_ids[0] for row in found] == [100, 300]
    labelled = [example("..xx", weight=1.0), example("..xx", weight=0.0), example("..xx", 200, weight=-1.0), pairs[0]]
    assert [row.prompt_ids[0] for row in rows(tokenizer, *labelled, rl="kto")] == [100]
    with_prompt = example(".xxxx", prompt_targets=2)
    assert rows(tokenizer, with_prompt, pairs[1], rl="orpo") == [GenerationRow([100, 101, 102], [103, 104])]


def test_no_more_rows_than_asked_for(tokenizer: Tokenizer) -> None:
    many = [example("..xx", 100 + at) for at in range(10)]
    assert len(rows(tokenizer, *many, generation_rows=4)) == 4
    assert len(rows(tokenizer, *many, do_causal_lm_eval=None, eval_table_size=3)) == 3
    assert rows(tokenizer, *many, do_causal_lm_eval=None) == []


def test_texts_without_a_prompt_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="texts that are trained on as a whole"):
        rows(tokenizer, example(".xxx"), example(".xx"))
    assert len(rows(tokenizer, example(".xxx"), example("..xx"))) == 1


def test_a_prompt_that_leaves_no_room_is_left_out(tokenizer: Tokenizer) -> None:
    assert len(rows(tokenizer, example("." * 64 + "x"), example("..xx"))) == 1
