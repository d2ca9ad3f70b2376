"""All of decoding from graphs but the recording, which takes a GPU: padding, inputs that stay in place, replaying."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.messages import Row
from runtime.model.attention import KVCache, PagedAttention
from runtime.model.decoder import Decoder
from runtime.workers.adapter_slots import AdapterTokens
from runtime.workers.batch import FlatBatch, build_batch
from runtime.workers.cuda_graphs import DecodeGraphs, padded, unsuited
from tests.kernels.triton.backend import TRITON
from tests.parity.llama import load
from tests.tiny import make_tiny_llama

BLOCK, PER, MAX_LEN = 8, 4, 32


def test_padding() -> None:
    assert [padded(rows) for rows in (1, 2, 3, 5, 8, 9, 16, 17, 250)] == [1, 2, 4, 8, 8, 16, 16, 24, 256]


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    decoder, _ = load(make_tiny_llama(tmp_path / "model"))
    decoder.ops = TRITON
    return decoder


def new_cache(decoder: Decoder) -> KVCache:
    spec = decoder.spec
    return KVCache(
        spec.kv_shapes,
        num_blocks=3 * PER,
        block_size=BLOCK,
        dtype=torch.float32,
        device=decoder.device,
    )


def batch_of(decoder: Decoder, starts: dict[int, int]) -> FlatBatch:
    """Each slot's token number `starts[slot]`."""
    tokens = {slot: [(7 * slot + 3 * at) % 500 for at in range(MAX_LEN)] for slot in starts}
    tables = np.arange(3 * PER).reshape(3, PER)[:, ::-1].copy()
    rows = [Row(slot=slot, start=at, count=1, sample=True, new_blocks=[]) for slot, at in starts.items()]
    return build_batch(rows, tokens, tables, BLOCK, decoder.device)


def test_steps_are_those_of_the_decoder(decoder: Decoder) -> None:
    """Rows come and go, and contexts cross blocks; a graph serves several numbers of rows and is recorded once."""
    recorded = []

    def record(work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        recorded.append(work)
        return work

    with_graphs, without = new_cache(decoder), new_cache(decoder)
    graphs = DecodeGraphs(decoder, with_graphs, max_len=MAX_LEN, record=record)
    steps = [{0: 0}, {0: 1, 1: 0, 2: 0}, {0: 2, 1: 1}, {0: 3, 1: 2, 2: 1}, {2: 2}]
    with torch.inference_mode():
        for step in steps:
            batch = batch_of(decoder, step)
            assert graphs.takes(batch)
            found = graphs.forward(batch)
            attention = PagedAttention(decoder.ops, without, batch.paged, decoder.spec)
            expected = decoder.forward(batch.token_ids, batch.positions, attention)
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(with_graphs.layers, without.layers, strict=True):
            assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours, theirs, strict=True))
    assert len(recorded) == 3  # for one row, two and four


def test_what_it_does_not_take(decoder: Decoder) -> None:
    graphs = DecodeGraphs(decoder, new_cache(decoder), max_len=MAX_LEN)
    tokens = {0: [1, 2, 3]}
    row = Row(slot=0, start=0, count=3, sample=True, new_blocks=[])
    tables = np.zeros((1, PER), dtype=np.int64)
    assert not graphs.takes(build_batch([row], tokens, tables, BLOCK, decoder.device))
    adapted = batch_of(decoder, {0: 0})
    adapted.adapters.append(AdapterTokens("one", None))
    assert not graphs.takes(adapted)


def test_without_cuda_nothing_is_recorded(decoder: Decoder) -> None:
    reason = unsuited(decoder)
    assert reason is not None
    assert "CUDA" in reason
