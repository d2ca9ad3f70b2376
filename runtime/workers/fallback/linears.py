"""The linears of a transformers model, run by our ops: for their speed, for int8, and for adapters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kernels import Ops, Quantiser
from runtime.workers.adaptation import Adaptation
from runtime.workers.layers import Linear, Parameter

META = torch.device("meta")


@dataclass
class Running:
    """What the linears do at the moment."""

    ops: Ops | None = None
    adaptation: Adaptation | None = None
    seen: Callable[[int, str, int], None] | None = field(default=None, repr=False)
    """Told of every linear that runs, with the number of rows."""

    @contextmanager
    def by(self, ops: Ops, adaptation: Adaptation | None) -> Iterator[None]:
        """Until the end of the block. Blocks do not nest."""
        if self.ops is not None:
            raise RuntimeError("the linears of a transformers model were set twice")
        self.ops, self.adaptation = ops, adaptation
        try:
            yield
        finally:
            self.ops = self.adaptation = None


@dataclass(frozen=True, eq=False)
class FallbackLayer:
    """One layer's linears, by their names in the module, such as `self_attn.q_proj`."""

    index: int
    linears: dict[str, Linear]


def take_over(layer: nn.Module, index: int, running: Running) -> FallbackLayer:
    """Have every linear inside a layer run by our ops."""
    found = {}
    for name, module in layer.named_modules():
        if type(module) in (nn.Linear, Conv1D):
            linear = found[name] = _linear(module)
            module.forward = partial(_run, running, index, name, linear)
    return FallbackLayer(index, found)


def _linear(module: nn.Module) -> Linear:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, nn.Parameter)
    if isinstance(module, Conv1D):  # GPT-2's own kind: transposed
        weight = module.weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
    out, size = weight.shape
    linear = Linear(size, {"": out}, bias=False, dtype=weight.dtype, device=META)
    linear.weight = Parameter.of(weight.data)
    linear.bias = Parameter.of(bias.data) if isinstance(bias, Tensor) else None
    return linear


def quantise(layer: FallbackLayer, module: nn.Module, ops: Ops, quantiser: Quantiser) -> None:
    """Hold a layer's matrices in integers from now on."""
    for name, linear in layer.linears.items():
        linear.weight.quantise(ops, quantiser)
        module.get_submodule(name).weight.data = linear.weight.data


def _run(running: Running, index: int, name: str, linear: Linear, x: Tensor) -> Tensor:
    """x [..., in] → [..., out]."""
    assert running.ops is not None, "a linear was run outside of `Running.by`"
    rows = x.flatten(0, -2)
    if running.seen is not None:
        running.seen(index, name, len(rows))
    y = linear(running.ops, rows)
    if running.adaptation is not None:
        y = running.adaptation(index, name, rows, y)
    return y.view(*x.shape[:-1], -1)
