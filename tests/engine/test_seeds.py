"""A request gives the same tokens alone, in a batch, chunked, preempted, resumed, forked and with guesses ahead.

On the reference ops in float32; the oracle is the request alone on an engine of its own.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import LLM, SamplingParams
from runtime.messages import Submission

RNG = random.Random(0)
PROMPTS = [[RNG.randrange(3, 500) for _ in range(length)] for length in (5, 23, 48, 61)]
PROMPTS.append([7, 8, 9, 10, 11] * 9)  # repeats itself, so that guesses are made
PARAMS = [
    SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=24, temperature=1.0, seed=11, ignore_eos=True),
    SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, top_k=40, seed=12, ignore_eos=True),
    SamplingParams(max_tokens=24, temperature=1.2, min_p=0.05, min_tokens=10, seed=13, stop_token_ids=(5, 9)),
]
NOISE = [[n, n + 1, n + 2] * (n % 7 + 1) for n in range(3, 23)]
NOISE_PARAMS = [SamplingParams(max_tokens=15 + n, temperature=1.3, seed=n) for n in range(len(NOISE))]


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> list[list[int]]:
    llm = LLM(str(tiny_model), prefix_caching=False)
    return [llm.generate([prompt], params)[0].token_ids for prompt in PROMPTS for params in PARAMS]


def squeezed(llm: LLM) -> None:
    assert llm.engine.scheduler.num_preemptions > 0


def swapped(llm: LLM) -> None:
    """And what was out came back: of the host's pool something was written."""
    squeezed(llm)
    host = llm.engine._executor._worker._host  # type: ignore[attr-defined]
    assert any(keys.any() for keys, _ in host.layers)
    counts = llm.engine.scheduler.counts
    assert counts.swapped_out >= counts.swapped_in > 0
    text = llm.engine.metrics.render()[0].decode()
    assert f'eft:swap_out_blocks_total{{model_name="{llm.model_name}"}} {float(counts.swapped_out)}' in text
    assert f'eft:swap_in_blocks_total{{model_name="{llm.model_name}"}} {float(counts.swapped_in)}' in text
    assert f'eft:swap_used_bytes{{model_name="{llm.model_name}"}} 0.0' in text  # nobody is out now


def guessed(llm: LLM) -> None:
    counts = llm.engine.scheduler.counts
    assert 0 < counts.accepted <= counts.drafted


def quiet(llm: LLM) -> None:
    assert llm.engine.scheduler.num_preemptions == 0


@pytest.mark.parametrize(
    ("overrides", "check"),
    [
        ({}, quiet),
        ({"max_prefill_chunk": 7, "max_batched_tokens": 40}, quiet),
        ({"max_prefill_chunk": 1, "block_size": 4}, quiet),
        ({"num_blocks": 12, "max_running": 6}, squeezed),
        ({"num_blocks": 12, "max_running": 6, "prefix_caching": False, "max_prefill_chunk": 5}, squeezed),
        ({"speculative_tokens": 4, "speculative_max_running": 64, "speculative_min_acceptance": 0.0}, guessed),
        ({"speculative_tokens": 3, "speculative_max_running": 64, "num_blocks": 12}, squeezed),
        ({"preemption_mode": "swap", "num_blocks": 12, "max_running": 6}, swapped),
        ({"preemption_mode": "swap", "num_blocks": 12, "prefix_caching": False, "asynchronous": "on"}, swapped),
        ({"asynchronous": "on", "max_prefill_chunk": 7}, quiet),
        ({"asynchronous": "on", "num_blocks": 12, "max_running": 6}, squeezed),
    ],
)
def test_same_tokens_however_it_runs(
    tiny_model: Path, alone: list[list[int]], overrides: dict[str, object], check: Callable[[LLM], None]
) -> None:
    llm = LLM(str(tiny_model), **overrides)
    mine = [(prompt, params) for prompt in PROMPTS for params in PARAMS]
    crowd = [*zip(NOISE, NOISE_PARAMS, strict=True), *mine]
    done = llm.generate([prompt for prompt, _ in crowd], [params for _, params in crowd])
    assert [completion.token_ids for completion in done[len(NOISE) :]] == alone
    check(llm)
    llm.engine.scheduler.check_integrity()


def test_guesses_alone_are_exact_too(tiny_model: Path, alone: list[list[int]]) -> None:
    """One at a time the batch is small, as guessing is meant for."""
    llm = LLM(str(tiny_model), speculative_tokens=5)
    done = [llm.generate([prompt], params)[0].token_ids for prompt in PROMPTS for params in PARAMS]
    assert done == alone
    guessed(llm)


@pytest.mark.parametrize("caching", [True, False])
def test_forks_give_what_each_gives_alone(tiny_model: Path, caching: bool) -> None:
    llm = LLM(str(tiny_model), prefix_caching=caching)
    prompt = PROMPTS[1]
    seeds = [SamplingParams(max_tokens=20, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(4)]
    expected = [llm.generate([prompt], params)[0].token_ids for params in seeds]
    llm.engine.scheduler.blocks.reset_prefixes()
    before = llm.engine.scheduler.counts.prefix_hits
    leader = 0
    for number, params in enumerate(seeds):
        one = Submission(request_id=str(number), prompt_ids=prompt, params=params, fork_of=leader, scored=True)
        llm.engine.submit(one)
        leader = leader or one.id
    got: dict[str, list[int]] = {str(number): [] for number in range(4)}
    scores = {}
    while llm.engine.busy:
        for output in llm.engine.step():
            got[output.request_id] += output.token_ids
            scores[output.request_id] = output.cumulative_logprob
    assert list(got.values()) == expected
    assert llm.engine.scheduler.counts.prefix_hits - before == 3 * (len(prompt) - 1)
    assert len(set(scores.values())) == 4
    assert all(score < 0 for score in scores.values())
