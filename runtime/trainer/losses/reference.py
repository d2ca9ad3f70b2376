"""Log-probabilities of rows under the reference, each computed once in a job.

The reference never changes, so neither do they. They are kept with checkpoints: computed again beside other rows, they
would be rounded otherwise, and a run that goes on would not end as the one that was not stopped.
"""

import hashlib
from array import array
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from runtime.trainer.data.example import Example

_KEY_BYTES = 16


class ReferenceScores:
    """Log-probabilities of targets by the tokens of their row, on the CPU."""

    def __init__(self) -> None:
        self._known: dict[bytes, Tensor] = {}

    def find(self, examples: Sequence[Example], device: torch.device) -> Tensor | None:
        """[R] of all targets of a micro-batch; None where some of its rows are not known."""
        found = [self._known.get(_key(example)) for example in examples]
        if any(one is None for one in found):
            return None
        return torch.cat([one for one in found if one is not None]).to(device)

    def add(self, examples: Sequence[Example], logprobs: Tensor) -> None:
        """Keep [R] of a micro-batch. Rows that are known stay as they are."""
        parts = torch.split(logprobs.cpu(), [example.num_trained for example in examples])
        for example, part in zip(examples, parts, strict=True):
            self._known.setdefault(_key(example), part.clone())

    def capture(self) -> dict[str, Tensor]:
        """All of it in three tensors; none where nothing is known."""
        if not self._known:
            return {}
        return {
            "keys": torch.tensor([list(key) for key in self._known], dtype=torch.uint8),
            "lengths": torch.tensor([len(part) for part in self._known.values()]),
            "logprobs": torch.cat(list(self._known.values())),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take an earlier `capture`."""
        if not tensors:
            return
        parts = torch.split(tensors["logprobs"], tensors["lengths"].tolist())
        for key, part in zip(tensors["keys"].tolist(), parts, strict=True):
            self._known[bytes(key)] = part


def _key(example: Example) -> bytes:
    words = array("q", example.token_ids).tobytes() + bytes(example.trained)
    return hashlib.blake2b(words, digest_size=_KEY_BYTES).digest()
