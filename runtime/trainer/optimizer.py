"""From gradients to new parameters: one optimiser a layer, so that a step is made of slices too.

Gradients and state are allocated at once and stay in place: long-lived tensors, allocated between the large
temporaries of the first step, would leave holes that nothing fits into.
"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from runtime.trainer.layer_optimizers import ELEMENTWISE, MATRICES, EightBit, LayerOptimizer, Matrices, Named
from runtime.trainer.recipe import Recipe
from runtime.trainer.shards import Shards
from runtime.trainer.slices import Slice, Sliced, Slices


class Optimizer:
    """All parameters of one adapter, in groups by layer."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], recipe: Recipe, shards: Shards) -> None:
        """`parameters` are named `layer.…` and lie layer by layer; `shards` describes the parts held here."""
        self._recipe = recipe
        self._shards = shards
        self._named = list(parameters)
        self.zero_grad()
        self._optimizers: list[LayerOptimizer] = []
        self._scales: list[float] = []
        """Of the learning rate, for each of them."""
        for _, layer in groupby(self._named, key=lambda item: item[0].partition(".")[0]):
            for scale, group in _by_scale(list(layer), recipe.loraplus_lr_ratio):
                self._optimizers.append(_make(recipe, group, shards, self._matrices))
                self._scales.append(scale)

    def step(self, factor: float) -> Sliced[float]:
        """Clip, change the parameters at `factor` times the learning rate, and clear the gradients.

        Returns the norm of all gradients before clipping; where it is not finite, nothing was changed.
        """
        yield Slice("clip", 1)
        self._shards.complete(self._grads)
        norm = self._norm()
        if norm == norm and norm != float("inf"):
            self._clip(norm)
            yield from self._change(self._recipe.learning_rate * factor)
        self.zero_grad()
        return norm

    def _matrices(self, name: str) -> int:
        """Number of matrices that lie one above the other in a parameter: those of A are one for each B."""
        above = name.removesuffix(".a")
        return 1 if above == name else max(1, sum(other.startswith(f"{above}.b.") for other, _ in self._named))

    def zero_grad(self) -> None:
        for _, parameter in self._named:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    @property
    def _grads(self) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in self._named if parameter.grad is not None}

    def _norm(self) -> float:
        grads = self._grads
        return self._shards.squares(grads) ** 0.5 if grads else 0.0

    def _clip(self, norm: float) -> None:
        most = self._recipe.max_grad_norm
        if most == 0 or norm <= most:
            return
        for _, parameter in self._named:
            if parameter.grad is not None:
                parameter.grad.mul_(most / (norm + 1e-6))

    def _change(self, rate: float) -> Slices:
        done = 0
        while done < len(self._optimizers):
            count = yield Slice("optimizer", len(self._optimizers) - done)
            part = slice(done, done + count)
            for scale, optimizer in zip(self._scales[part], self._optimizers[part], strict=True):
                optimizer.step(rate * scale)
            done += count

    def capture(self) -> dict[str, Tensor]:
        """A copy of the whole state, on the CPU: `name.key` for every parameter, such as `0.qkv.a.exp_avg`. All ranks
        at once."""
        return self._shards.gather_state(
            {
                (name, key): torch.as_tensor(value).detach()
                for name, parameter in self._named
                for key, value in self._state(parameter).items()
            }
        )

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take an earlier `capture`."""
        by_id = {id(parameter): name for name, parameter in self._named}
        for optimizer in self._optimizers:
            for parameter in optimizer.parameters:
                name = by_id[id(parameter)]
                state = {
                    key.removeprefix(f"{name}."): self._shards.pick(name, value).clone()
                    for key, value in tensors.items()
                    if key.startswith(f"{name}.")
                }
                if state:
                    optimizer.restore(parameter, state)

    def release(self) -> None:
        """Release gradients and state: there will be no more steps."""
        for _, parameter in self._named:
            parameter.grad = None
        self._optimizers.clear()

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        for optimizer in self._optimizers:
            if any(parameter is own for own in optimizer.parameters):
                return {key: value for key, value in optimizer.capture(parameter).items() if value is not None}
        return {}


def eight_bit_available(device: torch.device) -> bool:
    """True if bitsandbytes' optimisers with 8-bit states run here: they are CUDA kernels."""
    return device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None


def _by_scale(layer: list[Named], ratio: float | None) -> list[tuple[float, list[Named]]]:
    """A layer's parameters by the scale of their learning rate: with a `ratio`, that of LoRA+ (arXiv:2402.12354) for B
    matrices and vectors, as PEFT groups them."""
    if ratio is None:
        return [(1.0, layer)]
    raised = [item for item in layer if ".b." in item[0] or item[1].ndim == 1]
    plain = [item for item in layer if not any(item[1] is other for _, other in raised)]
    return [(scale, some) for scale, some in ((1.0, plain), (ratio, raised)) if some]


def _make(recipe: Recipe, named: list[Named], shards: Shards, matrices: Callable[[str], int]) -> LayerOptimizer:
    family, parameters = recipe.optimizer_family, [parameter for _, parameter in named]
    if family == "adamw_8bit":
        if eight_bit_available(parameters[0].device):
            return EightBit(parameters, recipe)
        family = "adamw"
    if family in ELEMENTWISE:
        return ELEMENTWISE[family](parameters, recipe)
    if not shards.alone:
        raise ValueError(f"optimizer {recipe.optimizer} works on whole matrices, of which each rank holds a part")
    return Matrices([(parameter, matrices(name)) for name, parameter in named], recipe, MATRICES[family])
