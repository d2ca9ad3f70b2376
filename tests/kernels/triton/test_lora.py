"""Segmented LoRA in Triton against the reference."""

import pytest
import torch

from kernels import LoraFactors, LoraSegment, LoraTable
from runtime.workers.adapter_table import entry_of
from tests.kernels.triton.backend import DEVICE, REFERENCE, TRITON, random

PARTS, SIZE, TOKENS = (70, 16, 12), 90, 21


def factors(seed: int, parts: tuple[int, ...], ranks: tuple[int, ...]) -> LoraFactors:
    b = tuple(random(PARTS[p], rank, seed=seed + p) for p, rank in zip(parts, ranks, strict=True))
    columns = tuple(sum(PARTS[:p]) for p in parts)
    return LoraFactors(random(sum(ranks), SIZE, seed=seed), b, columns, random(sum(ranks), seed=seed + 9))


def segment(tokens: list[int], of: LoraFactors) -> LoraSegment:
    return LoraSegment(torch.tensor(tokens, dtype=torch.int64, device=DEVICE), of)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_references_sums(transposed: bool) -> None:
    """Segments of one token, of more than a tile, of none; adapters of different parts and ranks."""
    x, start = random(TOKENS, 2 * SIZE, seed=1)[:, SIZE:], random(TOKENS, sum(PARTS), seed=2)
    segments = [
        segment([20], factors(10, (0, 2), (1, 3))),
        segment([*range(19)], factors(20, (0, 1, 2), (8, 20, 5))),
        segment([], factors(30, (1,), (2,))),
    ]
    y = start.t().contiguous().t() if transposed else start.clone()
    found = TRITON.lora_apply(x, y, segments)
    assert found.data_ptr() == y.data_ptr()
    assert torch.allclose(found, REFERENCE.lora_apply(x, start.clone(), segments), rtol=1e-4, atol=1e-3)
    assert torch.equal(found[19], start[19])


def test_a_token_is_the_same_whoever_is_beside_it() -> None:
    x, y, mine = random(TOKENS, SIZE, seed=1), random(TOKENS, sum(PARTS), seed=2), factors(10, (0, 2), (4, 3))
    everywhere = TRITON.lora_apply(x, y.clone(), [LoraSegment(None, mine)])
    assert torch.allclose(
        everywhere, REFERENCE.lora_apply(x, y.clone(), [LoraSegment(None, mine)]), rtol=1e-4, atol=1e-4
    )
    beside = [segment([0, 7], factors(20, (1,), (9,))), segment([3], mine)]
    alone = TRITON.lora_apply(x[3:4], y[3:4].clone(), [LoraSegment(None, mine)])
    assert torch.allclose(TRITON.lora_apply(x, y.clone(), beside)[3:4], alone, rtol=1e-6, atol=1e-5)


def test_nobody() -> None:
    x, y = random(2, SIZE, seed=1), random(2, sum(PARTS), seed=2)
    assert torch.equal(TRITON.lora_apply(x, y.clone(), []), y)
    assert torch.equal(TRITON.lora_apply(x, y.clone(), [segment([], factors(10, (0,), (4,)))]), y)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_table_of_adapters(transposed: bool) -> None:
    """Each token by its adapter's number: the same bits as with segments, and the base's tokens stay as they are."""
    x, start = random(TOKENS, 2 * SIZE, seed=1)[:, SIZE:], random(TOKENS, sum(PARTS), seed=2)
    held = (None, factors(10, (0, 2), (1, 3)), factors(20, (0, 1, 2), (8, 20, 5)), None)
    entries = torch.zeros(len(held), 3 + 5 * len(PARTS), dtype=torch.int64)
    for number, one in enumerate(held):
        if one is not None:
            entry = torch.tensor(entry_of(one))
            entries[number, : len(entry)] = entry
    table = LoraTable(entries.to(DEVICE), len(PARTS), 33, 20, max(PARTS), held)
    numbers = torch.tensor([(0, 1, 2, 3, 2)[token % 5] for token in range(TOKENS)], device=DEVICE)
    y = start.t().contiguous().t() if transposed else start.clone()
    found = TRITON.lora_apply_table(x, y, table, numbers)
    assert found.data_ptr() == y.data_ptr()
    segments = [LoraSegment((numbers == number).nonzero().flatten(), one) for number, one in enumerate(held) if one]
    assert torch.equal(found, TRITON.lora_apply(x, start.clone(), segments))
    expected = REFERENCE.lora_apply_table(x, start.clone(), table, numbers)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(found[numbers == 0], start[numbers == 0])
    assert torch.equal(found[numbers == 3], start[numbers == 3])
