"""Log-probabilities of outputs and prompts against transformers, however a sequence is computed."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from runtime import LLM, SamplingParams
from runtime.messages import Submission, TokenLogprob
from tests.adapter_files import make_adapter

PROMPT = [5, 77, 131, 9, 42, 200, 17, 33, 8, 120, 64]
PARAMS = SamplingParams(
    max_tokens=12,
    temperature=0.7,
    top_k=20,
    seed=3,
    ignore_eos=True,
    repetition_penalty=1.5,
    logit_bias={9: 5.0, 40: -100.0},
    logprobs=4,
    prompt_logprobs=2,
)
"""Rules and temperature that must not show: what is reported is the model's own."""


def expected_scores(model: Path, ids: list[int], adapter: Path | None = None) -> torch.Tensor:
    """[len(ids) - 1, vocab] log-probabilities of what follows each token."""
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        theirs = PeftModel.from_pretrained(theirs, adapter)
    with torch.inference_mode():
        scores: torch.Tensor = theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return scores


def check(found: Sequence[TokenLogprob], tokens: list[int], scores: torch.Tensor, count: int) -> None:
    assert len(found) == len(tokens) == len(scores)
    for one, token, row in zip(found, tokens, scores, strict=True):
        assert one.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert one.rank == int((row > row[token]).sum()) + 1
        best = row.topk(count)
        assert [id for id, _ in one.top] == best.indices.tolist()
        assert [logprob for _, logprob in one.top] == pytest.approx(best.values.tolist(), abs=1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"max_prefill_chunk": 3},
        {"asynchronous": "on", "max_prefill_chunk": 4},
        {"speculative_tokens": 3},
    ],
)
def test_they_are_those_of_transformers(tiny_model: Path, overrides: dict[str, object]) -> None:
    llm = LLM(str(tiny_model), **overrides)
    for _ in range(2):  # the second time, the prompt is cached
        done = llm.generate([PROMPT], PARAMS)[0]
        scores = expected_scores(tiny_model, PROMPT + done.token_ids)
        check(done.prompt_logprobs, PROMPT[1:], scores[: len(PROMPT) - 1], 2)
        check(done.logprobs, done.token_ids, scores[len(PROMPT) - 1 :], 4)


def test_drafts_do_not_change_them(tiny_model: Path) -> None:
    """A prompt that repeats itself, so that drafts are made and kept."""
    prompt = [5, 77, 131, 9] * 6
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=2)
    plain = LLM(str(tiny_model)).generate([prompt], params)[0]
    llm = LLM(str(tiny_model), speculative_tokens=4)
    drafted = llm.generate([prompt], params)[0]
    assert llm.engine.scheduler.counts.accepted > 0
    assert drafted.token_ids == plain.token_ids
    for one, other in zip(drafted.logprobs, plain.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [id for id, _ in one.top] == [id for id, _ in other.top]


def test_with_an_adapter(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    llm = LLM(str(tiny_model))
    llm.engine.prepare_adapter("a@1:x", str(adapter))
    llm.engine.load_adapter("a@1:x")
    submission = Submission(request_id="a", prompt_ids=PROMPT, params=PARAMS, adapter="a@1:x")
    llm.engine.submit(submission)
    tokens: list[int] = []
    found: list[TokenLogprob] = []
    of_prompt: list[TokenLogprob] = []
    while llm.engine.busy:
        for output in llm.engine.step():
            tokens += output.token_ids
            found += output.logprobs
            of_prompt += output.prompt_logprobs
    scores = expected_scores(tiny_model, PROMPT + tokens, adapter)
    assert not torch.allclose(scores, expected_scores(tiny_model, PROMPT + tokens), atol=1e-2)
    check(of_prompt, PROMPT[1:], scores[: len(PROMPT) - 1], 2)
    check(found, tokens, scores[len(PROMPT) - 1 :], 4)


def test_preempted_sequences_have_each_once(tiny_model: Path) -> None:
    """With blocks for a few of them, so that prompts are computed again before and after they are complete."""
    prompts = [[token, *PROMPT, *PROMPT, token] for token in range(3, 9)]
    for mode in ({}, {"preemption_mode": "swap", "swap_memory": "16MiB"}):
        llm = LLM(str(tiny_model), num_blocks=15, max_prefill_chunk=7, max_batched_tokens=14, block_size=4, **mode)
        tight = llm.generate(prompts, PARAMS)
        assert llm.engine.scheduler.num_preemptions > 0
        for prompt, done in zip(prompts, tight, strict=True):
            scores = expected_scores(tiny_model, prompt + done.token_ids)
            check(done.prompt_logprobs, prompt[1:], scores[: len(prompt) - 1], 2)
            check(done.logprobs, done.token_ids, scores[len(prompt) - 1 :], 4)


def test_probabilities_add_up_to_one(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), max_logprobs=10_000)
    vocab = llm.engine.vocab_size
    done = llm.generate([PROMPT], SamplingParams(max_tokens=3, logprobs=vocab, prompt_logprobs=vocab, ignore_eos=True))
    for one in [*done[0].logprobs, *done[0].prompt_logprobs]:
        assert len(one.top) == vocab
        assert sum(math.exp(logprob) for _, logprob in one.top) == pytest.approx(1.0, abs=1e-4)


def test_requests_without_them_carry_none(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model))
    plain = SamplingParams(max_tokens=6, temperature=0.9, seed=5, ignore_eos=True)
    mixed = llm.generate([PROMPT, PROMPT], [plain, PARAMS])
    assert mixed[0].logprobs == mixed[0].prompt_logprobs == []
    assert mixed[0].token_ids == llm.generate([PROMPT], plain)[0].token_ids
