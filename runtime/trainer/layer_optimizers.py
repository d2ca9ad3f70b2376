"""Optimisers of the parameters of one layer, by the family that the recipe's `optimizer` comes down to."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.trainer.recipe import Recipe

Named = tuple[str, Tensor]
"""A parameter by its name, such as `0.qkv.b.q`."""


class LayerOptimizer(ABC):
    """Optimiser of the parameters of one layer."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.state: dict[Tensor, dict[str, Any]] = {}
        """State of each parameter, by torch's own names."""

    @abstractmethod
    def step(self, rate: float) -> None:
        """Change the parameters by their gradients."""

    def capture(self, parameter: Tensor) -> dict[str, Any]:
        """The state of one of the parameters, by names: tensors and numbers."""
        return self.state.get(parameter, {})

    def restore(self, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        """Take an earlier `capture`, as tensors."""
        self.state[parameter] = dict(state)


# -- value by value --------------------------------------------------------------------------------


class Sgd(LayerOptimizer):
    """Stochastic gradient descent with weight decay and no state."""

    def __init__(self, parameters: list[Tensor], recipe: Recipe) -> None:
        super().__init__(parameters)
        self._weight_decay = recipe.weight_decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.sub_(parameter.grad.add(parameter, alpha=self._weight_decay), alpha=rate)


class AdamW(LayerOptimizer):
    """torch's fused kernel (arXiv:1711.05101), without the class around it: that imports torch's compiler, which
    takes 74 MB and a second."""

    def __init__(self, parameters: list[Tensor], recipe: Recipe) -> None:
        super().__init__(parameters)
        self.state = {
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


class Lion(LayerOptimizer):
    """Steps by the sign of a mean of gradients (arXiv:2302.06675), with decoupled weight decay."""

    def __init__(self, parameters: list[Tensor], recipe: Recipe) -> None:
        super().__init__(parameters)
        self.state = {parameter: {"exp_avg": torch.zeros_like(parameter)} for parameter in parameters}
        self._recipe = recipe

    @torch.no_grad()
    def step(self, rate: float) -> None:
        recipe = self._recipe
        for parameter in self.parameters:
            assert parameter.grad is not None
            mean = self.state[parameter]["exp_avg"]
            direction = mean.lerp(parameter.grad, 1 - recipe.adam_beta1).sign_()
            parameter.mul_(1 - rate * recipe.weight_decay).sub_(direction, alpha=rate)
            mean.lerp_(parameter.grad, 1 - recipe.adam_beta2)


ELEMENTWISE: dict[str, Callable[[list[Tensor], Recipe], LayerOptimizer]] = {"sgd": Sgd, "adamw": AdamW, "lion": Lion}
"""Families that treat each value by itself, so that a part of a parameter is changed as the whole would be."""


class EightBit(LayerOptimizer):
    """AdamW of bitsandbytes, whose state is in 8 bits."""

    def __init__(self, parameters: list[Tensor], recipe: Recipe) -> None:
        import bitsandbytes

        super().__init__(parameters)
        untyped: Any = bitsandbytes.optim
        self._optimizer: torch.optim.Optimizer = untyped.AdamW8bit(
            parameters,
            lr=recipe.learning_rate,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            eps=recipe.adam_epsilon,
            weight_decay=recipe.weight_decay,
        )
        self.state = self._optimizer.state

    def step(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()


# -- whole matrices --------------------------------------------------------------------------------


class Matrices(LayerOptimizer):
    """An optimiser of torch's or transformers' that looks at matrices as wholes. Those of A that lie one above the
    other are each a matrix of their own, as in PEFT."""

    def __init__(
        self, parameters: Sequence[tuple[Tensor, int]], recipe: Recipe, make: Callable[..., torch.optim.Optimizer]
    ) -> None:
        """`parameters`: each with the number of its matrices."""
        super().__init__([parameter for parameter, _ in parameters])
        self._pieces = {
            parameter: [_piece(parameter, at, count) for at in range(count)] for parameter, count in parameters
        }
        pieces = [piece for some in self._pieces.values() for piece in some]
        self._optimizer = make(pieces, recipe)

    def step(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()

    def capture(self, parameter: Tensor) -> dict[str, Any]:
        return {
            f"{index}.{key}": value
            for index, piece in enumerate(self._pieces[parameter])
            for key, value in self._optimizer.state.get(piece, {}).items()
        }

    def restore(self, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        for index, piece in enumerate(self._pieces[parameter]):
            own = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{index}.")}
            # A number of steps is Python's in these classes.
            self._optimizer.state[piece] = {key: int(value) if key == "step" else value for key, value in own.items()}


def _piece(parameter: Tensor, index: int, count: int) -> Tensor:
    """One of `count` matrices that lie one above the other, over the same memory, with its gradient."""
    assert parameter.grad is not None, "gradients are allocated before"
    piece = parameter.detach().chunk(count)[index].requires_grad_()
    piece.grad = parameter.grad.chunk(count)[index]
    return piece


def _adafactor(pieces: list[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """transformers' (arXiv:1804.04235), as its trainer sets it: the learning rate is the schedule's."""
    from transformers.optimization import Adafactor

    return Adafactor(  # type: ignore[no-untyped-call]
        pieces,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        scale_parameter=False,
        relative_step=False,
    )


def _muon(pieces: list[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """torch's, whose steps are orthogonal matrices."""
    return torch.optim.Muon(pieces, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


MATRICES: dict[str, Callable[[list[Tensor], Recipe], torch.optim.Optimizer]] = {
    "adafactor": _adafactor,
    "muon": _muon,
}
