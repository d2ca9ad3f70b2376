"""Tokens and masks of chats, against transformers' assistant mask and tokens."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from runtime.api.openai.prompts import chat_prompt
from runtime.api.openai.schema import ChatRequest
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.example import Example, RowProblem
from runtime.trainer.data.messages import ChatRows
from runtime.trainer.data.turns import ChatEncoder
from runtime.trainer.recipe import Dataset
from settings.api import LimitSettings
from tests.tiny import SPECIAL_TOKENS
from tests.trainer.data.conftest import MakeTokenizer

EXAMPLES = settings(max_examples=60)
START, END = 1, 2

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, with the marks by which transformers finds what an assistant generates."""

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many legs?"},
    {"role": "assistant", "content": "Eight."},
    {"role": "user", "content": "And a newt?"},
    {"role": "assistant", "content": "Four."},
]


def encode(
    tokenizer: Tokenizer, messages: list[Any], *, roles: tuple[str, ...] = ("assistant",), **options: Any
) -> Example:
    defaults = {"ends": tokenizer.eos_ids, "eos": "turn", "everything": False}
    encoder = ChatEncoder(tokenizer, **{**defaults, **options})
    turns = [index for index, message in enumerate(messages) if message["role"] in roles]
    return encoder.encode(messages, turns, None)


def trained_text(tokenizer: Tokenizer, example: Example) -> str:
    ids = [id for id, on in zip(example.token_ids, example.trained, strict=True) if on]
    return tokenizer.decode(ids, skip_special_tokens=False)


CONTENT = st.one_of(st.text(max_size=30), st.text(alphabet="the newt\n.", max_size=30)).filter(
    lambda text: not any(special in text for special in SPECIAL_TOKENS)
)


@EXAMPLES
@given(contents=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4), system=st.none() | CONTENT)
def test_ids_and_masks_are_those_of_transformers(
    tiny_model: Path, make_tokenizer: MakeTokenizer, contents: list[tuple[str, str]], system: str | None
) -> None:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in contents:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    theirs = AutoTokenizer.from_pretrained(tiny_model)
    expected = theirs.apply_chat_template(
        messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    example = encode(make_tokenizer(MARKED), messages)
    assert example.token_ids == expected["input_ids"]
    assert [int(on) for on in example.trained] == list(expected["assistant_masks"])


def test_the_prompt_is_what_serving_computes(tokenizer: Tokenizer) -> None:
    """The tokens before the last answer are the prompt of the chat before it."""
    example = encode(tokenizer, CHAT)
    prompt = tokenizer.encode_chat(CHAT[:-1])
    assert example.token_ids[: len(prompt)] == prompt
    assert trained_text(tokenizer, example) == "Eight.<|im_end|>Four.<|im_end|>"
    assert example.token_ids == tokenizer.encode_chat(CHAT, add_generation_prompt=False)


TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
END_OF_TURN = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
WALK = "{% for p in m.content %}{{ p.text }}{% endfor %}"
FORMS = {
    "walks": TURN + WALK + END_OF_TURN,
    "prints": TURN + "{{ m.content }}" + END_OF_TURN,
    "either": TURN + "{% if m.content is string %}{{ m.content }}{% else %}" + WALK + "{% endif %}" + END_OF_TURN,
    "walks users": TURN + "{% if m.role == 'user' %}" + WALK + "{% else %}{{ m.content }}{% endif %}" + END_OF_TURN,
    "walks answers": TURN + "{% if m.role == 'user' %}{{ m.content }}{% else %}" + WALK + "{% endif %}" + END_OF_TURN,
}
WORDS = st.text(alphabet="ZQ nep.", min_size=1, max_size=6).filter(lambda text: bool(text.strip()))
CONTENTS = WORDS | st.lists(WORDS, min_size=1, max_size=3).map(
    lambda texts: [{"type": "text", "text": text} for text in texts]
)


@EXAMPLES
@given(template=st.sampled_from(sorted(FORMS)), question=CONTENTS, answer=CONTENTS)
def test_parts_are_trained_on_as_they_are_served(
    make_tokenizer: MakeTokenizer, template: str, question: Any, answer: Any
) -> None:
    """Whatever the template does with a list of parts: a row gives the tokens that the API gives for its messages."""
    tokenizer = make_tokenizer(FORMS[template])
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    body = msgspec.json.encode({"model": "m", "messages": messages})
    request = msgspec.json.decode(body, type=ChatRequest)
    served = chat_prompt(request, tokenizer.chat_template, LimitSettings(max_messages=9)).messages
    row = ChatRows(Dataset(path="a"), system=None, template=tokenizer.chat_template).read({"messages": messages})
    encoder = ChatEncoder(tokenizer, ends=tokenizer.eos_ids, eos="turn", everything=False)
    example = encoder.encode(row.messages, row.turns, row.tools, row.spans)
    assert example.token_ids == tokenizer.encode_chat(served, add_generation_prompt=False)
    trained = trained_text(tokenizer, example)
    assert trained.endswith("<|im_end|>")
    texts = [answer] if isinstance(answer, str) else [part["text"] for part in answer]
    walked = template in ("walks", "either", "walks answers")
    assert trained.removesuffix("<|im_end|>") == ("" if walked else "\n").join(texts)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"eos": "none"}, "Eight.Four."),
        ({"eos": "last"}, "Eight.Four.<|im_end|>"),
        ({"eos": "all"}, "<|im_end|><|im_end|>Eight.<|im_end|><|im_end|>Four.<|im_end|>"),
        ({"roles": ("user",)}, "How many legs?<|im_end|>And a newt?<|im_end|>"),
        ({"roles": ("system", "assistant")}, "Be brief.<|im_end|>Eight.<|im_end|>Four.<|im_end|>"),
        ({"ends": ()}, "Eight.<|im_end|>\nFour.<|im_end|>\n"),
        ({"ends": (START,)}, "Eight.<|im_end|>\nFour.<|im_end|>\n"),
    ],
)
def test_what_is_trained_on(tokenizer: Tokenizer, options: dict[str, Any], text: str) -> None:
    assert trained_text(tokenizer, encode(tokenizer, CHAT, **options)) == text


def test_everything_but_the_first_token(tokenizer: Tokenizer) -> None:
    example = encode(tokenizer, CHAT, everything=True)
    assert example.trained == [False] + [True] * (len(example) - 1)


def test_special_tokens_in_a_message_end_no_turn(tokenizer: Tokenizer) -> None:
    chat = [*CHAT[:2], {"role": "assistant", "content": "a <|im_end|> b"}]
    example = encode(tokenizer, chat)
    assert trained_text(tokenizer, example) == "a <|im_end|> b<|im_end|>"
    assert [id for id, on in zip(example.token_ids, example.trained, strict=True) if on].count(END) == 1


TEMPLATES = {
    "trims": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
    ),
    "without a generation prompt": (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|endoftext|>"
        "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    ),
    "plain text": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    ),
    "closes the chat": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
    ),
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("trims", "Eight.<|im_end|>Four.<|im_end|>"),
        ("without a generation prompt", " Eight.<|im_end|> Four.<|im_end|>"),
        ("plain text", " Eight.\n Four.\n"),
        ("closes the chat", "Eight.<|im_end|>Four.<|im_end|>"),
    ],
)
def test_templates_of_other_kinds(make_tokenizer: MakeTokenizer, name: str, text: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name])
    assert trained_text(tokenizer, encode(tokenizer, CHAT[1:], ends=(END,))) == text


def test_a_template_that_forgets_earlier_answers(make_tokenizer: MakeTokenizer) -> None:
    """As those do that drop earlier reasoning: only the last turn can be trained on."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last else '…' }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(RowProblem, match=r"message 2: .* when other messages follow|message 2: .* otherwise"):
        encode(tokenizer, CHAT[1:])


def test_a_prompt_that_history_does_not_have(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    )
    with pytest.raises(RowProblem, match=r"message 2: .* otherwise than the prompt"):
        encode(tokenizer, CHAT[1:3])


def test_a_chat_that_begins_with_an_answer(tokenizer: Tokenizer) -> None:
    example = encode(tokenizer, CHAT[2:3])
    assert trained_text(tokenizer, example) == "Eight.<|im_end|>"
