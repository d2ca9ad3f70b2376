"""From a plan's rows to tensors: the flat batch, and how it lies over the paged cache."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import PagedRows
from runtime.messages import Row
from runtime.workers.adapter_slots import AdapterTokens

NO_ADAPTERS: Mapping[int, str] = {}


@dataclass(frozen=True)
class Batch:
    """One step's flat batch of T tokens."""

    token_ids: Tensor
    positions: Tensor
    paged: PagedRows
    slots: list[int]
    """Slot of each token after which one is sampled, in batch order: a row's last one, and all of its draft."""
    lengths: list[int]
    """Length of its sequence up to there."""
    sample_at: Tensor
    """[len(slots)] index of that token in the flat batch."""
    adapters: list[AdapterTokens]
    """Who the tokens are for, base rows left out; empty where all rows are for the base."""


def build_batch(
    rows: list[Row],
    tokens: dict[int, list[int]],
    tables: np.ndarray,
    block_size: int,
    device: torch.device,
    adapters: Mapping[int, str] = NO_ADAPTERS,
) -> Batch:
    """`tokens` holds every slot's known tokens and then its draft, `tables` [slots, max_blocks] its block ids
    (int64), `adapters` the keys of the slots that are not for the base.

    Rows of one token come first, by context length, so that those that decode together lie together.
    """
    rows = sorted(rows, key=lambda row: (row.count > 1, row.start if row.count == 1 else 0))
    token_ids = [token for row in rows for token in tokens[row.slot][row.start : row.start + row.count]]
    counts = np.array([row.count for row in rows])
    starts = np.array([row.start for row in rows])
    ends = counts.cumsum()
    positions = np.arange(ends[-1]) - np.repeat(ends - counts - starts, counts)
    owners = np.repeat(np.array([row.slot for row in rows]), counts)
    places = tables[owners, positions // block_size] * block_size + positions % block_size
    width = -(-int((starts + counts).max()) // block_size)
    sampled = [(row, back) for row in rows if row.sample for back in range(len(row.draft), -1, -1)]
    last = {row.slot: int(end) - 1 for row, end in zip(rows, ends, strict=True)}
    return Batch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.from_numpy(positions).to(device),
        paged=PagedRows(
            slots=torch.from_numpy(places).to(device),
            counts=counts.tolist(),
            contexts=starts.tolist(),
            tables=torch.from_numpy(tables[[row.slot for row in rows], :width]).to(device),
            block_size=block_size,
        ),
        slots=[row.slot for row, _ in sampled],
        lengths=[row.start + row.count - back for row, back in sampled],
        sample_at=torch.tensor([last[row.slot] - back for row, back in sampled], dtype=torch.int64, device=device),
        adapters=_adapter_tokens([adapters.get(row.slot, "") for row in rows], counts, device) if adapters else [],
    )


def _adapter_tokens(keys: list[str], counts: np.ndarray, device: torch.device) -> list[AdapterTokens]:
    """`keys` and `counts` are the rows', in batch order."""
    if len(set(keys)) == 1:  # nobody to pick out
        return [AdapterTokens(keys[0], None)] if keys[0] else []
    owners = np.repeat(np.array(keys), counts)
    return [
        AdapterTokens(key, torch.from_numpy(np.flatnonzero(owners == key)).to(device))
        for key in dict.fromkeys(filter(None, keys))
    ]
