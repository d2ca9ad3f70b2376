"""The MLPs of the decoder: dense, or a mixture of experts.

An MLP has `linears`, which adapters may change, and `parameters`, all its weights by name. It maps x [T, hidden] to the
same shape, token by token, in two parts: `expand`, with the norm before it, and `contract`. Ranks split the inner
values, also those of every expert.
"""

from typing import Protocol

import torch
from torch import Tensor

from kernels import Ops
from runtime.model.group import SOLO, Group
from runtime.model.layers import Adapt, Linear, Parameter, RowLinear
from runtime.model.norms import Norm
from runtime.model.spec import DecoderSpec, ExpertsSpec
from runtime.model.split import Split

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Hugging Face's name of an activation → our name."""


class MLP(Protocol):
    """The feed-forward part of a layer: dense, or a mixture of experts."""

    linears: dict[str, Linear]

    @property
    def parameters(self) -> dict[str, Parameter]: ...

    @property
    def is_swiglu(self) -> bool:
        """True for down(silu(gate) * up)."""

    def expand(self, ops: Ops, norm: Norm, x: Tensor, adapt: Adapt | None) -> Tensor:
        """The first part: x [T, hidden], not normed yet → the input of `contract`, [T, any]. `adapt` is for
        `gate_up`."""

    def contract(self, ops: Ops, inner: Tensor, adapt: Adapt | None) -> Tensor:
        """The second part: inner [T, any] → [T, hidden]. `adapt` is for `down`."""

    def contract_add(self, ops: Ops, residual: Tensor, inner: Tensor, adapt: Adapt | None) -> Tensor:
        """residual [T, hidden] plus `contract`."""


class DenseMLP:
    """down(act(gate) * up), or down(act(up)): `gate_up` then has the part `up` alone."""

    def __init__(self, spec: DecoderSpec, *, dtype: torch.dtype, device: torch.device, group: Group = SOLO) -> None:
        self._activation = _activation(spec)
        self._gated = spec.gated
        hidden, bias = spec.hidden_size, spec.mlp_bias
        inner = _shared_out(spec.intermediate_size, "intermediate_size", group)
        parts = {"gate": inner, "up": inner} if spec.gated else {"up": inner}
        if spec.gate_up_fused:
            parts = {"": Split.joined(list(parts.values()))}
        self.linears: dict[str, Linear] = {
            "gate_up": Linear(hidden, parts, bias=bias, dtype=dtype, device=device, group=group),
            "down": RowLinear(inner, {"": hidden}, bias=bias, dtype=dtype, device=device, group=group),
        }

    @property
    def is_swiglu(self) -> bool:
        return self._activation == "silu"

    @property
    def parameters(self) -> dict[str, Parameter]:
        return {
            f"{name}.{key}": parameter
            for name, linear in self.linears.items()
            for key, parameter in linear.parameters.items()
        }

    def expand(self, ops: Ops, norm: Norm, x: Tensor, adapt: Adapt | None) -> Tensor:
        gate_up = self.linears["gate_up"]
        if self.is_swiglu:
            return norm.norm_swiglu(ops, x, gate_up, adapt)
        inner, tanh = norm.norm_linear(ops, x, gate_up, adapt), self._activation == "gelu_tanh"
        return ops.gelu_mul(inner, tanh=tanh) if self._gated else ops.gelu(inner, tanh=tanh)

    def contract(self, ops: Ops, inner: Tensor, adapt: Adapt | None) -> Tensor:
        return self.linears["down"](ops, inner, adapt)

    def contract_add(self, ops: Ops, residual: Tensor, inner: Tensor, adapt: Adapt | None) -> Tensor:
        return self.linears["down"].residual_add(ops, residual, inner, adapt)


class Experts:
    """Mixture of experts: every token passes through the few experts to which a router gives the most weight, and
    through the shared one where there is one (arXiv:2401.04088, arXiv:2401.06066). Adapters do not change it."""

    is_swiglu = False
    """Each expert is one, the mixture is not."""

    def __init__(
        self,
        spec: DecoderSpec,
        experts: ExpertsSpec,
        *,
        dtype: torch.dtype,
        device: torch.device,
        group: Group = SOLO,
    ) -> None:
        if (activation := _activation(spec)) != "silu":
            raise ValueError(
                f"hidden_act: activation {activation!r} is not supported in a mixture of experts; supported is: silu"
            )
        self._spec = experts
        self._group = group
        self.linears: dict[str, Linear] = {}
        hidden, each = spec.hidden_size, range(experts.count)
        inner = _shared_out(experts.intermediate_size, "the experts' intermediate size", group)
        halves = {f"{expert}.{half}": inner for expert in each for half in ("gate", "up")}
        self.router = Parameter({"": experts.count}, (hidden,), dtype, device)
        self.gate_up = Parameter(halves, (hidden,), dtype, device)
        self.down = _columns({str(expert): hidden for expert in each}, inner, dtype, device, group)
        self.parameters = {
            "router.weight": self.router,
            "experts_gate_up.weight": self.gate_up,
            "experts_down.weight": self.down,
        }
        if experts.shared_size:
            size = _shared_out(experts.shared_size, "the shared expert's intermediate size", group)
            self._shared_gate_up = Parameter({"gate": size, "up": size}, (hidden,), dtype, device)
            self._shared_down = _columns({"": hidden}, size, dtype, device, group)
            self._shared_gate = Parameter({"": 1}, (hidden,), dtype, device)
            self.parameters["shared_gate_up.weight"] = self._shared_gate_up
            self.parameters["shared_down.weight"] = self._shared_down
            self.parameters["shared_gate.weight"] = self._shared_gate

    def expand(self, ops: Ops, norm: Norm, x: Tensor, adapt: Adapt | None) -> Tensor:
        """The normed x: `contract` routes the tokens and does the rest of the computation."""
        return norm(ops, x)

    def contract(self, ops: Ops, inner: Tensor, adapt: Adapt | None) -> Tensor:
        x = inner
        scores = ops.linear(x, self.router.data).float().softmax(-1)
        shares, chosen = scores.topk(self._spec.per_token, dim=-1)
        if self._spec.normalise:
            shares = shares / shares.sum(-1, keepdim=True)
        count, hidden, enter = self._spec.count, x.shape[1], self._group.copy_to_tp
        gate_up, down = self.gate_up.data.view(count, -1, hidden), self.down.data.view(count, hidden, -1)
        mixed = ops.moe(enter(x), chosen, enter(shares.to(x.dtype)), gate_up, down)
        return self._group.sum(mixed + self._shared(ops, x) if self._spec.shared_size else mixed)

    def contract_add(self, ops: Ops, residual: Tensor, inner: Tensor, adapt: Adapt | None) -> Tensor:
        return residual + self.contract(ops, inner, adapt)

    def _shared(self, ops: Ops, x: Tensor) -> Tensor:
        enter = self._group.copy_to_tp
        inner = ops.silu_mul(ops.linear(enter(x), self._shared_gate_up.data))
        return enter(ops.linear(x, self._shared_gate.data).sigmoid()) * ops.linear(inner, self._shared_down.data)


def _shared_out(size: int, name: str, group: Group) -> Split:
    if size % group.size:
        raise ValueError(f"{name} is {size}, which cannot be shared evenly by {group.size} ranks (parallel.tp)")
    return Split.even(size, group.rank, group.size)


def _columns(parts: dict[str, int], held: Split, dtype: torch.dtype, device: torch.device, group: Group) -> Parameter:
    columns = None if held.is_whole else held
    return Parameter(parts, (held.full,), dtype, device, columns=columns, group=group)


def _activation(spec: DecoderSpec) -> str:
    name = ACTIVATIONS.get(spec.activation)
    supported = [key for key, ours in ACTIVATIONS.items() if spec.gated or ours != "silu"]
    if name is None or spec.activation not in supported:
        kind = "a gated" if spec.gated else "an ungated"
        raise ValueError(
            f"activation {spec.activation!r} is not supported in {kind} MLP; supported are: {', '.join(supported)}"
        )
    return name
