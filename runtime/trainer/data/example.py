"""Nouns of training data: a tokenised sequence with the tokens that are trained on, a micro-batch of several, and a
problem of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.errors import InvalidRequest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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


# -- micro-batch ------------------------------------------------------------------------------------
#
# Several sequences laid one after the other, without padding, as tensors.


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """T tokens of S sequences, of which R are followed by one that is trained on."""

    token_ids: Tensor
    """[T] int64"""
    positions: Tensor
    """[T] int64, from 0 in every sequence."""
    sequences: tuple[slice, ...]
    """[S] place of each sequence among the tokens."""
    rows: Tensor
    """[R] int64: tokens whose next one is a target, sequence by sequence."""
    targets: Tensor
    """[R] int64: the ids of those next ones."""
    trained: tuple[int, ...]
    """[S] number of targets of each sequence."""
    weights: Tensor
    """[S] float32: weight of each sequence in the loss."""
    prompt_targets: tuple[int, ...] = ()
    """[S] `Example.prompt_targets` of each sequence."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        return len(self.rows)


def collate(examples: Sequence[Example], device: torch.device) -> MicroBatch:
    """Lay the examples one after the other."""
    import torch  # recipes are read, and plans are made, without it

    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    sequences = []
    trained = []
    for example in examples:
        start = len(ids)
        ids += example.token_ids
        positions += range(len(example))
        targets = [start + place - 1 for place, is_target in enumerate(example.trained) if is_target and place > 0]
        rows += targets
        trained.append(len(targets))
        sequences.append(slice(start, len(ids)))
    index = torch.tensor(rows, dtype=torch.int64)
    token_ids = torch.tensor(ids, dtype=torch.int64)
    return MicroBatch(
        token_ids=token_ids.to(device),
        positions=torch.tensor(positions, dtype=torch.int64).to(device),
        sequences=tuple(sequences),
        rows=index.to(device),
        targets=token_ids[index + 1].to(device),
        trained=tuple(trained),
        weights=torch.tensor([example.weight for example in examples]).to(device),
        prompt_targets=tuple(example.prompt_targets for example in examples),
    )


def joined_batch(batches: Sequence[MicroBatch]) -> MicroBatch:
    """Micro-batches laid one after the other as one."""
    import torch

    if len(batches) == 1:
        return batches[0]
    starts = [sum(batch.num_tokens for batch in batches[:index]) for index in range(len(batches))]
    placed = list(zip(batches, starts, strict=True))
    return MicroBatch(
        token_ids=torch.cat([batch.token_ids for batch in batches]),
        positions=torch.cat([batch.positions for batch in batches]),
        sequences=tuple(slice(at + one.start, at + one.stop) for batch, at in placed for one in batch.sequences),
        rows=torch.cat([batch.rows + at for batch, at in placed]),
        targets=torch.cat([batch.targets for batch in batches]),
        trained=tuple(count for batch in batches for count in batch.trained),
        weights=torch.cat([batch.weights for batch in batches]),
        prompt_targets=tuple(count for batch in batches for count in batch.prompt_targets),
    )


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
