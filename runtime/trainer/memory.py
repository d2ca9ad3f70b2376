"""What to do when memory runs out: know it when it happens, and ask for half as much."""

from collections.abc import Sequence

import torch

from runtime.trainer.examples import Example


def is_out_of_memory(error: BaseException) -> bool:
    """Torch's CPU allocator has no exception of its own for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def halve(micro_batches: Sequence[Sequence[Example]]) -> list[Sequence[Example]]:
    """Every micro-batch in two; one of a single sequence stays as it is."""
    halves: list[Sequence[Example]] = []
    for examples in micro_batches:
        middle = (len(examples) + 1) // 2
        halves += [part for part in (examples[:middle], examples[middle:]) if part]
    return halves
