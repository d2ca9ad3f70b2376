"""Attention of rows of several tokens and of training on a GPU, with flash-attn where it is installed and without.

Results are compared with the reference's, for the ops that are loaded here, and for the same ops over the package's
function as it is documented, in plain torch. Only a GPU with the package runs the package itself.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import PagedRows, cache
from kernels.training import TrainingOps
from kernels.triton import flash
from kernels.triton.flash import FlashAttention
from runtime.checkpoints import open_checkpoint
from runtime.cli.doctor import find_flash_attention
from runtime.model.decoder import Decoder
from runtime.model.families import find_model
from runtime.model.lora import LoraShape
from runtime.trainer.data.example import collate
from runtime.trainer.step import MicroStep
from tests.kernels.triton.backend import DEVICE, REFERENCE, TRITON, TritonOps, random
from tests.kernels.triton.varlen_attention import varlen_attention
from tests.parity.gradients import adapter
from tests.parity.gradients import drive as drive_slices
from tests.trainer.tiny_training import examples

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

OPTIONS = [(None, 0.0), (7, 0.0), (300, 3.0)]
"""Windows and softcaps."""
BACKENDS = {"loaded here": TRITON, "as documented": TritonOps(FlashAttention(varlen_attention))}

needs_package = pytest.mark.skipif(flash.unavailable() is not None, reason=f"flash-attn: {flash.unavailable()}")


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS)
def ops(request: pytest.FixtureRequest) -> TritonOps:
    found = request.param
    assert isinstance(found, TritonOps)
    return found


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
@pytest.mark.parametrize(
    "shapes",
    [[(3, 1), (270, 1), (0, 17), (300, 5)], [(0, 4), (255, 2)], [(3, 1), (9, 1)]],
    ids=["both", "prompts", "decoding"],
)
def test_paged_rows(ops: TritonOps, shapes: list[tuple[int, int]], window: int | None, softcap: float) -> None:
    paged = Paged(shapes, dtype=torch.float16)
    found, expected = paged.attend(ops, window, softcap), paged.attend(REFERENCE, window, softcap)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def never(*args: Any, **options: Any) -> Tensor:
    raise AssertionError("the package cannot read this")


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
def test_what_the_package_cannot_read_is_left_to_triton(
    shapes: list[tuple[int, int]], block: int, dim: int, dtype: torch.dtype
) -> None:
    paged = Paged(shapes, block=block, dim=dim, dtype=dtype)
    assert torch.equal(paged.attend(TritonOps(FlashAttention(never))), paged.attend(TritonOps()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("window", "softcap"), OPTIONS)
def test_packed_sequences_and_their_gradients(
    ops: TritonOps, dtype: torch.dtype, window: int | None, softcap: float
) -> None:
    lengths, made = [5, 1, 12], []
    weight = random(18, 4, 8, seed=7)
    for training in (kernels.triton.training_ops(ops), TrainingOps()):
        plain = type(training) is TrainingOps
        q, k, v = (random(18, heads, 8, seed=heads + at).to(dtype) for at, heads in enumerate((4, 2, 2)))
        leaves = [(x.float() if plain else x).requires_grad_() for x in (q, k, v)]
        out = training.packed_attention(*leaves, lengths, 0.3, window=window, softcap=softcap)
        (out.float() * weight).sum().backward()  # type: ignore[no-untyped-call]
        made.append([out, *(leaf.grad for leaf in leaves)])
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    for found, expected in zip(*made, strict=True):
        assert found is not None
        torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


def test_a_training_step(ops: TritonOps, tiny_model: Path) -> None:
    """In bfloat16, with the gradients of the same step on the ops without kernels."""
    data = examples(3, longest=20)
    made = []
    for training in (kernels.triton.training_ops(ops), TrainingOps()):
        decoder = half_decoder(tiny_model)
        lora = adapter(decoder, LoraShape(rank=4, alpha=8))
        micro = MicroStep(decoder, training, lora, collate(data, decoder.device), checkpointing=False)
        drive_slices(micro.forward_backward(0.1), "whole")
        made.append(
            (micro.score.mean, torch.cat([p.grad.flatten() for _, p in lora.parameters() if p.grad is not None]))
        )
    (loss, found), (expected_loss, expected) = made
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.999


def half_decoder(path: Path) -> Decoder:
    checkpoint = open_checkpoint(str(path))
    model = find_model(checkpoint.config)
    spec, device = model.spec(checkpoint.config), torch.device(DEVICE)
    decoder = Decoder(spec, REFERENCE, max_len=spec.max_position, dtype=torch.bfloat16, device=device)
    decoder.load(model.weights(checkpoint.tensors(), spec))
    return decoder


@needs_package
def test_the_package_is_used_where_it_works() -> None:
    """Its backward pass gives the same bits twice."""
    assert isinstance(TRITON, TritonOps)
    assert TRITON.flash is not None
    training = kernels.triton.training_ops(TRITON)
    assert training.packs
    grads = []
    for _ in range(2):
        q, k, v = (random(600, heads, 64, seed=heads).to(torch.bfloat16).requires_grad_() for heads in (8, 2, 2))
        out = training.packed_attention(q, k, v, [400, 200], 0.125)
        out.float().square().sum().backward()  # type: ignore[no-untyped-call]
        grads.append([x.grad for x in (q, k, v)])
    for first, second in zip(*grads, strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)


# -- may the package be used -----------------------------------------------------------------------


def test_results_that_are_right_are_no_fault() -> None:
    assert flash.fault(FlashAttention(varlen_attention), torch.device(DEVICE)) is None


def changed(change: Callable[[dict[str, Any]], None], *args: Any, **options: Any) -> Tensor:
    change(options)
    return varlen_attention(*args, **options)


def backwards(options: dict[str, Any]) -> None:
    if (table := options.get("block_table")) is not None:
        options["block_table"] = table.flip(1).contiguous()


FAULTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "sees later tokens": lambda options: options.update(causal=False, window_size=(-1, -1)),
    "no window": lambda options: options.update(window_size=(-1, -1)),
    "a window one wider": lambda options: options.update(window_size=(options["window_size"][0] + 1, 0)),
    "no softcap": lambda options: options.update(softcap=0.0),
    "another scale": lambda options: options.update(softmax_scale=None),
    "another order of blocks": backwards,
}


@pytest.mark.parametrize("change", FAULTS.values(), ids=FAULTS)
def test_results_that_are_wrong_are_a_fault(change: Callable[[dict[str, Any]], None]) -> None:
    reason = flash.fault(FlashAttention(partial(changed, change)), torch.device(DEVICE))
    assert reason is not None
    assert reason.startswith("its results differ from the reference's by up to ")


def test_a_function_that_raises_is_a_fault() -> None:
    def raising(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")

    reason = flash.fault(FlashAttention(raising), torch.device(DEVICE))
    assert reason == "does not run here: RuntimeError: no kernel image is available for execution on the device"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Write a package `flash_attn` with this source, found before any other."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == flash.PACKAGE}

    def install(source: str) -> None:
        folder = tmp_path / flash.PACKAGE
        folder.mkdir()
        (folder / "__init__.py").write_text(source, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    sys.modules.pop(flash.PACKAGE, None)
    sys.modules.update(kept)


ALL_OPTIONS = ", ".join(sorted(flash.OPTIONS))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_module_that_is_missing", "cannot be imported: ModuleNotFoundError: No module named"),
        ("raise OSError('undefined symbol')", "cannot be imported: OSError: undefined symbol"),
        ("def flash_attn_func(q): ...", "cannot be imported: AttributeError: "),
        (
            "def flash_attn_varlen_func(q, softmax_scale, causal, window_size, deterministic): ...",
            "its version has no block_table, softcap",
        ),
        (
            f"def flash_attn_varlen_func(*args, {ALL_OPTIONS}): raise RuntimeError('for another device')",
            "does not run here: RuntimeError: for another device"
            if torch.cuda.is_available()
            else "there is no CUDA device",
        ),
    ],
)
def test_a_package_that_cannot_be_used_is_left_with_its_reason(
    installed: Callable[[str], None], source: str, reason: str
) -> None:
    """Also by what `eft doctor` finds; the ops are then those without the package."""
    installed(source)
    said = flash.unavailable()
    assert said is not None
    assert said.startswith(reason)
    assert [finding.value for finding in find_flash_attention()] == [f"not used: {said}"]
    loaded = kernels.triton.load()
    assert isinstance(loaded, TritonOps)
    assert loaded.flash is None
    assert not kernels.triton.training_ops(loaded).packs


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "PACKAGE", "flash_attn_that_is_not_there")
    assert flash.unavailable() == "not installed"
    assert flash.load()[0] is None
