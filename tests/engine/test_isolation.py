"""One request's fault stays that request's: clients' ids, exceptions in planning, booking and delivery, and poison."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.engine.engine import Engine
from runtime.engine.service import EngineService
from runtime.errors import Conflict, EngineFailure, EngineUnavailable, InvalidRequest
from runtime.llm import LLM
from runtime.messages import BeamSearch, Output, SamplingParams, Submission, new_sequence_id
from runtime.scheduler import Request
from runtime.support import failpoints
from runtime.workers.executor import AllRowsFailed
from tests.engine.services import LONG, check_empty, gather, run, submission

SHORT = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
PLACES = ("planner.enter", "scheduler.book", "engine.deliver", "scheduler.plan", "scheduler.commit")


@pytest.fixture(autouse=True)
def no_failpoints() -> Iterator[None]:
    yield
    failpoints.configure("")


def play(engine: Engine) -> dict[int, list[Output]]:
    """Steps until nothing is left; the outputs by sequence. Nothing may be leaked."""
    outputs: dict[int, list[Output]] = {}
    while engine.busy:
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
        engine.scheduler.check_integrity()
    blocks = engine.scheduler.blocks
    assert blocks.num_free == blocks.num_blocks
    assert len(engine.delivery) == 0
    assert not engine._beams._groups
    assert not engine._beams._group_of
    assert not engine._adapter_uses
    return outputs


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@pytest.mark.parametrize("asynchronous", ["off", "on"])
@pytest.mark.parametrize("beams", [None, BeamSearch(width=3, best=3)])
@pytest.mark.parametrize("place", PLACES)
def test_an_exception_at_any_step_ends_few_and_leaks_nothing(
    tiny_model: Path, place: str, beams: BeamSearch | None, asynchronous: str
) -> None:
    llm = LLM(str(tiny_model), asynchronous=asynchronous, num_blocks=60)
    expected = llm.generate([[5, 6, 7]], SHORT)[0].token_ids
    for at in range(1, 9):
        asked = [Submission(request_id="same", prompt_ids=[5, 6, 7], params=SHORT) for _ in range(3)]
        asked += [Submission(request_id="same", prompt_ids=[8, 9], params=SHORT, beams=beams)] if beams else []
        for one in asked:
            llm.engine.submit(one)
        failpoints.configure(f"{place}=raise:{at}")
        outputs = play(llm.engine)
        failpoints.configure("")
        ends = [outputs[one.id][-1].finish_reason for one in asked]
        assert set(ends) <= {"length", "stop", "error"}
        if place in ("planner.enter", "scheduler.book", "engine.deliver"):
            assert ends.count("error") <= 1
        for one, end in zip(asked, ends, strict=True):
            if end != "error" and one.beams is None:
                assert tokens(outputs[one.id]) == expected
        assert tokens(play_one(llm, [5, 6, 7])) == expected


def play_one(llm: LLM, prompt: list[int]) -> list[Output]:
    one = Submission(request_id="after", prompt_ids=prompt, params=SHORT)
    llm.engine.submit(one)
    return play(llm.engine)[one.id]


def test_a_poisonous_request_may_come_as_often_as_it_likes(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine asks itself whether it still works, so failures of one kind of request never end it."""
    llm = LLM(str(tiny_model))
    expected = llm.generate([[7]], SHORT)[0].token_ids

    def poisonous(name: str, detail: object = "") -> None:
        running = llm.engine.scheduler.running
        if any(r.slot == detail and r.submission.prompt_ids[0] == 13 for r in running):
            raise failpoints.FailpointError(name)

    monkeypatch.setattr("runtime.workers.worker.failpoint", poisonous)
    for number in range(8):
        one = Submission(request_id="r", prompt_ids=[13, number], params=SHORT)
        llm.engine.submit(one)
        assert play(llm.engine)[one.id][-1].finish_reason == "error"
    assert tokens(play_one(llm, [7])) == expected


def test_an_engine_that_fails_by_itself_gives_up_after_one_request(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model))
    failpoints.configure("worker.row=raise")
    llm.engine.submit(Submission(request_id="r", prompt_ids=[1], params=SHORT))
    with pytest.raises(AllRowsFailed, match="probe"):
        play(llm.engine)


@pytest.mark.parametrize("place", ["scheduler.plan", "scheduler.commit"])
def test_planning_that_always_fails_gives_up(tiny_model: Path, place: str) -> None:
    llm = LLM(str(tiny_model))
    failpoints.configure(f"{place}=raise")
    asked = [Submission(request_id="r", prompt_ids=[n], params=SHORT) for n in range(3)]
    for one in asked:
        llm.engine.submit(one)
    ends: dict[int, str | None] = {}

    def steps() -> None:
        while llm.engine.busy:
            ends.update({output.id: output.finish_reason for output in llm.engine.step()})

    with pytest.raises(AllRowsFailed):
        steps()
    assert set(ends.values()) <= {"error"}


def test_a_policy_that_raises_for_one_request_ends_that_one(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(tiny_model), policy="priority", max_running=1)
    policy = llm.engine.scheduler.policy

    def raises(*arguments: object) -> bool:
        if any(isinstance(a, Request) and a.submission.request_id == "bad" for a in arguments):
            raise ValueError("bad")
        return False

    for method in ("should_shed", "outranks"):
        monkeypatch.setattr(policy, method, raises)
        asked = [Submission(request_id=name, prompt_ids=[3, 4], params=SHORT) for name in ("a", "bad", "b")]
        for one in asked:
            llm.engine.submit(one)
        outputs = play(llm.engine)
        assert [outputs[one.id][-1].finish_reason for one in asked] == ["length", "error", "length"]
        monkeypatch.undo()


@pytest.mark.parametrize("asynchronous", ["off", "on"])
@pytest.mark.parametrize("policy", ["fcfs", "priority", "deadline", "fair"])
def test_ids_are_used_again_at_once(tiny_model: Path, policy: str, asynchronous: str) -> None:
    """In the queue, while decoding, and with names like the engine's own. Nobody gets another one's tokens."""

    async def body(service: EngineService) -> None:
        expected = tokens(await gather(service.submit(Submission(request_id="x", prompt_ids=[9, 8], params=SHORT))))
        holder = service.submit(submission("holder"))
        await anext(holder)
        for number in range(30):
            label = ("gateway", "gateway/beam-1", "gateway-1")[number % 3]
            first = service.submit(submission(label, length=1 + number % 5))
            with pytest.raises(Conflict):
                service.submit(submission(label))
            if number % 2:
                await asyncio.sleep(0.002)
            first.cancel()
            again = service.submit(Submission(request_id=label, prompt_ids=[9, 8], params=SHORT))
            assert tokens(await gather(again)) == expected
        beams = BeamSearch(width=3, best=3)
        group = [Submission(request_id="g", prompt_ids=[4, 5], params=SHORT, beams=beams)]
        plain = service.submit(Submission(request_id="g/beam-1", prompt_ids=[9, 8], params=SHORT))
        searched = service.submit_all(group)[0]
        assert tokens(await gather(plain)) == expected
        assert len((await gather(searched))[-1].choices) == 3
        holder.cancel()

    check_empty(run(tiny_model, body, policy=policy, max_running=3, asynchronous=asynchronous))


def test_choices_share_a_label_and_all_or_none_come_in(tiny_model: Path) -> None:
    async def body(service: EngineService) -> None:
        leader = Submission(request_id="r", prompt_ids=[3, 4, 5], params=LONG)
        twin = Submission(request_id="r", prompt_ids=leader.prompt_ids, params=LONG, fork_of=leader.id)
        streams = service.submit_all([leader, twin])
        with pytest.raises(Conflict):
            service.submit(submission("r"))
        other = service.submit(submission("r-1"))
        streams[0].cancel()
        with pytest.raises(Conflict):  # the other choice is alive
            service.submit(submission("r"))
        streams[1].cancel()
        again = service.submit(submission("r"))
        wrong = Submission(request_id="bad", prompt_ids=[10**6], params=SHORT)
        with pytest.raises(InvalidRequest, match="Token ids"):
            service.submit(wrong)
        assert "bad" not in service._labels
        again.cancel()
        other.cancel()

    check_empty(run(tiny_model, body))


def test_what_raises_while_a_request_is_taken_in_is_its_own_error(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(service: EngineService) -> None:
        begin = service.engine.delivery.begin

        def raises(request: Request) -> None:
            if request.submission.request_id == "bad":
                raise MemoryError
            begin(request)

        monkeypatch.setattr(service.engine.delivery, "begin", raises)
        good = service.submit(submission("good", SHORT))
        with pytest.raises(EngineFailure):
            await gather(service.submit(submission("bad", SHORT)))
        assert len(tokens(await gather(good))) == 4

    check_empty(run(tiny_model, body))


def test_a_message_that_raises_does_not_end_the_engine(tiny_model: Path) -> None:
    def raises() -> None:
        raise RuntimeError("a message")

    async def body(service: EngineService) -> None:
        service.on_engine_thread(raises)
        assert len(tokens(await gather(service.submit(submission("r", SHORT))))) == 4
        assert service.healthy

    check_empty(run(tiny_model, body))


def test_whatever_the_engine_thread_does_is_watched(tiny_model: Path) -> None:
    async def body(service: EngineService) -> None:
        gate = asyncio.Event()
        loop = asyncio.get_running_loop()

        def hang() -> None:
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(20)

        service.on_engine_thread(hang)
        await asyncio.sleep(0.6)
        assert not service.healthy
        assert not service.ready
        gate.set()
        await service.call(lambda: None)
        assert service.healthy
        await asyncio.sleep(0.5)
        assert service.healthy  # it waits for something to do, and does not hang

    run(tiny_model, body, step_timeout=0.3)


def test_every_call_is_answered_when_the_engine_ends(tiny_model: Path) -> None:
    """Those that lie in the inbox behind a step when the server stops, too."""

    async def body(service: EngineService) -> None:
        failpoints.configure("worker.row=sleep:0.3")
        stream = service.submit(submission("r"))
        await asyncio.sleep(0.05)
        calls = [asyncio.ensure_future(service.call(lambda: 7)) for _ in range(5)]
        await asyncio.sleep(0)
        await service.stop(0.0)
        results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)
        assert all(result == 7 or isinstance(result, EngineUnavailable) for result in results)
        with pytest.raises(EngineUnavailable):
            await service.call(lambda: 7)
        stream.cancel()

    run(tiny_model, body)


def test_sequence_ids_are_never_given_twice() -> None:
    made = [Submission(request_id="r", prompt_ids=[1], params=SHORT).id for _ in range(100)]
    made += [new_sequence_id() for _ in range(100)]
    assert len(set(made)) == 200
