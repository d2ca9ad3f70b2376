"""Types of the settings' values, and numbers with units, as people write them: `32K` tokens, `4GiB`, `30s`."""

import re
from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta


def doc(text: str, *, example: object = None, secret: bool = False, expects: str | None = None) -> Meta:
    """The one line that `--help` and the reference page print for a field.

    `example` is a value for the example file, where the default (None) has no TOML form; the value of
    a `secret` field is never printed. `expects` says what a value must be, where the type does not.
    """
    return Meta(
        description=text,
        examples=None if example is None else [example],
        extra={"secret": secret, "expects": expects},
    )


Count = Annotated[int, Meta(ge=1, extra={"unit": "count"})]
"""A whole number of at least 1; `32K` is 32 × 1024 (context lengths are powers of two), `2M` is 2 × 1024²."""
Bytes = Annotated[int, Meta(ge=1, extra={"unit": "bytes"})]
"""A size; `4GiB` is 4 × 1024³, `4GB` 4 × 1000³."""
BytesOrNone = Annotated[int, Meta(ge=0, extra={"unit": "bytes"})]
"""A size, or 0."""
Seconds = Annotated[float, Meta(gt=0, extra={"unit": "seconds"})]
"""A duration in seconds; `500ms`, `30s`, `5m`, `2h`."""

NonEmpty = Annotated[str, Meta(min_length=1)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Share = Annotated[float, Meta(ge=0.0, le=0.9)]
LatencyRatio = Annotated[float, Meta(gt=1.0, le=100.0)]
Percentile = Annotated[float, Meta(ge=0.5, le=0.999)]
LoggedShare = Annotated[float, Meta(ge=0.0, le=1.0)]
NonzeroShare = Annotated[float, Meta(gt=0.0, le=1.0)]
TenantWeight = Annotated[str, Meta(pattern=r"^[0-9a-f]{12}=(?!0+(\.0+)?$)[0-9]{1,6}(\.[0-9]{1,6})?$")]
HostPattern = Annotated[
    str, Meta(pattern=r"^(\*|(\*\.)?[A-Za-z0-9._-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?)$")
]
OriginPattern = Annotated[str, Meta(pattern=r"^(\*|[A-Za-z][A-Za-z0-9+.-]*://[A-Za-z0-9._\[\]:-]+)$")]
HubAdapter = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*=[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[^@=\s]+)?$")
]
RootPath = Annotated[str, Meta(pattern=r"^((/[A-Za-z0-9._~-]+)+)?$")]
Device = Annotated[str, Meta(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")]
TrainingDevice = Annotated[str, Meta(pattern=r"^(cpu|cuda:[0-9]{1,3})$")]
Restarts = Annotated[int, Meta(ge=0, le=99)]

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
