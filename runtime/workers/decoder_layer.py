"""One layer of the decoder. Its two halves, `project` and `finish`, work token by token: training slices them, the
second one in three parts."""

import torch
from torch import Tensor

from kernels import Ops
from runtime.workers.adaptation import Adaptation
from runtime.workers.attention import Attention
from runtime.workers.layers import Linear, Parameter
from runtime.workers.mlp import MLP, DenseMLP, Experts
from runtime.workers.norms import NORMS, Identity, Norm, PerHeadLayerNorm, RMSNorm
from runtime.workers.spec import DecoderSpec


class DecoderLayer:
    """Attention and MLP, each added to the residual stream; `DecoderSpec` says where norms are."""

    def __init__(self, spec: DecoderSpec, index: int, dtype: torch.dtype, device: torch.device) -> None:
        self.index = index
        self._spec = spec
        hidden, heads, groups = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self._split = [heads, groups, groups]
        parts = dict(zip("qkv", self._split, strict=True)) if spec.qkv == "parts" else {"": heads + 2 * groups}
        self.mlp: MLP
        if spec.layers[index].moe and spec.experts is not None:
            self.mlp = Experts(spec, spec.experts, dtype=dtype, device=device)
        else:
            self.mlp = DenseMLP(spec, dtype=dtype, device=device)
        self.linears: dict[str, Linear] = {
            "qkv": Linear(hidden, parts, bias=spec.qkv_bias, dtype=dtype, device=device),
            "out": Linear(heads, {"": hidden}, bias=spec.out_bias, dtype=dtype, device=device),
            **self.mlp.linears,
        }
        """Those of `LINEARS` that this layer has."""
        self._norms: dict[str, Norm] = _norms(spec, dtype, device)
        norm = self._norms["mlp_norm"]
        self._swiglu = norm if isinstance(norm, RMSNorm) and self._is_plain() else None
        """The norm of a layer as Llama has it: backends have ops for its second half."""

    def __call__(
        self, ops: Ops, hidden: Tensor, attention: Attention, cos: Tensor, sin: Tensor, adaptation: Adaptation | None
    ) -> Tensor:
        """hidden [T, hidden] → the same; cos, sin: see `Decoder.angles`."""
        q, k, v = self.project(ops, hidden, adaptation)
        return self.finish(ops, hidden, attention(self.index, q, k, v, cos, sin), adaptation)

    def project(self, ops: Ops, hidden: Tensor, adaptation: Adaptation | None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [T, hidden] → q [T, H, D], k and v [T, G, D], before rope. Token by token: T may be any part."""
        norm = self._norms["attention_norm"]
        if adaptation is None:
            fused = norm.then_linear(ops, hidden, *self.linears["qkv"].tensors)
        else:
            fused = self._linear("qkv", ops, norm(ops, hidden), adaptation)
        q, k, v = self._heads(fused)
        if self._spec.qk_norm == "none":
            return q, k, v
        return self._qk_norm("q_norm", ops, q), self._qk_norm("k_norm", ops, k), v

    def finish(self, ops: Ops, hidden: Tensor, mixed: Tensor, adaptation: Adaptation | None) -> Tensor:
        """What attention found [T, H, D], and the layer's input [T, hidden] → its output. Token by token too."""
        if adaptation is None and self._swiglu is not None:
            out, gate_up, down = (self.linears[name].tensors for name in ("out", "gate_up", "down"))
            hidden = ops.linear_add(hidden, mixed.flatten(1), *out)
            inner = ops.norm_swiglu(hidden, self._swiglu.weight.data, self._swiglu.eps, *gate_up)
            return ops.linear_add(hidden, inner, *down)
        residual = self.mix(ops, hidden, mixed, adaptation)
        inner = self.expand(ops, hidden if self._spec.parallel else residual, adaptation)
        return self.contract(ops, residual, inner, adaptation)

    def mix(self, ops: Ops, hidden: Tensor, mixed: Tensor, adaptation: Adaptation | None) -> Tensor:
        """First part of `finish`: with what attention found, [T, hidden]."""
        attended = self._linear("out", ops, mixed.flatten(1), adaptation)
        return hidden + self._scaled(self._norms["attention_post_norm"](ops, attended))

    def expand(self, ops: Ops, seen: Tensor, adaptation: Adaptation | None) -> Tensor:
        """Second part: the MLP up to its inner activations. `seen` [T, hidden] is what `mix` gave, or in a parallel
        layer what it was given."""
        norm = self._norms["attention_norm" if self._spec.shared_norm else "mlp_norm"]
        return self.mlp.expand(ops, norm(ops, seen), lambda name, x: self._linear(name, ops, x, adaptation))

    def contract(self, ops: Ops, residual: Tensor, inner: Tensor, adaptation: Adaptation | None) -> Tensor:
        """Last part: the MLP's output added to what `mix` gave, [T, hidden]."""
        out = self.mlp.contract(ops, inner, lambda name, x: self._linear(name, ops, x, adaptation))
        return residual + self._scaled(self._norms["mlp_post_norm"](ops, out))

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Every weight by its place in the layer, such as `qkv.weight`."""
        named = {f"{name}.{key}": p for name in ("qkv", "out") for key, p in self.linears[name].parameters.items()}
        named |= self.mlp.parameters
        return named | {f"{name}.{key}": p for name, norm in self._norms.items() for key, p in norm.parameters.items()}

    def _is_plain(self) -> bool:
        spec = self._spec
        added_as_is = not (spec.post_norm or spec.parallel) and spec.residual_scale == 1.0
        return added_as_is and isinstance(self.mlp, DenseMLP) and self.mlp.is_swiglu

    def _heads(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spec = self._spec
        if spec.qkv == "grouped":
            groups = fused.view(len(fused), spec.num_kv_heads, -1, spec.head_dim)
            return groups[:, :, :-2].flatten(1, 2), groups[:, :, -2].contiguous(), groups[:, :, -1].contiguous()
        q, k, v = (x.view(len(x), -1, spec.head_dim) for x in torch.split(fused, self._split, dim=-1))
        return q, k, v

    def _qk_norm(self, name: str, ops: Ops, x: Tensor) -> Tensor:
        rows = x.flatten(1) if self._spec.qk_norm == "projection" else x.reshape(-1, x.shape[-1])
        return self._norms[name](ops, rows).view(x.shape)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self._spec.residual_scale == 1.0 else x * self._spec.residual_scale

    def _linear(self, name: str, ops: Ops, x: Tensor, adaptation: Adaptation | None) -> Tensor:
        y = self.linears[name](ops, x)
        return y if adaptation is None else adaptation(self.index, name, x, y)


def _norms(spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> dict[str, Norm]:
    kind = NORMS[spec.norm]

    def norm(size: int) -> Norm:
        return kind(size, spec.norm_eps, dtype=dtype, device=device)

    norms: dict[str, Norm] = {
        "attention_norm": norm(spec.hidden_size) if spec.pre_norm else Identity(),
        "attention_post_norm": norm(spec.hidden_size) if spec.post_norm else Identity(),
        "mlp_norm": norm(spec.hidden_size) if spec.pre_norm and not spec.shared_norm else Identity(),
        "mlp_post_norm": norm(spec.hidden_size) if spec.post_norm else Identity(),
    }
    for name, heads in (("q_norm", spec.num_heads), ("k_norm", spec.num_kv_heads)):
        if spec.qk_norm == "head":
            norms[name] = norm(spec.head_dim)
        elif spec.qk_norm == "projection":
            norms[name] = norm(heads * spec.head_dim)
        elif spec.qk_norm == "per_head":
            norms[name] = PerHeadLayerNorm(heads, spec.head_dim, spec.norm_eps, dtype=dtype, device=device)
    return norms
