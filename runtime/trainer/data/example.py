"""Nouns of training data: a tokenised sequence with the tokens that are trained on, and a problem of a row."""

from dataclasses import dataclass

from runtime.errors import InvalidRequest

# -- example ---------------------------------------------------------------------------------------
#
# The noun of training data: one tokenised sequence, and which of its tokens are trained on.


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence of n tokens."""

    token_ids: list[int]
    trained: list[bool]
    """[n] True for each token that is a target of the loss. The first never is: no token precedes it."""
    weight: float = 1.0
    """Weight of the sequence in the loss; the advantage, in policy gradients."""
    prompt_targets: int = 0
    """The first of the targets that lie in the prompt, for a loss that tells them from the answer's."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        return sum(self.trained)


# -- problems --------------------------------------------------------------------------------------
#
# Rows that cannot be used: which, where and why.

MAX_LISTED = 10
"""Number of bad rows after which reading stops: a file with more of them is of another kind."""


class RowProblem(Exception):
    """This row cannot be an example. The message gives the reason; the reader of the file adds the place."""


class BadRows(InvalidRequest):
    """Up to `MAX_LISTED` rows of the data, each with file, row number and reason."""

    default_code = "invalid_data"


class Rows:
    """Collects the bad rows of all files, and raises `BadRows` for them in the end."""

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
