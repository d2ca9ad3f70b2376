"""What the engine thread does between its steps, and when nobody asks for anything."""

from typing import Protocol


class Background(Protocol):
    """Work in small slices. All of it on the engine thread, but `ready`, which anybody may ask."""

    @property
    def ready(self) -> bool:
        """Is there work now? When there is none, the thread sleeps until it is woken."""

    def idle(self) -> None:
        """Nothing else is to be done: work, but come back soon."""

    def between_steps(self, step_seconds: float, *, decoding: bool, first_tokens_due: bool) -> None:
        """A step took so long, and the next one waits. `decoding`: it did nothing else; `first_tokens_due`: some
        request has no token yet."""
