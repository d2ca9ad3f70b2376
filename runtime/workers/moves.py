"""Copies of whole blocks, within the cache or between it and host memory, grouped so that order does not matter."""

from collections.abc import Iterator, Sequence

from runtime.messages import Move
from runtime.workers.kv_cache import KVCache

Pairs = list[tuple[int, int]]


def execute_moves(moves: Sequence[Move], cache: KVCache, host: KVCache | None) -> None:
    """Do `moves` as if one after the other. Raises `RuntimeError` when one is for a host pool that is not there."""
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
