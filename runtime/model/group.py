"""Collectives of tensor-parallel ranks (Megatron-LM, arXiv:1909.08053), differentiable where training needs it.

A rank has its number and the size of the group, and calls the same collectives in the same order as the others. The
transport of bytes is in `runtime.workers.parallel.rank`. One rank alone is a group too, whose collectives do
nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Group(ABC):
    """The ranks that share one model. Every rank gets the same bits from a collective."""

    rank: int = 0
    size: int = 1

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """x, contiguous, summed over the ranks. May be done in place; no gradient."""

    def all_reduce_later(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin `all_reduce`; calling the result waits for its end. Until then x must not be used; more may be
        begun."""
        return partial(self.all_reduce, x)

    @abstractmethod
    def max(self, x: Tensor) -> Tensor:
        """The largest over the ranks of each element of x. May be done in place; no gradient."""

    @abstractmethod
    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's x, of one shape on all, in the order of the ranks. No gradient."""

    # -- with gradients ------------------------------------------------------------------------

    def copy_to_tp(self, x: Tensor) -> Tensor:
        """x, equal on all ranks, as the input of a split operation: in the backward pass the gradients are summed."""
        if self.size == 1 or not _wants_grad(x):
            return x
        copied: Tensor = _CopyToTP.apply(x, self)  # type: ignore[no-untyped-call]
        return copied

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, for a computation that is alike on all ranks from here on: each gets the whole
        gradient."""
        if self.size == 1:
            return x
        if not _wants_grad(x):
            return self.all_reduce(x.contiguous())
        summed: Tensor = _AllReduce.apply(x, self)  # type: ignore[no-untyped-call]
        return summed

    def sum_later(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin `sum`, as far as possible; calling the result returns the sum."""
        if self.size == 1:
            return lambda: x
        return partial(self.sum, x) if _wants_grad(x) else self.all_reduce_later(x.contiguous())

    def share(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, for a computation that is split over ranks from here on."""
        return self.copy_to_tp(self.sum(x))

    def all_gather(self, x: Tensor) -> Tensor:
        """x [..., n] of all ranks, concatenated: [..., size * n], alike on all ranks from here on."""
        if self.size == 1:
            return x
        if not _wants_grad(x):
            return torch.cat(self.gather(x.contiguous()), dim=-1)
        gathered: Tensor = _AllGather.apply(x, self)  # type: ignore[no-untyped-call]
        return gathered


class SingleRank(Group):
    """One rank that holds everything."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        return [x]


SOLO = SingleRank()


class UnconnectedRank(SingleRank):
    """One of `size` ranks without the others: for shapes alone, where nothing is computed."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self.size = size
        self.rank = rank


def _wants_grad(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


class _CopyToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        return ctx.group.all_reduce(grad.clone(memory_format=torch.contiguous_format)), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.all_reduce(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.rank, ctx.width = group.rank, x.shape[-1]
        return torch.cat(group.gather(x.contiguous()), dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].narrow(-1, ctx.rank * ctx.width, ctx.width), None
