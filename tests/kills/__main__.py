"""`python -m tests.kills --kills 200`: a server is killed at random, over jobs, publishing, uploads and batches.

After each start: no acknowledged job, adapter, file or batch is lost, no half one is visible, and no line of a batch is
answered twice. Prints a report; exit code 1 where something was lost.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from tests.adapter_files import make_adapter
from tests.kills.actors import Actor, Publisher, Trainer, Uploader
from tests.kills.forking import Nursery, Server
from tests.kills.ledger import ENDED, Ledger, Lost, expect
from tests.tiny import make_tiny_llama

EARLY = 0.2
"""Share of the servers that are killed while they start."""


class Campaign:
    """One state directory, and the servers that come and go over it."""

    def __init__(self, folder: Path, seed: int, *, longest: float) -> None:
        """`longest`: the most seconds that a server works before it is killed."""
        self._folder = folder
        self._rng = random.Random(seed)
        self._longest = longest
        self._model = make_tiny_llama(folder / "tiny")
        roots = folder / "sources"
        self._sources = [
            make_adapter(self._model, roots / str(n), seed=n, target_modules=["q_proj"]) for n in (1, 2, 3)
        ]
        self._state = folder / "state"
        self.ledger = Ledger(self._state)
        self._owed: dict[str, Any] = {}
        self._nursery = Nursery()
        self.phases: Counter[str] = Counter()

    def run(self, kills: int) -> None:
        """Raises `Lost`."""
        try:
            for number in range(kills):
                self._round(number)
            self._finish()
        finally:
            self._nursery.close()

    def _start(self) -> Server:
        log = self._folder / "server.log"
        return self._nursery.start(self._model, self._state, log, data_roots=self._folder / "sources")

    def _round(self, number: int) -> None:
        server = self._start()
        try:
            if self._rng.random() < EARLY:
                time.sleep(self._rng.uniform(0, 1.0))
                self.phases["starting"] += 1
                return
            server.wait_until_ready()
            with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
                self.ledger.check(http)
            self._work(server)
        finally:
            if server.alive:
                server.end(signal.SIGKILL)
        print(f"kill {number + 1}: {self.ledger.acknowledged} acknowledged, {len(self.ledger.jobs)} jobs", flush=True)

    def _work(self, server: Server) -> None:
        over = threading.Event()
        seed = self._rng.getrandbits(32)
        actors: list[Actor] = [Trainer(self.ledger, server.url, seed, over, self._owed)]
        actors += [Publisher(self.ledger, server.url, seed + n, over, f"ext-{n}", self._sources) for n in range(2)]
        actors.append(Uploader(self.ledger, server.url, seed, over))
        for actor in actors:
            actor.start()
        time.sleep(self._rng.uniform(0, self._longest))
        unanswered = self.ledger.unanswered
        server.end(signal.SIGKILL)
        over.set()
        for actor in actors:
            actor.join(90)
            assert not actor.is_alive()
            if actor.failure is not None:
                raise actor.failure
        self.phases["asked" if self.ledger.unanswered > unanswered else "between"] += 1

    def _finish(self) -> None:
        """Nothing is killed any more: every job comes to its end."""
        server = self._start()
        try:
            server.wait_until_ready()
            with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
                end = time.monotonic() + 300
                while not self._all_ended(http):
                    expect(time.monotonic() < end, "jobs do not come to an end")
                    time.sleep(0.2)
                self.ledger.check(http)
            server.end(signal.SIGTERM)
        finally:
            if server.alive:
                server.end(signal.SIGKILL)
        self._check_log()

    def _all_ended(self, http: httpx.Client) -> bool:
        page = http.get("/admin/jobs", params={"limit": 100}).json()
        batches = http.get("/v1/batches", params={"limit": 100}).json()["data"]
        return all(job["status"] in ENDED for job in page["data"]) and all(
            batch["status"] == "completed" for batch in batches
        )

    def _check_log(self) -> None:
        for line in (self._folder / "server.log").read_text().splitlines():
            try:
                told = json.loads(line)
            except ValueError:
                expect("Traceback" not in line, line)
                continue
            expect(told["level"] != "error" or told["event"] == "job_failed", line)

    def report(self) -> str:
        jobs = Counter(job.status for job in self.ledger.jobs.values())
        deleted = sum(job.deleted for job in self.ledger.jobs.values())
        batches = [batch.answered for batch in self.ledger.batches.values() if batch.ended is not None]
        patterns = ("jobs/*", "adapters/*/*", "files/*", "batches/*")
        finds = [path for pattern in patterns for path in self._state.glob(f"lost+found/*/{pattern}")]
        return (
            f"kills: {dict(self.phases)}; {self.ledger.acknowledged} changes acknowledged, {self.ledger.unanswered} "
            f"without an answer; jobs: {dict(jobs)}, of them {deleted} deleted; files: {len(self.ledger.files)}; "
            f"batches: {len(batches)} with {sum(batches)} answers; {len(finds)} unacknowledged finds in lost+found. "
            "Nothing was lost."
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--longest", type=float, default=3.0)
    parser.add_argument("--keep", action="store_true", help="keep the folder, for a look")
    asked = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="eft-kills-")
    print(f"seed {asked.seed}, {folder}", flush=True)
    campaign = Campaign(Path(folder), asked.seed, longest=asked.longest)
    try:
        campaign.run(asked.kills)
    except Lost as lost:
        print(f"LOST: {lost}\nThe state and the log are in {folder}.")
        return 1
    print(campaign.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
