"""Events of a job's journal."""

from runtime.trainer.jobs.records import JobEvent


def event(number: int) -> JobEvent:
    return JobEvent(number=number, created_at=0.0, level="info", kind="message", message="m" * 40, data={})
