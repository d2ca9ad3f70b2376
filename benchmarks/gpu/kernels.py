"""Every op of a backend against the reference in float32, on the same rounded inputs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from kernels import LoraFactors, LoraSegment, LoraTable, Ops, PagedRows, cache
from kernels.quantised import Int8Weight, largest_of
from runtime.workers.adapter_table import entry_of

TOKENS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 37, 192, 320, 6, 2, 64, 1031
BLOCK = 16
SCALE = HEAD_DIM**-0.5
ROWS = [(41, 1), (129, 1), (0, 33), (57, 20)]
"""(context, new tokens) of each row of the paged cache."""

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest error of an op, as a share of its largest expected value."""
QUANTISED_TOLERANCE = 3e-2
"""The same for weights in integers: rounding may move an activation to the next integer."""


@dataclass(frozen=True)
class Inputs:
    """Random inputs: `rounded` to one type, given out in another, on one device."""

    rounded: torch.dtype
    dtype: torch.dtype
    device: torch.device

    def random(self, *shape: int, seed: int) -> Tensor:
        """[shape], standard normal, the same for every type and device up to rounding."""
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return values.to(self.rounded).to(self.device, self.dtype)

    def whole(self, values: Tensor) -> Tensor:
        """An input of a fixed type."""
        return values.to(self.device)


Case = Callable[[Ops, Inputs], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class OpResult:
    """An op in one type, checked."""

    op: str
    dtype: str
    error: float
    """Largest error over the largest expected value."""
    tolerance: float

    @property
    def right(self) -> bool:
        return self.error <= self.tolerance


def check(ops: Ops, device: torch.device, dtypes: list[torch.dtype]) -> Iterator[OpResult]:
    """One result for each op, case and type, right or wrong. Raises what an op raises, with its name as a note."""
    reference = kernels.load("reference")
    for dtype in dtypes:
        for name, case in CASES.items():
            try:
                found = _outputs(case(ops, Inputs(dtype, dtype, device)))
            except Exception as error:
                error.add_note(f"in the op {name}, {_short(dtype)}")
                raise
            expected = _outputs(case(reference, Inputs(dtype, torch.float32, device)))
            tolerance = max(TOLERANCE[dtype], QUANTISED_TOLERANCE if name in QUANTISED else 0.0)
            error_size = max(_error(one, other) for one, other in zip(found, expected, strict=True))
            yield OpResult(name, _short(dtype), error_size, 0.0 if name in EXACT else tolerance)


def _outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    largest = float(expected.double().abs().max())
    return float((found.double() - expected.double()).abs().max()) / (largest or 1.0)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- cases -----------------------------------------------------------------------------------------


def _weight(inputs: Inputs, form: str, out: int = INNER, size: int = HIDDEN) -> kernels.Weight:
    plain = inputs.random(out, size, seed=2)
    if not form:
        return plain
    makers: dict[str, kernels.Quantiser] = {
        "int8": kernels.quantise_int8, "int4": kernels.quantise_int4, "nf4": kernels.quantise_nf4
    }  # fmt: skip
    return makers[form](plain.float())


def _linear(form: str) -> Case:
    def case(ops: Ops, inputs: Inputs) -> Tensor:
        weight = _weight(inputs, form)
        prepared = weight if isinstance(weight, Tensor) else ops.prepare(weight)
        return ops.linear(inputs.random(TOKENS, HIDDEN, seed=1), prepared, inputs.random(INNER, seed=3))

    return case


def _int8_sums(ops: Ops, inputs: Inputs) -> Tensor:
    weight = _weight(inputs, "int8")
    assert isinstance(weight, Int8Weight)
    turned = weight.turned(inputs.random(TOKENS, HIDDEN, seed=1).float())
    return ops.int8_sums(turned, weight, largest_of(turned))


def _factors(inputs: Inputs, ranks: tuple[int, int] = (8, 5)) -> LoraFactors:
    parts = (INNER // 2, INNER // 4)
    return LoraFactors(
        inputs.random(sum(ranks), HIDDEN, seed=4),
        tuple(inputs.random(out, rank, seed=5 + rank) for out, rank in zip(parts, ranks, strict=True)),
        (0, parts[0]),
        inputs.random(sum(ranks), seed=6),
    )


def _lora_table(ops: Ops, inputs: Inputs) -> Tensor:
    held = None, _factors(inputs), _factors(inputs, (3, 16))
    entries = torch.tensor([[0] * 13, *(entry_of(one) for one in held if one is not None)])
    table = LoraTable(inputs.whole(entries), 2, 19, 16, INNER // 2, held)
    adapters = inputs.whole(torch.arange(TOKENS) % len(held))
    x, y = inputs.random(TOKENS, HIDDEN, seed=1), inputs.random(TOKENS, INNER, seed=7)
    return ops.lora_apply_table(x, y, table, adapters)


def _lora(ops: Ops, inputs: Inputs) -> Tensor:
    factors = _factors(inputs)
    tokens = inputs.whole(torch.tensor([0, *range(5, TOKENS)]))
    y = inputs.random(TOKENS, INNER, seed=7)
    segment = LoraSegment(tokens, ops.prepare_lora(factors))
    return ops.lora_apply(inputs.random(TOKENS, HIDDEN, seed=1), y, [segment])


def _moe(ops: Ops, inputs: Inputs) -> Tensor:
    experts, chosen = 5, 2
    order = torch.rand(TOKENS, experts, generator=torch.Generator().manual_seed(8)).argsort(1)[:, :chosen]
    return ops.moe(
        inputs.random(TOKENS, HIDDEN, seed=1),
        inputs.whole(order.contiguous()),
        inputs.random(TOKENS, chosen, seed=9).abs(),
        inputs.random(experts, 2 * INNER, HIDDEN, seed=10) * 0.1,
        inputs.random(experts, HIDDEN, INNER, seed=11) * 0.1,
    )


def _angles(inputs: Inputs, tokens: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(tokens, HEAD_DIM // 2, generator=torch.Generator().manual_seed(12))
    return inputs.whole(angles.cos()), inputs.whole(angles.sin())


def _rows(inputs: Inputs) -> tuple[PagedRows, int]:
    """The rows of `ROWS` over shuffled blocks, and the number of blocks."""
    needed = [-(-(context + count) // BLOCK) for context, count in ROWS]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(13)).tolist()
    tables = torch.zeros(len(ROWS), max(needed), dtype=torch.int64)
    for index, blocks in enumerate(needed):
        tables[index, :blocks] = torch.tensor([order.pop() for _ in range(blocks)])
    slots = [
        int(tables[index, at // BLOCK]) * BLOCK + at % BLOCK
        for index, (context, count) in enumerate(ROWS)
        for at in range(context, context + count)
    ]
    counts, contexts = [count for _, count in ROWS], [context for context, _ in ROWS]
    rows = PagedRows(inputs.whole(torch.tensor(slots)), counts, contexts, inputs.whole(tables), BLOCK)
    return rows, sum(needed)


def _cache(inputs: Inputs, blocks: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Filled on the CPU and in one type, so that both sides of a comparison read the same cache."""
    stored = torch.zeros(blocks, BLOCK, KV_HEADS, cache.width(dtype, HEAD_DIM), dtype=dtype)
    heads = torch.randn(blocks * BLOCK, KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    cache.write(stored, torch.arange(blocks * BLOCK), heads)
    return inputs.whole(stored)


def _rope_and_cache(stored: torch.dtype | None) -> Case:
    def case(ops: Ops, inputs: Inputs) -> tuple[Tensor, ...]:
        rows, blocks = _rows(inputs)
        tokens, dtype = len(rows.slots), stored or inputs.dtype
        k_cache, v_cache = (_cache(inputs, blocks, dtype, seed) for seed in (14, 15))
        q, k = ops.rope_and_cache(
            inputs.random(tokens, HEADS, HEAD_DIM, seed=16),
            inputs.random(tokens, KV_HEADS, HEAD_DIM, seed=17),
            inputs.random(tokens, KV_HEADS, HEAD_DIM, seed=18),
            *_angles(inputs, tokens),
            k_cache,
            v_cache,
            rows.slots,
        )
        return q, k, cache.read(k_cache, torch.float32), cache.read(v_cache, torch.float32)

    return case


def _paged(stored: torch.dtype | None, window: int | None = None, softcap: float = 0.0) -> Case:
    def case(ops: Ops, inputs: Inputs) -> Tensor:
        rows, blocks = _rows(inputs)
        caches = [_cache(inputs, blocks, stored or inputs.rounded, seed) for seed in (14, 15)]
        if stored is None:
            caches = [one.to(inputs.dtype) for one in caches]
        k, v = (cache.read(one, inputs.dtype).flatten(0, 1)[rows.slots] for one in caches)
        q = inputs.random(len(rows.slots), HEADS, HEAD_DIM, seed=16)
        return ops.paged_attention(q, k, v, caches[0], caches[1], rows, SCALE, window=window, softcap=softcap)

    return case


def _packed(ops: Ops, inputs: Inputs) -> Tensor:
    lengths = [TOKENS, 1, 90]
    q, k, v = (
        inputs.random(sum(lengths), heads, HEAD_DIM, seed=seed)
        for heads, seed in ((HEADS, 16), (KV_HEADS, 17), (KV_HEADS, 18))
    )
    return ops.packed_attention(q, k, v, lengths, SCALE)


def _sample(ops: Ops, inputs: Inputs) -> Tensor:
    rows = 16
    generator = torch.Generator().manual_seed(19)
    logits = torch.randn(rows, VOCAB, generator=generator) * 3
    return ops.sample(
        inputs.whole(logits),
        inputs.whole(torch.rand(rows, generator=generator, dtype=torch.float64)),
        inputs.whole(torch.full((rows,), 0.8)),
        inputs.whole(torch.tensor([VOCAB, 40] * (rows // 2))),
        inputs.whole(torch.tensor([1.0, 1.0, 0.9, 0.9] * (rows // 4))),
        inputs.whole(torch.tensor([0.0] * (rows // 2) + [0.05] * (rows // 2))),
    )


def _x(inputs: Inputs, size: int = HIDDEN) -> Tensor:
    return inputs.random(TOKENS, size, seed=1)


def _norm(inputs: Inputs) -> Tensor:
    return inputs.random(HIDDEN, seed=20)


EPS = 1e-5
CASES: dict[str, Case] = {
    "linear": _linear(""),
    "linear (int8)": _linear("int8"),
    "linear (int4)": _linear("int4"),
    "linear (nf4)": _linear("nf4"),
    "int8_sums": _int8_sums,
    "lora_apply": _lora,
    "lora_apply_table": _lora_table,
    "rms_norm": lambda ops, i: ops.rms_norm(_x(i), _norm(i), EPS),
    "rms_norm_plus_one": lambda ops, i: ops.rms_norm_plus_one(_x(i), _norm(i), EPS),
    "layer_norm": lambda ops, i: ops.layer_norm(_x(i), _norm(i), i.random(HIDDEN, seed=21), EPS),
    "silu_mul": lambda ops, i: ops.silu_mul(_x(i, 2 * INNER)),
    "norm_linear": lambda ops, i: ops.norm_linear(_x(i), _norm(i), EPS, _weight(i, "")),
    "norm_swiglu": lambda ops, i: ops.norm_swiglu(_x(i), _norm(i), EPS, _weight(i, "", 2 * INNER)),
    "linear_add": lambda ops, i: ops.linear_add(i.random(TOKENS, INNER, seed=22), _x(i), _weight(i, "")),
    "gelu_mul": lambda ops, i: ops.gelu_mul(_x(i, 2 * INNER), tanh=True),
    "gelu": lambda ops, i: ops.gelu(_x(i), tanh=False),
    "moe": _moe,
    "rope": lambda ops, i: ops.rope(i.random(TOKENS, HEADS, HEAD_DIM, seed=16), *_angles(i, TOKENS)),
    "rope_and_cache": _rope_and_cache(None),
    "rope_and_cache (int8)": _rope_and_cache(torch.int8),
    "paged_attention": _paged(None),
    "paged_attention (int8)": _paged(torch.int8),
    "paged_attention, window and softcap": _paged(None, window=19, softcap=30.0),
    "packed_attention": _packed,
    "argmax": lambda ops, i: ops.argmax(i.whole(i.random(16, VOCAB, seed=23).float())),
    "sample": _sample,
}
"""Every op, by the name of its method and what is special about the case."""

QUANTISED = frozenset(name for name in CASES if name.endswith(("(int8)", "(int4)", "(nf4)")))

EXACT = frozenset({"int8_sums", "argmax", "sample"})
"""Ops whose inputs are the same bits for both, and whose results have to be."""
