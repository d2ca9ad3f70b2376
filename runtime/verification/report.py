"""What was found."""

from msgspec import Struct


class Check(Struct, frozen=True):
    """One thing that was looked at."""

    name: str
    found: str
    ok: bool = True


class Report(Struct, frozen=True):
    """All of it, in the order in which it was looked at."""

    model: str
    checks: list[Check]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)
