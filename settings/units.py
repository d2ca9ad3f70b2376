"""Numbers with units, as people write them: `32K` tokens, `4GiB`, `30s`."""

import re
from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta

Count = Annotated[int, Meta(ge=1, extra={"unit": "count"})]
"""A whole number of at least 1; `32K` is 32 × 1024 (context lengths are powers of two), `2M` is 2 × 1024²."""
Bytes = Annotated[int, Meta(ge=1, extra={"unit": "bytes"})]
"""A size; `4GiB` is 4 × 1024³, `4GB` 4 × 1000³."""
Seconds = Annotated[float, Meta(gt=0, extra={"unit": "seconds"})]
"""A duration in seconds; `500ms`, `30s`, `5m`, `2h`."""

_COUNT = {"": 1, "k": 1024, "m": 1024**2}
_BYTES = {
    "": 1, "b": 1,
    "kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4,
    "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4,
    "kib": 1024, "mib": 1024**2, "gib": 1024**3, "tib": 1024**4,
}  # fmt: skip
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SCALES: dict[str, Mapping[str, float]] = {"count": _COUNT, "bytes": _BYTES, "seconds": _SECONDS}
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)")


def parse(text: str, unit: str) -> float:
    """The number that `text` stands for. `unit` is "count", "bytes" or "seconds".

    Raises `ValueError` with the units that are understood.
    """
    scale = _SCALES[unit]
    match = _NUMBER.fullmatch(text.strip())
    factor = scale.get(match[2].lower()) if match else None
    if match is None or factor is None:
        known = ", ".join(name for name in scale if name)
        raise ValueError(f"expected a number with an optional unit ({known}), got {text!r}")
    return float(match[1]) * factor


def show_duration(seconds: float) -> str:
    """A duration for people, in its two largest units: `45 s`, `2 min 10 s`, `1 h 5 min`."""
    whole = max(0, round(seconds))
    minutes, seconds = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
