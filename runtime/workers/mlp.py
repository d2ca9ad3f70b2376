"""The MLPs of the decoder: dense, or a mixture of experts.

An MLP has `linears`, which adapters may change, so it runs them through what it is handed, and `parameters`, all
its weights by name. It maps x [T, hidden] to the same shape, token by token, in two parts.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kernels import Ops
from runtime.workers.layers import Linear, Parameter
from runtime.workers.spec import DecoderSpec, ExpertsSpec

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""What Hugging Face configs call the activations, and which of ours each is."""

Run = Callable[[str, Tensor], Tensor]
"""Runs one of the layer's linears by name, and what an adapter adds to it."""


class MLP(Protocol):
    linears: dict[str, Linear]

    @property
    def parameters(self) -> dict[str, Parameter]: ...

    def expand(self, ops: Ops, x: Tensor, run: Run) -> Tensor:
        """The first part: x [T, hidden] → what `contract` wants, [T, any]."""

    def contract(self, ops: Ops, inner: Tensor, run: Run) -> Tensor:
        """The rest: → [T, hidden]."""


class DenseMLP:
    """down(act(gate) * up), or down(act(up)): `gate_up` then has the part `up` alone."""

    def __init__(self, spec: DecoderSpec, *, dtype: torch.dtype, device: torch.device) -> None:
        self._activation = _activation(spec)
        self._gated = spec.gated
        inner = spec.intermediate_size
        parts = {"gate": inner, "up": inner} if spec.gated else {"up": inner}
        if spec.gate_up_fused:
            parts = {"": sum(parts.values())}
        self.linears = {
            "gate_up": Linear(spec.hidden_size, parts, bias=spec.mlp_bias, dtype=dtype, device=device),
            "down": Linear(inner, {"": spec.hidden_size}, bias=spec.mlp_bias, dtype=dtype, device=device),
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

    def expand(self, ops: Ops, x: Tensor, run: Run) -> Tensor:
        inner = run("gate_up", x)
        if self.is_swiglu:
            return ops.silu_mul(inner)
        tanh = self._activation == "gelu_tanh"
        return ops.gelu_mul(inner, tanh=tanh) if self._gated else ops.gelu(inner, tanh=tanh)

    def contract(self, ops: Ops, inner: Tensor, run: Run) -> Tensor:
        return run("down", inner)


class Experts:
    """Every token goes through the few experts that a router gives the most weight, and through the shared one
    where there is one (arXiv:2401.04088, arXiv:2401.06066). Adapters do not change it."""

    def __init__(self, spec: DecoderSpec, experts: ExpertsSpec, *, dtype: torch.dtype, device: torch.device) -> None:
        if (activation := _activation(spec)) != "silu":
            raise ValueError(f"activation {activation!r} is not supported in a mixture of experts; supported is: silu")
        self._spec = experts
        self.linears: dict[str, Linear] = {}
        hidden, inner, each = spec.hidden_size, experts.intermediate_size, range(experts.count)
        halves = {f"{expert}.{half}": inner for expert in each for half in ("gate", "up")}
        self.router = Parameter({"": experts.count}, (hidden,), dtype, device)
        self.gate_up = Parameter(halves, (hidden,), dtype, device)
        self.down = Parameter({str(expert): hidden for expert in each}, (inner,), dtype, device)
        self.parameters = {
            "router.weight": self.router,
            "experts_gate_up.weight": self.gate_up,
            "experts_down.weight": self.down,
        }
        if size := experts.shared_size:
            self._shared_gate_up = Parameter({"gate": size, "up": size}, (hidden,), dtype, device)
            self._shared_down = Parameter({"": hidden}, (size,), dtype, device)
            self._shared_gate = Parameter({"": 1}, (hidden,), dtype, device)
            self.parameters["shared_gate_up.weight"] = self._shared_gate_up
            self.parameters["shared_down.weight"] = self._shared_down
            self.parameters["shared_gate.weight"] = self._shared_gate

    def expand(self, ops: Ops, x: Tensor, run: Run) -> Tensor:
        """Nothing: which expert expands a token is known only when all is done."""
        return x

    def contract(self, ops: Ops, inner: Tensor, run: Run) -> Tensor:
        x = inner
        scores = ops.linear(x, self.router.data).float().softmax(-1)
        shares, chosen = scores.topk(self._spec.per_token, dim=-1)
        if self._spec.normalise:
            shares = shares / shares.sum(-1, keepdim=True)
        count, hidden = self._spec.count, x.shape[1]
        gate_up, down = self.gate_up.data.view(count, -1, hidden), self.down.data.view(count, hidden, -1)
        mixed = ops.moe(x, chosen, shares.to(x.dtype), gate_up, down)
        return mixed + self._shared(ops, x) if self._spec.shared_size else mixed

    def _shared(self, ops: Ops, x: Tensor) -> Tensor:
        inner = ops.silu_mul(ops.linear(x, self._shared_gate_up.data))
        return ops.linear(x, self._shared_gate.data).sigmoid() * ops.linear(inner, self._shared_down.data)


def _activation(spec: DecoderSpec) -> str:
    name = ACTIVATIONS.get(spec.activation)
    supported = [key for key, ours in ACTIVATIONS.items() if spec.gated or ours != "silu"]
    if name is None or spec.activation not in supported:
        kind = "a gated" if spec.gated else "an ungated"
        raise ValueError(
            f"activation {spec.activation!r} is not supported in {kind} MLP; supported are: {', '.join(supported)}"
        )
    return name
