"""Any order of submitting, stepping, cancelling, pausing, resuming, stopping and being killed."""

import asyncio
import itertools
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.errors import Conflict
from runtime.trainer.jobs.records import AT_WORK, TRANSITIONS, Job
from tests.trainer.jobs.fakes import World


class Jobs(RuleBasedStateMachine):
    """The manager over runs that step when a rule says so."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.world = World(Path(self.folder.name), steps_itself=False)
        self.ids: list[str] = []
        self.names = (f"a{number}" for number in itertools.count())

    @initialize()
    def begin(self) -> None:
        self.runner.run(self.world.start())

    def teardown(self) -> None:
        try:
            self.runner.run(self._finish())
        finally:
            self.runner.close()
            self.folder.cleanup()

    @rule(steps=st.integers(1, 4), every=st.integers(0, 2), good=st.booleans())
    def submit(self, steps: int, every: int, good: bool) -> None:
        lines = [f"name: {next(self.names)}", f"steps: {steps}", f"every: {every}", "keep: 1"]
        job = self.runner.run(self.world.submit(*lines, *([] if good else ["good: no"])))
        self.ids.append(job.id)

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), action=st.sampled_from(["cancel", "pause", "resume"]))
    def ask(self, data: st.DataObject, action: str) -> None:
        job_id = data.draw(st.sampled_from(self.ids))
        before = self._jobs()[job_id]
        try:
            self.runner.run(getattr(self.world.manager, action)(job_id))
        except Conflict:
            allowed = {
                "cancel": not before.ended and before.state != "publishing",
                "pause": before.state == "queued" or (before.state == "running" and before.wanted != "cancel"),
                "resume": before.state == "paused",
            }
            assert not allowed[action], f"{action} of a {before.state} job"

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(self.ids))
        before = self._jobs()[job_id]
        try:
            self.runner.run(self.world.manager.delete(job_id))
        except Conflict:
            assert not before.ended, f"deletion of a {before.state} job"
        else:
            assert before.ended
            self.ids.remove(job_id)

    @rule(count=st.integers(1, 3))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.world.runs.runs:
                self.runner.run(self.world.step())

    @rule()
    def settle(self) -> None:
        self.runner.run(self.world.settle())

    @rule(killed=st.booleans())
    def restart(self, killed: bool) -> None:
        self.runner.run(self.world.crash() if killed else self.world.stop(0.0))
        self.runner.run(self.world.start())

    @invariant()
    def at_most_one_is_at_work(self) -> None:
        if hasattr(self.world, "manager"):
            assert sum(job.state in AT_WORK for job in self._jobs().values()) <= 1

    @invariant()
    def no_checkpoint_row_without_its_directory(self) -> None:
        if not hasattr(self.world, "manager"):
            return
        store, directories = self.world.manager.store, self.world.manager.directories
        for job_id in self.ids:
            for checkpoint in self.runner.run(store.checkpoints(job_id)):
                folder = directories.checkpoint(job_id, checkpoint.step)
                assert (folder / "step").read_text() == str(checkpoint.step)

    @invariant()
    def on_the_disk_is_what_has_rows(self) -> None:
        """After any end of the process: no job's folder without a job, and nothing of a job that there is, or that was
        deleted, is in lost+found."""
        if hasattr(self.world, "manager"):
            folder = Path(self.folder.name)
            assert {path.name for path in (folder / "jobs").iterdir()} <= set(self.ids)
            assert not {path.name for path in folder.glob("lost+found/*/jobs/*") if (path / "job.json").exists()}

    @invariant()
    def every_state_follows_on_the_one_before(self) -> None:
        for job_id in self.ids:
            _, events = self.runner.run(self.world.manager.store.events(job_id, after=0, limit=10_000))
            assert [event.number for event in events] == list(range(1, len(events) + 1))
            states = [event.data["status"] for event in events if "status" in event.data]
            assert states[-1] == self._jobs()[job_id].state
            for one, other in itertools.pairwise(states):
                assert other in TRANSITIONS[one]

    def _jobs(self) -> dict[str, Job]:
        found, _ = self.runner.run(self.world.manager.store.page(after=None, limit=1000, states=()))
        return {job.id: job for job, _ in found}

    async def _finish(self) -> None:
        """Nobody asks for anything any more: every job comes to an end, or is paused and comes to one when resumed."""
        if not hasattr(self.world, "manager"):
            return
        for job in (await self.world.manager.store.page(after=None, limit=1000, states=("paused",)))[0]:
            await self.world.manager.resume(job[0].id)
        for _ in range(400):
            found, _ = await self.world.manager.store.page(after=None, limit=1000, states=())
            open_jobs = [job for job, _ in found if not job.ended]
            if not open_jobs:
                break
            for job in open_jobs:
                if job.state == "paused":
                    await self.world.manager.resume(job.id)
            await self.world.step() if self.world.runs.runs else await self.world.settle()
        else:
            raise AssertionError(f"stuck: {[(job.id, job.state, job.wanted) for job in open_jobs]}")
        await self.world.stop()


TestJobs = Jobs.TestCase
TestJobs.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
