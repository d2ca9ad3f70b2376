"""What holds for a linear with weights of any kind in integers: rows do not know each other."""

import torch

import kernels


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_normed(
    ops: kernels.Ops,
    weights: tuple[kernels.Weight, kernels.Weight],
    x: torch.Tensor,
    norm: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Linears after a norm are the reference's, who has the second of the weights. The norm's last bit can move an
    activation, of up to 8 here, to the next of 127 integers, and then a weight of up to 4 is counted once more."""
    reference, (ours, theirs) = kernels.load("reference"), weights
    step = 0.3
    expected = reference.norm_linear(x, norm, 1e-5, theirs, bias)
    assert torch.allclose(ops.norm_linear(x, norm, 1e-5, ours, bias), expected, rtol=1e-3, atol=step)
    step *= 1 + float(expected.abs().max())  # a product of two: as far off as one, times the other
    gated = reference.norm_swiglu(x, norm, 1e-5, theirs, bias)
    assert torch.allclose(ops.norm_swiglu(x, norm, 1e-5, ours, bias), gated, rtol=1e-3, atol=step)


def check_rows_alone(ops: kernels.Ops, *forms: kernels.Weight) -> None:
    """The same bits in every batch, on any number of threads, and with each of the weight's forms."""
    weight = forms[0]
    x = random(300, weight.shape[1], seed=1)
    whole = ops.linear(x, weight)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            for first, last in [(0, 1), (3, 20), (5, 45), (17, 290), (299, 300)]:
                for form in forms:
                    assert torch.equal(ops.linear(x[first:last], form), whole[first:last])
    finally:
        torch.set_num_threads(threads)


def check_broken_rows(ops: kernels.Ops, weight: kernels.Weight) -> None:
    """A row of zeros gives zeros, one that is not finite nothing finite, and the others are not touched by it."""
    x = random(4, weight.shape[1], seed=1)
    x[0] = 0.0
    x[1, 7] = float("nan")
    x[2, 7] = float("inf")
    found = ops.linear(x, weight)
    assert torch.equal(found[0], torch.zeros(weight.shape[0]))
    assert not found[1:3].isfinite().any()
    assert found[3].isfinite().all()
