"""The watch sees what blocks an event loop, and nothing else."""

import asyncio
import functools
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvloop

from runtime.checkpoints import open_checkpoint
from tests.api import blocking
from tests.api.blocking import LIMIT, own_doing, watch_loop, watching

pytestmark = pytest.mark.anyio


@pytest.fixture
def _usual_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "slowness", lambda moment: 1.0)


def compute(seconds: float) -> None:
    """In Python, so that other threads get their turns."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def keep_the_lock() -> None:
    """In one call of C, for about a second."""
    re.match(r"(a+)+$", "a" * 24 + "b")


@functools.cache
def pool(name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix=name)


async def in_thread(work: Callable[[], object], name: str) -> None:
    await asyncio.get_running_loop().run_in_executor(pool(name), work)


@pytest.mark.usefixtures("_usual_processor")
async def test_computing_on_the_loop() -> None:
    with watching() as watch:
        compute(LIMIT * 1.5)
        await asyncio.sleep(0)  # a callback ends
    assert len(watch.blocked) == 1
    assert "on the event loop: 1" in watch.blocked[0]


async def test_a_slow_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "slowness", lambda moment: 2.0)
    with watching() as watch:
        compute(LIMIT * 1.5)
        await asyncio.sleep(0)
        compute(LIMIT * 2.5)
        await asyncio.sleep(0)
        time.sleep(LIMIT * 1.5)  # noqa: ASYNC251
        await asyncio.sleep(0)
    assert len(watch.blocked) == 2
    assert "on the event loop: 2" in watch.blocked[0]
    assert "time.sleep" in watch.blocked[1]


async def test_what_the_test_computes_itself() -> None:
    with watching() as watch:
        with own_doing():
            compute(LIMIT * 1.5)
        await asyncio.sleep(0)
    assert watch.blocked == []


async def test_sleeping_on_the_loop() -> None:
    with watching() as watch:
        time.sleep(LIMIT * 1.5)  # noqa: ASYNC251
        await asyncio.sleep(0)
    assert watch.blocked == ["time.sleep on the event loop: 150 ms"]


@pytest.mark.usefixtures("_usual_processor")
def test_a_turn_of_another_loop() -> None:
    async def main() -> None:
        watch_loop(asyncio.get_running_loop())
        await asyncio.sleep(0.1)
        compute(LIMIT * 1.5)
        await asyncio.sleep(0.1)

    with watching() as watch:
        uvloop.run(main())
    assert len(watch.blocked) == 1
    assert watch.blocked[0].startswith("a turn of the server's event loop: ")


@pytest.mark.parametrize("name", ["text", "engine"])
async def test_a_thread_of_the_server_that_keeps_the_lock(name: str) -> None:
    with watching() as watch:
        await in_thread(keep_the_lock, name + ("_" if name == "engine" else ""))
    assert watch.blocked
    assert watch.blocked[0].startswith(f"Python's lock, kept by {name}_")


async def test_a_thread_of_the_test_may_keep_it() -> None:
    with watching() as watch:
        await in_thread(keep_the_lock, "client")
    assert watch.blocked == []


@pytest.mark.parametrize("threads", [1, 4])
async def test_threads_that_share_the_lock_and_cores(threads: int) -> None:
    """However long they compute, and however many there are: a busy machine is not a blocked loop."""
    with watching() as watch:
        await asyncio.gather(*(in_thread(lambda: compute(0.4), f"text_{n}") for n in range(threads)))
        for _ in range(20):
            compute(LIMIT / 3)
            await asyncio.sleep(0)
    assert watch.blocked == []


async def test_the_tokenizer_keeps_the_lock_unless_it_is_given_a_batch(tiny_model: Path) -> None:
    """What this is all about, and why long texts are encoded as they are."""
    backend = open_checkpoint(str(tiny_model)).tokenizer._backend
    text = "The newt crosses the road at night. " * 20_000
    for work, blocks in ((lambda: backend.encode(text), True), (lambda: backend.encode_batch_fast([text]), False)):
        with watching() as watch:
            await in_thread(work, "text")
        assert bool(watch.blocked) == blocks, (work, watch.blocked)


async def test_a_machine_that_does_something_else_is_not_the_apps_fault() -> None:
    """Four threads without Python's lock on two cores or so, and a loop with little to do."""
    with watching() as watch:
        digest = __import__("hashlib").sha256
        stop = threading.Event()

        def hash_on() -> None:
            while not stop.is_set():
                digest(bytes(10_000_000))

        pools = [asyncio.ensure_future(in_thread(hash_on, f"engine_{n}")) for n in range(6)]
        for _ in range(10):
            await asyncio.sleep(0.05)
        stop.set()
        await asyncio.gather(*pools)
    assert watch.blocked == []
