"""Guesses at a sequence's next tokens, looked up in the sequence itself (prompt lookup decoding).

When the last few tokens have occurred before, what followed them then is the guess. The worker verifies a
whole draft in one step, and what it keeps is exactly what it would have sampled without. A draft that is
wrong costs computation, so a sequence whose guesses fail stops guessing for a while.
Source: A. Saxena, "Prompt Lookup Decoding", 2023; verification as in arXiv:2211.17192.
"""

from array import array
from dataclasses import dataclass

LONGEST, SHORTEST = 4, 2
"""Tokens at the end that are searched for: first many, then fewer."""

PAST_ACCEPTANCE_WEIGHT = 0.8
"""Weight of the acceptance so far in its running mean; a new draft has the rest."""

PAUSE = 64
"""Tokens without drafts after acceptance has fallen too low."""

_ITEM = array("i").itemsize


@dataclass(frozen=True, slots=True)
class Speculation:
    """Rules for when to draft, and how much."""

    num_tokens: int
    """Longest draft."""
    max_running: int
    """Most running sequences with which drafts are made: a larger batch has no idle arithmetic to spend."""
    min_acceptance: float
    """Share of drafted tokens that must prove right, from 0 to 1."""


class Drafter:
    """One sequence's drafts and how they fared."""

    __slots__ = ("_acceptance", "_bytes", "_known", "_paused_until", "_rules")

    def __init__(self, rules: Speculation) -> None:
        self._rules = rules
        self._bytes = bytearray()
        self._known = 0
        self._acceptance = 1.0
        self._paused_until = 0

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `tokens`, which only ever grow at the end."""
        most = min(most, self._rules.num_tokens)
        if most <= 0 or len(tokens) < self._paused_until:
            return []
        self._bytes += array("i", tokens[self._known :]).tobytes()
        self._known = len(tokens)
        for length in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
            if (at := self._find(length)) is not None:
                return tokens[at : at + most]
        return []

    def learn(self, num_drafted: int, num_accepted: int, num_tokens: int) -> None:
        """Take in that `num_accepted` tokens of a draft proved right; the sequence now has `num_tokens`."""
        share = num_accepted / num_drafted
        self._acceptance = PAST_ACCEPTANCE_WEIGHT * self._acceptance + (1 - PAST_ACCEPTANCE_WEIGHT) * share
        if self._acceptance < self._rules.min_acceptance:
            self._paused_until = num_tokens + PAUSE
            self._acceptance = 1.0

    def _find(self, length: int) -> int | None:
        """Position at which the last earlier occurrence of the last `length` tokens ends."""
        pattern = bytes(self._bytes[-length * _ITEM :])
        end = len(self._bytes) - _ITEM
        while (at := self._bytes.rfind(pattern, 0, end)) >= 0:
            if at % _ITEM == 0:
                return at // _ITEM + length
            end = at + len(pattern) - 1
        return None
