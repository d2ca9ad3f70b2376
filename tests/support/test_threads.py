"""Work beside the engine: its results, its errors, and the threads that it must not leave."""

import asyncio
import threading

import pytest

from runtime.support.threads import WorkerThread, call_in_fresh_thread, run_in_fresh_thread


def test_results_and_errors_come_back() -> None:
    assert run_in_fresh_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        run_in_fresh_thread(divmod, 1, 0)
    assert asyncio.run(call_in_fresh_thread(divmod, 7, 2)) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(call_in_fresh_thread(divmod, 1, 0))


def test_each_piece_of_work_has_a_thread_that_ends_with_it() -> None:
    async def main() -> list[threading.Thread]:
        worker = WorkerThread()
        own = [await call_in_fresh_thread(threading.current_thread), await worker.call(threading.current_thread)]
        return [*own, run_in_fresh_thread(threading.current_thread)]

    threads = asyncio.run(main())
    for thread in threads:
        thread.join(5.0)
    assert not any(thread.is_alive() for thread in threads)
    assert len({threading.main_thread(), *threads}) == 4
    assert all(thread.daemon for thread in threads)


def test_a_worker_does_one_thing_after_the_other_even_when_nobody_waits_any_more() -> None:
    async def main() -> list[str]:
        worker, seen, may_end, begun = WorkerThread(), [], threading.Event(), threading.Event()

        def slow() -> None:
            begun.set()
            may_end.wait(5.0)
            seen.append("slow")

        left = asyncio.ensure_future(worker.call(slow))
        await asyncio.to_thread(begun.wait, 5.0)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        after = asyncio.ensure_future(worker.call(seen.append, "after"))
        await asyncio.sleep(0.01)
        assert seen == []
        may_end.set()
        await after
        return seen

    assert asyncio.run(main()) == ["slow", "after"]
