"""What can be asked about jobs. Each method is one transaction, and changes nothing."""

import sqlite3
from typing import Any

import msgspec

from runtime.trainer.database import Database
from runtime.trainer.jobs import rows
from runtime.trainer.jobs.records import Checkpoint, Job, JobEvent, JobFile, Progress


class JobReader:
    """Jobs, their files, events, checkpoints and results, as they are stored."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, job_id: str) -> Job:
        """Raises `NotFound`."""
        return await self._database.call(lambda c: rows.get(c, job_id))

    async def describe(self, job_id: str) -> tuple[Job, Progress]:
        return await self._database.call(lambda c: (rows.get(c, job_id), rows.progress(c, job_id)))

    async def page(
        self, *, after: str | None, limit: int, states: tuple[str, ...]
    ) -> tuple[list[tuple[Job, Progress]], bool]:
        """The newest first, from behind the job `after`, and whether there are more. Raises `NotFound`."""

        def work(c: sqlite3.Connection) -> tuple[list[tuple[Job, Progress]], bool]:
            where, values = ["1"], list[Any]()
            if after is not None:
                rows.get(c, after)
                where.append("number < (SELECT number FROM jobs WHERE id = ?)")
                values.append(after)
            if states:
                where.append(f"state IN ({', '.join('?' * len(states))})")
                values.extend(states)
            query = f"SELECT * FROM jobs WHERE {' AND '.join(where)} ORDER BY number DESC LIMIT ?"
            found = [rows.to_job(row) for row in c.execute(query, (*values, limit + 1)).fetchall()]
            return [(job, rows.progress(c, job.id)) for job in found[:limit]], len(found) > limit

        return await self._database.call(work)

    async def files(self, job_id: str) -> list[JobFile]:
        query = "SELECT name, stored_as, bytes FROM job_files WHERE job_id = ? ORDER BY stored_as"
        return await self._database.call(
            lambda c: [
                JobFile(name=row["name"], stored_as=row["stored_as"], bytes=row["bytes"])
                for row in c.execute(query, (job_id,))
            ]
        )

    async def events(self, job_id: str, *, after: int, limit: int) -> tuple[Job, list[JobEvent]]:
        """The events numbered above `after`, oldest first. Raises `NotFound`."""
        return await self._database.call(lambda c: (rows.get(c, job_id), rows.events(c, job_id, after, limit)))

    async def events_after(self, job_id: str, number: int, limit: int) -> list[JobEvent]:
        """The same, and nothing for a job that is not there."""
        return await self._database.call(lambda c: rows.events(c, job_id, number, limit))

    async def metrics(self, job_id: str, *, after: int, limit: int) -> list[dict[str, Any]]:
        """Steps and evaluations above step `after`, each step once, as `StepEvent` and `EvalEvent` have them."""
        query = (
            "SELECT data, max(number) FROM job_events WHERE job_id = ? AND kind IN ('step', 'eval') AND step > ? "
            "GROUP BY step, kind ORDER BY step, kind DESC LIMIT ?"
        )

        def work(c: sqlite3.Connection) -> list[dict[str, Any]]:
            rows.get(c, job_id)
            return [msgspec.json.decode(row["data"]) for row in c.execute(query, (job_id, after, limit))]

        return await self._database.call(work)

    async def gate_metrics(self, job_id: str, step: int) -> dict[str, float]:
        """What is known of the weights of `step`: `train_loss` and `train_accuracy`, and `eval_loss` and
        `eval_accuracy` of the last evaluation up to then. What is unknown or no number is left out."""
        query = (
            "SELECT data FROM job_events WHERE job_id = ? AND kind = ? AND step <= ? "
            "ORDER BY step DESC, number DESC LIMIT 1"
        )

        def work(c: sqlite3.Connection) -> dict[str, float]:
            metrics: dict[str, float] = {"step": step}
            for kind, prefix in (("step", "train"), ("eval", "eval")):
                row = c.execute(query, (job_id, kind, step)).fetchone()
                if row is not None:
                    data = msgspec.json.decode(row["data"])
                    known = [name for name in ("loss", "accuracy") if data[name] is not None]  # None: not a number
                    metrics |= {f"{prefix}_{name}": data[name] for name in known}
            return metrics

        return await self._database.call(work)

    async def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """Oldest first."""
        query = "SELECT step, best, created_at FROM job_checkpoints WHERE job_id = ? ORDER BY step"
        return await self._database.call(
            lambda c: [
                Checkpoint(step=row["step"], best=bool(row["best"]), created_at=row["created_at"])
                for row in c.execute(query, (job_id,))
            ]
        )

    async def result(self, job_id: str) -> int | None:
        """The step whose weights the finished result has."""
        query = "SELECT step FROM job_results WHERE job_id = ?"
        row = await self._database.call(lambda c: c.execute(query, (job_id,)).fetchone())
        return None if row is None else row["step"]

    async def kept(self) -> dict[str, tuple[set[int], bool]]:
        """Job id → the steps of its checkpoints, and whether it has a result: all that may be on disk."""

        def work(c: sqlite3.Connection) -> dict[str, tuple[set[int], bool]]:
            results = {row["job_id"] for row in c.execute("SELECT job_id FROM job_results")}
            found = {row["id"]: (set[int](), row["id"] in results) for row in c.execute("SELECT id FROM jobs")}
            for row in c.execute("SELECT job_id, step FROM job_checkpoints"):
                found[row["job_id"]][0].add(row["step"])
            return found

        return await self._database.call(work)
