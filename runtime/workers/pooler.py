"""Pooling of hidden states: one vector of a prompt, gathered over the chunks in which it is computed."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.messages import Admission, Pooling, Row


class MissingChunk(RuntimeError):
    """A row does not continue what was pooled of its prompt so far."""


@dataclass
class _Pool:
    kind: Pooling
    total: Tensor | None = None
    """[hidden] float64: sum over the tokens so far."""
    count: int = 0
    """Tokens so far."""


class Pooler(Container[int]):
    """Pooled hidden states of each slot's prompt. The sum is in float64, so that it does not depend on the chunks."""

    def __init__(self) -> None:
        self._pools: dict[int, _Pool] = {}

    def __contains__(self, slot: object) -> bool:
        return slot in self._pools

    def admit(self, admission: Admission) -> None:
        """Take in a slot's new sequence."""
        if admission.pooling is not None:
            self._pools[admission.slot] = _Pool(admission.pooling)
        elif self._pools:
            self._pools.pop(admission.slot, None)

    def wanted(self, rows: Sequence[tuple[Row, int]]) -> list[int]:
        """Indices, in the flat batch, of the tokens that are pooled; rows as in `Batch.pooled`."""
        found: list[int] = []
        for row, first in rows:
            if self._pools[row.slot].kind == "mean":
                found += range(first, first + row.count)
            elif row.sample:
                found.append(first + row.count - 1)
        return found

    def add(self, rows: Sequence[tuple[Row, int]], hidden: Tensor) -> dict[int, list[float]]:
        """Pool `hidden` [len(wanted), hidden], after the last norm. Returns the vectors of prompts that are complete,
        by slot; not finite where the model's output was not. Raises `MissingChunk`: then nothing was pooled."""
        for row, _ in rows:
            pool = self._pools[row.slot]
            if pool.kind == "mean" and row.start != pool.count:
                raise MissingChunk(f"slot {row.slot} has {pool.count} tokens pooled, and the row begins at {row.start}")
        done: dict[int, list[float]] = {}
        pools: dict[int, _Pool] = {}
        taken = 0
        for row, _ in rows:
            pool = self._pools[row.slot]
            if pool.kind == "mean":
                part = hidden[taken : taken + row.count].sum(0, dtype=torch.float64)
                taken += row.count
                total = part if pool.total is None else pool.total + part
                pools[row.slot] = _Pool("mean", total, pool.count + row.count)
                if row.sample:
                    done[row.slot] = (total / (pool.count + row.count)).tolist()
            elif row.sample:
                done[row.slot] = hidden[taken].tolist()
                taken += 1
        self._pools |= pools
        return done
