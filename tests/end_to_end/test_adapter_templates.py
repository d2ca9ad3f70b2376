"""What was trained is what is asked: chats of an adapter with a template of its own, as rows and as requests."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.api.openai.prompts import PromptEncoder, chat_prompt
from runtime.api.openai.schema import ChatMessage, ChatRequest
from runtime.checkpoints.hf_tokenizer import load_tokenizer
from runtime.cli.client import in_process
from runtime.text.templates import BUILTIN_TEMPLATES, builtin_template
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.messages import ChatRows
from runtime.trainer.data.turns import ChatEncoder
from runtime.trainer.recipe import Dataset
from settings.api import LimitSettings
from tests.jobs import finished, served, upload

TEXT = st.text(alphabet="the newt<|im_end|>\n {}", min_size=1, max_size=12).filter(str.strip)
TAIL = "adapter: lora\nlora_r: 4\nmax_steps: 2\nlearning_rate: 0.001\nname: newt\nsequence_len: 512\n"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model, {}, {})


async def _never() -> Any:
    await asyncio.Event().wait()


def asked(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    """The ids of a request's prompt."""
    limits = LimitSettings()
    request = ChatRequest(messages=[ChatMessage(**message) for message in messages])
    chat = chat_prompt(request, tokenizer.chat_template, limits)
    encoder = PromptEncoder(tokenizer, tokenizer.vocab_size, None, limits.max_tokenize_chars, _never)
    return asyncio.run(encoder.chat(chat))


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(system=st.none() | TEXT, question=TEXT, answer=TEXT)
@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_a_request_has_the_tokens_of_its_row(
    tokenizer: Tokenizer, name: str, system: str | None, question: str, answer: str
) -> None:
    source = builtin_template(name)
    assert source is not None
    other = tokenizer.with_template(source)
    before = [] if system is None else [{"role": "system", "content": system}]
    before.append({"role": "user", "content": question})
    messages = [*before, {"role": "assistant", "content": answer}]
    rows = ChatRows(Dataset(path="a"), system=None, template=source)
    chat = rows.read({"messages": messages})
    encoder = ChatEncoder(other, ends=other.eos_ids, eos="turn", everything=False)
    example = encoder.encode(chat.messages, chat.turns, chat.tools, chat.spans)
    prompt = asked(other, before)
    start = example.trained.index(True)
    assert example.token_ids[:start] == prompt[:start]
    assert len(prompt) - start <= 1  # a token that takes in the beginning of the answer
    assert not any(example.trained[:start])
    assert asked(other, [*messages, {"role": "user", "content": question}])[:start] == prompt[:start] or (
        system is not None  # which some templates write into the last question
    )


ASKED = [{"role": "user", "content": "Where?"}]
RECIPES = {
    "phi_4": "chat_template: phi_4\n",
    "exaone4": "chat_template: exaone4\n",
    "jinja": 'chat_template_jinja: "{% for m in messages %}{{ m.role }}? {{ m.content }}<|im_end|>{% endfor %}"\n',
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", RECIPES)
async def test_an_adapter_is_asked_with_its_own_template(
    tiny_model: Path, tmp_path: Path, tokenizer: Tokenizer, name: str
) -> None:
    row = {"messages": [*ASKED, {"role": "assistant", "content": "In the pond."}]}
    recipe = "datasets:\n  - path: a.jsonl\n    type: chat_template\n" + RECIPES[name] + TAIL
    async with in_process(served(tiny_model, tmp_path), training=True) as client:
        job = await finished(client, upload(recipe, [row] * 4))
        assert any("goes with the adapter" in note for note in job["summary"]["notes"])
        body = {"messages": ASKED, "model": "newt"}
        ids = (await client.post("/tokenize", json=body)).json()["tokens"]
        base = (await client.post("/tokenize", json={**body, "model": tiny_model.name})).json()["tokens"]
        assert base == tokenizer.encode_chat(ASKED) != ids
        source = builtin_template(name) or "{% for m in messages %}{{ m.role }}? {{ m.content }}<|im_end|>{% endfor %}"
        assert ids == tokenizer.with_template(source).encode_chat(ASKED)
        answer = await client.post("/v1/chat/completions", json={**body, "max_tokens": 2, "return_token_ids": True})
        assert answer.json()["prompt_token_ids"] == ids
        card = json.loads((tmp_path / "adapters/newt/1/eft.json").read_text())
        assert card["chat_template"] == source
    # The next process reads the same from the version's folder.
    async with in_process(served(tiny_model, tmp_path), training=True) as client:
        assert (await client.post("/tokenize", json=body)).json()["tokens"] == ids


@pytest.mark.anyio
async def test_an_answer_ends_where_the_adapters_template_ends_it(tiny_model: Path, tmp_path: Path) -> None:
    """At an id that the base model does not end at, or at a text; not so for the base model."""
    async with in_process(served(tiny_model, tmp_path), training=True) as client:
        row = {"messages": [*ASKED, {"role": "assistant", "content": "In the pond."}]}
        recipe = "datasets:\n  - path: a.jsonl\n    type: chat_template\nchat_template: exaone4\n" + TAIL
        await finished(client, upload(recipe, [row] * 4))
        path = tmp_path / "adapters/newt/1/eft.json"
        assert json.loads(path.read_text())["stop"] == ["[|endofturn|]"]
        body = {"messages": ASKED, "model": "newt", "max_tokens": 8, "temperature": 0, "return_token_ids": True}
        free = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
        assert free["finish_reason"] == "length"
    card = json.loads(path.read_text())
    third = free["token_ids"][2]
    path.write_text(json.dumps({**card, "end_ids": [third]}))
    async with in_process(served(tiny_model, tmp_path), training=True) as client:
        ended = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
        assert (ended["finish_reason"], len(ended["token_ids"])) == ("stop", free["token_ids"].index(third) + 1)
        on = (await client.post("/v1/chat/completions", json={**body, "ignore_eos": True})).json()["choices"][0]
        assert on["token_ids"] == free["token_ids"]


@pytest.mark.anyio
async def test_a_template_that_does_not_compile(tiny_model: Path, tmp_path: Path) -> None:
    """Of a folder that came from elsewhere."""
    async with in_process(served(tiny_model, tmp_path), training=True) as client:
        row = {"messages": [*ASKED, {"role": "assistant", "content": "In the pond."}]}
        await finished(client, upload("datasets:\n  - path: a.jsonl\n" + TAIL, [row] * 4))
    path = tmp_path / "adapters/newt/1/eft.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "{% if %}"}))
    async with in_process(served(tiny_model, tmp_path), training=True) as client:
        answer = await client.post("/v1/chat/completions", json={"messages": ASKED, "model": "newt", "max_tokens": 1})
        assert answer.status_code == 503
        assert "is not valid Jinja" in answer.json()["error"]["message"]
