"""The numbers of one step of decoding, a column a row: made on the host, copied at once, read where they always lie."""

import numpy as np
import torch
from torch import Tensor

INTEGERS = (
    "token_id",  # -1: the last token that was sampled in the slot, which the device knows
    "position",
    "place",  # of the token's keys and values in the cache
    "slot",
    "adapter",  # number in the adapter table
    "table_index",  # where `block` belongs in the slot's table
    "block",
    "top_k",
    "sampled",  # 1: drawn; 0: greedy
    "history",  # row of the counts of tokens
)
REALS = ("uniform", "temperature", "top_p", "min_p", "repetition", "frequency", "presence")

_INTEGER_ROWS = {name: index for index, name in enumerate(INTEGERS)}
_REAL_ROWS = {name: index for index, name in enumerate(REALS)}


class StagedStep:
    """A step's numbers on the host, zero at first: `values` [numbers, size] int64, the last ones float64's bits."""

    def __init__(self, size: int) -> None:
        self.values = np.zeros((len(INTEGERS) + len(REALS), size), dtype=np.int64)
        self._reals = self.values[len(INTEGERS) :].view(np.float64)

    def integers(self, name: str) -> np.ndarray:
        """[size] int64, to be filled."""
        found: np.ndarray = self.values[_INTEGER_ROWS[name]]
        return found

    def reals(self, name: str) -> np.ndarray:
        """[size] float64, to be filled."""
        found: np.ndarray = self._reals[_REAL_ROWS[name]]
        return found


class StepInputs:
    """The same on the device, for recorded work over `size` rows."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.values = torch.zeros(len(INTEGERS) + len(REALS), size, dtype=torch.int64, device=device)
        self._reals = self.values[len(INTEGERS) :].view(torch.float64)

    def integers(self, name: str) -> Tensor:
        """[size] int64."""
        return self.values[_INTEGER_ROWS[name]]

    def reals(self, name: str) -> Tensor:
        """[size] float64."""
        return self._reals[_REAL_ROWS[name]]

    def floats(self, name: str) -> Tensor:
        """[size] float32."""
        return self.reals(name).float()
