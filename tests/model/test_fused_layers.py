"""All layers in one call give the bits that they give op by op, and leave the same in the cache."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import AdaptedTokens, LoraFactors, PagedRows, StackFactors
from kernels.cpu import CpuOps
from runtime.model_loading import load_decoder
from runtime.workers.attention import PagedAttention
from runtime.workers.batch_adaptation import BatchAdaptation
from runtime.workers.decoder import Decoder
from runtime.workers.kv_cache import KVCache
from runtime.workers.loading import open_checkpoint
from settings.schema import ModelSettings
from tests.kernels.rows import random
from tests.parity.families import CASES, make_model
from tests.tiny import make_tiny_tokenizer

pytestmark = pytest.mark.skipif(CpuOps.unavailable() is not None, reason="an op of the C++ kernels")

BLOCK = 16
COUNTS, CONTEXTS = [1, 1, 1, 7, 40], [3, 17, 150, 0, 21]
WANTED = [[], [0, 1, 2, 9], [2, 47, 48, 49], [*range(49)]]
"""Tokens of that batch: none, each row's last but for the longest, a row's last three and another one, all but one."""


def load(tmp_path: Path, family: str, quantization: str = "none") -> Decoder:
    kind, options = CASES[family]
    make_model(tmp_path, kind, options)
    make_tiny_tokenizer(tmp_path)
    settings = ModelSettings(model=str(tmp_path), quantization=quantization, kernels="cpu")  # type: ignore[arg-type]
    return load_decoder(open_checkpoint(str(tmp_path)), settings)


def run(
    decoder: Decoder,
    adapted: list[AdaptedTokens],
    dtype: torch.dtype,
    *,
    at_once: bool,
    wanted: Tensor | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Hidden states of a mixed batch, over a cache that holds something, and that cache."""
    if not at_once:
        decoder.__dict__["_joined"] = None
    else:
        decoder.__dict__.pop("_joined", None)
    per = -(-max(a + b for a, b in zip(COUNTS, CONTEXTS, strict=True)) // BLOCK)
    tables = torch.randperm(per * len(COUNTS), generator=torch.Generator().manual_seed(1)).view(len(COUNTS), per)
    cache = KVCache(decoder.kv_shapes, num_blocks=tables.numel(), block_size=BLOCK, dtype=dtype, device=decoder.device)
    for layer, both in enumerate(cache.layers):
        for index, tensor in enumerate(both):
            seen = random(*tensor.shape, seed=2 * layer + index)
            tensor.copy_((seen * 20).round() if dtype is torch.int8 else seen)
            if dtype is torch.int8:
                tensor[..., -4:] = torch.tensor([0.05]).view(torch.int8)  # each head's scale
    places = [torch.arange(start, start + count) for count, start in zip(COUNTS, CONTEXTS, strict=True)]
    slots = torch.cat([tables[row, at // BLOCK] * BLOCK + at % BLOCK for row, at in enumerate(places)])
    rows = PagedRows(slots, COUNTS, CONTEXTS, tables, BLOCK)
    tokens = torch.arange(sum(COUNTS)) % 120 + 3
    adaptation = BatchAdaptation(decoder.ops, adapted) if adapted else None
    with torch.inference_mode():
        attention = PagedAttention(decoder.ops, cache, rows, decoder.spec)
        hidden = decoder.forward(tokens, torch.cat(places), attention, adaptation, wanted=wanted)
    assert (decoder.__dict__["_joined"] is not None) == at_once
    return hidden, cache.layers


def check(decoder: Decoder, adapted: list[AdaptedTokens], dtype: torch.dtype = torch.float32) -> Tensor:
    """Both ways agree, and so do the tokens that are wanted alone; the hidden states."""
    one_by_one, written_before = run(decoder, adapted, dtype, at_once=False)
    found, written = run(decoder, adapted, dtype, at_once=True)
    assert found.isfinite().all()
    assert torch.equal(found, one_by_one)
    same(written, written_before)
    for wanted in WANTED:
        some, written = run(decoder, adapted, dtype, at_once=True, wanted=torch.tensor(wanted, dtype=torch.int64))
        assert torch.equal(some, found[wanted])
        same(written, written_before)
    return found


def same(written: list[tuple[Tensor, Tensor]], written_before: list[tuple[Tensor, Tensor]]) -> None:
    for both, both_before in zip(written, written_before, strict=True):
        for here, there in zip(both, both_before, strict=True):
            assert torch.equal(here.view(torch.uint8), there.view(torch.uint8))


FAMILIES = [
    "llama",
    "mistral with a window",
    "qwen2 with windows",
    "qwen3 with biases and windows",
    "phi4 mini",
    "smollm3 with windows",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    """Windows by layer, biases, norms of heads, partial rotation, layers without rope, long-context rope."""
    check(load(tmp_path, family), [])


@pytest.mark.parametrize("quantization", ["int8", "int4", "nf4", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_weights_and_caches(tmp_path: Path, quantization: str, dtype: torch.dtype) -> None:
    """An inner size of 80 also makes gate and up two ops where a tile would hold both."""
    check(load(tmp_path, "llama", quantization), [], dtype)


def factors(decoder: Decoder, seed: int, places: list[tuple[int, str]]) -> StackFactors:
    made = {}
    for layer, name in places:
        out, size = decoder.layers[layer].linears[name].weight.value.shape
        a, b = random(4, size, seed=seed), random(out, 4, seed=seed + 1)
        made[layer, name] = decoder.ops.prepare_lora(LoraFactors(a, (b,), (0,), torch.full((4,), 0.3)))
    return StackFactors(made)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_adapters(tmp_path: Path, quantization: str) -> None:
    """Of two adapters one changes every linear, the other some of some layers; the rest of the batch is the base's."""
    decoder = load(tmp_path, "llama", quantization)
    every = [(layer, name) for layer in range(4) for name in ("qkv", "out", "gate_up", "down")]
    first, second = factors(decoder, 5, every), factors(decoder, 9, [(0, "gate_up"), (2, "qkv"), (3, "down")])
    base = check(decoder, [])
    mixed = [AdaptedTokens(torch.arange(1, 3), first), AdaptedTokens(torch.arange(5, 30), second)]
    found = check(decoder, mixed)
    own = torch.tensor([*range(1, 3), *range(5, 10)])  # after which others of a row's tokens follow
    assert not torch.isclose(found[own], base[own]).all(1).any()
    assert torch.equal(found[[0, 3, 4]], base[[0, 3, 4]])
    alone = check(decoder, [AdaptedTokens(None, first)])
    assert torch.equal(alone[1:3], found[1:3])


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "falcon 7b", "olmo2", "gpt2"])
def test_layers_that_are_not_llamas_run_op_by_op(tmp_path: Path, family: str) -> None:
    assert load(tmp_path, family)._joined is None


def test_factors_that_the_op_cannot_read_run_op_by_op(tmp_path: Path) -> None:
    decoder = load(tmp_path, "llama")
    out, size = decoder.layers[1].linears["out"].weight.value.shape
    raw = LoraFactors(random(2, size, seed=1), (random(out, 2, seed=2),), (0,), torch.ones(2))
    check(decoder, [AdaptedTokens(None, StackFactors({(1, "out"): raw}))])
