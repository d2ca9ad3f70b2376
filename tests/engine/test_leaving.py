"""Two hundred clients leave at once, and deadlines pass: all is given back, and all of it is counted."""

import asyncio
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from runtime.engine.service import EngineService
from runtime.errors import TooManyRequests
from runtime.messages import BeamSearch, Output, SamplingParams, Submission
from runtime.support import failpoints
from tests.engine.services import LONG, check_empty, gather, run, submission
from tests.waiting import until

GAUGES = ("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc")


def values(service: EngineService, name: str) -> dict[str, float]:
    """Label value (or "") → value, of the family `eft:name`."""
    return {
        ",".join(value for key, value in sample.labels.items() if key != "model_name"): sample.value
        for family in parse(service.metrics.render("")[0].decode())
        for sample in family.samples
        if sample.name in (f"eft:{name}", f"eft:{name}_total")
    }


async def all_zero(service: EngineService) -> None:
    await until(lambda: not any(value for name in GAUGES for value in values(service, name).values()))


@pytest.mark.parametrize("asynchronous", ["off", "on"])
def test_two_hundred_disconnects_at_once(tiny_model: Path, asynchronous: str) -> None:
    async def body(service: EngineService) -> None:
        streams = [service.submit(submission(str(n), length=1 + n % 40)) for n in range(5)]
        beams = BeamSearch(width=3, best=3)
        streams += [
            service.submit(Submission(request_id=f"b{n}", prompt_ids=[8, n], params=LONG, beams=beams))
            for n in range(2)
        ]
        streams += [service.submit(submission(str(n), length=1 + n % 40)) for n in range(5, 194)]
        leader = Submission(request_id="f", prompt_ids=[9] * 100, params=LONG)
        followers = [Submission(request_id="f", prompt_ids=[9] * 100, params=LONG, fork_of=leader.id) for _ in range(3)]
        streams += service.submit_all([leader, *followers])
        await anext(streams[0])
        await until(lambda: len(service.engine.scheduler) >= 200)  # all are taken in; a search has several beams
        await until(lambda: values(service, "num_requests_waiting_by_reason")["deferred"] >= 3)
        assert values(service, "num_requests_waiting")[""] > 0
        for stream in streams:
            stream.cancel()
        steps = service.engine.scheduler._step
        await until(lambda: not len(service.engine.scheduler))
        assert service.engine.scheduler._step - steps <= 1  # the one that was being planned, and no other
        await all_zero(service)
        phases = values(service, "aborts")
        assert sum(phases.values()) == 200
        assert phases["queued"] > 100
        assert phases["decode"] > 0
        done = await gather(service.submit(submission("after", SamplingParams(max_tokens=2, ignore_eos=True))))
        assert done[-1].finish_reason == "length"

    check_empty(run(tiny_model, body, max_running=8, num_blocks=200, asynchronous=asynchronous))


def test_deadlines_end_requests_and_are_counted(tiny_model: Path) -> None:
    async def body(service: EngineService) -> None:
        failpoints.configure("worker.row=sleep:0.01")  # so that 400 tokens are not done in a second
        now = time.monotonic()

        def late(name: str, seconds: float) -> Submission:
            return Submission(request_id=name, prompt_ids=[5, 6], params=LONG, deadline=now + seconds)

        first = service.submit(late("running", 1.0))
        second = service.submit(late("waiting", 0.9))
        kept = service.submit(
            Submission(
                request_id="kept",
                prompt_ids=[1],
                params=SamplingParams(max_tokens=2, ignore_eos=True),
                deadline=now + 60,
            )
        )
        ends: list[list[Output]] = await asyncio.gather(gather(first), gather(second), gather(kept))
        assert [outputs[-1].finish_reason for outputs in ends] == ["timeout", "timeout", "length"]
        assert ends[0][-1].generated_tokens > 0
        assert values(service, "timeouts") == {"decode": 1, "queued": 1, "prefill": 0}
        assert values(service, "deadline_misses") == {"": 2}
        await all_zero(service)

    check_empty(run(tiny_model, body, max_running=1, threads=1))


@pytest.mark.parametrize("limit", [{"max_waiting": 2}, {"max_waiting_tokens": 11}])
def test_rejections_are_counted_once(tiny_model: Path, limit: dict[str, int]) -> None:
    async def body(service: EngineService) -> None:
        streams = [service.submit(submission(str(n))) for n in range(2)]
        await anext(streams[0])
        streams.append(service.submit(submission("2")))
        await until(lambda: len(service.engine.scheduler) == 3)
        with pytest.raises(TooManyRequests) as refused:
            service.submit(submission("3"))
        assert refused.value.retry_after >= 1
        assert values(service, "admission_rejections")["queue_full"] == 1
        for stream in streams:
            stream.cancel()
        await all_zero(service)

    check_empty(run(tiny_model, body, max_running=1, **limit))
