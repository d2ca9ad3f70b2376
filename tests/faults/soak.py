"""A soak: everything at once for a while, after which memory, descriptors, tasks and blocks are where they were.

    python -m tests.faults.soak --minutes 30

Against one `eft serve` of a tiny model: streams and whole answers, choices, beams, adapters, aborts at random moments,
ids that are used again, bad input from the catalogue, slow and silent sockets, and a loop of train, publish, roll back
and delete; planning, booking and delivery fail now and then by failpoints. Every answer must be one of those that its
request allows, and what is used when all is quiet must not grow. Prints a report, and exits 1 where something is wrong.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.end_to_end.process import ServerProcess
from tests.faults.bodies import BAD_BODIES, BAD_BYTES
from tests.jobs import NEWT_ROWS, newt_recipe
from tests.tiny import make_tiny_llama

FAILPOINTS = "planner.enter=raise:%701;scheduler.book=raise:%9001;engine.deliver=raise:%7001;scheduler.plan=raise:%5003"
"""Injected failures, each at a multiple of the passes of its place."""
INJECTED = "An internal error ended this request"
GROWTH_BYTES = 48 * 1024**2
"""Resident memory that may be gained between the first and the last quiet look: caches fill, arenas fragment."""
CLIENTS = 12
SOAKED = newt_recipe(name="soaked", max_steps=6, save_steps=3, learning_rate=1e-4, loss_watchdog_threshold=1000)


@dataclass(frozen=True)
class Use:
    """What the server holds while nobody asks for anything."""

    resident: int
    descriptors: int
    threads: int
    tasks: int
    blocks: float
    running: int
    waiting: int


@dataclass
class Tally:
    """What was done, and what was wrong."""

    done: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    injected: int = 0
    wrong: list[str] = field(default_factory=list)

    def note(self, what: str, status: int, text: str, allowed: set[int]) -> None:
        self.done[what] += 1
        self.statuses[status] += 1
        if INJECTED in text:
            self.injected += 1
        elif status not in allowed:
            self.wrong.append(f"{what}: {status} {text[:300]}")


class Soak:
    """The load on one server, for `seconds` from when it is run."""

    def __init__(self, server: ServerProcess, seconds: float, seed: int) -> None:
        self._server = server
        self._seconds = seconds
        self._end = 0.0
        self._random = random.Random(seed)
        # Without a limit: in httpx a request that is cancelled while it connects keeps its place in the pool for good.
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False, limits=limits)
        self.tally = Tally()
        self._golden: list[int] = []

    @property
    def _over(self) -> bool:
        return time.monotonic() > self._end

    async def run(self) -> None:
        self._end = time.monotonic() + self._seconds
        async with self._http:
            self._golden = await self._ask_golden() or []
            clients = [self._client(number) for number in range(CLIENTS)]
            await asyncio.gather(*clients, self._train(), self._sockets(), self._scrape())
            after = await self._ask_golden()
            if after is not None and after != self._golden:
                self.tally.wrong.append(f"the golden request changed: {self._golden} became {after}")

    async def _ask_golden(self) -> list[int] | None:
        body = {"prompt": "The newt is a small", "max_tokens": 12, "temperature": 0, "return_token_ids": True}
        answer = await self._http.post("/v1/completions", json=body)
        self.tally.note("golden", answer.status_code, answer.text, {200})
        if answer.status_code != 200:
            return None
        ids: list[int] = answer.json()["choices"][0]["token_ids"]
        return ids

    # -- clients ---------------------------------------------------------------------------------

    async def _client(self, number: int) -> None:
        chances = random.Random(self._random.random() + number)
        kinds = [self._whole, self._stream, self._leave, self._reuse, self._bad, self._beams, self._golden_again]
        while not self._over:
            with contextlib.suppress(httpx.TransportError):
                await chances.choice(kinds)(chances)

    def _body(self, chances: random.Random) -> dict[str, Any]:
        words = ["newt", "road", "rain", "spring", "pond", "lantern", "eft", "é", "\U0001f98e"]
        body: dict[str, Any] = {
            "prompt": " ".join(chances.choices(words, k=chances.randrange(1, 60))),
            "max_tokens": chances.randrange(1, 40),
            "temperature": chances.choice([0, 0.7, 1.5]),
        }
        if chances.random() < 0.3:
            body |= {"n": chances.randrange(1, 4)}
        if chances.random() < 0.2:
            body |= {"model": "soaked"}
        if chances.random() < 0.2:
            body |= {"stop": [chances.choice(["a", "e", "th", "zz"])]}
        return body

    async def _whole(self, chances: random.Random) -> None:
        answer = await self._http.post("/v1/completions", json=self._body(chances))
        self.tally.note("whole", answer.status_code, answer.text, {200, 404, 429})

    async def _stream(self, chances: random.Random) -> None:
        text = ""
        async with self._http.stream("POST", "/v1/completions", json=self._body(chances) | {"stream": True}) as answer:
            async for part in answer.aiter_text():
                text += part
        self.tally.note("stream", answer.status_code, text, {200, 404, 429})
        if answer.status_code == 200 and not text.rstrip().endswith("[DONE]") and "error" not in text:
            self.tally.wrong.append(f"a stream ended without its end: {text[-200:]!r}")

    async def _leave(self, chances: random.Random) -> None:
        """Go away before, while or after the answer comes."""
        body = self._body(chances) | {"stream": chances.random() < 0.7, "max_tokens": 200}
        with contextlib.suppress(TimeoutError, httpx.TransportError):
            async with asyncio.timeout(chances.random() * 0.5):
                await self._http.post("/v1/completions", json=body)
        self.tally.done["left"] += 1

    async def _reuse(self, chances: random.Random) -> None:
        """The same id again, at once after an abort."""
        label = chances.choice(["gateway-7", "gateway-7/beam-1", "gateway-7-1", f"own-{chances.randrange(5)}"])
        headers = {"X-Request-Id": label}
        with contextlib.suppress(TimeoutError, httpx.TransportError):
            async with asyncio.timeout(chances.random() * 0.1):
                await self._http.post("/v1/completions", json=self._body(chances), headers=headers)
        answer = await self._http.post("/v1/completions", json=self._body(chances), headers=headers)
        self.tally.note("reused id", answer.status_code, answer.text, {200, 404, 409, 429})

    async def _beams(self, chances: random.Random) -> None:
        body = {"prompt": "Rain", "use_beam_search": True, "n": chances.randrange(1, 5), "temperature": 0}
        answer = await self._http.post("/v1/completions", json=body | {"max_tokens": chances.randrange(1, 12)})
        self.tally.note("beams", answer.status_code, answer.text, {200, 429})

    async def _bad(self, chances: random.Random) -> None:
        path, body = chances.choice(BAD_BODIES)
        answer = await self._http.post(path, json=body)
        self.tally.note("bad input", answer.status_code, answer.text, {400, 403, 404, 413, 415, 429})

    async def _golden_again(self, chances: random.Random) -> None:
        found = await self._ask_golden()
        if found is not None and found != self._golden:
            self.tally.wrong.append(f"the golden request gave {found}, and before {self._golden}")

    # -- beside them -----------------------------------------------------------------------------

    async def _train(self) -> None:
        """Train, publish, roll back, load, unload and delete, over and over."""
        number = 0
        while not self._over:
            number += 1
            files = [("recipe", ("recipe.yaml", SOAKED.encode(), "application/yaml"))]
            files += [("data", ("train.jsonl", NEWT_ROWS, "application/octet-stream"))]
            made = await self._http.post("/admin/train", files=files)
            self.tally.note("train", made.status_code, made.text, {201, 202, 409, 429})
            if made.status_code not in (201, 202):
                await asyncio.sleep(0.5)
                continue
            job = made.json()["id"]
            if number % 4 == 0:
                await asyncio.sleep(0.3)
                ended = await self._http.post(f"/admin/jobs/{job}/cancel")
                self.tally.note("cancel", ended.status_code, ended.text, {200, 202, 409})
            status = await self._wait_for(job)
            if status == "failed":
                self.tally.wrong.append(f"job {job} failed: {(await self._http.get(f'/admin/jobs/{job}')).text[:500]}")
            if number % 3 == 0:
                back = await self._http.post("/admin/adapters/soaked/rollback")
                self.tally.note("rollback", back.status_code, back.text, {200, 400, 404, 409})
            if number % 7 == 0:
                gone = await self._http.delete("/admin/adapters/soaked")
                self.tally.note("delete", gone.status_code, gone.text, {200, 204, 404, 409})

    async def _wait_for(self, job: str) -> str:
        while True:
            answer = await self._http.get(f"/admin/jobs/{job}")
            status: str = answer.json()["status"]
            if status in ("succeeded", "failed", "cancelled"):
                return status
            await asyncio.sleep(0.2)

    async def _sockets(self) -> None:
        """Hostile bytes, half requests, readers that do not read."""
        host, port = self._server.address
        while not self._over:
            with contextlib.suppress(OSError, TimeoutError):
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(self._random.choice(BAD_BYTES))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(4096), self._random.random())
                writer.close()
                await writer.wait_closed()
            self.tally.done["socket"] += 1

    async def _scrape(self) -> None:
        while not self._over:
            answer = await self._http.get("/metrics")
            self.tally.note("scrape", answer.status_code, "", {200})
            health = await self._http.get("/health")
            self.tally.note("health", health.status_code, health.text, {200})
            await asyncio.sleep(1.0)


async def quiet(server: ServerProcess) -> Use:
    """What is held once all is quiet."""
    async with httpx.AsyncClient(base_url=server.url, timeout=30, trust_env=False) as http:
        for _ in range(150):
            load = (await http.get("/load")).json()
            if not load["running"] and not load["waiting"] and not load["kv_cache_usage"]:
                break
            await asyncio.sleep(0.2)
        await asyncio.sleep(12)  # idle sockets of the catalogue meet their deadlines
        text = (await http.get("/metrics")).text
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if set(sample.labels) <= {"model_name"}
    }
    return Use(
        resident=server.resident_bytes,
        descriptors=server.open_descriptors,
        threads=len(os.listdir(f"/proc/{server.pid}/task")),
        tasks=int(values["eft:event_loop_tasks"]),
        blocks=values["eft:kv_cache_usage_perc"],
        running=int(values["eft:num_requests_running"]),
        waiting=int(values["eft:num_requests_waiting"]),
    )


def compare(first: Use, last: Use) -> list[str]:
    """What has grown."""
    wrong = []
    if last.resident > first.resident + GROWTH_BYTES:
        wrong.append(f"memory grew from {first.resident / 1e6:.0f} to {last.resident / 1e6:.0f} MB")
    for name, allowed in (("descriptors", 4), ("threads", 4), ("tasks", 2)):
        before, after = getattr(first, name), getattr(last, name)
        if after > before + allowed:
            wrong.append(f"{name} grew from {before} to {after}")
    if last.blocks or last.running or last.waiting:
        wrong.append(f"something is left: {last}")
    return wrong


def soak(seconds: float, seed: int, state: Path, model: Path) -> dict[str, Any]:
    """Run it in two halves: what is held after the first is what must be held after the second."""
    flags = {"threads": 1, "header_timeout": "5s", "body_timeout": "5s", "log_level": "error"}
    log = state.with_name("server.log")
    with ServerProcess(str(model), state, failpoints=FAILPOINTS, log=log, **flags) as server:
        halves = [Soak(server, seconds / 2, seed + half) for half in range(2)]
        uses = []
        for half in halves:
            asyncio.run(half.run())
            uses.append(asyncio.run(quiet(server)))
        alive = server.running
    wrong = [line for half in halves for line in half.tally.wrong] + compare(*uses)
    if not alive:
        wrong.append("the server has ended")
    wrong += [line[:2000] for line in log.read_text(encoding="utf-8").splitlines() if not _expected(line)]
    return {
        "seconds": seconds,
        "done": dict(sum((half.tally.done for half in halves), Counter())),
        "statuses": dict(sorted(sum((half.tally.statuses for half in halves), Counter()).items())),
        "injected_failures": sum(half.tally.injected for half in halves),
        "quiet": [vars(use) if hasattr(use, "__dict__") else str(use) for use in uses],
        "wrong": wrong[:50],
        "num_wrong": len(wrong),
    }


def _expected(line: str) -> bool:
    """A line of the server's log (errors only) about an injected failure, or of a library's progress bar."""
    return not line.startswith("{") or "FailpointError" in line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_llama(Path(folder) / "model")
        report = soak(asked.minutes * 60, asked.seed, Path(folder) / "state", model)
    sys.stdout.write(json.dumps({"seed": asked.seed} | report, indent=2) + "\n")
    return 1 if report["num_wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
