"""The group of ranks over torch.distributed: gloo between CPUs, NCCL between GPUs.

NCCL has a stream of its own, on which a sum runs beside what the device computes. With torch, ops that need a result
wait for it on the device, so the CPU continues and launches what follows.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.model.group import Group

T = TypeVar("T")


class CollectiveFailed(RuntimeError):
    """A rendezvous or a collective failed: another rank has died or hangs. This rank is unusable from now on."""


class TorchGroup(Group):
    """All ranks of the default process group."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def rendezvous(cls, store: str, rank: int, size: int, device: torch.device, timeout: float) -> "TorchGroup":
        """Wait until all ranks are there. `store` is an init method of torch.distributed. Raises
        `CollectiveFailed`."""
        nccl = device.type == "cuda"
        _checked(
            lambda: dist.init_process_group(
                "cpu:gloo,cuda:nccl" if nccl else "gloo",
                init_method=store,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout),
                device_id=device if nccl else None,
            )
        )
        return cls(rank, size)

    def all_reduce(self, x: Tensor) -> Tensor:
        _checked(lambda: dist.all_reduce(x, dist.ReduceOp.SUM))
        return x

    def all_reduce_later(self, x: Tensor) -> Callable[[], Tensor]:
        work = _checked(lambda: dist.all_reduce(x, dist.ReduceOp.SUM, async_op=True))
        assert work is not None

        def wait() -> Tensor:
            _checked(work.wait)
            return x

        return wait

    def max(self, x: Tensor) -> Tensor:
        _checked(lambda: dist.all_reduce(x, dist.ReduceOp.MAX))
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        found = [torch.empty_like(x) for _ in range(self.size)]
        _checked(lambda: dist.all_gather(found, x))
        return found


def _checked(collective: Callable[[], T]) -> T:
    try:
        return collective()
    except (RuntimeError, ValueError) as error:
        raise CollectiveFailed(str(error)) from error
