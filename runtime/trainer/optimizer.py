"""From gradients to new parameters: one optimiser a layer, so that a step is made of slices too.

Gradients and state are allocated at once and stay in place: long-lived tensors, allocated between the large
temporaries of the first step, would leave holes that nothing fits into.
"""

import importlib.util
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

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
        layers = groupby(self._named, key=lambda item: item[0].partition(".")[0])
        self._optimizers = [_make(recipe, [parameter for _, parameter in group]) for _, group in layers]
        self.zero_grad()

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
            for optimizer in self._optimizers[done : done + count]:
                optimizer.step(rate)
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
                    optimizer.state[parameter] = state

    def release(self) -> None:
        """Release gradients and state: there will be no more steps."""
        for _, parameter in self._named:
            parameter.grad = None
        self._optimizers.clear()

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        for optimizer in self._optimizers:
            if parameter in optimizer.state:
                state: dict[str, Any] = optimizer.state[parameter]
                return {key: value for key, value in state.items() if value is not None}
        return {}


def eight_bit_available(device: torch.device) -> bool:
    """True if bitsandbytes' optimisers with 8-bit states run here: they are CUDA kernels."""
    return device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None


class _LayerOptimizer(Protocol):
    """Optimiser of the parameters of one layer."""

    parameters: list[Tensor]
    state: dict[Tensor, dict[str, Any]]
    """State of each parameter, by torch's own names."""

    def step(self, rate: float) -> None:
        """Change the parameters by their gradients."""


class _Sgd:
    def __init__(self, parameters: list[Tensor], recipe: Recipe) -> None:
        self.parameters = parameters
        self.state: dict[Tensor, dict[str, Any]] = {}
        self._weight_decay = recipe.weight_decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.sub_(parameter.grad.add(parameter, alpha=self._weight_decay), alpha=rate)


class _AdamW:
    """torch's fused kernel (arXiv:1711.05101), without the class around it: that imports torch's compiler, which
    takes 74 MB and a second."""

    def __init__(self, parameters: list[Tensor], recipe: Recipe) -> None:
        self.parameters = parameters
        self.state: dict[Tensor, dict[str, Any]] = {
            parameter: {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for parameter in parameters
        }
        self._recipe = recipe

    @torch.no_grad()
    def step(self, rate: float) -> None:
        states = [self.state[parameter] for parameter in self.parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            self.parameters,
            [parameter.grad for parameter in self.parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=rate,
            beta1=self._recipe.adam_beta1,
            beta2=self._recipe.adam_beta2,
            weight_decay=self._recipe.weight_decay,
            eps=self._recipe.adam_epsilon,
            amsgrad=False,
            maximize=False,
        )


class _EightBit:
    """AdamW of bitsandbytes, whose state is in 8 bits."""

    def __init__(self, parameters: list[Tensor], recipe: Recipe) -> None:
        import bitsandbytes

        self.parameters = parameters
        untyped: Any = bitsandbytes.optim
        self._optimizer: torch.optim.Optimizer = untyped.AdamW8bit(
            parameters,
            lr=recipe.learning_rate,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            eps=recipe.adam_epsilon,
            weight_decay=recipe.weight_decay,
        )
        self.state: dict[Tensor, dict[str, Any]] = self._optimizer.state

    def step(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()


def _make(recipe: Recipe, parameters: list[Tensor]) -> _LayerOptimizer:
    if recipe.optimizer_family == "sgd":
        return _Sgd(parameters, recipe)
    if recipe.optimizer_family == "adamw_8bit" and eight_bit_available(parameters[0].device):
        return _EightBit(parameters, recipe)
    return _AdamW(parameters, recipe)
