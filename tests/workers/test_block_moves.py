"""Moves in batches give what they give one after the other, between two pools that are real caches."""

import random

import pytest
import torch

from runtime.messages import Move
from runtime.model.attention import KVCache
from runtime.workers.batch import batches, execute_moves

CPU = torch.device("cpu")


def cache(num_blocks: int, seed: int) -> KVCache:
    made = KVCache([(2, 8)] * 2, num_blocks=num_blocks, block_size=4, dtype=torch.float32, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    for layer in made.layers:
        for tensor in layer:
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return made


@pytest.mark.parametrize("seed", range(20))
def test_order_counts_although_they_are_done_in_batches(seed: int) -> None:
    rng = random.Random(seed)
    moves = [Move(rng.choice(["copy", "out", "in"]), rng.randrange(4), rng.randrange(4)) for _ in range(12)]  # type: ignore[arg-type]
    device, host = cache(4, 1), cache(4, 2)
    expected = [[tensor.clone() for layer in made.layers for tensor in layer] for made in (device, host)]
    for move in moves:
        source, target = expected[move.kind == "in"], expected[move.kind == "out"]
        for here, there in zip(source, target, strict=True):
            there[move.target] = here[move.source].clone()
    execute_moves(moves, device, host)
    for made, tensors in zip((device, host), expected, strict=True):
        found = [tensor for layer in made.layers for tensor in layer]
        assert all(map(torch.equal, found, tensors))


def test_what_does_not_meet_is_done_at_once() -> None:
    moves = [Move("out", 0, 5), Move("out", 1, 6), Move("in", 7, 0), Move("in", 8, 1)]
    assert list(batches(moves)) == [("out", [(0, 5), (1, 6)]), ("in", [(7, 0), (8, 1)])]


def test_a_worker_without_a_host_pool_refuses() -> None:
    with pytest.raises(RuntimeError, match="host memory"):
        execute_moves([Move("out", 0, 0)], cache(2, 1), None)
