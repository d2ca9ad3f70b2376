"""One micro-batch: several sequences packed one after the other, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.trainer.examples import Example


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """T tokens, of which R are followed by one that is trained on."""

    token_ids: Tensor
    """[T] int64"""
    positions: Tensor
    """[T] int64, from 0 in every sequence."""
    sequences: tuple[slice, ...]
    """Where each sequence lies among the tokens."""
    rows: Tensor
    """[R] int64: tokens whose next one is a target."""
    targets: Tensor
    """[R] int64: those next ones."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        return len(self.rows)


def pack(examples: Sequence[Example], device: torch.device) -> MicroBatch:
    """Lay the examples one after the other."""
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    sequences = []
    for example in examples:
        start = len(ids)
        ids += example.token_ids
        positions += range(len(example))
        rows += [start + place - 1 for place, trained in enumerate(example.trained) if trained and place > 0]
        sequences.append(slice(start, len(ids)))
    index = torch.tensor(rows, dtype=torch.int64)
    token_ids = torch.tensor(ids, dtype=torch.int64)
    return MicroBatch(
        token_ids=token_ids.to(device),
        positions=torch.tensor(positions, dtype=torch.int64).to(device),
        sequences=tuple(sequences),
        rows=index.to(device),
        targets=token_ids[index + 1].to(device),
    )
