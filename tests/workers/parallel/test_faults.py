"""Faults 10 to 12: a rank that dies, a rank that hangs, and an engine that dies."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from runtime.engine.service import EngineService
from runtime.errors import EngineFailure, EngineUnavailable, RequestError
from runtime.messages import SamplingParams, Submission
from runtime.workers.parallel.executor import DistributedExecutor
from tests.adapter_files import make_adapter
from tests.end_to_end.process import ServerProcess
from tests.engine.services import check_empty, gather, run
from tests.jobs import NEWT_ROWS, newt_recipe
from tests.waiting import until

TIMEOUT = 4.0
"""A step of the tiny model takes milliseconds; ranks that are started again get as long as they need."""
SHORT = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=480, temperature=0.0, ignore_eos=True)


def pids(service: EngineService) -> list[int]:
    executor = service.engine._executor
    assert isinstance(executor, DistributedExecutor)
    return executor.ranks.pids


async def answer(service: EngineService, adapter: str = "") -> list[int]:
    """A short greedy answer, asked for until there is one: while ranks start, requests are refused."""
    async with asyncio.timeout(60):
        while True:
            submission = Submission(request_id="s", prompt_ids=[5, 6, 7], params=SHORT, adapter=adapter)
            try:
                return [token for output in await gather(service.submit(submission)) for token in output.token_ids]
            except RequestError:
                await asyncio.sleep(0.05)


def test_lost_ranks_fail_what_runs_and_come_back(tiny_model: Path, tmp_path: Path) -> None:
    make_adapter(tiny_model, tmp_path / "a")

    async def lose(service: EngineService, how: Callable[[], None], reason: str) -> None:
        """In the middle of a request; another one waits meanwhile, and is answered afterwards."""
        before, waiting = pids(service), []
        stream = service.submit(Submission(request_id="long", prompt_ids=[5, 6], params=LONG))
        await anext(stream)
        waiting.append(service.submit(Submission(request_id="next", prompt_ids=[5, 6, 7], params=SHORT)))
        how()
        began = time.monotonic()
        with pytest.raises(EngineFailure, match=f"can be sent again.*{reason}"):
            await gather(stream)
        assert time.monotonic() - began < TIMEOUT + 5
        assert not service.ready
        with pytest.raises(EngineUnavailable, match="loaded again"):
            service.submit(Submission(request_id="late", prompt_ids=[5, 6], params=SHORT))
        (done,) = waiting
        assert (await gather(done))[-1].finish_reason == "length"
        await until(lambda: service.ready)
        assert service.healthy
        assert not set(before) & set(pids(service))
        assert not any(map(psutil.pid_exists, before))

    async def body(service: EngineService) -> None:
        await service.load_adapter("a", str(tmp_path / "a"))
        expected = [await answer(service), await answer(service, "a")]
        assert expected[0] != expected[1]
        first = pids(service)
        await lose(service, lambda: os.kill(pids(service)[1], signal.SIGKILL), "rank 1 was ended by SIGKILL")
        assert [await answer(service), await answer(service, "a")] == expected
        await lose(service, lambda: os.kill(pids(service)[1], signal.SIGSTOP), "did not answer within 4 s")
        assert [await answer(service), await answer(service, "a")] == expected
        os.kill(pids(service)[0], signal.SIGKILL)  # nobody asks for anything
        await until(lambda: service.engine.lost)
        await until(lambda: service.ready)
        assert await answer(service) == expected[0]
        assert not any(map(psutil.pid_exists, first))
        last.extend(pids(service))

    last: list[int] = []
    service = run(tiny_model, body, tp=2, threads=1, rank_timeout=TIMEOUT, max_running=1)
    check_empty(service)
    assert last
    assert not any(map(psutil.pid_exists, last))


def test_a_row_that_fails_on_all_ranks_fails_alone(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 7, with ranks: the first pass of the place fails the batch, the second one row of it."""
    monkeypatch.setenv("EFT_FAILPOINTS", "worker.row=raise:2")

    async def body(service: EngineService) -> None:
        params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
        streams = [service.submit(Submission(request_id=str(i), prompt_ids=[5, 6], params=params)) for i in range(3)]
        results = await asyncio.gather(*map(gather, streams), return_exceptions=True)
        assert not service.engine.lost
        assert all(not isinstance(result, BaseException) for result in results)

    check_empty(run(tiny_model, body, tp=2, threads=1))


def test_a_job_over_http_and_ranks_that_end_with_the_server(tiny_model: Path, tmp_path: Path) -> None:
    """What two ranks have trained is published as any adapter is; then fault 12."""
    with ServerProcess(str(tiny_model), tmp_path, tp=2, threads=1) as server:
        recipe = newt_recipe(max_steps=8, learning_rate=1e-2, save_strategy="no")
        children = psutil.Process(server.pid).children()
        assert len(children) == 2
        assert server.wait_for_job(server.train(recipe, {"train.jsonl": NEWT_ROWS}), 60)["status"] == "succeeded"
        answers = [server.tokens(model, "newt", 8) for model in ("tiny-llama", "newt")]
        assert answers[0] != answers[1]
        listening = [one for child in children for one in child.net_connections("inet") if one.status == "LISTEN"]
        assert listening
        assert all(one.laddr.ip == "127.0.0.1" for one in listening)
        children[0].suspend()
        server.kill()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive


def test_the_end_of_a_server_with_ranks_prints_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """Not even what Triton's bindings leak, which they tell an interpreter that is taken apart."""
    log = tmp_path / "stderr"
    with ServerProcess(str(tiny_model), tmp_path / "state", log=log, tp=2, threads=1) as server:
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait_for_exit() == 0
    assert log.read_text(encoding="utf-8") == ""
