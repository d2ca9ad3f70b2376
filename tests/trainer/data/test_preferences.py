"""Rows of preferences, in every form that Axolotl has them, to pairs of examples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime.errors import InvalidRequest
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.example import Example
from runtime.trainer.data.examples import Reader, RowCounts
from runtime.trainer.data.files import DataFiles
from runtime.trainer.data.preferences import with_companions
from runtime.trainer.recipe import Document, recipe_from

PROMPT, GOOD, BAD = "What is an eft?", "A young newt.", "A robot."
CHAT = "<|im_start|>user\nWhat is an eft?<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"


def said(answer: str, *, user: str = PROMPT) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


@pytest.fixture
def read(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., list[Example]]:
    def work(rows: list[Any], *, rl: str = "dpo", counts: RowCounts | None = None, **entry: Any) -> list[Example]:
        file = tmp_path / "rows.jsonl"
        file.write_bytes(b"\n".join(msgspec.json.encode(row) for row in rows))
        keys: dict[str, Any] = {"adapter": "lora", "learning_rate": 1e-4, "rl": rl, "sequence_len": 256}
        keys |= {key: entry.pop(key) for key in ("excess_length_strategy", "sequence_len") if key in entry}
        keys["datasets"] = [{"path": "rows.jsonl", **entry}]
        recipe = recipe_from(Document(keys), max_lora_rank=64)
        reader = Reader(recipe, tokenizer, DataFiles({"rows.jsonl": file}, []), tokenizer.eos_ids)
        return reader.read("datasets", recipe.datasets, counts or RowCounts())

    return work


def texts(tokenizer: Tokenizer, example: Example) -> tuple[str, str]:
    """What comes before the targets, and the targets."""
    start = example.trained.index(True)
    targets = [id for id, on in zip(example.token_ids, example.trained, strict=True) if on]
    return (
        tokenizer.decode(example.token_ids[:start], skip_special_tokens=False),
        tokenizer.decode(targets, skip_special_tokens=False),
    )


PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text answers": ({"type": "chat_template.default"}, {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}),
    "messages": (
        {"type": "chat_template.default"},
        {"messages": said(GOOD)[:1], "chosen": said(GOOD)[1], "rejected": said(BAD)[1]},
    ),
    "named columns": (
        {
            "type": "chat_template.default",
            "field_messages": "talk",
            "field_chosen": "good",
            "field_rejected": "bad",
            "message_property_mappings": {"role": "from", "content": "value"},
            "roles": {"user": ["asker"], "assistant": ["helper"]},
        },
        {
            "talk": [{"from": "asker", "value": PROMPT}],
            "good": {"from": "helper", "value": GOOD},
            "bad": {"from": "helper", "value": BAD},
        },
    ),
    "whole chats": ({"type": "chat_template.argilla"}, {"chosen": said(GOOD), "rejected": said(BAD)}),
    "chats": ({"type": "chat_template.argilla_chat"}, {"chosen": said(GOOD), "rejected": said(BAD)}),
    "intel": ({"type": "chatml.intel"}, {"question": PROMPT, "chosen": GOOD, "rejected": BAD, "system": ""}),
    "argilla": (
        {"type": "chatml.argilla"},
        {"instruction": PROMPT, "chosen_response": GOOD, "rejected_response": BAD},
    ),
    "icr": ({"type": "chatml.icr"}, {"input": PROMPT, "chosen": GOOD, "rejected": BAD}),
    "ultra": ({"type": "chatml.ultra"}, {"prompt": PROMPT, "chosen": said(GOOD), "rejected": said(BAD)}),
    "prompt_pairs": ({"type": "chatml.prompt_pairs"}, {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}),
    "chatml": ({"type": "chatml"}, {"question": PROMPT, "chosen": GOOD, "rejected": BAD}),
    "nectar": (
        {"type": "zephyr.nectar"},
        {
            "prompt": PROMPT,
            "answers": [
                {"answer": "?", "rank": 2},
                {"answer": BAD, "rank": 3},
                {"answer": GOOD, "rank": 1},
            ],
        },
    ),
    "openai": (
        {"type": "openai"},
        {
            "input": {"messages": said(GOOD)[:1], "tools": [], "parallel_tool_calls": True},
            "preferred_output": said(GOOD)[1:],
            "non_preferred_output": said(BAD)[1:],
        },
    ),
    "auto": ({}, {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}),
    "auto of chats": ({}, {"chosen": said(GOOD), "rejected": said(BAD)}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_two_answers_to_the_prompt_that_serving_renders(
    name: str, read: Callable[..., list[Example]], tokenizer: Tokenizer
) -> None:
    entry, row = PAIRS[name]
    found = [texts(tokenizer, example) for example in read([row], **entry)]
    assert found == [(CHAT, f"{GOOD}<|im_end|>"), (CHAT, f"{BAD}<|im_end|>")]


def test_the_system_column_is_the_first_message(read: Callable[..., list[Example]], tokenizer: Tokenizer) -> None:
    row = {"system": "Be brief.", "question": PROMPT, "chosen": GOOD, "rejected": BAD}
    assert {texts(tokenizer, example)[0] for example in read([row], type="chatml.intel")} == {SYSTEM + CHAT}


def test_texts_are_tokenised_as_they_stand(read: Callable[..., list[Example]], tokenizer: Tokenizer) -> None:
    """Formats are filled in one pass: a text may hold what looks like one of their names."""
    rows = [{"q": "{system}?", "system": "Be brief.", "good": "yes", "bad": "no"}]
    kind = {
        "field_prompt": "q",
        "field_chosen": "good",
        "field_rejected": "bad",
        "prompt_format": "{system} Q: {prompt} A:",
        "chosen_format": " {chosen}!",
        "rejected_format": " {rejected}.",
    }
    found = [texts(tokenizer, example) for example in read(rows, type=kind)]
    end = tokenizer.decode(tokenizer.eos_ids[:1], skip_special_tokens=False)
    assert found == [("Be brief. Q: {system}? A:", f" {word}{end}") for word in ("yes!", "no.")]
    rows = [{"prompt": "a ", "chosen": "b", "rejected": "c"}]
    found = [texts(tokenizer, example) for example in read(rows, type="passthrough")]
    assert [before + after for before, after in found] == [f"a b{end}", f"a c{end}"]


LABELLED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ultra": ({"type": "chatml.ultra"}, {"prompt": PROMPT, "completion": GOOD}),
    "argilla": ({"type": "chatml.argilla"}, {"instruction": PROMPT, "completion": GOOD}),
    "argilla_chat": ({"type": "chatml.argilla_chat"}, {"completion": said(GOOD)}),
    "intel": ({"type": "chatml.intel"}, {"question": PROMPT, "completion": GOOD}),
    "auto": ({}, {"prompt": PROMPT, "completion": GOOD}),
}


@pytest.mark.parametrize("name", LABELLED)
def test_a_label_is_the_sign_of_the_weight(name: str, read: Callable[..., list[Example]], tokenizer: Tokenizer) -> None:
    entry, row = LABELLED[name]
    labels = [True, False, 1, 0, "true", "False"]
    found = read([{**row, "label": label} for label in labels], rl="kto", **entry)
    assert [example.weight for example in found] == [1, -1, 1, -1, 1, -1]
    assert {texts(tokenizer, example) for example in found} == {(CHAT, f"{GOOD}<|im_end|>")}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": GOOD, "rejected": BAD}, "row 2: has no column 'question'; it has chosen, rejected; name it with"),
        ({"question": PROMPT, "chosen": GOOD}, "row 2: has no column 'rejected' or 'rejected_response'"),
        ({"question": " ", "chosen": GOOD, "rejected": BAD}, "row 2: question is empty"),
        ({"question": PROMPT, "chosen": "", "rejected": BAD}, "chosen: message 2: the answer is empty"),
        ({"question": PROMPT, "chosen": GOOD, "rejected": 3}, "rejected: message 2 is no object"),
        ({"question": PROMPT, "chosen": [], "rejected": BAD}, "row 2: chosen is empty"),
        (
            {"question": PROMPT, "chosen": said(GOOD)[:1], "rejected": BAD},
            "chosen: the last message is the user's, and must be the assistant's",
        ),
    ],
)
def test_a_row_that_cannot_be_used(row: dict[str, Any], message: str, read: Callable[..., list[Example]]) -> None:
    good = {"question": PROMPT, "chosen": GOOD, "rejected": BAD}
    with pytest.raises(InvalidRequest) as caught:
        read([good, row], type="chatml.intel")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("chat_template.argilla", {"chosen": said(GOOD), "rejected": said(BAD, user="And?")}, "answer different chats"),
        ("chat_template.argilla_chat", {"chosen": GOOD, "rejected": BAD}, "chosen must be a chat"),
        ("zephyr.nectar", {"prompt": PROMPT, "answers": [{"answer": "x", "rank": 1}]}, "a list of two answers"),
        ("zephyr.nectar", {"prompt": PROMPT, "answers": [{"answer": "x"}] * 2}, "answer 1 has no number in 'rank'"),
        ("passthrough", {"prompt": PROMPT, "chosen": GOOD, "rejected": " "}, "the answer is empty (rejected)"),
    ],
)
def test_a_row_of_another_kind(
    kind: str, row: dict[str, Any], message: str, read: Callable[..., list[Example]]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read([row], type=kind)
    assert message in str(caught.value)


def test_a_label_that_is_none(read: Callable[..., list[Example]]) -> None:
    row = {"prompt": PROMPT, "completion": GOOD, "label": "good"}
    with pytest.raises(InvalidRequest, match="row 1: label must be true or false, got 'good'"):
        read([row], rl="kto", type="chatml.ultra")


def test_a_row_is_left_out_whole(read: Callable[..., list[Example]]) -> None:
    long = "newt " * 300
    rows = [
        {"prompt": PROMPT, "chosen": GOOD, "rejected": long},
        {"prompt": PROMPT, "chosen": GOOD, "rejected": GOOD},
        {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
    ]
    counts = RowCounts()
    assert len(read(rows, counts=counts)) == 2
    assert (counts.rows, counts.too_long, counts.ties) == (3, 1, 1)
    assert [ref.row for ref in counts.named["ties"]] == [2]
    counts = RowCounts()
    assert len(read(rows, counts=counts, excess_length_strategy="truncate")) == 4
    assert counts.truncated == 1


def test_what_methods_lay_beside_rows() -> None:
    one = Example([1, 2, 3, 4, 5], [False, False, True, True, False], 1.0)
    other = Example([6, 7, 8], [False, False, True], -1.0)
    assert with_companions([one, other], "dpo", 9) == [one, other]
    assert with_companions([one, other], "orpo", 9) == [
        Example([1, 2, 3, 4, 5], [False, True, True, True, False], 1.0, prompt_targets=1),
        other,
    ]
    assert with_companions([one, other], "kto", 4) == [
        one,
        Example([1, 2, 8], [False, False, True], 0.0),
        other,
        Example([6, 7, 3, 4], [False, False, True, True], 0.0),
    ]
