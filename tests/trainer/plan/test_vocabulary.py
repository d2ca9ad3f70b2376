"""Tokens and rows of a recipe against the served model's vocabulary."""

from pathlib import Path
from typing import Any

import pytest

from runtime.checkpoints.hf_tokenizer import load_tokenizer
from runtime.errors import InvalidRequest
from runtime.model.vocabulary import VocabularyBase
from runtime.text.own_tokens import OwnToken
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.plan.served_model import ModelShape
from runtime.trainer.plan.vocabulary import VocabularyPlan, plan_vocabulary
from runtime.trainer.recipe import Document, recipe_from
from tests.tiny import VOCAB_SIZE

SIZE = VOCAB_SIZE


def shape(*, rows: int = SIZE, tied: bool = False) -> ModelShape:
    return ModelShape(
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        vocab_size=rows,
        linears={"self_attn.q_proj": (64, 64)},
        vocabulary=VocabularyBase("model.embed_tokens", "lm_head", tied, rows, 64, 4),
    )


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model, {}, {})


def plan(
    tokenizer: Tokenizer, of: ModelShape | None = None, *, limit: int | None = None, **keys: Any
) -> VocabularyPlan:
    basic = {"adapter": "lora", "learning_rate": 1e-4, "datasets": [{"path": "a"}]}
    recipe = recipe_from(Document({**basic, **keys}), max_lora_rank=64)
    return plan_vocabulary(recipe, tokenizer, of or shape(), limit=limit)


def test_a_recipe_without_tokens_changes_nothing(tokenizer: Tokenizer) -> None:
    found = plan(tokenizer, tokens=["<|im_start|>"], special_tokens={"pad_token": "<pad>", "eos_token": "<|im_end|>"})
    assert found.tokenizer is tokenizer
    assert (found.tokens, found.eos_id, found.size, found.rows.rows) == ((), None, None, 0)


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_that_the_vocabulary_lacks(tokenizer: Tokenizer, tied: bool) -> None:
    found = plan(
        tokenizer,
        shape(tied=tied),
        tokens=["<fact>", "<|im_start|>", "</fact>"],
        special_tokens={"eos_token": "<end>", "additional_special_tokens": ["<more>"], "unk_token": "<unk>"},
    )
    texts = ["<fact>", "</fact>", "<end>", "<more>"]
    ids = tuple(range(SIZE, SIZE + 4))
    assert [(token.id, token.text) for token in found.tokens] == list(zip(ids, texts, strict=True))
    assert [token.special for token in found.tokens] == [False, False, True, True]
    assert (found.eos_id, found.size) == (SIZE + 2, SIZE + 4)
    assert found.tokenizer.eos_ids[0] == SIZE + 2
    assert found.tokenizer.encode("a<fact>b</fact>")[1::2] == [SIZE, SIZE + 1]
    assert found.tokenizer.vocab_size == SIZE + 4
    rows = found.rows
    assert (rows.embedding, rows.head, rows.fresh, rows.tied, rows.copies) == (ids, ids, ids, tied, ())
    assert rows.rows == (4 if tied else 8)
    assert [note.partition(":")[0] for note in found.notes()] == [
        "4 tokens are new ('<fact>', '</fact>', '<end>', '<more>')",
        "PEFT loads this adapter on a base that was resized",
    ]


def test_free_rows_of_the_embedding_are_used_first(tokenizer: Tokenizer) -> None:
    found = plan(tokenizer, shape(rows=SIZE + 1), tokens=["<a>", "<b>"])
    assert [token.id for token in found.tokens] == [SIZE, SIZE + 1]
    assert found.size == SIZE + 2
    inside = plan(tokenizer, shape(rows=SIZE + 64), tokens=["<a>", "<b>"])
    assert inside.size is None
    assert inside.tokenizer.vocab_size == SIZE + 64
    assert inside.rows.fresh == (SIZE, SIZE + 1)


def test_reserved_tokens_get_other_texts(tokenizer: Tokenizer) -> None:
    found = plan(tokenizer, added_tokens_overrides={"0": "<mark>"}, tokens=["<mark>"])
    assert found.tokens == (OwnToken(0, "<mark>", special=True),)
    assert found.tokenizer.token_id("<mark>") == 0
    assert found.tokenizer.token_id("<|endoftext|>") is None
    assert (found.rows.embedding, found.rows.fresh) == ((0,), ())
    assert tokenizer.token_id("<|endoftext|>") == 0  # the model's own is as it was


def test_what_the_template_writes_cannot_be_written_by_a_client(tokenizer: Tokenizer) -> None:
    template = "{% for m in messages %}{{ '<turn>' + m['content'] + '</turn>' }}{% endfor %}"
    basic = {"adapter": "lora", "learning_rate": 1e-4, "datasets": [{"path": "a"}], "tokens": ["<turn>", "<plain>"]}
    recipe = recipe_from(Document(basic), max_lora_rank=64)
    found = plan_vocabulary(recipe, tokenizer, shape(), template=template)
    own = found.tokenizer.with_template(template)
    ids = own.encode_chat([{"role": "user", "content": "<turn>a<plain>"}], add_generation_prompt=False)
    assert ids.count(SIZE) == 1
    assert ids.count(SIZE + 1) == 1


@pytest.mark.parametrize(
    ("given", "tied", "embedding", "head"),
    [
        ([7, 3], False, (3, 7), ()),
        ([7, 3], True, (3, 7), (3, 7)),
        ({"embed_tokens": [3], "lm_head": [3]}, True, (3,), (3,)),
        ({"lm_head": [5]}, False, (), (5,)),
        ({"model.embed_tokens": [3], "lm_head": [4]}, True, (3,), (4,)),
    ],
)
def test_rows_of_known_tokens(
    tokenizer: Tokenizer, given: Any, tied: bool, embedding: tuple[int, ...], head: tuple[int, ...]
) -> None:
    rows = plan(tokenizer, shape(tied=tied), peft_trainable_token_indices=given).rows
    assert (rows.embedding, rows.head, rows.fresh) == (embedding, head, ())
    assert rows.tied == (tied and embedding == head)


def test_whole_copies(tokenizer: Tokenizer) -> None:
    both = plan(tokenizer, lora_modules_to_save=["lm_head", "embed_tokens"], tokens=["<a>"]).rows
    assert (both.copies, both.size, both.fresh) == (("embedding", "head"), SIZE + 1, (SIZE,))
    assert both.rows == 2 * (SIZE + 1)
    one = plan(tokenizer, lora_modules_to_save=["embed_tokens"], tokens=["<a>"]).rows
    assert (one.copies, one.head) == (("embedding",), (SIZE,))
    follows = plan(
        tokenizer, shape(tied=True), lora_modules_to_save=["embed_tokens"], peft_ensure_weight_tying=True
    ).rows
    assert (follows.copies, follows.tied, follows.rows) == (("embedding", "head"), True, SIZE)


@pytest.mark.parametrize(
    ("keys", "param", "says"),
    [
        ({"lora_modules_to_save": ["norm"]}, "lora_modules_to_save", "neither model.embed_tokens nor lm_head"),
        ({"peft_trainable_token_indices": [SIZE]}, "peft_trainable_token_indices", f"from 0 to {SIZE - 1}, got {SIZE}"),
        (
            {"peft_trainable_token_indices": {"q_proj": [1]}},
            "peft_trainable_token_indices.q_proj",
            "neither model.embed_tokens nor lm_head",
        ),
        (
            {"peft_trainable_token_indices": [1], "lora_modules_to_save": ["embed_tokens"]},
            "peft_trainable_token_indices",
            "name it in one of them",
        ),
        ({"added_tokens_overrides": {"7": "<x>"}}, "added_tokens_overrides.7", "no id of an added token"),
        ({"added_tokens_overrides": {"seven": "<x>"}}, "added_tokens_overrides.seven", "no id of an added token"),
        ({"added_tokens_overrides": {"0": "<|im_end|>"}}, "added_tokens_overrides.0", "has '<|im_end|>' already, as 2"),
        ({"tokens": [f"<{n}>" for n in range(1025)]}, "tokens", "at most 1024"),
    ],
)
def test_what_does_not_fit(tokenizer: Tokenizer, keys: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says.replace("|", r"\|")) as caught:
        plan(tokenizer, **keys)
    assert caught.value.param == param


def test_a_tied_head_needs_the_new_rows_too(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="one matrix in this model"):
        plan(tokenizer, shape(tied=True), lora_modules_to_save=["embed_tokens"], tokens=["<a>"])


def test_the_limit_is_named(tokenizer: Tokenizer) -> None:
    needed = 2 * SIZE * 64 * 4
    keys = {"lora_modules_to_save": ["embed_tokens", "lm_head"]}
    assert plan(tokenizer, limit=needed, **keys).rows.rows == 2 * SIZE
    with pytest.raises(
        InvalidRequest, match=rf"take {needed} bytes.*adapters.max_vocabulary_bytes allows {needed - 1}"
    ):
        plan(tokenizer, limit=needed - 1, **keys)


def test_transformers_own_modules_take_no_rows(tokenizer: Tokenizer) -> None:
    bare = ModelShape(num_layers=1, hidden_size=64, intermediate_size=64, vocab_size=SIZE, linears={})
    for keys in ({"tokens": ["<a>"]}, {"lora_modules_to_save": ["lm_head"]}, {"peft_trainable_token_indices": [3]}):
        with pytest.raises(InvalidRequest, match="runs in transformers' own modules") as caught:
            plan(tokenizer, bare, **keys)
        assert caught.value.param == next(iter(keys))
