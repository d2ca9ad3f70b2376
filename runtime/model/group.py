"""What ranks of tensor parallelism do together (arXiv:1909.08053), differentiable where training needs it.

A rank knows its number and how many there are, and calls the same collectives in the same order as the others. How
bytes travel is not known here: see `runtime.ranks.collectives`. One rank alone is a group too, for which all of this is
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
    def add_up(self, x: Tensor) -> Tensor:
        """x, contiguous, summed over the ranks. May be done in place; no gradient."""

    def add_up_later(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin `add_up`; what is returned waits for it. Meanwhile x belongs to it, and others may be begun."""
        return partial(self.add_up, x)

    @abstractmethod
    def max(self, x: Tensor) -> Tensor:
        """The largest over the ranks of each element of x. May be done in place; no gradient."""

    @abstractmethod
    def collect(self, x: Tensor) -> list[Tensor]:
        """Every rank's x, of one shape on all, in the order of the ranks. No gradient."""

    # -- with gradients ------------------------------------------------------------------------

    def enter(self, x: Tensor) -> Tensor:
        """x, alike on all ranks, on its way into what is split: the gradients of the ranks add up."""
        if self.size == 1 or not _wants_grad(x):
            return x
        entered: Tensor = _Enter.apply(x, self)  # type: ignore[no-untyped-call]
        return entered

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, for what is alike on all ranks from here on: each gets the whole gradient."""
        if self.size == 1:
            return x
        if not _wants_grad(x):
            return self.add_up(x.contiguous())
        summed: Tensor = _Sum.apply(x, self)  # type: ignore[no-untyped-call]
        return summed

    def sum_later(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin `sum`, as far as that is possible; what is returned gives it."""
        if self.size == 1:
            return lambda: x
        return partial(self.sum, x) if _wants_grad(x) else self.add_up_later(x.contiguous())

    def share(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, for what is split from here on."""
        return self.enter(self.sum(x))

    def join(self, x: Tensor) -> Tensor:
        """x [..., n] of all ranks, one beside the other: [..., size * n], alike on all ranks from here on."""
        if self.size == 1:
            return x
        if not _wants_grad(x):
            return torch.cat(self.collect(x.contiguous()), dim=-1)
        joined: Tensor = _Join.apply(x, self)  # type: ignore[no-untyped-call]
        return joined


class Solo(Group):
    """One rank that holds everything."""

    def add_up(self, x: Tensor) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x

    def collect(self, x: Tensor) -> list[Tensor]:
        return [x]


SOLO = Solo()


class Member(Solo):
    """A rank of so many without the others: for shapes alone, where nothing is computed."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self.size = size
        self.rank = rank


def _wants_grad(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        return ctx.group.add_up(grad.clone(memory_format=torch.contiguous_format)), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.add_up(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.rank, ctx.width = group.rank, x.shape[-1]
        return torch.cat(group.collect(x.contiguous()), dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].narrow(-1, ctx.rank * ctx.width, ctx.width), None
