"""Slices of a dataset, as in `train[:20%]`."""

import re
from collections.abc import Callable

from runtime.errors import InvalidRequest

_SPLIT = re.compile(r"train(?:\[(-?[0-9]{1,12}%?)?:(-?[0-9]{1,12}%?)?\])?")


def row_range(split: str | None, count: Callable[[], int], *, param: str) -> tuple[int, int | None]:
    """First row and the one after the last (None: to the end) of a slice; `count` counts all rows.

    A local file is one split, so its name is `train`. Raises `InvalidRequest`.
    """
    if split is None:
        return 0, None
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise InvalidRequest(
            f"split must be train or a slice of it, such as train[:20%] or train[100:200], got {split[:64]!r}: a "
            "file has no other splits.",
            param=param,
        )
    first, last = (bound and _bound(bound, count) for bound in match.groups())
    return first or 0, last if last is None else int(last)


def _bound(text: str, count: Callable[[], int]) -> int:
    if text.endswith("%"):
        share = int(text[:-1])
        total = count()
        return min(total, max(0, round(total * ((share if share >= 0 else 100 + share) / 100))))
    number = int(text)
    return number if number >= 0 else max(0, count() + number)
