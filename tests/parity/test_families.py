"""Every family against transformers: same files, same logits, however they are computed, and the same gradients."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels
from runtime import LLM, SamplingParams
from runtime.messages import Row, Submission
from runtime.model.attention import KVCache, PagedAttention
from runtime.model.decoder import Decoder
from runtime.workers.batch import build_batch
from tests.parity.families import CASES, SHAPE, make_model
from tests.parity.packing import load, packed
from tests.tiny import VOCAB_SIZE, make_tiny_tokenizer

BLOCK = 4
SEQUENCES = [
    torch.randint(0, SHAPE["vocab_size"], (length,), generator=torch.Generator().manual_seed(1))
    for length in (1, 7, 60)
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Any]:
    path = tmp_path_factory.mktemp("model")
    oracle = make_model(path, *CASES[request.param])
    return load(path)[0], oracle


class Server:
    """Computes sequences over the paged cache in whatever pieces it is told, as a worker would."""

    def __init__(self, decoder: Decoder, sequences: list[Tensor]) -> None:
        self.decoder = decoder
        self.tokens = {slot: ids.tolist() for slot, ids in enumerate(sequences)}
        per = -(-max(map(len, sequences)) // BLOCK)
        shuffled = torch.randperm(per * len(sequences), generator=torch.Generator().manual_seed(2))
        self.tables = shuffled.view(len(sequences), per).numpy().astype(np.int64)
        self.cache = KVCache(
            decoder.spec.kv_shapes,
            num_blocks=self.tables.size,
            block_size=BLOCK,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    def step(self, pieces: list[tuple[int, int, int]]) -> dict[int, Tensor]:
        """(slot, start, count) → the logits of each slot's last token."""
        rows = [Row(slot=s, start=a, count=n, sample=True, new_blocks=[]) for s, a, n in pieces]
        batch = build_batch(rows, self.tokens, self.tables, BLOCK, torch.device("cpu"))
        attention = PagedAttention(self.decoder.ops, self.cache, batch.paged, self.decoder.spec)
        with torch.inference_mode():
            hidden = self.decoder.forward(batch.token_ids, batch.positions, attention)
            logits = self.decoder.logits(hidden[batch.logits_indices])
        return dict(zip(batch.slots, logits, strict=True))


def test_a_window_gives_blocks_back_and_serves_on(tmp_path: Path) -> None:
    """The engine against transformers' generate, over many times the window; few blocks are held at the end."""
    oracle = make_model(tmp_path, "mistral", {"sliding_window": 9, "vocab_size": VOCAB_SIZE, "eos_token_id": None})
    make_tiny_tokenizer(tmp_path)
    ids = SEQUENCES[2].tolist()
    expected = oracle.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
    llm = LLM(str(tmp_path), num_blocks=8, block_size=16, max_prefill_chunk=13)
    held = []
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    llm.engine.submit(Submission(request_id="one", prompt_ids=ids, params=params))
    tokens: list[int] = []
    while llm.engine.busy:
        tokens += [token for output in llm.engine.step() for token in output.token_ids]
        held.append(8 - llm.engine.scheduler.blocks.num_free)
    assert tokens == expected
    assert max(held[10:]) <= 2
    llm.engine.scheduler.check_integrity()


def test_logits_equal_transformers(case: tuple[Decoder, Any]) -> None:
    decoder, oracle = case
    with torch.no_grad():
        ours = packed(decoder, SEQUENCES).split([len(ids) for ids in SEQUENCES])
        for ids, logits in zip(SEQUENCES, ours, strict=True):
            expected = oracle(ids.unsqueeze(0)).logits[0]
            assert (logits - expected).abs().max() < 1e-3
            assert expected.std() > 0.05  # there is something to compare


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_chunks_and_decoding_over_the_cache_equal_no_cache(case: tuple[Decoder, Any], backend: str) -> None:
    decoder = copy.copy(case[0])
    decoder.ops = kernels.load(backend)
    with torch.inference_mode():
        ends = torch.tensor([len(ids) for ids in SEQUENCES]).cumsum(0)
        whole = packed(decoder, SEQUENCES)
    lengths = [len(ids) for ids in SEQUENCES]
    at_once = Server(decoder, SEQUENCES).step([(slot, 0, n) for slot, n in enumerate(lengths)])
    pieces = Server(decoder, SEQUENCES)
    pieces.step([(1, 0, 3), (2, 0, 23)])
    pieces.step([(2, 23, 17), (1, 3, 1)])
    for length in range(40, 60):  # both decode, one token a step, until the shorter one is done
        last = pieces.step([(2, length, 1), *([(1, length - 36, 1)] if length < 43 else [])])
        if length == 42:
            assert torch.allclose(last[1], whole[ends[1] - 1], atol=1e-4)
    assert torch.allclose(last[2], whole[ends[2] - 1], atol=1e-4)
    for slot, logits in at_once.items():
        assert torch.allclose(logits, whole[ends[slot] - 1], atol=1e-4)


def test_input_gradients_equal_transformers(case: tuple[Decoder, Any]) -> None:
    """What training needs of a layer: the gradient with respect to what the first one sees."""
    decoder, oracle = case
    ids = SEQUENCES[2][:30]
    weight = decoder.embedding.weight.data.clone().requires_grad_(True)
    kept, decoder.embedding.weight.data = decoder.embedding.weight.data, weight
    try:
        torch.nn.functional.cross_entropy(packed(decoder, [ids])[:-1], ids[1:]).backward()
    finally:
        decoder.embedding.weight.data = kept
    oracle.zero_grad()
    oracle(ids.unsqueeze(0), labels=ids.unsqueeze(0)).loss.backward()
    expected = oracle.get_input_embeddings().weight.grad
    assert weight.grad is not None
    assert torch.allclose(weight.grad, expected, atol=1e-5)
    assert expected.abs().max() > 1e-4
