"""Beam search against transformers' `generate(num_beams=…)`, and what it holds while it runs."""

import random
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from runtime import LLM, SamplingParams
from runtime.messages import BeamSearch, Output, Submission

PROMPT = [5, 77, 131, 9, 42, 200, 17, 301, 44, 12, 90, 33, 7, 8, 250, 61, 18]
STOPS = tuple(random.Random(3).sample(range(3, 500), 90))
"""So many that outputs of all lengths come to an end."""


@pytest.fixture(scope="module")
def oracle(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture(scope="module", params=["off", "on"])
def llm(tiny_model: Path, request: pytest.FixtureRequest) -> LLM:
    return LLM(str(tiny_model), asynchronous=request.param, num_blocks=200)


def submission(name: str, beams: BeamSearch, prompt: list[int] = PROMPT, **params: Any) -> Submission:
    wanted = SamplingParams(temperature=0.0, **{"max_tokens": 16, **params})
    return Submission(request_id=name, prompt_ids=prompt, params=wanted, beams=beams)


def finish(llm: LLM) -> dict[str, Output]:
    """Steps until nothing is left; the last output of each request."""
    last: dict[str, Output] = {}
    while llm.engine.busy:
        last |= {output.request_id: output for output in llm.engine.step()}
        llm.engine.scheduler.check_integrity()
    blocks = llm.engine.scheduler.blocks
    assert blocks.num_free == blocks.num_blocks
    assert len(llm.engine.delivery) == 0
    assert not llm.engine._beams._groups
    assert not llm.engine._beams._group_of
    return last


def search(llm: LLM, beams: BeamSearch, **params: Any) -> list[Output]:
    llm.engine.submit(submission("r", beams, **params))
    return finish(llm)["r"].choices


def answers(choices: list[Output]) -> list[list[int]]:
    return [choice.token_ids for choice in choices]


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(("width", "length_penalty"), [(2, 1.0), (3, 0.0), (4, 2.0), (4, -1.0), (6, 0.7)])
def test_sequences_and_scores_are_those_of_transformers(
    llm: LLM, oracle: Any, width: int, length_penalty: float, early_stopping: Any
) -> None:
    beams = BeamSearch(width=width, best=width, length_penalty=length_penalty, early_stopping=early_stopping)
    for prompt, min_tokens in ((PROMPT, 0), (PROMPT[:3], 5), (PROMPT[4:9], 0)):
        got = search(llm, beams, prompt=prompt, stop_token_ids=STOPS, min_tokens=min_tokens, ignore_eos=True)
        expected = oracle.generate(
            torch.tensor([prompt]),
            num_beams=width,
            num_return_sequences=width,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            max_new_tokens=16,
            min_new_tokens=min_tokens or None,
            eos_token_id=list(STOPS),
            pad_token_id=2,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        theirs = [sequence[len(prompt) :].tolist() for sequence in expected.sequences]
        assert [tokens + [2] * (len(theirs[0]) - len(tokens)) for tokens in answers(got)] == theirs
        scores = [choice.cumulative_logprob / len(choice.token_ids) ** length_penalty for choice in got]
        assert scores == pytest.approx(expected.sequences_scores.tolist(), abs=1e-3)
        for choice in got:
            stopped = choice.token_ids[-1] in STOPS
            assert choice.finish_reason == ("stop" if stopped else "length")
            assert choice.stop_reason == (choice.token_ids[-1] if stopped else None)
            shown = choice.token_ids[:-1] if stopped else choice.token_ids
            assert choice.text == llm.tokenizer.decode(prompt + shown)[len(llm.tokenizer.decode(prompt)) :]


def test_a_search_with_a_penalty_is_that_of_transformers(llm: LLM, oracle: Any) -> None:
    """Which changes log-probabilities, not logits."""
    got = search(llm, BeamSearch(width=3, best=3), repetition_penalty=1.4, ignore_eos=True)
    expected = oracle.generate(
        torch.tensor([PROMPT]),
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=16,
        do_sample=False,
        repetition_penalty=1.4,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert answers(got) == expected[:, len(PROMPT) :].tolist()
    assert answers(got) != answers(search(llm, BeamSearch(width=3, best=3), ignore_eos=True))


def test_a_width_of_one_is_greedy(llm: LLM) -> None:
    greedy = llm.generate([PROMPT], SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True))[0]
    (choice,) = search(llm, BeamSearch(width=1, best=1), ignore_eos=True)
    assert (choice.token_ids, choice.text) == (greedy.token_ids, greedy.text)


def test_beams_share_what_they_have_in_common(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), prefix_caching=False)
    prompt = PROMPT * 8  # 136 tokens: 8 full blocks and half of one
    llm.engine.submit(submission("r", BeamSearch(width=4, best=2), prompt, ignore_eos=True))
    most = 0
    while llm.engine.busy:
        llm.engine.step()
        blocks = llm.engine.scheduler.blocks
        most = max(most, blocks.num_blocks - blocks.num_free)
    assert most <= 8 + 4 * 2  # alone each would take 10


@pytest.mark.parametrize("asynchronous", ["off", "on"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"num_blocks": 3},  # for one beam at a time
        {"num_blocks": 4, "max_preemptions": 1},
        {"num_blocks": 30, "max_running": 2},
        {"num_blocks": 7, "max_running": 6, "max_prefill_chunk": 5, "prefix_caching": False},
        {"num_blocks": 7, "max_running": 6, "speculative_tokens": 3},
        {"num_blocks": 5, "preemption_mode": "swap", "swap_memory": "4MiB", "prefix_caching": False},
    ],
)
def test_squeezed_among_others_it_finds_the_same(
    llm: LLM, tiny_model: Path, overrides: dict[str, Any], asynchronous: str
) -> None:
    kinds = {"a": BeamSearch(width=4, best=4), "b": BeamSearch(width=3, best=2, length_penalty=0.0)}
    expected = {name: answers(search(llm, beams, ignore_eos=True)) for name, beams in kinds.items()}
    greedy = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    others = {str(n): [n, n + 1] * 6 for n in range(4, 8)}
    alone = {name: llm.generate([prompt], greedy)[0].token_ids for name, prompt in others.items()}
    small = LLM(str(tiny_model), asynchronous=asynchronous, **overrides)
    for name, beams in kinds.items():
        small.engine.submit(submission(name, beams, ignore_eos=True))
    for name, prompt in others.items():
        small.engine.submit(Submission(request_id=name, prompt_ids=prompt, params=greedy))
    got: dict[str, list[Any]] = {name: [] for name in [*kinds, *others]}
    for _ in range(5000):
        if not small.engine.busy:
            break
        for output in small.engine.step():
            got[output.request_id] += answers(output.choices) if output.choices else output.token_ids
        small.engine.scheduler.check_integrity()
    assert not small.engine.busy, "it never ends"
    assert got == expected | alone
    assert small.engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 9])
def test_an_abort_leaves_nothing(llm: LLM, steps: int) -> None:
    asked = submission("r", BeamSearch(width=4, best=4), max_tokens=200, ignore_eos=True)
    llm.engine.submit(asked)
    for _ in range(steps):
        llm.engine.step()
    llm.engine.abort(asked.id)
    blocks = llm.engine.scheduler.blocks
    assert blocks.num_free == blocks.num_blocks
    assert finish(llm) == {}
    llm.engine.abort(asked.id)


def test_a_row_that_fails_ends_its_search(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(search(llm, BeamSearch(width=3, best=3), ignore_eos=True))
    llm.engine.submit(submission("bad", BeamSearch(width=3, best=3), ignore_eos=True))
    llm.engine.submit(submission("good", BeamSearch(width=3, best=3), ignore_eos=True))
    for _ in range(6):
        llm.engine.step()
    slots = [r.slot for r in llm.engine.scheduler.running if r.submission.request_id == "bad"]

    def failing(name: str, detail: object = "") -> None:
        if detail == slots[-1]:
            raise RuntimeError(name)

    monkeypatch.setattr("runtime.workers.worker.failpoint", failing)
    last: dict[str, Output] = {}
    while "bad" not in last:
        last |= {output.request_id: output for output in llm.engine.step()}
    monkeypatch.undo()
    last |= finish(llm)
    assert (last["bad"].finish_reason, last["bad"].choices) == ("error", [])
    assert answers(last["good"].choices) == expected


def test_a_deadline_ends_all_of_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = submission("r", BeamSearch(width=4, best=4), max_tokens=200, ignore_eos=True)
    llm.engine.submit(msgspec.structs.replace(patient, deadline=time.monotonic() + 60))
    for _ in range(4):
        llm.engine.step()
    monkeypatch.setattr(llm.engine.scheduler, "_clock", lambda: time.monotonic() + 61)
    last = finish(llm)["r"]
    assert (last.finish_reason, last.choices) == ("timeout", [])
