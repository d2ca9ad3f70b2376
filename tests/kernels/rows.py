"""What holds for a linear with weights of any kind in integers: rows do not know each other."""

import torch

import kernels


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
