"""Whether to begin with a new request at once, or to give those a moment that come right behind it.

Requests that ran together often end together, and who asks again is there within milliseconds. If the first of them
were begun at once, all others would wait until its prompt is computed, instead of being computed along with it.
"""

import math

LONGEST = 0.005
"""Seconds that are waited at most."""

SHARE = 0.25
"""Of a usual step: as much of it is waited at most."""


class Gathering:
    """Told before each step. Belongs to the engine thread."""

    def __init__(self) -> None:
        self._most = 0
        """Requests that ran at once since the last time that none did."""
        self._until = math.inf

    def seconds(self, *, running: int, waiting: int, step: float, now: float) -> float:
        """How long to wait for more before the next step; 0 for not at all. `step`: seconds that one usually takes.

        Nobody is waited for while anything runs, nor after requests that came one at a time.
        """
        if running or not waiting:
            self._most = max(self._most, running)
            self._until = math.inf
            return 0.0
        self._until = min(self._until, now + min(LONGEST, SHARE * step))
        if waiting < self._most and now < self._until:
            return self._until - now
        self._most = waiting
        return 0.0
