"""The nearest known name to a mistyped one."""

import difflib
from collections.abc import Iterable
from functools import lru_cache

LONGEST = 64
"""Characters of a name that is compared: a longer one is nothing mistyped."""
CANDIDATES = 8
"""Known names that are compared in full, those with the most pairs of letters in common: difflib takes a tenth of a
millisecond for each."""


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The name of `known` that is most like `name`, or None when none is alike."""
    if len(name) > LONGEST:
        return None
    pairs = _pairs(name.lower())
    alike = [(len(pairs & _pairs(other)) / (len(pairs) + len(_pairs(other))), other) for other in known]
    likeliest = [other for _, other in sorted(alike, reverse=True)[:CANDIDATES]]
    matches = difflib.get_close_matches(name.lower(), likeliest, n=1, cutoff=cutoff)
    return matches[0] if matches else None


def hint(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """`"; did you mean …?"`, or the empty string."""
    match = nearest(name, known, cutoff=cutoff)
    return f"; did you mean {match}?" if match else ""


@lru_cache(4096)
def _pairs(text: str) -> frozenset[str]:
    """Neighbouring letters, the ends of the text among them."""
    padded = f" {text} "
    return frozenset(padded[at : at + 2] for at in range(len(padded) - 1))
