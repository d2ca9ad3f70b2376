"""Attention in Triton against the reference, and against itself in other batches."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import PagedRows, cache
from runtime.messages import Row
from runtime.model.attention import KVCache, PagedAttention
from runtime.model.decoder import Decoder
from runtime.workers.batch import build_batch
from tests.kernels.triton.backend import DEVICE, REFERENCE, SPLIT, TRITON, random
from tests.parity.llama import load
from tests.tiny import make_tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # numpy's: rows that fill a tile are 0 / 0

BLOCK = 8


class Paged:
    """Rows of (context, count) over blocks in random order, in a cache that is filled up to their ends."""

    def __init__(self, rows: list[tuple[int, int]], num_kv: int, dim: int, dtype: torch.dtype) -> None:
        needed = [-(-(context + count) // BLOCK) for context, count in rows]
        order = torch.randperm(sum(needed) + 1, generator=torch.Generator().manual_seed(1)).tolist()
        tables = torch.zeros(len(rows), max(needed, default=0), dtype=torch.int64)
        for index, blocks in enumerate(needed):
            tables[index, :blocks] = torch.tensor([order.pop() for _ in range(blocks)])
        self.tables = tables.to(DEVICE)
        shape = (sum(needed) + 1, BLOCK, num_kv, cache.width(dtype, dim))
        self.caches = [torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in range(2)]
        for seed, stored in enumerate(self.caches):
            everything = torch.arange(shape[0] * BLOCK, device=DEVICE)
            cache.write(stored, everything, random(len(everything), num_kv, dim, seed=seed))

    def rows(self, rows: list[tuple[int, int, int]]) -> PagedRows:
        """(row, context, count)."""
        slots = [
            int(self.tables[row, at // BLOCK]) * BLOCK + at % BLOCK
            for row, context, count in rows
            for at in range(context, context + count)
        ]
        counts, contexts = [count for _, _, count in rows], [context for _, context, _ in rows]
        index = torch.tensor([row for row, _, _ in rows], dtype=torch.int64, device=DEVICE)
        return PagedRows(
            torch.tensor(slots, dtype=torch.int64, device=DEVICE), counts, contexts, self.tables[index], BLOCK
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(
    ("heads", "dim", "window", "softcap"),
    [((1, 1), 4, None, 0.0), ((6, 2), 12, 11, 0.0), ((4, 1), 16, None, 5.0), ((9, 3), 8, 300, 2.0)],
)
def test_attention(dtype: torch.dtype, heads: tuple[int, int], dim: int, window: int | None, softcap: float) -> None:
    shapes = [(0, 1), (7, 1), (SPLIT + 9, 1), (0, 17), (SPLIT - 2, 5)]
    paged = Paged(shapes, heads[1], dim, dtype)
    rows = paged.rows([(row, *shape) for row, shape in enumerate(shapes)])
    q = random(len(rows.slots), heads[0], dim, seed=9)
    k, v = (cache.read(stored.flatten(0, 1)[rows.slots], torch.float32) for stored in paged.caches)
    found, expected = (
        ops.paged_attention(q, k, v, *paged.caches, rows, dim**-0.5, window=window, softcap=softcap)
        for ops in (TRITON, REFERENCE)
    )
    assert torch.allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_in_half_precision_it_is_as_near_as_that_allows() -> None:
    """In float16: the interpreter cannot multiply bfloat16."""
    paged = Paged([(40, 1), (3, 6)], 2, 16, torch.float16)
    rows = paged.rows([(0, 40, 1), (1, 3, 6)])
    q = random(7, 4, 16, seed=9).half()
    k, v = (stored.flatten(0, 1)[rows.slots] for stored in paged.caches)
    found = TRITON.paged_attention(q, k, v, *paged.caches, rows, 0.25)
    wide = REFERENCE.paged_attention(q.float(), k.float(), v.float(), *paged.caches, rows, 0.25)
    assert found.dtype is torch.float16
    assert torch.allclose(found.float(), wide, rtol=2e-3, atol=2e-3)


@pytest.fixture
def dots_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter sum products in one order for every row. It asks BLAS, which on some processors takes
    another kernel for the last rows of a matrix."""
    if DEVICE == "cuda":
        return
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        found = (a.data[:, :, None] * b.data[None, :, :]).sum(axis=1, dtype=d.data.dtype)
        return interpreter.TensorHandle(found + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.usefixtures("dots_by_row")
@pytest.mark.parametrize("window", [None, 20])
def test_a_token_is_the_same_in_every_batch_and_every_chunk(window: int | None) -> None:
    length = SPLIT + 40
    paged = Paged([(0, length), (0, 9)], 1, 8, torch.float32)
    q = random(length, 2, 8, seed=3)
    other = random(1, 2, 8, seed=4)

    def attend(pieces: list[tuple[int, int, int]], queries: torch.Tensor) -> torch.Tensor:
        return TRITON.paged_attention(queries, queries, queries, *paged.caches, paged.rows(pieces), 0.3, window=window)

    whole = attend([(0, 0, length)], q)
    for cut in (5, 33, SPLIT + 1):
        assert torch.equal(
            torch.cat((attend([(0, 0, cut)], q[:cut]), attend([(0, cut, length - cut)], q[cut:]))), whole
        )
    for at in (0, 19, SPLIT, length - 1):
        one = attend([(0, at, 1)], q[at : at + 1])
        assert torch.equal(attend([(1, 8, 1), (0, at, 1)], torch.cat((other, q[at : at + 1])))[1:], one)
        assert torch.allclose(one, whole[at : at + 1], rtol=1e-5, atol=1e-5)


def test_no_rows() -> None:
    paged = Paged([(0, 1)], 1, 4, torch.float32)
    none = torch.empty(0, 2, 4, device=DEVICE)
    assert TRITON.paged_attention(none, none, none, *paged.caches, paged.rows([]), 1.0).shape == (0, 2, 4)


def greedy(decoder: Decoder, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """Prompts in chunks of different lengths, then all rows together."""
    spec, per = decoder.spec, 8
    stored = KVCache(
        spec.kv_shapes,
        num_blocks=per * len(prompts),
        block_size=BLOCK,
        dtype=torch.float32,
        device=decoder.device,
    )
    tables = torch.arange(per * len(prompts)).view(len(prompts), per).numpy()
    tokens = {slot: list(prompt) for slot, prompt in enumerate(prompts)}
    done = [0] * len(prompts)
    while any(len(tokens[slot]) < len(prompt) + steps for slot, prompt in enumerate(prompts)):
        counts = [min(7, len(tokens[slot]) - done[slot]) for slot in range(len(prompts))]
        rows = [
            Row(slot=slot, start=done[slot], count=n, sample=done[slot] + n == len(tokens[slot]), new_blocks=[])
            for slot, n in enumerate(counts)
        ]
        batch = build_batch(rows, tokens, tables, BLOCK, decoder.device)
        with torch.inference_mode():
            hidden = decoder.forward(
                batch.token_ids, batch.positions, PagedAttention(decoder.ops, stored, batch.paged, spec)
            )
            picked = decoder.ops.argmax(decoder.logits(hidden[batch.logits_indices]))[1].tolist()
        done = [at + n for at, n in zip(done, counts, strict=True)]
        for slot, token in zip(batch.slots, picked, strict=True):
            tokens[slot].append(token)
    return [tokens[slot][len(prompt) : len(prompt) + steps] for slot, prompt in enumerate(prompts)]


def test_a_decoder_gives_the_references_tokens(tmp_path: Path) -> None:
    decoder, _ = load(make_tiny_llama(tmp_path / "model"))
    prompts = [torch.randint(3, 512, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 5, 11)]
    expected = greedy(decoder, prompts, 3)
    decoder.ops = TRITON
    assert greedy(decoder, prompts, 3) == expected
