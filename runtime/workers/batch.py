"""Conversion of a plan's rows to tensors: the flat batch, and its positions in the paged cache."""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import PagedRows
from runtime.messages import Move, Row
from runtime.model.attention import KVCache
from runtime.workers.adapter_slots import AdapterTokens


class TokenOutOfRange(ValueError):
    """A token id without a row in the embedding. Requests are checked before; this keeps memory safe."""


NO_ADAPTERS: Mapping[int, str] = {}
NOT_EXTENDED: Mapping[int, int] = {}


@dataclass(frozen=True)
class FlatBatch:
    """One step's flat batch of T tokens."""

    rows: list[Row]
    """In the order of the batch."""
    token_ids: Tensor
    positions: Tensor
    paged: PagedRows
    slots: list[int]
    """Slot of each token after which one is sampled, in batch order: a row's last one, and all of its draft."""
    lengths: list[int]
    """Length of its sequence up to there."""
    logits_indices: Tensor
    """[len(slots)] index of that token in the flat batch."""
    adapters: list[AdapterTokens]
    """Tokens by adapter version, base rows left out; empty where all rows are for the base."""
    pooled: list[tuple[Row, int]]
    """Rows whose hidden states are pooled, each with the index of its first token in the flat batch."""


def build_batch(
    rows: list[Row],
    tokens: dict[int, list[int]],
    tables: np.ndarray,
    block_size: int,
    device: torch.device,
    adapters: Mapping[int, str] = NO_ADAPTERS,
    *,
    vocab_size: int | None = None,
    extended: Mapping[int, int] = NOT_EXTENDED,
    pooled: Container[int] = (),
) -> FlatBatch:
    """`tokens` holds every slot's tokens so far and then its draft, `tables` [slots, max_blocks] its block ids
    (int64), `adapters` the keys of the slots that are not for the base. Slots in `pooled` sample nothing.

    Rows of one token come first, by context length, so that rows that decode together lie together. Raises
    `TokenOutOfRange` for an id beyond `vocab_size`, or beyond the number that `extended` has for its slot: kernels that
    read quantised embeddings trust ids, and a device that checks them is lost to the process.
    """
    rows = sorted(rows, key=lambda row: (row.count > 1, row.start if row.count == 1 else 0))
    token_ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    slots: list[int] = []
    lengths: list[int] = []
    logits_indices: list[int] = []
    pooling: list[tuple[Row, int]] = []
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
        if slot in pooled:
            pooling.append((row, len(token_ids) - row.count))
        elif row.sample:
            draft = len(row.draft)
            slots += [slot] * (draft + 1)
            lengths += range(end - draft, end + 1)
            logits_indices += range(len(token_ids) - 1 - draft, len(token_ids))
    width = -(-max(row.start + row.count for row in rows) // block_size)
    counts = [row.count for row in rows]
    found = np.array([token_ids, positions, places], dtype=np.int64)
    if vocab_size is not None and not 0 <= found[0].min() <= found[0].max() < vocab_size:
        _check_ids(found[0], [(row.count, extended.get(row.slot, vocab_size)) for row in rows])
    flat = torch.from_numpy(found).to(device)
    return FlatBatch(
        rows=rows,
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
        logits_indices=torch.tensor(logits_indices, dtype=torch.int64, device=device),
        adapters=_adapter_tokens([adapters.get(row.slot, "") for row in rows], counts, device) if adapters else [],
        pooled=pooling,
    )


def _check_ids(token_ids: np.ndarray, limits: Sequence[tuple[int, int]]) -> None:
    """`limits`: number of tokens of each row, in batch order, and the number of ids that are valid for it."""
    ends = np.repeat([limit for _, limit in limits], [count for count, _ in limits])
    wrong = np.flatnonzero((token_ids < 0) | (token_ids >= ends))
    if len(wrong):
        rows = ends[wrong[0]]
        raise TokenOutOfRange(f"token id {token_ids[wrong[0]]} in a batch, and the embedding has {rows} rows")


def _adapter_tokens(keys: list[str], counts: list[int], device: torch.device) -> list[AdapterTokens]:
    """`keys` and `counts` are the rows', in batch order."""
    if len(set(keys)) == 1:  # no adapter rows to pick out
        return [AdapterTokens(keys[0], None)] if keys[0] else []
    owners = np.repeat(np.array(keys), counts)
    return [
        AdapterTokens(key, torch.from_numpy(np.flatnonzero(owners == key)).to(device))
        for key in dict.fromkeys(filter(None, keys))
    ]


# -- block moves -----------------------------------------------------------------------------------
#
# Copies of whole blocks, within the cache or between it and host memory, grouped so that order does not matter.

Pairs = list[tuple[int, int]]


def execute_moves(moves: Sequence[Move], cache: KVCache, host: KVCache | None) -> None:
    """Copy blocks as if `moves` ran one after the other. Raises `RuntimeError` for a move to a host pool that does not
    exist."""
    for kind, pairs in batches(moves):
        if kind == "copy":
            cache.copy_blocks(pairs)
            continue
        if host is None:
            raise RuntimeError("this worker was made without a pool in host memory")
        source, target = (cache, host) if kind == "out" else (host, cache)
        source.copy_to(target, pairs)


def batches(moves: Sequence[Move]) -> Iterator[tuple[str, Pairs]]:
    """Runs of one kind in which no block is written twice, nor read after it was written."""
    pairs: Pairs = []
    kind, written = "", set[int]()
    for move in moves:
        reads_written = move.kind == "copy" and move.source in written
        if move.kind != kind or move.target in written or reads_written:
            if pairs:
                yield kind, pairs
            kind, pairs, written = move.kind, [], set()
        pairs.append((move.source, move.target))
        written.add(move.target)
    if pairs:
        yield kind, pairs
