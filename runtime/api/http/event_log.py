"""Server-sent events that are kept in memory: clients follow them, and go on from where they left off.

A log lives as long as the process, at most. All logs share one limit of bytes: the oldest that have ended go first.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable


class EventLog:
    """Encoded events of one stream."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.num_events = 0
        """Events so far, also of a log that was dropped."""
        self.num_bytes = 0
        self.ended = False
        self.dropped = False
        self._changed = asyncio.Event()

    async def follow(self, start: int, lost: Callable[[int], bytes]) -> AsyncGenerator[bytes, None]:
        """The events from the index `start` on, until the stream's end. If the log is dropped before that, `lost` gives
        the last event, from its index."""
        number = start
        while True:
            while number < len(self.events):
                yield self.events[number]
                number += 1
            if self.dropped or self.ended:
                break
            await self._changed.wait()
        if self.dropped and not (self.ended and number == self.num_events):
            yield lost(number)

    def wake(self) -> None:
        """Let the followers see a change."""
        self._changed.set()
        self._changed = asyncio.Event()


class EventLogs:
    """The logs of a server, by ids."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._logs: dict[str, EventLog] = {}

    def begin(self, id: str) -> EventLog:
        """A new log."""
        log = self._logs[id] = EventLog()
        return log

    def get(self, id: str) -> EventLog | None:
        """The log; None if there is none, or no longer."""
        return self._logs.get(id)

    def append(self, id: str, event: bytes) -> None:
        """Add an event to a log, unless that was dropped, and drop others, or this one, for its room."""
        log = self._logs.get(id)
        if log is None:
            return
        log.events.append(event)
        log.num_events += 1
        log.num_bytes += len(event)
        self._num_bytes += len(event)
        log.wake()
        while self._num_bytes > self._max_bytes:
            self.drop(next((other for other, one in self._logs.items() if one.ended), id))

    def end(self, id: str) -> None:
        """Note that no more events come to a log."""
        if (log := self._logs.get(id)) is not None:
            log.ended = True
            log.wake()

    def drop(self, id: str) -> None:
        """Forget a log, if it is there."""
        if (log := self._logs.pop(id, None)) is not None:
            self._num_bytes -= log.num_bytes
            log.events, log.dropped = [], True
            log.wake()
