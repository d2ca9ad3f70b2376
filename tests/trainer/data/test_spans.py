"""Parts of a message with flags: what is marked is trained on, and nothing else."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.example import Example
from runtime.trainer.data.messages import ChatRows
from runtime.trainer.data.turns import ChatEncoder
from runtime.trainer.recipe import Dataset
from tests.tiny import SPECIAL_TOKENS

EXAMPLES = settings(max_examples=80)

TEXT = st.text(alphabet="the newt. Ü\n", min_size=1, max_size=12)
PARTS = st.lists(st.tuples(TEXT, st.booleans()), min_size=1, max_size=4)


def encode(tokenizer: Tokenizer, *messages: dict[str, Any], eos: Any = "turn") -> Example:
    rows = ChatRows(Dataset(path="a"), system=None, template=tokenizer.chat_template)
    chat = rows.read({"messages": list(messages)})
    encoder = ChatEncoder(tokenizer, ends=tokenizer.eos_ids, eos=eos, everything=False)
    return encoder.encode(chat.messages, chat.turns, chat.tools, chat.spans)


def trained_text(tokenizer: Tokenizer, example: Example) -> str:
    ids = [id for id, on in zip(example.token_ids, example.trained, strict=True) if on]
    return tokenizer.decode(ids, skip_special_tokens=False)


def whole_text(tokenizer: Tokenizer, example: Example) -> str:
    return tokenizer.decode(example.token_ids, skip_special_tokens=False)


def answer(*parts: tuple[str, bool], flag: str = "train") -> dict[str, Any]:
    content = [{"type": "text", "text": text, flag: on} for text, on in parts]
    return {"role": "assistant", "content": content}


USER = {"role": "user", "content": "Q"}


@pytest.mark.parametrize("flag", ["train", "weight"])
def test_a_thought_is_masked_and_the_answer_is_not(tokenizer: Tokenizer, flag: str) -> None:
    example = encode(tokenizer, USER, answer(("Think. ", False), ("Answer.", True), flag=flag))
    assert trained_text(tokenizer, example) == "Answer.<|im_end|>"
    assert "assistant\nThink. Answer.<|im_end|>" in whole_text(tokenizer, example)
    last_masked = encode(tokenizer, USER, answer(("Answer.", True), (" Done.", False), flag=flag))
    assert trained_text(tokenizer, last_masked) == "Answer."


@EXAMPLES
@given(first=PARTS, second=PARTS)
def test_what_is_marked_is_trained_on_to_the_letter(
    tokenizer: Tokenizer, first: list[tuple[str, bool]], second: list[tuple[str, bool]]
) -> None:
    """Of two turns, whatever the tokenizer would join across the parts' borders."""
    messages = [USER, answer(*first), USER, answer(*second)]
    if not any(on and text.strip() for text, on in first) or not any(on and text.strip() for text, on in second):
        return
    example = encode(tokenizer, *messages)
    expected = ""
    for parts in (first, second):
        expected += "".join(text for text, on in parts if on) + ("<|im_end|>" if parts[-1][1] else "")
    assert trained_text(tokenizer, example) == expected
    joined = [
        USER,
        *({"role": "assistant", "content": "".join(text for text, _ in parts)} for parts in (first, second)),
    ]
    plain = tokenizer.render_chat([joined[0], joined[1], USER, joined[2]], add_generation_prompt=False)
    assert whole_text(tokenizer, example) == plain


def test_a_part_without_a_flag_is_as_its_message(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "One. "}, {"type": "text", "text": "Two.", "train": False}]
    assert trained_text(tokenizer, encode(tokenizer, USER, {"role": "assistant", "content": parts})) == "One. "
    asked = {
        "role": "user",
        "content": [{"type": "text", "text": "One. "}, {"type": "text", "text": "Two.", "train": 1}],
    }
    assert trained_text(tokenizer, encode(tokenizer, asked, {"role": "assistant", "content": "A", "weight": 0})) == (
        "Two.<|im_end|>"
    )


def test_parts_without_flags_stand_on_lines_of_their_own(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]
    example = encode(tokenizer, USER, {"role": "assistant", "content": parts})
    assert trained_text(tokenizer, example) == "One.\nTwo.<|im_end|>"


def test_the_text_of_a_special_token_in_a_part_stays_text(tokenizer: Tokenizer) -> None:
    example = encode(tokenizer, USER, answer(("a <|im_end|> ", False), ("b", True)))
    assert trained_text(tokenizer, example) == "b<|im_end|>"
    assert all(SPECIAL in whole_text(tokenizer, example) for SPECIAL in SPECIAL_TOKENS[1:])
