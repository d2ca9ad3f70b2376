"""Ranks as threads of the test's process: the layers' side of tensor parallelism, without processes to start."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from runtime.model.group import SOLO, Group

T = TypeVar("T")


class Meeting:
    """Where the threads exchange tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.brought: list[Tensor] = [torch.empty(0)] * size


class ThreadGroup(Group):
    """Adds in the order of the ranks, so that all of them get the same bits."""

    def __init__(self, meeting: Meeting, rank: int, size: int) -> None:
        self._meeting = meeting
        self.rank = rank
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(sum(self.gather(x)))  # type: ignore[arg-type]

    def max(self, x: Tensor) -> Tensor:
        return torch.stack(self.gather(x)).amax(0)

    def gather(self, x: Tensor) -> list[Tensor]:
        meeting = self._meeting
        meeting.brought[self.rank] = x.detach().clone()
        meeting.barrier.wait()
        brought = list(meeting.brought)
        meeting.barrier.wait()
        assert len({(one.shape, one.dtype) for one in brought}) == 1, "the ranks brought different things"
        return brought


def in_ranks(size: int, work: Callable[[Group], T]) -> list[T]:
    """What `work` gives on each of so many ranks, in their order. Raises what one of them raised."""
    if size == 1:
        return [work(SOLO)]
    meeting = Meeting(size)

    def run(rank: int) -> T:
        try:
            return work(ThreadGroup(meeting, rank, size))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
