"""Memory for weights: tensors of their own, whatever is asked for before and after, and as long as they live."""

import gc

import pytest
import torch

from kernels.cpu import memory


@pytest.mark.parametrize(
    "size", [1, memory.SMALL - 1, memory.SMALL, memory.SMALL + 1, memory.CHUNK // 3, memory.CHUNK + 5]
)
def test_each_tensor_has_lines_of_its_own(size: int) -> None:
    tensors = [memory.empty((size,), torch.int8).fill_(index) for index in range(4)]
    assert all((tensor == index).all() for index, tensor in enumerate(tensors))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)


def test_a_tensor_outlives_those_beside_it() -> None:
    first, second = (memory.empty((memory.SMALL, 3), torch.float32) for _ in range(2))
    second.fill_(7.0)
    assert second.shape == (memory.SMALL, 3)
    del first
    gc.collect()
    memory.empty((memory.CHUNK,), torch.int8).zero_()
    assert (second == 7.0).all()
