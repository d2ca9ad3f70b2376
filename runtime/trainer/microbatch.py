"""One micro-batch: several sequences laid one after the other, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.trainer.data.example import Example


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
