"""All layers in one call give the bits that they give one by one, and leave the same in the cache."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import AdaptedTokens, ForwardLayers, LayerStack, LoraFactors, PagedRows, StackFactors
from kernels.cpu import CpuOps
from kernels.cpu.layers import CpuLayers
from kernels.stack import ContextT
from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.model_loading import load_decoder
from runtime.model.attention import KVCache, PagedAttention
from runtime.model.decoder import Decoder
from runtime.model.lora import Adaptation, BatchAdaptation
from settings.schema import ModelSettings
from tests.kernels.rows import random
from tests.parity.families import CASES, make_model
from tests.tiny import VOCAB_SIZE, make_tiny_tokenizer

pytestmark = pytest.mark.skipif(CpuOps.unavailable() is not None, reason="an op of the C++ kernels")

BLOCK = 16
COUNTS, CONTEXTS = [1, 1, 1, 7, 40], [3, 17, 150, 0, 21]
LOGITS_INDICES = [[], [0, 1, 2, 9], [2, 47, 48, 49], [*range(49)]]
"""Tokens of that batch: none, each row's last but for the longest, a row's last three and another one, all but one."""


class OpByOp(CpuOps):
    """The same ops, without the one for all layers."""

    def fuse_layers(self, stack: LayerStack, layer_by_layer: ForwardLayers[ContextT]) -> ForwardLayers[ContextT]:
        return layer_by_layer


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of tokens of each call of all layers in C++."""
    calls: list[int] = []
    forward_fused = CpuLayers.forward_fused

    def counted(self: CpuLayers[ContextT], hidden: Tensor, *rest: object) -> Tensor:
        calls.append(len(hidden))
        return forward_fused(self, hidden, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(CpuLayers, "forward_fused", counted)
    return calls


class Case:
    """A model twice: one runs all its layers in one call, the other one by one."""

    def __init__(self, tmp_path: Path, fused_calls: list[int], family: str, quantization: str = "none") -> None:
        kind, options = CASES[family]
        make_model(tmp_path, kind, {**options, "vocab_size": VOCAB_SIZE})
        make_tiny_tokenizer(tmp_path)
        settings = ModelSettings(model=str(tmp_path), quantization=quantization, kernels="cpu")  # type: ignore[arg-type]
        self.fused = load_decoder(open_checkpoint(str(tmp_path)), settings)
        self.one_by_one = load_decoder(open_checkpoint(str(tmp_path)), settings)
        self.one_by_one.ops = OpByOp()
        self.fused_calls = fused_calls

    def check(self, adapted: list[AdaptedTokens], dtype: torch.dtype = torch.float32, *, fuses: bool = True) -> Tensor:
        """Both agree, for all tokens and for those at some `logits_indices`; the hidden states. `fuses`: the first of
        them is expected to run in one call."""
        expected, written_before = run(self.one_by_one, adapted, dtype)
        assert not self.fused_calls
        for index in [None, *map(torch.tensor, LOGITS_INDICES)]:
            index = None if index is None else index.long()
            found, written = run(self.fused, adapted, dtype, logits_indices=index)
            assert len(self.fused_calls) == fuses
            self.fused_calls.clear()
            assert torch.equal(found, expected if index is None else expected[index])
            same(written, written_before)
        assert expected.isfinite().all()
        return expected


def run(
    decoder: Decoder,
    adapted: list[AdaptedTokens],
    dtype: torch.dtype,
    *,
    adaptation: Adaptation | None = None,
    logits_indices: Tensor | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Hidden states of a mixed batch, over a cache that holds something, and that cache."""
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
    if adapted:
        adaptation = BatchAdaptation(decoder.ops, adapted)
    with torch.inference_mode():
        attention = PagedAttention(decoder.ops, cache, rows, decoder.spec)
        hidden = decoder.forward(tokens, torch.cat(places), attention, adaptation, logits_indices=logits_indices)
    return hidden, cache.layers


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
def test_families(tmp_path: Path, fused_calls: list[int], family: str) -> None:
    """Windows by layer, biases, norms of heads, partial rotation, layers without rope, long-context rope."""
    Case(tmp_path, fused_calls, family).check([])


@pytest.mark.parametrize("quantization", ["int8", "int4", "nf4", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_weights_and_caches(tmp_path: Path, fused_calls: list[int], quantization: str, dtype: torch.dtype) -> None:
    """An inner size of 80 also makes gate and up two ops where a tile would hold both."""
    Case(tmp_path, fused_calls, "llama", quantization).check([], dtype)


def factors(
    decoder: Decoder, seed: int, places: list[tuple[int, str]], dtype: torch.dtype = torch.float32, *, lacks: int = 0
) -> StackFactors:
    """The last `lacks` outputs of each linear are not adapted."""
    made = {}
    for layer, name in places:
        out, size = decoder.layers[layer].linears[name].weight.value.shape
        out -= lacks
        a, b = random(4, size, seed=seed), random(out, 4, seed=seed + 1)
        made[layer, name] = decoder.ops.prepare_lora(LoraFactors(a, (b,), (0,), torch.full((4,), 0.3)), dtype)
    return StackFactors(made)


EVERY = [(layer, name) for layer in range(4) for name in ("qkv", "out", "gate_up", "down")]


@pytest.mark.parametrize(
    ("quantization", "held"),
    [
        ("none", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("int8", torch.float32),
        ("int8", torch.int8),
        ("int4", torch.int8),
        ("nf4", torch.int8),
    ],
)
def test_adapters(tmp_path: Path, fused_calls: list[int], quantization: str, held: torch.dtype) -> None:
    """Of two adapters one changes every linear, the other some of some layers; the rest of the batch is the base's."""
    case = Case(tmp_path, fused_calls, "llama", quantization)
    first = factors(case.fused, 5, EVERY, held)
    second = factors(case.fused, 9, [(0, "gate_up"), (2, "qkv"), (3, "down")], held, lacks=21)
    base = case.check([])
    mixed = [AdaptedTokens(torch.arange(1, 3), first), AdaptedTokens(torch.arange(5, 30), second)]
    found = case.check(mixed)
    own = torch.tensor([*range(1, 3), *range(5, 10)])  # after which others of a row's tokens follow
    assert not torch.isclose(found[own], base[own]).all(1).any()
    assert torch.equal(found[[0, 3, 4]], base[[0, 3, 4]])
    alone = case.check([AdaptedTokens(None, first)])
    assert torch.equal(alone[1:3], found[1:3])


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "falcon 7b", "olmo2", "gpt2", "granite"])
def test_layers_that_are_not_llamas_run_one_by_one(tmp_path: Path, fused_calls: list[int], family: str) -> None:
    Case(tmp_path, fused_calls, family).check([], fuses=False)


def test_factors_that_the_op_cannot_read_run_one_by_one(tmp_path: Path, fused_calls: list[int]) -> None:
    """Where some batches cannot be fused, the others are."""
    case = Case(tmp_path, fused_calls, "llama")
    out, size = case.fused.layers[1].linears["out"].weight.value.shape
    raw = LoraFactors(random(2, size, seed=1), (random(out, 2, seed=2),), (0,), torch.ones(2))
    case.check([AdaptedTokens(None, StackFactors({(1, "out"): raw}))], fuses=False)
    case.check([])


class Doubled(Adaptation):
    """A change that is no adapter of the ops: the output of every `qkv` twice."""

    def __call__(self, layer: int, linear: str, x: Tensor, y: Tensor, base: Tensor | None = None) -> Tensor:
        return y * 2 if linear == "qkv" else y


def test_an_adaptation_that_ops_do_not_apply_runs_one_by_one(tmp_path: Path, fused_calls: list[int]) -> None:
    case = Case(tmp_path, fused_calls, "llama")
    (found, _), (expected, _) = (
        run(decoder, [], torch.float32, adaptation=Doubled()) for decoder in (case.fused, case.one_by_one)
    )
    assert not fused_calls
    assert torch.equal(found, expected)
    assert not torch.isclose(found, case.check([])).all(1).any()
