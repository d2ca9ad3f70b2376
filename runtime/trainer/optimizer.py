"""From gradients to new parameters: one torch optimiser a layer, so that a step is made of slices too."""

import importlib.util
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from runtime.trainer.slices import Slice, Sliced, Slices
from runtime.trainer.spec import OptimizerSpec


class Optimizer:
    """All parameters of one adapter, in groups by layer."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], spec: OptimizerSpec) -> None:
        """`parameters` are named `layer.…` and lie layer by layer."""
        self._spec = spec
        self._named = list(parameters)
        layers = groupby(self._named, key=lambda item: item[0].partition(".")[0])
        self._optimizers = [_make(spec, [parameter for _, parameter in group]) for _, group in layers]

    def step(self, factor: float) -> Sliced[float]:
        """Clip, change the parameters at `factor` times the learning rate, and clear the gradients.

        Returns the norm of all gradients before clipping; where it is not finite, nothing was changed.
        """
        yield Slice("clip", 1)
        norm = self._norm()
        if norm == norm and norm != float("inf"):
            self._clip(norm)
            yield from self._change(self._spec.learning_rate * factor)
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        for _, parameter in self._named:
            parameter.grad = None

    def _norm(self) -> float:
        grads = [parameter.grad for _, parameter in self._named if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0

    def _clip(self, norm: float) -> None:
        most = self._spec.max_grad_norm
        if most is None or norm <= most:
            return
        for _, parameter in self._named:
            if parameter.grad is not None:
                parameter.grad.mul_(most / (norm + 1e-6))

    def _change(self, rate: float) -> Slices:
        done = 0
        while done < len(self._optimizers):
            count = yield Slice("optimizer", len(self._optimizers) - done)
            for optimizer in self._optimizers[done : done + count]:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
            done += count

    def capture(self) -> dict[str, Tensor]:
        """A copy of the state, on the CPU: `name.key` for every parameter, such as `0.qkv.a.exp_avg`."""
        captured = {}
        for name, parameter in self._named:
            for key, value in self._state(parameter).items():
                captured[f"{name}.{key}"] = torch.as_tensor(value).detach().to("cpu", copy=True)
        return captured

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take an earlier `capture`."""
        by_id = {id(parameter): name for name, parameter in self._named}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    prefix = by_id[id(parameter)] + "."
                    state = {k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)}
                    if state:
                        optimizer.state[parameter] = state

    def release(self) -> None:
        """Let gradients and state go: there will be no more steps."""
        self.zero_grad()
        self._optimizers.clear()

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        for optimizer in self._optimizers:
            if parameter in optimizer.state:
                state: dict[str, Any] = optimizer.state[parameter]
                return {key: value for key, value in state.items() if value is not None}
        return {}


def eight_bit_available(device: torch.device) -> bool:
    """Whether bitsandbytes' optimisers with 8-bit states run here: they are CUDA kernels."""
    return device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None


def _make(spec: OptimizerSpec, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if spec.name == "sgd":
        return torch.optim.SGD(parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay)
    options: dict[str, Any] = {
        "lr": spec.learning_rate,
        "betas": spec.betas,
        "eps": spec.epsilon,
        "weight_decay": spec.weight_decay,
    }
    if spec.name == "adamw_8bit" and eight_bit_available(parameters[0].device):
        import bitsandbytes

        eight_bit: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, **options)
        return eight_bit
    return torch.optim.AdamW(parameters, fused=True, **options)
