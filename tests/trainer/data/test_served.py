"""What is trained is what is asked: a row gives the tokens that the API gives for its messages and tools."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.api.openai.forms import check_form
from runtime.api.openai.prompts import PromptEncoder, chat_prompt
from runtime.api.openai.schema import ChatRequest
from runtime.checkpoints import open_checkpoint
from runtime.text.templates import BUILTIN_TEMPLATES, builtin_template
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.messages import ChatRows
from runtime.trainer.data.turns import ChatEncoder
from runtime.trainer.recipe import Dataset
from settings.schema import Settings
from tests.trainer.data.conftest import MakeTokenizer

TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
THOUGHTS = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
CALLS = (
    "{% for call in m.tool_calls or [] %}[{{ call.id }} {{ call.type }} {{ call.function.name }} "
    "{{ call.function.arguments | tojson }}]{% endfor %}"
)
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.name or '' }}{{ m.tool_call_id or '' }}\n"
CONTENT = "{{ m.content }}"
WALK = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
)
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
TEMPLATES = {
    "knows no tools": TURN + THOUGHTS + CONTENT + END,
    "knows no tools and no system": NO_SYSTEM + TURN + CONTENT + END,
    "prints tools": TOOLS + TURN + THOUGHTS + CONTENT + CALLS + END,
    "prints arguments as text": TOOLS + TURN + CONTENT + CALLS.replace(" | tojson", "") + END,
    "prints tools, not calls": TOOLS + TURN + CONTENT + END,
    "prints calls, not tools": TURN + CONTENT + CALLS + END,
    "walks parts": TOOLS + TURN + THOUGHTS + WALK + CALLS + END,
}

WORDS = st.text(alphabet="ZQ nep.<", min_size=1, max_size=6).filter(lambda text: bool(text.strip()))
CONTENTS = WORDS | st.lists(WORDS, min_size=1, max_size=3).map(
    lambda texts: [{"type": "text", "text": text} for text in texts]
)
ARGUMENTS = st.dictionaries(WORDS, WORDS | st.integers(0, 9), max_size=2)
FUNCTIONS = st.fixed_dictionaries(
    {"name": st.sampled_from(["now", "zone"])},
    optional={
        "description": WORDS,
        "parameters": st.just({"type": "object", "properties": {}}),
        "strict": st.booleans(),
    },
)
CALL = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": st.just("now")}, optional={"arguments": ARGUMENTS})},
    optional={"id": st.just("c1"), "type": st.just("function")},
)


@st.composite
def exchanges(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A question, some calls with their results, and the answer."""
    found: list[dict[str, Any]] = [{"role": "user", "content": draw(CONTENTS)}]
    for calls in draw(st.lists(st.lists(CALL, min_size=1, max_size=2), max_size=2)):
        found.append({"role": "assistant", "content": draw(st.none() | WORDS), "tool_calls": calls})
        found += [{"role": "tool", "tool_call_id": "c1", "content": draw(CONTENTS)} for _ in calls]
    answer: dict[str, Any] = {"role": "assistant", "content": draw(CONTENTS)}
    if draw(st.booleans()):
        answer["reasoning_content"] = draw(WORDS)
    return [*found, answer]


def served(tokenizer: Tokenizer, messages: list[Any], tools: list[Any], *, prompt: bool) -> list[int]:
    """Ids of a request's prompt."""
    body = {"messages": messages, "tools": tools or None, "add_generation_prompt": prompt}
    asked = msgspec.json.decode(msgspec.json.encode(body), type=ChatRequest)
    service: Any = SimpleNamespace(tokenizer=tokenizer, reasoning=None)
    form = check_form(asked, service, Settings())
    chat = chat_prompt(asked, tokenizer.chat_template, Settings().limits, tools=form.shown_tools)
    encoder = PromptEncoder(tokenizer, tokenizer.vocab_size, None, 10_000, None)  # type: ignore[arg-type]
    return asyncio.run(encoder.chat(chat))


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40)
@given(
    system=st.none() | CONTENTS,
    chat=st.lists(exchanges(), min_size=1, max_size=2),
    functions=st.lists(FUNCTIONS, max_size=2, unique_by=lambda function: function["name"]),
    flat=st.booleans(),
)
def test_a_row_is_what_is_served(
    make_tokenizer: MakeTokenizer,
    name: str,
    system: Any,
    chat: list[list[dict[str, Any]]],
    functions: list[dict[str, Any]],
    flat: bool,
) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name])
    messages = [message for exchange in chat for message in exchange]
    if system is not None and "no system" not in name:
        messages.insert(0, {"role": "system", "content": system})
    tools = [{"type": "function", "function": function} for function in functions]
    row = ChatRows(Dataset(path="a"), system=None, template=tokenizer.chat_template).read(
        {"messages": messages, "tools": functions if flat else tools}
    )
    example = ChatEncoder(tokenizer, ends=tokenizer.eos_ids, eos="turn", everything=False).encode(
        row.messages, row.turns, row.tools, row.spans
    )
    assert example.token_ids == served(tokenizer, messages, tools, prompt=False)
    for turn in (index for index, message in enumerate(messages) if message["role"] == "assistant"):
        prompt = served(tokenizer, messages[:turn], tools, prompt=True)
        assert example.token_ids[: len(prompt)] == prompt
        assert not example.trained[len(prompt) - 1]
        assert example.trained[len(prompt)]


@pytest.fixture(scope="module")
def real_tokenizer(demo_model: Path) -> Tokenizer:
    return open_checkpoint(str(demo_model)).tokenizer


ONLY_LAST = ("qwen3", "exaone4")
"""Templates that write an answer otherwise when other messages follow."""
TEXTS = st.sampled_from(["Hi", "a", "7", "```py\n```", "- one\n- two", "中", "(no)", "\n\nyes", "  two", "<b>", "[1]"])


@pytest.mark.real_model
@pytest.mark.parametrize("name", sorted(BUILTIN_TEMPLATES))
@settings(max_examples=8)
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_a_prompt_is_the_beginning_of_its_row(real_tokenizer: Tokenizer, name: str, pairs: list[Any]) -> None:
    """With each built-in template on the vocabulary of another model, which has other tokens and joins "\\n\\n"."""
    source = builtin_template(name)
    assert source is not None
    tokenizer = real_tokenizer.with_template(source)
    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]
    turns = range(1, len(messages), 2) if name not in ONLY_LAST else [len(messages) - 1]
    example = ChatEncoder(tokenizer, ends=tokenizer.eos_ids, eos="turn", everything=False).encode(messages, turns, None)
    text = tokenizer.render_chat(messages, add_generation_prompt=False)
    assert tokenizer.decode(example.token_ids, skip_special_tokens=False) == text
    for turn in turns:
        prompt = tokenizer.encode_chat(messages[:turn])
        if text.startswith(tokenizer.render_chat(messages[:turn])):
            assert example.token_ids[: len(prompt)] == prompt
            assert not example.trained[len(prompt) - 1]
            assert example.trained[len(prompt)]
