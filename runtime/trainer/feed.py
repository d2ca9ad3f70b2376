"""What a run is fed with: examples, and in which order each epoch takes them. Can be sent to another process."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from runtime.trainer import batches
from runtime.trainer.examples import Example


@dataclass(frozen=True, kw_only=True)
class Feed:
    """The data of one run."""

    train: list[Example] = field(repr=False)
    bins: list[batches.Bin] = field(repr=False)
    """Examples that are packed together."""
    micro_batch_size: int
    """Bins of a micro-batch."""
    seed: int
    shuffle: bool
    by_length: bool
    test: list[list[Example]] = field(repr=False)
    """Micro-batches to evaluate on."""

    def epoch(self, number: int) -> Sequence[Sequence[Example]]:
        """The micro-batches of an epoch, from 0. The same for the same feed and epoch, whatever ran before."""
        order = batches.epoch_order(
            self.bins,
            [len(example) for example in self.train],
            micro_batch_size=self.micro_batch_size,
            seed=self.seed,
            epoch=number,
            shuffle=self.shuffle,
            by_length=self.by_length,
        )
        return batches.chosen(self.train, order)
