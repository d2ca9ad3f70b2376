"""The real SmolLM2 against transformers' generate: the same 64 greedy tokens, however they are computed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import available
from runtime import LLM, SamplingParams
from runtime.checkpoints import open_checkpoint

pytestmark = pytest.mark.real_model

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Explain why the sky is blue, to a child of five.",
    "List three prime numbers above 100.",
    "Translate 'good morning' into Spanish.",
    "Write a Python function that reverses a string.",
    "Who was Ada Lovelace? Answer in two sentences.",
    "What should I cook tonight with eggs, rice and spinach?",
]
STEPS = 64
GREEDY = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module", params=[pytest.param("reference", marks=pytest.mark.slow), "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if (reason := available()[request.param]) is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(scope="module")
def prompts(demo_model: Path) -> list[list[int]]:
    tokenizer = open_checkpoint(str(demo_model)).tokenizer
    return [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]


@pytest.fixture(scope="module")
def expected(demo_model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates from the same weights, one prompt at a time, float32. It is shown an answer of ours
    at once, which takes a tenth of the time: where each token is its likeliest after those before, it is its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shown = [completion.token_ids for completion in LLM(str(demo_model)).generate(prompts, GREEDY)]
    checkpoint = open_checkpoint(str(demo_model))
    model: Any = LlamaForCausalLM(LlamaConfig(**checkpoint.config)).eval()
    missing, unexpected = model.load_state_dict(dict(checkpoint.tensors()), strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    likeliest = []
    for prompt, answer in zip(prompts, shown, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer[:-1]])).logits[0]
        likeliest.append(logits[len(prompt) - 1 :].argmax(-1).tolist())
    assert likeliest == shown
    return likeliest


def test_all_at_once(demo_model: Path, backend: str, prompts: list[list[int]], expected: list[list[int]]) -> None:
    completions = LLM(str(demo_model), kernels=backend).generate(prompts, GREEDY)
    assert [c.token_ids for c in completions] == expected


def test_chunks_of_7_and_preempting(demo_model: Path, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """What the engine does is the same for all backends."""
    llm = LLM(str(demo_model), num_blocks=17, max_prefill_chunk=7)
    completions = llm.generate(prompts, GREEDY)
    assert [c.token_ids for c in completions] == expected
    assert llm.engine.scheduler.num_preemptions > 0
    llm.engine.scheduler.check_integrity()


def test_one_by_one(demo_model: Path, backend: str, prompts: list[list[int]], expected: list[list[int]]) -> None:
    llm = LLM(str(demo_model), kernels=backend, max_prefill_chunk=7)
    count = 2 if backend == "cpu" else 1  # the reference takes four times as long
    assert [llm.generate([ids], GREEDY)[0].token_ids for ids in prompts[:count]] == expected[:count]
