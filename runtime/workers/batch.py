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
    token_ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    slots: list[int] = []
    lengths: list[int] = []
    sample_at: list[int] = []
    # Plain integers: most rows are of one token, and a step's few of them are quicker so than by calls of numpy.
    for row in rows:
        slot, start, end = row.slot, row.start, row.start + row.count
        table = tables[slot]
        if row.count == 1:
            token_ids.append(tokens[slot][start])
            positions.append(start)
            places.append(int(table[start // block_size]) * block_size + start % block_size)
        else:
            span = np.arange(start, end)
            token_ids += tokens[slot][start:end]
            positions += range(start, end)
            places += (table[span // block_size] * block_size + span % block_size).tolist()
        if row.sample:
            draft = len(row.draft)
            slots += [slot] * (draft + 1)
            lengths += range(end - draft, end + 1)
            sample_at += range(len(token_ids) - 1 - draft, len(token_ids))
    width = -(-max(row.start + row.count for row in rows) // block_size)
    counts = [row.count for row in rows]
    flat = torch.tensor([token_ids, positions, places], device=device)
    return Batch(
        token_ids=flat[0],
        positions=flat[1],
        paged=PagedRows(
            slots=flat[2],
            counts=counts,
            contexts=[row.start for row in rows],
            tables=torch.from_numpy(tables[[row.slot for row in rows], :width]).to(device),
            block_size=block_size,
        ),
        slots=slots,
        lengths=lengths,
        sample_at=torch.tensor(sample_at, dtype=torch.int64, device=device),
        adapters=_adapter_tokens([adapters.get(row.slot, "") for row in rows], counts, device) if adapters else [],
    )


def _adapter_tokens(keys: list[str], counts: list[int], device: torch.device) -> list[AdapterTokens]:
    """`keys` and `counts` are the rows', in batch order."""
    if len(set(keys)) == 1:  # nobody to pick out
        return [AdapterTokens(keys[0], None)] if keys[0] else []
    owners = np.repeat(np.array(keys), counts)
    return [
        AdapterTokens(key, torch.from_numpy(np.flatnonzero(owners == key)).to(device))
        for key in dict.fromkeys(filter(None, keys))
    ]
