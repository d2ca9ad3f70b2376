"""Penalties, biases and masks against a plain reference, one token at a time, and alone as well as among others."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from transformers import AutoModelForCausalLM

from runtime import LLM, SamplingParams
from runtime.errors import InvalidRequest
from runtime.messages import Admission, Submission
from runtime.model.split import Vocabulary
from runtime.workers.logit_rules import LogitRules
from runtime.workers.sampler import uniform

PROMPT = [5, 77, 131, 9, 42, 200, 17]
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.7, "presence_penalty": 0.8, "frequency_penalty": -0.6}
RULES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 1.2},
    {"frequency_penalty": -1.5},
    {"logit_bias": {3: 4.5, 250: -100.0, 9: 2.0}},
    {"allowed_token_ids": (3, 9, 77, 131, 250, 301, 302, 303)},
    {**PENALTIES, "logit_bias": {3: 4.5, 9: 2.0}, "allowed_token_ids": tuple(range(3, 400))},
]


class Reference:
    """A model and a sampler without batches, caches or tensors of the engine."""

    def __init__(self, model: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def logits(self, ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = self._model(torch.tensor([ids])).logits[0, -1].double().numpy()
        return found

    def generate(
        self, prompt: list[int], params: SamplingParams, bad_words: list[list[int]] | None = None
    ) -> list[int]:
        output: list[int] = []
        for _ in range(params.max_tokens or 0):
            logits = change(self.logits(prompt + output), prompt, output, params, bad_words or [])
            output.append(draw(logits, params, len(prompt) + len(output)))
        return output


def change(
    logits: np.ndarray, prompt: list[int], output: list[int], params: SamplingParams, bad_words: list[list[int]]
) -> np.ndarray:
    logits = logits.copy()
    for token in range(len(logits)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            logits[token] = -math.inf
        if any([*output, token][-len(word) :] == word for word in bad_words):
            logits[token] = -math.inf
        logits[token] += params.logit_bias.get(token, 0.0)
        count = output.count(token)
        if token in prompt or count:
            penalty = params.repetition_penalty
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        logits[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    return logits


def draw(logits: np.ndarray, params: SamplingParams, position: int) -> int:
    if params.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if params.top_k > 0:
        order = order[: params.top_k]
    weights = np.exp((logits[order] - logits[order[0]]) / params.temperature)
    point = uniform(params.seed or 0, position) * weights.sum()
    return int(order[int((np.cumsum(weights) <= point).sum())])


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Reference:
    return Reference(tiny_model)


@pytest.mark.parametrize("overrides", [{}, {"speculative_tokens": 3}, {"asynchronous": "on"}, {"kernels": "reference"}])
def test_rules_are_those_of_a_plain_sampler(
    tiny_model: Path, reference: Reference, overrides: dict[str, object]
) -> None:
    """Rows with different rules, and without any, in one batch; greedy and sampled."""
    greedy = [SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, **rules) for rules in ({}, *RULES)]
    drawn = [
        SamplingParams(max_tokens=16, temperature=0.8, top_k=12, seed=seed, ignore_eos=True, **rules)
        for seed, rules in enumerate(({}, *RULES))
    ]
    each = greedy + drawn
    done = LLM(str(tiny_model), **overrides).generate([PROMPT] * len(each), each)
    for params, one in zip(each, done, strict=True):
        assert one.token_ids == reference.generate(PROMPT, params), params
    neutral = SamplingParams(max_tokens=16, temperature=0.8, top_k=12, ignore_eos=True)
    unruled = [reference.generate(PROMPT, replace(neutral, seed=seed)) for seed in range(len(drawn))]
    found = [one.token_ids for one in done[len(greedy) :]]
    assert found[0] == unruled[0]
    assert all(one != other for one, other in zip(found[1:], unruled[1:], strict=True)), "a rule does nothing"


def test_bad_words_do_not_occur(tiny_model: Path, reference: Reference) -> None:
    llm = LLM(str(tiny_model))
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    plain = llm.generate([PROMPT], params)[0]
    words = tuple(
        text for at in (0, 4, 7) if (text := llm.tokenizer.decode(plain.token_ids[at : at + 2])).strip().isascii()
    ) or ("a",)
    ids = llm.tokenizer.bad_word_ids(words)
    banned = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, bad_words=words)
    done = llm.generate([PROMPT], banned)[0]
    assert done.token_ids == reference.generate(PROMPT, banned, ids)
    text = done.token_ids
    assert not [word for word in ids for at in range(len(text)) if text[at : at + len(word)] == word]


def test_preemption_and_forks_change_nothing(tiny_model: Path, reference: Reference) -> None:
    params = SamplingParams(
        max_tokens=20, temperature=0.8, top_k=12, seed=1, ignore_eos=True, logit_bias={3: 2.0}, **PENALTIES
    )
    prompts = [[token, *PROMPT] for token in range(3, 9)]
    tight = LLM(str(tiny_model), num_blocks=12, block_size=4)
    done = tight.generate(prompts, params)
    assert tight.engine.scheduler.num_preemptions > 0
    for prompt, one in zip(prompts, done, strict=True):
        assert one.token_ids == reference.generate(prompt, params)

    engine = LLM(str(tiny_model)).engine
    first = Submission(request_id="n", prompt_ids=PROMPT, params=params)
    second = Submission(request_id="n", prompt_ids=PROMPT, params=params, fork_of=first.id)
    engine.submit_all([first, second])
    tokens: dict[int, list[int]] = {first.id: [], second.id: []}
    while engine.busy:
        for output in engine.step():
            tokens[output.id] += output.token_ids
    assert tokens[first.id] == tokens[second.id] == reference.generate(PROMPT, params)


def test_a_slot_forgets_the_rules_of_the_sequence_before(tiny_model: Path, reference: Reference) -> None:
    llm = LLM(str(tiny_model), max_running=1)
    plain = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    for rules in RULES:
        ruled = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, **rules)
        first, second, third = llm.generate([PROMPT] * 3, [ruled, plain, ruled])
        assert first.token_ids == third.token_ids == reference.generate(PROMPT, ruled)
        assert second.token_ids == reference.generate(PROMPT, plain)


def test_when_nothing_may_follow_that_request_fails_alone(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model))
    word = next(text for id in range(300, 500) if (text := llm.tokenizer.decode([id])).strip().isalpha())
    only = llm.tokenizer.bad_word_ids([word])[0][-1]
    params = SamplingParams(max_tokens=4, ignore_eos=True, allowed_token_ids=(only,), bad_words=(word,))
    bad = Submission(request_id="bad", prompt_ids=PROMPT, params=params)
    good = Submission(request_id="good", prompt_ids=PROMPT, params=SamplingParams(max_tokens=4, ignore_eos=True))
    if [only] not in llm.tokenizer.bad_word_ids([word]):
        pytest.skip("this vocabulary has no word of one token")
    llm.engine.submit(bad)
    llm.engine.submit(good)
    ends = {}
    while llm.engine.busy:
        ends |= {output.request_id: output for output in llm.engine.step() if output.finish_reason}
    assert ends["good"].finish_reason == "length"
    assert ends["bad"].finish_reason == "error"
    assert "No token may follow" in (ends["bad"].error or "")


def test_counts_follow_drafts_that_were_wrong() -> None:
    """Positions along a draft see its guesses; the next step sees what took their place."""
    rules, device = LogitRules(10), torch.device("cpu")
    params = SamplingParams(frequency_penalty=1.0)
    rules.admit(Admission(slot=0, token_ids=[1], prompt_len=1, block_ids=[], params=params, seed=0, suppressed_ids=[]))
    logits = torch.zeros(3, 10, device=device)
    rules.apply(logits, [0, 0, 0], [2, 3, 4], {0: [1, 5, 5, 6]})
    assert logits[:, [5, 6]].tolist() == [[-1, 0], [-2, 0], [-2, -1]]
    logits = torch.zeros(1, 10)
    rules.apply(logits, [0], [3], {0: [1, 5, 7]})
    assert logits[0].tolist() == [0, 0, 0, 0, 0, -1, 0, -1, 0, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty must be between 0.01 and 100, got 0.0"),
        ({"presence_penalty": 2.5}, "presence_penalty must be between -2 and 2, got 2.5"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must be between -2 and 2, got nan"),
        ({"logit_bias": {1: 101.0}}, r"logit_bias\[1\] must be between -100 and 100, got 101"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias: token ids must be from 0 to 511, got 1000000"),
        ({"allowed_token_ids": ()}, "at least one token id"),
        ({"allowed_token_ids": (512,)}, "allowed_token_ids: token ids must be from 0 to 511, got 512"),
        ({"allowed_token_ids": (7,), "stop_token_ids": (7,), "min_tokens": 1, "max_tokens": 3}, "does not end"),
        ({"bad_words": (" ",)}, "empty"),
        ({"logprobs": 21}, "logprobs must be at most 20, got 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be at least 0, got -1"),
    ],
)
def test_values_out_of_range(tiny_model: Path, fields: dict[str, Any], message: str) -> None:
    llm = LLM(str(tiny_model))
    with pytest.raises(InvalidRequest, match=message) as refused:
        llm.generate([PROMPT], SamplingParams(**fields))
    assert refused.value.param in fields


def test_the_vocabulary_is_the_models(tiny_model: Path) -> None:
    assert Vocabulary(512).split.full == LLM(str(tiny_model)).engine.vocab_size == 512
