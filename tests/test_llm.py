"""Offline generation: order, per-prompt parameters, chat, and arguments that contradict each other."""

from pathlib import Path

import pytest

from runtime import LLM, SamplingParams
from settings.schema import Settings


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(str(tiny_model), max_running=4, max_waiting=2)


def test_answers_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    """More prompts than the queue holds, each with its own length."""
    params = [SamplingParams(max_tokens=1 + i % 7, temperature=0.0, ignore_eos=True) for i in range(25)]
    done = llm.generate([[i + 3, i + 4] for i in range(25)], params, progress=True)
    assert [c.prompt_ids for c in done] == [[i + 3, i + 4] for i in range(25)]
    assert [len(c.token_ids) for c in done] == [1 + i % 7 for i in range(25)]
    assert all(0 < c.ttft <= c.e2e for c in done)
    alone = llm.generate([[10, 11]], params[7])[0]
    assert alone.token_ids == done[7].token_ids
    assert alone.text == llm.tokenizer.decode(alone.token_ids)


def test_text_and_chat_prompts_are_tokenised_as_the_model_wants(llm: LLM) -> None:
    greedy = SamplingParams(max_tokens=3, temperature=0.0)
    text = llm.generate("The newt", greedy)[0]
    assert text.prompt_ids == llm.tokenizer.encode("The newt")
    messages = [{"role": "user", "content": "Hello"}]
    one = llm.chat(messages, greedy)
    two = llm.chat([messages, messages], greedy)
    assert one[0].prompt_ids == llm.tokenizer.encode_chat(messages)
    assert [c.token_ids for c in two] == [one[0].token_ids] * 2


def test_contradictions_are_errors(llm: LLM, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="2 prompts but 1"):
        llm.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(TypeError, match="either"):
        LLM(str(tiny_model), settings=Settings())
