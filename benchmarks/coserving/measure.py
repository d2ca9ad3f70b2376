"""Loads of requests alone, beside a job in our process, and beside a job in a process of its own, in turns."""

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from msgspec import Struct, field

from benchmarks.coserving.loads import Load, Served, percentile, serve, until
from benchmarks.coserving.peer import PeftProcess
from benchmarks.training import Job, random_epoch
from runtime.engine.service import EngineService
from runtime.trainer.host import TrainingHost
from runtime.trainer.slices import LatencyTargets, TrainingShare
from settings.schema import Settings

ALONE, OURS, PEER = "alone", "one process", "two processes"
SHARES = {"p50": 0.5, "p95": 0.95}
WARM_SECONDS = 1.0


class Window(Struct, frozen=True):
    """One way to run one load, once."""

    tpot: dict[str, float]
    """Seconds by percentile, as `ttft`."""
    ttft: dict[str, float]
    served: float
    """Generated tokens a second."""
    trained: float
    """Tokens a second of the job; 0 without one."""

    @classmethod
    def of(cls, served: Served, trained: float) -> "Window":
        tpot, ttft = (
            {name: percentile(values, share) for name, share in SHARES.items()} for values in (served.gaps, served.ttft)
        )
        return cls(tpot=tpot, ttft=ttft, served=served.rate, trained=trained)


class Result(Struct):
    """Windows of all repeats of one load with one type of weights."""

    weights: str
    load: str
    windows: dict[str, list[Window]] = field(default_factory=dict)
    """By way: `ALONE`, `OURS`, `PEER`."""
    stand_alone: dict[str, list[float]] = field(default_factory=dict)
    """Tokens a second of the job alone, by way."""

    def median(self, way: str, value: Callable[[Window], float]) -> float:
        """Median over the repeats; NaN where there are none."""
        return statistics.median([value(one) for one in self.windows.get(way, [])] or [float("nan")])

    def ratio(self, way: str, value: Callable[[Window], float]) -> float:
        """Median of each repeat's ratio to the same value alone."""
        pairs = zip(self.windows.get(way, []), self.windows[ALONE], strict=False)
        return statistics.median([value(one) / value(alone) for one, alone in pairs] or [float("nan")])

    def kept(self, way: str) -> float:
        """Median of each repeat's share of the stand-alone speed that the job keeps."""
        pairs = zip(self.windows.get(way, []), self.stand_alone.get(way, []), strict=False)
        return statistics.median([one.trained / alone for one, alone in pairs] or [float("nan")])


class Bench:
    """One service with one type of weights, jobs on it, and the other process."""

    def __init__(
        self, service: EngineService, settings: Settings, peer: PeftProcess | None, seconds: float, jobs: int = 1
    ) -> None:
        """`seconds`: of each window; `jobs`: that train at once in our process."""
        self._service = service
        self._peer = peer
        self._seconds = seconds
        share = TrainingShare(LatencyTargets.of(settings.scheduler), min_share=settings.trainer.min_share)
        self._host = TrainingHost(
            share,
            interrupted=lambda: service.has_messages,
            riding_rows=settings.trainer.riding_rows,
            kept_widths=lambda: service.engine.kept_widths,
        )
        self._jobs = [Job(service.decoder, random_epoch(service.vocab_size)) for _ in range(jobs)]
        self._windows = 0

    async def run(
        self, loads: Sequence[Load], repeats: int, weights: str, report: Callable[[str], None], *, full: Load
    ) -> list[Result]:
        """Measure the loads in turns. The rate of random ones is half of what the server does under the `full` load.
        `report` is called with every window, as a line of text."""
        service = self._service
        for job in self._jobs:
            service.on_engine_thread(lambda job=job: self._host.attach(job.run, job.note))  # type: ignore[misc]
        await self._warm_up(loads)
        results = {load.name: Result(weights, load.name) for load in loads}
        ways = (OURS,) if self._peer is None else (OURS, PEER)
        for repeat in range(repeats):
            most = await self._full_rate(full, seed=repeat) if any(load.at_once is None for load in loads) else 0.0
            stand_alone = {way: await self._stand_alone(way) for way in ways}
            for load in loads:
                result = results[load.name]
                rate = max(0.5 * most / load.output, 1 / self._seconds)
                for way in (ALONE, *ways):
                    window = await self._window(load, way, rate)
                    result.windows.setdefault(way, []).append(window)
                    tpot, speeds = 1e3 * window.tpot["p95"], f"{window.served:.0f} and {window.trained:.0f} tok/s"
                    report(f"{weights}, turn {repeat + 1}, {load.name}, {way}: TPOT p95 {tpot:.1f} ms, {speeds}")
                for way, speed in stand_alone.items():
                    result.stand_alone.setdefault(way, []).append(speed)
        for job in self._jobs:
            service.on_engine_thread(lambda job=job: self._host.detach(job.run))  # type: ignore[misc]
        return list(results.values())

    async def _full_rate(self, full: Load, *, seed: int) -> float:
        return (await serve(self._service, full, self._seconds, seed=seed)).rate

    async def _warm_up(self, loads: Sequence[Load]) -> None:
        for load in loads:
            await serve(self._service, load, min(WARM_SECONDS, self._seconds), seed=-1)
        with self._job_of(OURS):
            await until(lambda: all(job.steps > 0 or job.failed is not None for job in self._jobs))
            self._check()
            await serve(self._service, loads[0], min(WARM_SECONDS, self._seconds), seed=-2)

    async def _window(self, load: Load, way: str, rate: float) -> Window:
        self._windows += 1
        with self._job_of(way) as tokens_done:
            before, begun = tokens_done(), time.perf_counter()
            served = await serve(self._service, load, self._seconds, seed=self._windows, requests_per_second=rate)
            trained = (tokens_done() - before) / (time.perf_counter() - begun)
        self._check()
        return Window.of(served, trained)

    async def _stand_alone(self, way: str) -> float:
        """Tokens a second of the job without requests."""
        with self._job_of(way) as tokens_done:
            before, begun = tokens_done(), time.perf_counter()
            await asyncio.sleep(self._seconds)
            await until(lambda: tokens_done() > before)
            return (tokens_done() - before) / (time.perf_counter() - begun)

    @contextmanager
    def _job_of(self, way: str) -> Iterator[Callable[[], float]]:
        """Let a job train meanwhile; gives its tokens so far."""
        if way == PEER and self._peer is not None:
            peer = self._peer
            with peer.running():
                yield lambda: peer.tokens_done
            return
        if way == ALONE:
            yield lambda: 0.0
            return
        self._set_background(self._host)
        try:
            yield lambda: sum(job.run.tokens_done for job in self._jobs)
        finally:
            self._set_background(None)

    def _set_background(self, host: TrainingHost | None) -> None:
        self._service.on_engine_thread(lambda: setattr(self._service, "background", host))

    def _check(self) -> None:
        for job in self._jobs:
            if job.failed is not None:
                raise RuntimeError(f"a job has failed: {job.failed}")
