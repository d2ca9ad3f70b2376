"""What `eft doctor` looks at. Each module finds the facts of one area, and raises nothing."""

from msgspec import Struct


class Finding(Struct, frozen=True):
    """One fact. `problem` says what is broken and the way out; None when nothing is."""

    area: str
    name: str
    value: str
    problem: str | None = None


def size(number: float) -> str:
    """Bytes for people: `3.9 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
