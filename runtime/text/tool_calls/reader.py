"""Incremental parsers of answers with calls of tools: text goes in, content and calls come out.

A parser is one generator that reads a character at a time, so the pieces in which a text arrives cannot change what
comes out. What turns out to be no call is content, unchanged; once the name of a call is out, its arguments follow as
they are written.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")

Reading = Generator[None, str, T]
"""Part of a parser: it is sent characters, and the empty string at the end, and returns a result."""


@dataclass(frozen=True)
class CallDelta:
    """The beginning of a call, or more of its arguments."""

    index: int
    """Number of the call in the answer."""
    name: str | None = None
    """Name of the function; on the first delta of a call, and only there."""
    arguments: str = ""
    """Piece of the JSON text of the arguments."""


Event = str | CallDelta
"""Content, or a piece of a call."""


class ToolParser(Protocol):
    """Parser of one answer."""

    def feed(self, text: str) -> list[Event]:
        """Events that more text of the answer brings."""

    def finish(self) -> list[Event]:
        """Events at the end of the answer: what was held back. Nothing may be fed afterwards."""


class CharacterParser(ABC):
    """Base of the parsers: a subclass implements `_read`, with the helpers here."""

    def __init__(self, names: Collection[str]) -> None:
        """`names`: those of the tools. A call of any other is content."""
        self._names = frozenset(names)
        self._events: list[Event] = []
        self._back: deque[str] = deque()
        """Characters that are read again."""
        self._space = ""
        """Whitespace that is content if more content follows, and none between or before calls."""
        self.num_calls = 0
        self._ended = False
        self._reading = self._read()
        next(self._reading, None)

    @abstractmethod
    def _read(self) -> Reading[None]:
        """Read the whole answer, character by character."""

    def feed(self, text: str) -> list[Event]:
        for char in text:
            self._reading.send(char)
        return self._take()

    def finish(self) -> list[Event]:
        self._ended = True
        try:
            self._reading.send("")
        except StopIteration:
            pass
        else:
            raise AssertionError("a parser reads on after the end")
        if not self.num_calls:
            self._write(self._space)
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return _joined(events)

    # -- for subclasses ------------------------------------------------------------------------

    def _next(self) -> Reading[str]:
        """The next character; the empty string at the end, as often as it is asked for."""
        if self._back:
            return self._back.popleft()
        if self._ended:
            return ""
        return (yield)

    def _unread(self, text: str) -> None:
        self._back.extendleft(reversed(text))

    def _content(self, text: str) -> None:
        """Write content. Whitespace at its end waits for what comes next."""
        kept = text.rstrip()
        if kept:
            self._write(self._space + kept)
            self._space = text[len(kept) :]
        else:
            self._space += text

    def _write(self, text: str) -> None:
        if text:
            self._events.append(text)

    def _begin_call(self, name: str) -> int:
        self._space = ""
        self._events.append(CallDelta(self.num_calls, name))
        self.num_calls += 1
        return self.num_calls - 1

    def _arguments(self, index: int, text: str) -> None:
        if text:
            self._events.append(CallDelta(index, arguments=text))

    def _skip_space(self) -> Reading[str]:
        """Read whitespace, and return it. The character after it is not read."""
        space = ""
        while (char := (yield from self._next())).isspace():
            space += char
        self._unread(char)
        return space

    def _expect(self, text: str) -> Reading[str]:
        """Read `text`, or as much of it as is there. Returns what was read; the character after it is not read."""
        read = ""
        while read != text:
            char = yield from self._next()
            if char != text[len(read)]:
                self._unread(char)
                break
            read += char
        return read

    def _until_marker(self, markers: Sequence[str]) -> Reading[str]:
        """Content up to the first of some markers, which is returned; the empty string at the end."""
        held = ""
        while True:
            if held in markers:
                return held
            char = yield from self._next()
            if not char:
                self._content(held)
                return ""
            held += char
            while held and not any(marker.startswith(held) for marker in markers):
                self._content(held[0])
                held = held[1:]


def _joined(events: list[Event]) -> list[Event]:
    """The events with neighbours of the same kind as one."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, str) and isinstance(last, str):
            found[-1] = last + event
        elif (
            isinstance(event, CallDelta)
            and isinstance(last, CallDelta)
            and event.name is None
            and last.index == event.index
        ):
            found[-1] = CallDelta(last.index, last.name, last.arguments + event.arguments)
        else:
            found.append(event)
    return found
