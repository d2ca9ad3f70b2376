"""The engine over a tiny real model: what ends a request, what a seed promises, what a fault costs."""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import LLM, SamplingParams
from runtime.errors import ContextLengthExceeded, InvalidRequest
from runtime.llm import Completion
from runtime.messages import Output, Submission
from runtime.support import failpoints
from runtime.workers.executor import AllRowsFailed

PROMPT = [5, 77, 131, 9, 42, 200, 17]


@pytest.fixture(scope="module", params=["off", "on"])
def llm(tiny_model: Path, request: pytest.FixtureRequest) -> LLM:
    return LLM(str(tiny_model), max_batched_tokens=32, max_running=8, asynchronous=request.param)


@pytest.fixture(autouse=True)
def clean(llm: LLM) -> Iterator[None]:
    yield
    failpoints.configure("")
    assert not llm.engine.busy
    llm.engine.scheduler.check_integrity()
    assert llm.engine.scheduler.blocks.num_free == llm.engine.scheduler.blocks.num_blocks


def one(llm: LLM, **params: object) -> Completion:
    return llm.generate([PROMPT], SamplingParams(**params))[0]  # type: ignore[arg-type]


def test_who_waits_for_a_first_token(llm: LLM) -> None:
    """Requests of the background too are prefilled, but are not waited for."""
    engine, params = llm.engine, SamplingParams(max_tokens=3, ignore_eos=True)
    own, behind = (
        Submission(request_id="one", prompt_ids=PROMPT, params=params, background=background, arrival=arrival)
        for background, arrival in ((False, 2.5), (True, 1.5))
    )
    assert (engine.prefilling, engine.waiting_since) == (False, None)
    engine.submit(engine.prepare(behind))
    assert (engine.prefilling, engine.waiting_since) == (True, None)
    engine.submit(engine.prepare(own))
    assert engine.waiting_since == 2.5
    while engine.prefilling:
        engine.step()
    assert engine.busy
    assert engine.waiting_since is None
    while engine.busy:
        engine.step()


def test_max_tokens_ends_with_length(llm: LLM) -> None:
    done = one(llm, max_tokens=5, temperature=0.0, ignore_eos=True)
    assert len(done.token_ids) == 5
    assert done.finish_reason == "length"


def test_without_max_tokens_the_context_is_the_end(llm: LLM) -> None:
    done = one(llm, temperature=0.0, ignore_eos=True)
    assert len(PROMPT) + len(done.token_ids) == llm.engine.max_len == 512
    assert done.finish_reason == "length"


def test_a_stop_id_ends_and_is_named(llm: LLM) -> None:
    free = one(llm, max_tokens=20, temperature=0.0, ignore_eos=True)
    stop = free.token_ids[7]
    done = one(llm, max_tokens=20, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    at = free.token_ids.index(stop)
    assert done.token_ids == free.token_ids[: at + 1]
    assert (done.finish_reason, done.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_the_text_of_a_stop_id_is_shown_where_stop_strings_are(llm: LLM, include: bool, skip: bool) -> None:
    """As in vLLM; a special token has a text only where special tokens are not skipped."""
    free = one(llm, max_tokens=20, temperature=0.0, ignore_eos=True)
    decode = llm.tokenizer.decode
    done = one(
        llm,
        max_tokens=20,
        temperature=0.0,
        ignore_eos=True,
        stop_token_ids=(free.token_ids[7],),
        include_stop_str_in_output=include,
        skip_special_tokens=skip,
    )
    assert done.text == decode(done.token_ids if include else done.token_ids[:-1], skip_special_tokens=skip)


def test_min_tokens_keeps_stop_ids_from_being_sampled(llm: LLM) -> None:
    free = one(llm, max_tokens=20, temperature=0.0, ignore_eos=True)
    stop = free.token_ids[3]
    done = one(llm, max_tokens=20, min_tokens=10, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    assert stop not in done.token_ids[:10]
    assert len(done.token_ids) >= 10


def test_a_stop_string_ends_and_is_cut_off(llm: LLM) -> None:
    free = one(llm, max_tokens=30, temperature=0.0, ignore_eos=True)
    stop = free.text[6:9]
    done = one(llm, max_tokens=30, temperature=0.0, ignore_eos=True, stop=(stop,))
    assert done.text == free.text[: free.text.index(stop)]
    assert (done.finish_reason, done.stop_reason) == ("stop", stop)
    kept = one(llm, max_tokens=30, temperature=0.0, ignore_eos=True, stop=(stop,), include_stop_str_in_output=True)
    assert kept.text == done.text + stop


def test_a_seed_gives_the_same_tokens_whatever_else_runs(llm: LLM, tiny_model: Path) -> None:
    """Alone, in a batch, chunked, from the cache, and preempted in a pool that is too small."""
    params = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)
    alone = llm.generate([PROMPT], params)[0].token_ids
    others = [[i, i + 1, i + 2] * (i % 5 + 1) for i in range(3, 20)]
    noise = [SamplingParams(max_tokens=30 + i, temperature=1.3, seed=i) for i in range(len(others))]
    crowded = llm.generate([*others, PROMPT], [*noise, params])[-1].token_ids
    assert crowded == alone
    small = LLM(str(tiny_model), num_blocks=8, max_prefill_chunk=3, max_running=4)
    squeezed = small.generate([*others, PROMPT], [*noise, params])[-1].token_ids
    assert small.engine.scheduler.num_preemptions > 0
    assert squeezed == alone
    other_seed = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.9, seed=8, ignore_eos=True)
    assert llm.generate([PROMPT], other_seed)[0].token_ids != alone


def test_a_shared_prefix_is_cached_and_changes_nothing(llm: LLM) -> None:
    prompt = [7, 8, 9, 10] * 16
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    llm.engine.scheduler.blocks.reset_prefixes()
    first, second = (llm.generate([prompt], params)[0] for _ in range(2))
    assert (first.cached_tokens, second.cached_tokens) == (0, 63)
    assert first.token_ids == second.token_ids


def test_what_can_never_run_is_refused_at_once(llm: LLM, tiny_model: Path) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"at most 512 tokens.*513"):
        llm.generate([[1] * 513])
    with pytest.raises(ContextLengthExceeded):
        llm.generate([[1] * 500], SamplingParams(max_tokens=13))
    small = LLM(str(tiny_model), num_blocks=3)
    with pytest.raises(ContextLengthExceeded, match="at most 48 tokens"):
        small.generate([[1] * 48])
    assert len(small.generate([[1] * 47], SamplingParams(ignore_eos=True))[0].token_ids) == 1
    with pytest.raises(InvalidRequest, match="0 to 511, got 512"):
        llm.generate([[1, 512]])
    with pytest.raises(InvalidRequest, match="empty"):
        llm.generate([[]])
    with pytest.raises(InvalidRequest, match="top_p must be above 0"):
        llm.generate([[1]], SamplingParams(top_p=0.0))


def test_one_bad_row_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch raises, then its rows run one by one, and only the bad one raises again."""
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    expected = {str(i): llm.generate([[i] * 5], params)[0].token_ids for i in (10, 20, 30)}
    asked = {name: Submission(request_id=name, prompt_ids=[int(name)] * 5, params=params) for name in expected}
    for submission in asked.values():
        llm.engine.submit(submission)
    outputs: dict[str, list[int]] = {name: [] for name in expected}
    rows = itertools.count(1)

    def fail_for_20(name: str, detail: object = "") -> None:
        request = llm.engine.scheduler.get(asked["20"].id)
        if request is not None and detail == request.slot and next(rows) > 2:
            raise failpoints.FailpointError(name)

    monkeypatch.setattr("runtime.workers.worker.failpoint", fail_for_20)
    errors = {}
    while llm.engine.busy:
        for output in llm.engine.step():
            outputs[output.request_id] += output.token_ids
            if output.finish_reason == "error":
                errors[output.request_id] = output.error
    assert errors == {"20": "An internal error ended this request; the others go on."}
    assert outputs == expected | {"20": expected["20"][:2]}


def test_when_every_step_raises_the_engine_gives_up(llm: LLM) -> None:
    failpoints.configure("worker.row=raise")
    asked = [Submission(request_id=f"r{i}", prompt_ids=[i + 1], params=SamplingParams()) for i in range(20)]
    for submission in asked:
        llm.engine.submit(submission)
    outputs: list[Output] = []

    def go_on() -> None:
        for _ in range(10):
            outputs.extend(llm.engine.step())

    with pytest.raises(AllRowsFailed):
        go_on()
    assert len(outputs) == 16
    assert {output.finish_reason for output in outputs} == {"error"}
    for submission in asked:
        llm.engine.abort(submission.id)
    llm.engine._failed_steps = 0
    llm.engine.settle()


class Watched(list[int]):
    """Counts how often all of it is looked at, or copied."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__(ids)
        self.looks = 0

    def __iter__(self) -> Iterator[int]:
        self.looks += 1
        return super().__iter__()


def test_the_choices_of_a_request_share_their_prompt(tiny_model: Path) -> None:
    """Its ids are checked at the door, once, and there is one list of them until a sequence runs."""
    engine = LLM(str(tiny_model), max_running=2, num_blocks=64).engine
    prompt = Watched(PROMPT * 4)
    params = SamplingParams(max_tokens=3, ignore_eos=True, seed=1)
    first = Submission(request_id="many", prompt_ids=prompt, params=params)
    others = [Submission(request_id="many", prompt_ids=prompt, params=params, fork_of=first.id) for _ in range(40)]
    engine.check(first)
    assert prompt.looks == 2  # the least and the greatest
    engine.submit_all([first, *others])
    assert all(request.tokens is prompt for request in engine.scheduler.waiting)
    assert prompt.looks == 2
    done: Counter[int] = Counter()
    while engine.busy:
        for output in engine.step():
            done[output.id] += len(output.token_ids)
    assert list(done.values()) == [3] * 41
    assert prompt == PROMPT * 4
