"""`lora_apply` of every backend that works here, against the dense product that it stands for."""

import pytest
import torch

import kernels
from kernels import LoraFactors, LoraSegment, Ops

IN, PARTS, T = 24, (16, 8, 12), 15
RANKS = (4, 1, 3)


@pytest.fixture(params=[name for name, reason in kernels.available().items() if reason is None])
def ops(request: pytest.FixtureRequest) -> Ops:
    return kernels.load(request.param)


def factors(seed: int, parts: tuple[int, ...], dtype: torch.dtype) -> tuple[LoraFactors, torch.Tensor]:
    """Factors for some of three parts, and the change of the weight [out, in] that they are, in float64."""
    generator = torch.Generator().manual_seed(seed)
    starts = [sum(PARTS[:index]) for index in range(len(PARTS))]
    a = [torch.randn(RANKS[p], IN, generator=generator).to(dtype) for p in parts]
    b = [torch.randn(PARTS[p], RANKS[p], generator=generator).to(dtype) for p in parts]
    scales = [0.5 * (p + 1) for p in parts]
    dense = torch.zeros(sum(PARTS), IN, dtype=torch.float64)
    for index, p in enumerate(parts):
        dense[starts[p] : starts[p] + PARTS[p]] = scales[index] * b[index].double() @ a[index].double()
    stacked = torch.cat([torch.full((RANKS[p],), scale) for p, scale in zip(parts, scales, strict=True)]).to(dtype)
    return LoraFactors(torch.cat(a), tuple(b), tuple(starts[p] for p in parts), stacked), dense


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_it_is_the_dense_product(ops: Ops, dtype: torch.dtype, close: float, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, IN, generator=generator).to(dtype)
    start = torch.randn(T, sum(PARTS), generator=generator).to(dtype)
    first, first_dense = factors(1, (0, 2), dtype)
    second, second_dense = factors(2, (1,), dtype)
    rows = torch.tensor([0, 3, 4, 9]), torch.tensor([1, 14])
    expected = start.double()
    expected[rows[0]] += x[rows[0]].double() @ first_dense.T
    expected[rows[1]] += x[rows[1]].double() @ second_dense.T
    y = start.t().contiguous().t() if transposed else start.clone()  # `linear` may give either
    result = ops.lora_apply(x, y, [LoraSegment(rows[0], first), LoraSegment(rows[1], second)])
    assert result.data_ptr() == y.data_ptr()
    assert (result.double() - expected).abs().max() < close * expected.abs().max()
    untouched = [row for row in range(T) if row not in (0, 3, 4, 9, 1, 14)]
    assert torch.equal(result[untouched], start[untouched])
    everywhere = ops.lora_apply(x, start.clone(), [LoraSegment(None, first)])
    expected = start.double() + x.double() @ first_dense.T
    assert (everywhere.double() - expected).abs().max() < close * expected.abs().max()
