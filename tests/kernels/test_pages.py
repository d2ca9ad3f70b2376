"""Memory for weights: tensors of their own, whatever is asked for before and after, and as long as they live."""

import gc

import pytest
import torch

from kernels import pages


@pytest.mark.parametrize("size", [1, pages.SMALL - 1, pages.SMALL, pages.SMALL + 1, pages.CHUNK // 3, pages.CHUNK + 5])
def test_each_tensor_has_lines_of_its_own(size: int) -> None:
    tensors = [pages.empty((size,), torch.int8).fill_(index) for index in range(4)]
    assert all((tensor == index).all() for index, tensor in enumerate(tensors))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)


def test_a_tensor_outlives_those_beside_it() -> None:
    first, second = (pages.empty((pages.SMALL, 3), torch.float32) for _ in range(2))
    second.fill_(7.0)
    assert second.shape == (pages.SMALL, 3)
    del first
    gc.collect()
    pages.empty((pages.CHUNK,), torch.int8).zero_()
    assert (second == 7.0).all()
