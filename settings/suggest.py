"""The nearest known name to a mistyped one."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The name of `known` that is most like `name`, or None when none is alike."""
    matches = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def hint(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """`"; did you mean …?"`, or the empty string."""
    match = nearest(name, known, cutoff=cutoff)
    return f"; did you mean {match}?" if match else ""
