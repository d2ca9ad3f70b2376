"""Planning ahead changes nothing that a client sees: the oracle is the engine that does not.

Requests arrive and leave at random steps, stop at strings and ids, fork, and share a pool that is too small; a
result that comes after its request has ended is dropped.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import LLM, SamplingParams
from runtime.messages import Output, Submission
from runtime.support import failpoints
from tests.adapter_files import make_adapter

KEY = "one@1:a"
Arrival = tuple[int, Submission]


@pytest.fixture(autouse=True)
def no_failpoints() -> Iterator[None]:
    yield
    failpoints.configure("")


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapter") / "one", seed=1)


def make(tiny_model: Path, adapter: Path, mode: str, **overrides: object) -> LLM:
    llm = LLM(str(tiny_model), asynchronous=mode, **overrides)
    llm.engine.prepare_adapter(KEY, str(adapter))
    llm.engine.load_adapter(KEY)
    return llm


def traffic(seed: int, texts: dict[str, str], count: int = 24) -> tuple[list[Arrival], dict[str, int]]:
    """Submissions with the step at which they come, and the steps at which some of them leave. With `texts`
    (name → output without a stop string) half of the requests stop inside of theirs."""
    rng = random.Random(seed)
    arrivals: list[Arrival] = []
    leaving: dict[str, int] = {}
    for number in range(count):
        name, at = str(number), rng.randrange(30)
        forked = str(rng.randrange(number)) if number and rng.random() < 0.3 else ""
        prompt = [
            rng.randrange(3, 9) if rng.random() < 0.3 else rng.randrange(3, 500) for _ in range(rng.randrange(1, 50))
        ]
        adapted = KEY if rng.random() < 0.4 else ""
        fork_of = 0
        if forked:
            leader = {s.request_id: s for _, s in arrivals}[forked]
            fork_of = leader.id
            prompt, adapted = leader.prompt_ids, leader.adapter
        greedy, stops, tokens = rng.random() < 0.5, rng.random() < 0.5, rng.randrange(1, 30)
        text, start = texts.get(name, ""), rng.randrange(1, 20)
        params = SamplingParams(
            max_tokens=tokens,
            min_tokens=rng.randrange(tokens) if rng.random() < 0.3 else 0,
            temperature=0.0 if greedy else 1.0,
            seed=number,
            stop=(text[start : start + 2],) if stops and text[start : start + 2] else (),
            stop_token_ids=tuple(rng.sample(range(3, 500), 40)),
            ignore_eos=rng.random() < 0.5,
        )
        submission = Submission(request_id=name, prompt_ids=prompt, params=params, adapter=adapted, fork_of=fork_of)
        arrivals.append((at, submission))
        if rng.random() < 0.25:
            leaving[name] = at + rng.randrange(1, 15)
    return sorted(arrivals, key=lambda arrival: arrival[0]), leaving


def play(llm: LLM, arrivals: list[Arrival], leaving: dict[str, int]) -> dict[str, list[Output]]:
    engine, coming = llm.engine, list(arrivals)
    outputs: dict[str, list[Output]] = {submission.request_id: [] for _, submission in arrivals}
    now = 0
    while engine.busy or coming:
        while coming and coming[0][0] <= now:
            engine.submit(coming.pop(0)[1])
        for name, at in leaving.items():
            if at == now:
                engine.abort(next(one.id for _, one in arrivals if one.request_id == name))
        for output in engine.step():
            outputs[output.request_id].append(output)
        if now % 10 == 0:
            engine.scheduler.check_integrity()
        now += 1
    engine.scheduler.check_integrity()
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    assert len(engine.delivery) == 0
    return outputs


def whole(outputs: list[Output]) -> tuple[list[int], str, object, object]:
    last = outputs[-1] if outputs else Output(request_id="")
    tokens = [token for output in outputs for token in output.token_ids]
    return tokens, "".join(output.text for output in outputs), last.finish_reason, last.stop_reason


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_blocks": 9, "max_running": 5, "max_preemptions": 2},
        {"num_blocks": 40, "block_size": 4, "max_prefill_chunk": 3, "max_batched_tokens": 16, "prefix_caching": False},
        {"speculative_tokens": 3, "speculative_max_running": 3, "num_blocks": 10},
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_every_client_gets_what_it_would_get(
    tiny_model: Path, adapter: Path, overrides: dict[str, object], seed: int
) -> None:
    free, _ = traffic(seed, {})
    alone = make(tiny_model, adapter, "off", **overrides)
    texts = {name: whole(outputs)[1] for name, outputs in play(alone, free, {}).items()}
    arrivals, leaving = traffic(seed, texts)
    expected = play(make(tiny_model, adapter, "off", **overrides), arrivals, leaving)
    llm = make(tiny_model, adapter, "on", **overrides)
    got = play(llm, arrivals, leaving)
    reasons = set()
    for name in expected:
        theirs, mine = whole(expected[name]), whole(got[name])
        if theirs[2] is not None and mine[2] is not None:
            assert mine == theirs
        else:  # it left in the middle, a step earlier or later
            length = min(len(mine[0]), len(theirs[0]))
            assert mine[0][:length] == theirs[0][:length]
        reasons.add(type(mine[3]))
    assert {str, int} <= reasons, "some stop at a string, and some at an id"
    if "num_blocks" in overrides and "speculative_tokens" not in overrides and overrides["num_blocks"] == 9:
        assert llm.engine.scheduler.num_preemptions > 0


def test_the_next_step_is_planned_while_one_runs(tiny_model: Path) -> None:
    """And a stop that is found late takes back what was begun after it."""
    llm = LLM(str(tiny_model), asynchronous="on")
    free = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))[0].token_ids
    stop = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, stop_token_ids=(free[1],))
    asked = Submission(request_id="r", prompt_ids=[5, 6, 7], params=stop)
    llm.engine.submit(asked)
    failpoints.configure("worker.row=hold")
    assert llm.engine.step() == []  # though the worker is held: nothing waited for it
    request = llm.engine.scheduler.get(asked.id)
    assert request is not None
    assert (request.num_computed, request.num_written, request.num_pending) == (3, 0, 1)
    failpoints.release("worker.row")
    outputs = [output for _ in range(3) for output in llm.engine.step()]
    assert [output.token_ids for output in outputs] == [[free[0]], [free[1]]]
    assert outputs[-1].stop_reason == free[1]
    assert not llm.engine.busy
    assert failpoints.passed("worker.row") == 3  # the last one was for nothing
    assert llm.engine.scheduler.blocks.num_free == llm.engine.scheduler.blocks.num_blocks
    again = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))[0].token_ids
    assert again == free


def test_a_caller_that_wants_the_worker_finds_it_idle(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), asynchronous="on")
    llm.engine.submit(Submission(request_id="r", prompt_ids=[5], params=SamplingParams(max_tokens=6, ignore_eos=True)))
    assert llm.engine.step() == []
    outputs = llm.engine.step(ahead=False)
    assert sum(len(output.token_ids) for output in outputs) == 2
    while llm.engine.busy:
        outputs += llm.engine.step()
    assert sum(len(output.token_ids) for output in outputs) == 6


def test_a_row_that_fails_with_the_next_one_in_flight(tiny_model: Path) -> None:
    """The next one is not computed, and the other sequence does not notice."""
    llm = LLM(str(tiny_model), asynchronous="on")
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    expected = llm.generate([[9, 10]], params)[0].token_ids
    for name, prompt in (("bad", [5, 6]), ("good", [9, 10])):
        llm.engine.submit(Submission(request_id=name, prompt_ids=prompt, params=params))
    failpoints.configure("worker.row@0=raise:3+")  # the slot of the first: its prompt, its first token, its second
    outputs: dict[str, list[Output]] = {"bad": [], "good": []}
    while llm.engine.busy:
        for output in llm.engine.step():
            outputs[output.request_id].append(output)
    assert whole(outputs["good"])[0] == expected
    assert (len(whole(outputs["bad"])[0]), whole(outputs["bad"])[2]) == (2, "error")
    assert failpoints.passed("worker.row@0") == 4  # the failing one twice, alone the second time, and none after it
    llm.engine.scheduler.check_integrity()


@pytest.mark.parametrize("mode", ["off", "on"])
def test_after_an_interrupt_it_goes_on(tiny_model: Path, mode: str) -> None:
    """Ctrl-C in the middle of an offline run: the step is lost, and the engine is not."""
    llm = LLM(str(tiny_model), asynchronous=mode)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    expected = llm.generate([[5, 6, 7]], params)[0].token_ids
    failpoints.configure("worker.row=interrupt:5")  # in the third step of two sequences
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[9, 8], [7, 6, 5]], params)
    failpoints.configure("")
    assert llm.generate([[5, 6, 7]], params)[0].token_ids == expected
    llm.engine.scheduler.check_integrity()
    blocks = llm.engine.scheduler.blocks
    assert blocks.num_free == blocks.num_blocks
