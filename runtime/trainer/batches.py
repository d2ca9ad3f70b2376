"""Examples into micro-batches: in another order each epoch, the same for the same seed, and as many every time.

Nothing is padded: attention keeps the examples of a micro-batch apart. So a packed bin is no more than a group of
examples that have room in `sequence_len` tokens together. Bins are made once; epochs differ in their order.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from runtime.trainer.data.example import Example
from runtime.trainer.recipe import Recipe

# Examples that are packed at a time: packing all at once would put all long ones first.
PACKING_WINDOW_EXAMPLES = 2048
# Micro-batches within which examples are sorted by length: of like length, and still in no order.
MEGABATCH_MICRO_BATCHES = 50

Bin = tuple[int, ...]
"""Indices of examples."""


def pack(lengths: Sequence[int], capacity: int, *, window: int = PACKING_WINDOW_EXAMPLES) -> list[Bin]:
    """Bins of at most `capacity` tokens that hold every example once: longest first, each into the fullest
    bin that has room for it, by windows.

    An example that is longer than `capacity` has a bin of its own.
    """
    bins: list[Bin] = []
    for start in range(0, len(lengths), window):
        bins += _pack_window(lengths, range(start, min(start + window, len(lengths))), capacity)
    return bins


def pack_in_order(lengths: Sequence[int], capacity: int) -> list[Bin]:
    """Bins of neighbours: an example that has no room in the last bin begins the next."""
    bins: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not bins or length > room:
            bins.append([])
            room = capacity
        bins[-1].append(index)
        room -= length
    return [tuple(bin) for bin in bins]


def grouped(lengths: Sequence[int], group_size: int, capacity: int | None, *, in_order: bool = False) -> list[Bin]:
    """Bins of whole groups of `group_size` examples that follow each other: packed where there is a `capacity`, else
    a bin each. `in_order`: neighbours share a bin."""
    starts = range(0, len(lengths), group_size)
    groups = [tuple(range(start, start + group_size)) for start in starts]
    if capacity is None:
        return groups
    packed = (pack_in_order if in_order else pack)([sum(lengths[i] for i in group) for group in groups], capacity)
    return [tuple(index for number in bin for index in groups[number]) for bin in packed]


def _pack_window(lengths: Sequence[int], indices: range, capacity: int) -> list[Bin]:
    filled: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[index], -1))
        if at == len(room):
            filled.append([index])
            insort(room, (max(0, capacity - lengths[index]), len(filled) - 1))
        else:
            free, number = room.pop(at)
            filled[number].append(index)
            insort(room, (free - lengths[index], number))
    return [tuple(bin) for bin in filled]


def epoch_order(
    bins: Sequence[Bin],
    lengths: Sequence[int],
    *,
    micro_batch_size: int,
    seed: int,
    epoch: int,
    shuffle: bool,
    by_length: bool,
) -> list[list[int]]:
    """The micro-batches of an epoch (from 0), as indices of examples."""
    order = list(range(len(bins)))
    if shuffle:
        random.Random(f"epoch {epoch} of {seed}").shuffle(order)
    if by_length:
        order = _by_length(order, bins, lengths, micro_batch_size)
    groups = [order[start : start + micro_batch_size] for start in range(0, len(order), micro_batch_size)]
    return [[index for number in group for index in bins[number]] for group in groups]


def _by_length(order: list[int], bins: Sequence[Bin], lengths: Sequence[int], micro_batch_size: int) -> list[int]:
    """Sorted by length within megabatches, longest first: what does not fit in memory fails at once."""
    size = MEGABATCH_MICRO_BATCHES * micro_batch_size
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return [
        number for part in parts for number in sorted(part, key=lambda n: -sum(lengths[index] for index in bins[n]))
    ]


def chosen(examples: Sequence[Example], batches: Sequence[Sequence[int]]) -> list[list[Example]]:
    """The micro-batches themselves."""
    return [[examples[index] for index in batch] for batch in batches]


def step_groups(
    epoch: Callable[[int], Sequence[Sequence[Example]]], size: int, *, total: int, done: int
) -> Iterator[tuple[float, Sequence[Sequence[Example]]]]:
    """The micro-batches of each step after the first `done` of `total`, and the epoch that the step ends at. `epoch`
    gives the micro-batches of an epoch (from 0), of which `size` make a step."""
    step = number = 0
    while step < total:
        batches = epoch(number)
        groups = [batches[first : first + size] for first in range(0, len(batches), size)]
        for index, group in enumerate(groups[: total - step], 1):
            if step + index > done:
                yield number + index / len(groups), group
        step += len(groups)
        number += 1


# -- feed ------------------------------------------------------------------------------------------
#
# The data of a run: examples, and their order in each epoch. Can be sent to another process.


@dataclass(frozen=True, kw_only=True)
class ExampleFeed:
    """The data of one run."""

    train: list[Example] = field(repr=False)
    bins: list[Bin] = field(repr=False)
    """Examples that are packed together."""
    recipe: Recipe = field(repr=False)
    """Size and order of the micro-batches."""
    test: list[list[Example]] = field(repr=False)
    """Micro-batches to evaluate on."""

    def epoch(self, number: int) -> Sequence[Sequence[Example]]:
        """The micro-batches of an epoch, from 0. The same for the same feed and epoch, whatever ran before."""
        recipe = self.recipe
        order = epoch_order(
            self.bins,
            [len(example) for example in self.train],
            micro_batch_size=recipe.micro_batch_size,
            seed=recipe.seed,
            epoch=number,
            shuffle=recipe.shuffle_merged_datasets,
            by_length=recipe.group_by_length,
        )
        return chosen(self.train, order)
