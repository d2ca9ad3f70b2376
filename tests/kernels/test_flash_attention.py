"""Attention through flash-attn, which is played by a function that checks its arguments and computes in torch.

The package itself needs a GPU, and has not run here.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import kernels
from kernels import PagedRows, cache
from kernels.training import TrainingOps
from kernels.triton import flash
from kernels.triton.flash import FlashAttention
from runtime.trainer.microbatch import pack
from runtime.trainer.step import MicroStep
from runtime.workers.decoder import Decoder
from runtime.workers.loading import open_checkpoint
from runtime.workers.lora import LoraShape
from runtime.workers.models import find_model
from tests.kernels.fake_flash import FakeFlash
from tests.kernels.triton_backend import DEVICE, REFERENCE, TRITON, TritonOps, TritonTrainingOps, random
from tests.parity.test_lora_gradients import adapter
from tests.parity.test_lora_gradients import drive as drive_slices
from tests.trainer.tiny_training import examples

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

OPTIONS = [(None, 0.0), (7, 0.0), (300, 3.0)]
"""Windows and softcaps."""


@pytest.fixture
def fake() -> FakeFlash:
    return FakeFlash()


@pytest.fixture
def ops(fake: FakeFlash) -> TritonOps:
    return TritonOps(FlashAttention(fake.flash_attn_varlen_func))


class Paged:
    """Rows of (context, count) in a cache of blocks in reverse order; the queries, and what the reference makes."""

    def __init__(self, shapes: list[tuple[int, int]], *, block: int = 256, dim: int = 8, dtype: torch.dtype) -> None:
        needed = [-(-(context + count) // block) for context, count in shapes]
        total, width = sum(needed), max(needed)
        ids = iter(range(total, 0, -1))
        tables = torch.zeros(len(shapes), width, dtype=torch.int64)
        for row, count in enumerate(needed):
            tables[row, :count] = torch.tensor([next(ids) for _ in range(count)])
        places = [(row, at) for row, (context, count) in enumerate(shapes) for at in range(context, context + count)]
        slots = [int(tables[row, at // block]) * block + at % block for row, at in places]
        self.caches = [torch.zeros(total + 1, block, 2, cache.width(dtype, dim), dtype=dtype) for _ in range(2)]
        for seed, stored in enumerate(self.caches):
            every = torch.arange((total + 1) * block)
            cache.write(stored, every, random(len(every), 2, dim, seed=seed).cpu())
        self.caches = [stored.to(DEVICE) for stored in self.caches]
        counts, contexts = [count for _, count in shapes], [context for context, _ in shapes]
        self.rows = PagedRows(torch.tensor(slots).to(DEVICE), counts, contexts, tables.to(DEVICE), block)
        self.q = random(len(slots), 4, dim, seed=9).to(torch.float16)
        self.new = [cache.read(stored.flatten(0, 1)[self.rows.slots], torch.float16) for stored in self.caches]

    def attend(self, ops: kernels.Ops, window: int | None = None, softcap: float = 0.0) -> Tensor:
        wide = (lambda x: x.float()) if ops is REFERENCE else (lambda x: x)
        q, k, v = map(wide, (self.q, *self.new))
        return ops.paged_attention(q, k, v, *self.caches, self.rows, 0.3, window=window, softcap=softcap).float()


@pytest.mark.parametrize(("window", "softcap"), OPTIONS)
def test_rows_of_several_tokens_go_there_and_the_others_do_not(
    fake: FakeFlash, ops: TritonOps, window: int | None, softcap: float
) -> None:
    paged = Paged([(3, 1), (270, 1), (0, 17), (300, 5)], dtype=torch.float16)
    found, expected = paged.attend(ops, window, softcap), paged.attend(REFERENCE, window, softcap)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert fake.calls == [{"sequences": 2, "paged": True, "deterministic": False}]


def test_a_batch_of_prompts_alone(fake: FakeFlash, ops: TritonOps) -> None:
    paged = Paged([(0, 4), (255, 2)], dtype=torch.float16)
    torch.testing.assert_close(paged.attend(ops), paged.attend(REFERENCE), rtol=2e-3, atol=2e-3)
    assert [call["sequences"] for call in fake.calls] == [2]


@pytest.mark.parametrize(
    ("shapes", "block", "dim", "dtype"),
    [
        ([(3, 1), (9, 1)], 256, 8, torch.float16),  # no row of several tokens
        ([(0, 5)], 16, 8, torch.float16),  # a block that it does not take
        ([(0, 5)], 256, 8, torch.int8),
        ([(0, 5)], 256, 8, torch.float32),
        ([(0, 5)], 256, 12, torch.float16),  # heads of no multiple of 8
    ],
)
def test_what_it_cannot_read_is_left_to_triton(
    fake: FakeFlash, ops: TritonOps, shapes: list[tuple[int, int]], block: int, dim: int, dtype: torch.dtype
) -> None:
    paged = Paged(shapes, block=block, dim=dim, dtype=dtype)
    assert torch.equal(paged.attend(ops), paged.attend(TRITON))
    assert fake.calls == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("window", "softcap"), OPTIONS)
def test_packed_sequences_and_their_gradients(
    fake: FakeFlash, dtype: torch.dtype, window: int | None, softcap: float
) -> None:
    lengths, made = [5, 1, 12], []
    weight = random(18, 4, 8, seed=7)
    for ops in (TritonTrainingOps(FlashAttention(fake.flash_attn_varlen_func)), TrainingOps()):
        plain = type(ops) is TrainingOps
        q, k, v = (random(18, heads, 8, seed=heads + at).to(dtype) for at, heads in enumerate((4, 2, 2)))
        leaves = [(x.float() if plain else x).requires_grad_() for x in (q, k, v)]
        out = ops.packed_attention(*leaves, lengths, 0.3, window=window, softcap=softcap)
        (out.float() * weight).sum().backward()  # type: ignore[no-untyped-call]
        made.append([out, *(leaf.grad for leaf in leaves)])
    tolerance = 4e-3 if dtype is torch.float16 else 4e-2
    for found, expected in zip(*made, strict=True):
        assert found is not None
        torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
    assert fake.calls == [{"sequences": 3, "paged": False, "deterministic": True}]


def test_floats_that_it_does_not_take_are_attended_to_as_before(fake: FakeFlash) -> None:
    q = random(4, 2, 8, seed=1)
    ops = TritonTrainingOps(FlashAttention(fake.flash_attn_varlen_func))
    assert torch.equal(ops.packed_attention(q, q, q, [4], 0.3), TrainingOps().packed_attention(q, q, q, [4], 0.3))
    assert fake.calls == []


def test_a_training_step_attends_to_all_sequences_at_once(fake: FakeFlash, tiny_model: Path) -> None:
    """In bfloat16, with the gradients of the same step without the package."""
    data = examples(3, longest=20)
    made = []
    serving = TritonOps(FlashAttention(fake.flash_attn_varlen_func))
    for ops in (kernels.triton.training_ops(serving), TrainingOps()):
        decoder = half_decoder(tiny_model)
        lora = adapter(decoder, LoraShape(rank=4, alpha=8))
        micro = MicroStep(decoder, ops, lora, pack(data, decoder.device), checkpointing=False)
        drive_slices(micro.forward_backward(0.1), "whole")
        made.append(
            (micro.score.mean, torch.cat([p.grad.flatten() for _, p in lora.parameters() if p.grad is not None]))
        )
    (loss, found), (expected_loss, expected) = made
    assert [call["sequences"] for call in fake.calls] == [3] * decoder.spec.num_layers
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.999


def half_decoder(path: Path) -> Decoder:
    checkpoint = open_checkpoint(str(path))
    model = find_model(checkpoint.config)
    spec, device = model.spec(checkpoint.config), torch.device(DEVICE)
    decoder = Decoder(spec, REFERENCE, max_len=spec.max_position, dtype=torch.bfloat16, device=device)
    decoder.load(model.weights(checkpoint.tensors(), spec))
    return decoder


# -- whether there is any --------------------------------------------------------------------------


def package(function: Callable[..., Tensor]) -> ModuleType:
    module = ModuleType(flash.PACKAGE)
    module.__spec__ = ModuleSpec(flash.PACKAGE, None)
    module.__dict__["flash_attn_varlen_func"] = function
    return module


def old(q: Tensor, softmax_scale: float, causal: bool, window_size: tuple[int, int], deterministic: bool) -> Tensor:
    raise AssertionError("not to be called")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, fake: FakeFlash) -> pytest.MonkeyPatch:
    """A machine on which nothing is missing."""
    monkeypatch.setitem(sys.modules, flash.PACKAGE, package(fake.flash_attn_varlen_func))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    return monkeypatch


def test_it_is_taken_where_nothing_is_missing(found: pytest.MonkeyPatch, fake: FakeFlash) -> None:
    assert flash.unavailable() is None
    loaded = kernels.triton.load()
    assert isinstance(loaded, TritonOps)
    assert loaded.flash is not None
    assert kernels.triton.training_ops(loaded).packs


def test_what_may_be_missing(found: pytest.MonkeyPatch) -> None:
    found.setitem(sys.modules, flash.PACKAGE, package(old))
    assert flash.unavailable() == "its version has no block_table, softcap"
    found.setitem(sys.modules, flash.PACKAGE, ModuleType(flash.PACKAGE))
    found.setattr(flash, "find_spec", lambda name: True)
    assert str(flash.unavailable()).startswith("cannot be imported: AttributeError")
    found.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert flash.unavailable() == "needs compute capability 8.0, and the device has 7.5"
    found.setattr(torch.cuda, "is_available", lambda: False)
    assert flash.unavailable() == "there is no CUDA device"
    found.setattr(flash, "find_spec", lambda name: None)
    assert flash.unavailable() == "not installed"
    assert flash.load() is None
