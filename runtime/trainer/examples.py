"""The noun of training data: one tokenised sequence, and which of its tokens are trained on."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence of n tokens."""

    token_ids: list[int]
    trained: list[bool]
    """[n] Whether each token is a target of the loss. The first never is: nothing comes before it."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        return sum(self.trained)
