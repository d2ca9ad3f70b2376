"""A transformers model without its insides: the same code around other layers, or around another base.

A frame is a shallow copy: its weights are those of the model, which does not change. So what a model does before its
layers, between them and after them can be had by itself, whatever it is.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast


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
    """What a model hands to one of its layers besides the hidden states."""

    args: tuple[Any, ...]
    options: Mapping[str, Any]


class Stand(nn.Module):
    """In the place of a layer: notes what it is called with, and gives back what it got, or what it was told to."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # not a child: this has no weights
        self.call: LayerCall | None = None
        self.seen: Tensor | None = None
        self.gives: Tensor | None = None
        self.tuple = False
        """The layer gives a tuple, of which the hidden states are the first."""

    def __getattr__(self, name: str) -> Any:
        """Some models ask their layers what kind they are."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden: Tensor, *args: Any, **options: Any) -> Any:
        self.call, self.seen = LayerCall(args, options), hidden
        out = hidden if self.gives is None else self.gives
        return (out,) if self.tuple else out


class _Output(BaseModelOutputWithPast):
    """Only hidden states: of whatever else a kind of model has, there is none."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class Handed(nn.Module):
    """In the place of a base model: gives the hidden states [T, hidden] that it was handed."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """Some heads call a part of the base, such as `model.decoder`: this is its own."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return self

    def forward(self, *args: Any, **options: Any) -> BaseModelOutputWithPast:
        assert self.hidden is not None
        return _Output(last_hidden_state=self.hidden.unsqueeze(0))
