"""Started ranks as one group: every message goes to all of them, and all answer, or the whole group is lost."""

import contextlib
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from runtime.support.logs import get_logger
from runtime.workers.executor import WorkersLost
from runtime.workers.parallel.messages import Link, LinkClosed, RankMessage, Reply, Stop, decode_reply, encode

GRACE = 5.0
"""Seconds that ranks get to end by themselves on request."""

_HANGUP = getattr(select, "POLLRDHUP", 0)

log = get_logger("ranks")


@dataclass(frozen=True)
class RankProcess:
    """One rank, as the engine's process sees it."""

    number: int
    link: Link
    stream: int
    """Descriptor of the link, to watch."""
    process: subprocess.Popen[bytes] | None
    """None: it runs on another node, or another process started it."""


class RankGroup:
    """A thread of its own starts the ranks and watches over them: a rank ends when the thread that started it does.

    `send` and `receive` are for one thread, the engine's.
    """

    def __init__(self, start: Callable[[], list[RankProcess]], timeout: float, on_loss: Callable[[], None]) -> None:
        """`start` makes the ranks, and raises the error that prevents it. A rank that has not answered after `timeout`
        seconds is lost. `on_loss` is called from any thread, once."""
        self._start = start
        self._timeout = timeout
        self._on_loss = on_loss
        self._members: list[RankProcess] = []
        self._reason: str | None = None
        self._ending = False
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    @property
    def lost(self) -> bool:
        return self._reason is not None

    @property
    def pids(self) -> list[int]:
        """Processes of the ranks that were started here, in their order."""
        return [member.process.pid for member in self._members if member.process is not None]

    # -- asking --------------------------------------------------------------------------------

    def ask(self, message: RankMessage, timeout: float | None = None) -> list[Reply]:
        """Every rank's answer, in their order. Raises `WorkersLost`."""
        self.send([message] * len(self._members))
        return self.receive(timeout)

    def send(self, messages: list[RankMessage]) -> None:
        """One message for each rank. Raises `WorkersLost`."""
        same = all(message is messages[0] for message in messages)
        data = [encode(messages[0])] * len(messages) if same else list(map(encode, messages))
        deadline = time.monotonic() + self._timeout
        for member, one in zip(self._members, data, strict=True):
            try:
                member.link.send(one, deadline)
            except (LinkClosed, TimeoutError) as error:
                raise self._lose(member, error, self._timeout) from None

    def receive(self, timeout: float | None = None) -> list[Reply]:
        """Every rank's answer to the message before. Raises `WorkersLost`."""
        seconds = timeout or self._timeout
        deadline = time.monotonic() + seconds
        replies: list[Reply] = []
        for member in self._members:
            try:
                replies.append(decode_reply(member.link.receive(deadline)))
            except (LinkClosed, TimeoutError) as error:
                raise self._lose(member, error, seconds) from None
        return replies

    def give_up(self, reason: str) -> WorkersLost:
        """End all ranks, at once; the error to raise, with the reason that was found first."""
        with self._lock:
            first = self._reason is None and not self._ending
            self._reason = self._reason or reason
        self._kill()
        if first:
            log.error("ranks_lost", reason=self._reason)
            self._on_loss()
        return WorkersLost(self._reason)

    def end(self) -> None:
        """Send `Stop` to the ranks, and kill any that do not end."""
        with self._lock:
            self._ending = True
        deadline = time.monotonic() + GRACE
        for member in self._members:
            with contextlib.suppress(LinkClosed, TimeoutError):
                member.link.send(encode(Stop()), deadline)
        for member in self._members:
            if member.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    member.process.wait(max(0.0, deadline - time.monotonic()))
        self._kill()
        self._thread.join(GRACE)
        for member in self._members:
            member.link.close()

    # -- watching ------------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            self._members = self._start()
        except BaseException as error:
            self._error = error
            return
        finally:
            self._started.set()
        poll = select.poll()
        by_stream = {member.stream: member for member in self._members}
        for stream in by_stream:
            poll.register(stream, _HANGUP)
        while by_stream:
            for stream, _ in poll.poll():
                poll.unregister(stream)
                gone = by_stream.pop(stream)
                if not self._ending and not self.lost:
                    self.give_up(self._why(gone))

    def _lose(self, member: RankProcess, error: Exception, seconds: float) -> WorkersLost:
        if isinstance(error, TimeoutError):
            return self.give_up(f"rank {member.number} did not answer within {seconds:g} s")
        return self.give_up(self._why(member))

    def _why(self, gone: RankProcess) -> str:
        """A rank that was killed is the cause; the others end because it is gone."""
        ends = {member.number: _exit_code(member) for member in self._members}
        killed = next((number for number, code in ends.items() if code is not None and code < 0), gone.number)
        code = ends[killed]
        if code is None:
            return f"rank {killed} has closed its connection"
        return (
            f"rank {killed} was ended by {_signal(-code)}" if code < 0 else f"rank {killed} ended with exit code {code}"
        )

    def _kill(self) -> None:
        for member in self._members:
            if member.process is not None:
                member.process.kill()
                member.process.wait()


def _exit_code(member: RankProcess) -> int | None:
    if member.process is None:
        return None
    try:
        return member.process.wait(0.2)
    except subprocess.TimeoutExpired:
        return None


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
