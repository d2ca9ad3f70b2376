"""Rows that cannot be used: which, where and why."""

from runtime.errors import InvalidRequest

MAX_LISTED = 10
"""Reading stops after so many bad rows: a file with more of them is of another kind."""


class RowProblem(Exception):
    """This row cannot be an example. The message says why; whoever reads the file adds where."""


class BadRows(InvalidRequest):
    """Up to `MAX_LISTED` rows of the data, each with file, row number and reason."""

    default_code = "invalid_data"


class Rows:
    """Collects the bad rows of all files, and says so in the end."""

    def __init__(self) -> None:
        self._found: list[str] = []
        self._param: str | None = None

    def add(self, param: str, file: str, row: int, reason: object) -> None:
        """Note a bad row (from 1) of a file. Raises `BadRows` when it is one too many."""
        self._param = self._param or param
        self._found.append(f"{file}, row {row}: {reason}")
        if len(self._found) >= MAX_LISTED:
            self.check(more=True)

    def check(self, *, more: bool = False) -> None:
        """Raise `BadRows` if there were any."""
        if not self._found:
            return
        head = f"The first {len(self._found)} rows that cannot be used:" if more else "Rows that cannot be used:"
        raise BadRows("\n".join([head, *self._found]) if len(self._found) > 1 else self._found[0], param=self._param)
