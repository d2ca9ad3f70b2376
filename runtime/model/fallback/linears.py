"""The linears of a transformers model, run by our ops: for speed, for int8, and for adapters."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.pytorch_utils import Conv1D

from kernels import Ops, Quantiser
from runtime.model.layers import Linear, Parameter
from runtime.model.lora import Adaptation

META = torch.device("meta")


@dataclass
class FallbackPass:
    """Ops and adaptation that the linears currently use."""

    ops: Ops | None = None
    adaptation: Adaptation | None = None
    seen: Callable[[int, str, int], None] | None = field(default=None, repr=False)
    """Callback for every linear that runs: layer index, name, number of rows."""

    @contextmanager
    def by(self, ops: Ops, adaptation: Adaptation | None) -> Iterator[None]:
        """Context in which the linears use `ops` and `adaptation`. Blocks do not nest. Raises `RuntimeError` if they
        do."""
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


def take_over(layer: nn.Module, index: int, running: FallbackPass) -> FallbackLayer:
    """Make our ops run every linear inside a layer."""
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


def _run(running: FallbackPass, index: int, name: str, linear: Linear, x: Tensor) -> Tensor:
    """x [..., in] → [..., out]."""
    assert running.ops is not None, "a linear was run outside of `Running.by`"
    rows = x.flatten(0, -2)
    if running.seen is not None:
        running.seen(index, name, len(rows))
    y = linear(running.ops, rows)
    if running.adaptation is not None:
        y = running.adaptation(index, name, rows, y, y)
    return y.view(*x.shape[:-1], -1)


# -- interface -------------------------------------------------------------------------------------
#
# Our entry in transformers' table of attention functions. `attending` sets the function that it calls.

NAME = "eft"
"""The value of `attn_implementation`."""


class Attend(Protocol):
    """Called for every attention module with q [T, H, D], k [T, G, D] and v [T, G, Dv], after rope, the factor of the
    scores, and all other arguments of the module's attention function; returns [T, H, Dv]."""

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, options: Mapping[str, Any]
    ) -> Tensor: ...


_attend: Attend | None = None


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Context in which modules attend by `attend`. Blocks do not nest."""
    global _attend
    if _attend is not None:
        raise RuntimeError("attention of a transformers model was set twice")
    _attend = attend
    try:
        yield
    finally:
        _attend = None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [1, H, T, D], key and value [1, G, T, D] → [1, T, H, D]."""
    if _attend is None:
        raise RuntimeError("a transformers model that attends by our function was called outside of `attending`")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return _attend(module, q, k, v, scale, options).unsqueeze(0), None


AttentionInterface.register(NAME, _attention)


# -- frames ----------------------------------------------------------------------------------------
#
# A transformers model without its insides: the same code around other layers, or around another base.
#
# A frame is a shallow copy: it shares the weights of the model, which does not change. It gives the model's computation
# before, between and after its layers separately, for any model.


def replaced(module: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """A shallow copy of `module` with `new` at a dotted path."""
    name, _, rest = path.partition(".")
    frame = copy.copy(module)
    frame._modules = dict(module._modules)
    inner = module._modules[name]
    assert inner is not None
    frame._modules[name] = replaced(inner, rest, new) if rest else new
    return frame


@dataclass(frozen=True)
class LayerCall:
    """Arguments that a model passes to one of its layers besides the hidden states."""

    args: tuple[Any, ...]
    options: Mapping[str, Any]


class Stand(nn.Module):
    """Stand-in for a layer: records its arguments, and returns its input or a preset output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # not a child: this has no weights
        self.call: LayerCall | None = None
        self.seen: Tensor | None = None
        self.gives: Tensor | None = None
        self.tuple = False
        """True if the layer returns a tuple, hidden states first."""

    def __getattr__(self, name: str) -> Any:
        """Attribute of the replaced layer: some models read the kind of a layer from it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden: Tensor, *args: Any, **options: Any) -> Any:
        self.call, self.seen = LayerCall(args, options), hidden
        out = hidden if self.gives is None else self.gives
        return (out,) if self.tuple else out


class _Output(BaseModelOutputWithPast):
    """Hidden states alone: every other output of a model is absent."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class Handed(nn.Module):
    """Stand-in for a base model: returns the hidden states [T, hidden] that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """Itself for every attribute: some heads call a part of the base, such as `model.decoder`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return self

    def forward(self, *args: Any, **options: Any) -> BaseModelOutputWithPast:
        assert self.hidden is not None
        return _Output(last_hidden_state=self.hidden.unsqueeze(0))
