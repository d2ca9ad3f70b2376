"""Linears whose inputs are split over ranks: each holds a slice of the weight's columns, and all add up.

This module decides how each weight format does that. In floating point the products are added. int8 quantises a token
by the largest value of its whole row and adds integers, so any number of ranks gives the same bits as one, as long as
each holds whole blocks of what is turned together (`kernels.hadamard`). A new format whose products can be added as
they are needs nothing here.
"""

from typing import Protocol

import torch
from torch import Tensor

from kernels.hadamard import turn
from kernels.interface import Ops
from kernels.quantised import Int8Weight, Weight, from_sums, largest_of


class Collective(Protocol):
    """Operations of all ranks together. Both give every rank the same bits, and may change x in place."""

    def sum(self, x: Tensor) -> Tensor:
        """x, any shape, added up over the ranks. Differentiable."""

    def max(self, x: Tensor) -> Tensor:
        """The largest over the ranks of each element of x."""


def split_linear(ops: Ops, x: Tensor, weight: Weight, ranks: Collective) -> Tensor:
    """x [T, in / ranks] times weight [out, in / ranks] transposed, added up over the ranks → [T, out]."""
    if isinstance(weight, Int8Weight) and is_exact(ops, weight, x):
        turned = turn(x)
        most = ranks.max(largest_of(turned))
        return from_sums(ranks.sum(ops.int8_sums(turned, weight, most)), weight, most).to(x.dtype)
    return ranks.sum(ops.linear(x, weight))


def is_exact(ops: Ops, weight: Weight, x: Tensor) -> bool:
    """True if `split_linear` adds in integers, so that nothing may be added to a rank's share before. In training it
    does not, with gradients or without: a layer that is computed again for its backward pass gives what it gave."""
    wants_grad = torch.is_grad_enabled() and x.requires_grad
    return isinstance(weight, Int8Weight) and ops.quantises_inputs and not wants_grad
