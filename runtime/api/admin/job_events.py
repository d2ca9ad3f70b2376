"""A job's events as a stream: those that were, and those that come, until the job's end."""

import msgspec

from runtime.api.admin.query import integer
from runtime.api.admin.views import event_item
from runtime.api.handle import AnyRequest
from runtime.api.sse import DONE, Events
from runtime.errors import InvalidRequest
from runtime.trainer.jobs.manager import JobManager

BEAT = 15.0
"""Seconds of silence after which a comment is sent, so that nobody in between takes the connection for dead."""

_BATCH = 500
_MOST = 2**53


async def event_stream(jobs: JobManager, job_id: str, after: int) -> Events:
    """Events numbered above `after`, each with its number as id; `[DONE]` at the job's end.

    It also ends, without that, when the server stops: the client comes back with its Last-Event-ID.
    """
    while not jobs.feed.closed:
        ticket = jobs.feed.ticket(job_id)
        try:
            job, events = await jobs.store.events(job_id, after=after, limit=_BATCH)
            for event in events:
                yield b"id: %d\ndata: %s\n\n" % (event.number, msgspec.json.encode(event_item(event)))
                after = event.number
            if len(events) == _BATCH:
                continue
            if job.ended:
                yield DONE
                return
            if not await jobs.feed.until(ticket, BEAT):
                yield b": still here\n\n"
        finally:
            ticket.cancel()


def first_number(request: AnyRequest) -> int:
    """After which event to begin: Last-Event-ID, which a browser sends when it reconnects, or `after`."""
    last = request.headers.get("last-event-id")
    if last is None:
        return integer(request, "after", default=0, least=0, most=_MOST)
    if not (last.isascii() and last.isdigit() and int(last[:20]) <= _MOST):
        raise InvalidRequest(f"Last-Event-ID: expected an event's number, got `{last[:50]}`.", param="Last-Event-ID")
    return int(last)
