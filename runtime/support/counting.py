"""Counts by key that forget the keys which they have none of."""

from collections import Counter
from typing import TypeVar

Key = TypeVar("Key")


def count_down(counter: Counter[Key], key: Key) -> None:
    """Count one less of a key, which is dropped with the last one."""
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
