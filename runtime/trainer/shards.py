"""Trained parameters of which every rank holds a part: their sums over ranks, and gathering of whole parameters.

One rank holds everything, and then all of this changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.model.group import Group
from runtime.model.split import Split


@dataclass(frozen=True)
class Held:
    """Indices along one dimension of a whole parameter that are held here."""

    split: Split
    dim: int
    ndim: int = 2
    """Dimensions of the parameter."""


class Shards:
    """All parameters of one adapter, by name."""

    def __init__(self, group: Group, held: Mapping[str, Held], device: torch.device) -> None:
        """All ranks at once."""
        self._group = group
        self._held = held
        self._copies = {split: _copies(split, group, device) for split in dict.fromkeys(h.split for h in held.values())}
        """Number of ranks that hold each index of the whole. A fused projection may have heads of both kinds, alone and
        copied."""

    @property
    def alone(self) -> bool:
        """True where one rank holds everything."""
        return self._group.size == 1

    def shape(self, name: str, tensor: Tensor) -> torch.Size:
        """Shape of the whole parameter of which `tensor` is held here."""
        held, sizes = self._held[name], list(tensor.shape)
        sizes[held.dim] = held.split.full
        return torch.Size(sizes)

    def pick(self, name: str, whole: Tensor) -> Tensor:
        """The part held here of a tensor that is shaped as the parameter; other tensors stay whole."""
        held = self._held[name]
        return held.split.pick(whole, held.dim) if _is_shaped(whole, held) else whole

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of whole parameters, on the CPU. All ranks at once, with the same names in the same order."""
        return {name: self._whole(self._held[name], tensor).to("cpu", copy=True) for name, tensor in tensors.items()}

    def gather_state(self, states: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
        """The same of an optimiser's state: (parameter, key) → `parameter.key`."""
        return {
            f"{name}.{key}": self._whole(self._held[name], tensor, is_state=True).to("cpu", copy=True)
            for (name, key), tensor in states.items()
        }

    def complete(self, grads: Mapping[str, Tensor]) -> None:
        """Make gradients whole, in place: those of a parameter, or of a part of it, that several ranks hold are
        pieces of a sum."""
        if self._group.size == 1:
            return
        named = [(self._held[name], grad) for name, grad in grads.items()]
        shared = [(held, grad) for held, grad in named if bool((self._copies[held.split] > 1).any())]
        spread = [grad if held.split.is_whole else self._spread(held, grad) for held, grad in shared]
        if not spread:
            return
        total = self._group.all_reduce(torch.cat([grad.flatten() for grad in spread]))
        for (held, grad), like, piece in zip(
            shared, spread, torch.split(total, [g.numel() for g in spread]), strict=True
        ):
            grad.copy_(held.split.pick(piece.view(like.shape), held.dim))

    def squares(self, grads: Mapping[str, Tensor]) -> float:
        """The sum of the squares of all whole gradients."""
        device = next(iter(grads.values())).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for name, grad in grads.items():
            total += (grad.double().square() / self._counts(self._held[name], grad)).sum()
        return float(self._group.all_reduce(total.unsqueeze(0)))

    def _counts(self, held: Held, tensor: Tensor) -> Tensor:
        """Number of ranks that hold each value that is here, to divide by."""
        return _along(held.split.pick(self._copies[held.split]), held.dim, tensor.ndim)

    def _spread(self, held: Held, tensor: Tensor) -> Tensor:
        sizes = list(tensor.shape)
        sizes[held.dim] = held.split.full
        whole = tensor.new_zeros(sizes)
        held.split.put(whole, tensor, held.dim)
        return whole

    def _whole(self, held: Held, tensor: Tensor, *, is_state: bool = False) -> Tensor:
        if held.split.is_whole or (is_state and not _is_held(tensor, held)):
            return tensor
        # Values that several ranks hold are the same on all of them.
        total = self._group.all_reduce(self._spread(held, tensor))
        return total / _along(self._copies[held.split], held.dim, total.ndim)


def _copies(split: Split, group: Group, device: torch.device) -> Tensor:
    if split.is_whole:
        return torch.full((split.full,), float(group.size), device=device)
    held = torch.zeros(split.full, device=device)
    split.put(held, torch.ones(split.size, device=device))
    return group.all_reduce(held)


def _along(counts: Tensor, dim: int, ndim: int) -> Tensor:
    return counts.view([-1 if at == dim else 1 for at in range(ndim)])


def _is_shaped(tensor: Tensor, held: Held) -> bool:
    return tensor.ndim == held.ndim and tensor.shape[held.dim] == held.split.full


def _is_held(tensor: Tensor, held: Held) -> bool:
    """True for a state [values held here], and not one of another shape, such as a number of steps."""
    return tensor.ndim == held.ndim and tensor.shape[held.dim] == held.split.size
