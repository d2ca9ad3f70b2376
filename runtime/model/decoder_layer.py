"""One layer of the decoder. Its two halves, `project` and `finish`, work token by token: training slices them, the
second one in three parts."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels import LayerWeights, LinearWeights, Ops
from runtime.workers.adaptation import Adaptation
from runtime.workers.attention import Attention
from runtime.workers.group import SOLO, Group
from runtime.workers.heads import Heads
from runtime.workers.layers import Linear, Parameter, RowLinear
from runtime.workers.mlp import MLP, DenseMLP, Experts
from runtime.workers.norms import NORMS, Identity, Norm, PerHeadLayerNorm, RMSNorm, SplitRMSNorm
from runtime.workers.spec import LINEARS, DecoderSpec
from runtime.workers.split import Split


class DecoderLayer:
    """Attention and MLP, each added to the residual stream; `DecoderSpec` says where norms are.

    The residual stream is alike on all ranks of `group`; each computes some of the heads and of the MLP's inner values.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        heads: Heads,
        index: int,
        dtype: torch.dtype,
        device: torch.device,
        group: Group = SOLO,
    ) -> None:
        self.index = index
        self._spec = spec
        self._heads = heads
        self._group = group
        hidden, q, kv = spec.hidden_size, heads.q.scaled(spec.head_dim), heads.kv.scaled(spec.head_dim)
        self._widths = [q.size, kv.size, kv.size]
        self.mlp: MLP
        if spec.layers[index].moe and spec.experts is not None:
            self.mlp = Experts(spec, spec.experts, dtype=dtype, device=device, group=group)
        else:
            self.mlp = DenseMLP(spec, dtype=dtype, device=device, group=group)
        qkv = heads.qkv(spec)
        self._out = RowLinear(q, {"": hidden}, bias=spec.out_bias, dtype=dtype, device=device, group=group)
        self.linears: dict[str, Linear] = {
            "qkv": Linear(hidden, qkv, bias=spec.qkv_bias, dtype=dtype, device=device, group=group),
            "out": self._out,
            **self.mlp.linears,
        }
        """Those of `LINEARS` that this layer has."""
        self._norms: dict[str, Norm] = _norms(spec, heads, dtype, device, group)
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
        """hidden [T, hidden] → this rank's q [T, H, D], k and v [T, G, D], before rope. Token by token: T may be any
        part."""
        norm = self._norms["attention_norm"]
        if adaptation is None and self._fuses:
            fused = norm.then_linear(ops, hidden, *self.linears["qkv"].tensors)
        else:
            fused = self._linear("qkv", ops, norm(ops, hidden), adaptation)
        q, k, v = self._by_head(fused)
        if self._spec.qk_norm == "none":
            return q, k, v
        return self._qk_norm("q_norm", ops, q), self._qk_norm("k_norm", ops, k), v

    def finish(self, ops: Ops, hidden: Tensor, mixed: Tensor, adaptation: Adaptation | None) -> Tensor:
        """What attention found [T, H, D], and the layer's input [T, hidden] → its output. Token by token too."""
        if adaptation is None and self._swiglu is not None and self._fuses:
            hidden = self._out.add(ops, hidden, mixed.flatten(1))
            norm_weight, eps = self._swiglu.weight.data, self._swiglu.eps
            inner = ops.norm_swiglu(hidden, norm_weight, eps, *self.linears["gate_up"].tensors)
            return self.linears["down"].add(ops, hidden, inner)
        if adaptation is not None and self._swiglu is not None and self._group.size == 1:
            return self._adapted(ops, hidden, mixed.flatten(1), adaptation)
        attention = self._attended(ops, mixed, adaptation)
        if self._spec.parallel:
            inner = self.expand(ops, hidden, adaptation)
            residual = hidden + attention()
        else:
            residual = hidden + attention()
            inner = self.expand(ops, residual, adaptation)
        return self.contract(ops, residual, inner, adaptation)

    def _adapted(self, ops: Ops, hidden: Tensor, mixed: Tensor, adaptation: Adaptation) -> Tensor:
        """`finish` of a layer as Llama has it, with adapters: the residual stream is added by the linears, so adapters
        add to the stream itself."""
        added = adaptation(self.index, "out", mixed, self._out.add(ops, hidden, mixed))
        inner = self.expand(ops, added, adaptation)
        down = self.linears["down"]
        return adaptation(self.index, "down", inner, down.add(ops, added, inner))

    def mix(self, ops: Ops, hidden: Tensor, mixed: Tensor, adaptation: Adaptation | None) -> Tensor:
        """First part of `finish`: with what attention found, [T, hidden]."""
        return hidden + self._attended(ops, mixed, adaptation)()

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

    @property
    def weights(self) -> LayerWeights | None:
        """All of them, where the layer is as Llama has it."""
        spec, attention_norm, mlp_norm = self._spec, self._norms["attention_norm"], self._swiglu
        if mlp_norm is None or not isinstance(attention_norm, RMSNorm) or self._group.size > 1 or spec.qkv == "grouped":
            return None
        if spec.qk_norm not in ("none", "head"):
            return None
        heads = [norm for name in ("q_norm", "k_norm") if isinstance(norm := self._norms.get(name), RMSNorm)]
        q_norm, k_norm = [norm.weight.data for norm in heads] or (None, None)
        qkv, out, gate_up, down = (LinearWeights(*self.linears[name].tensors) for name in LINEARS)
        layer = spec.layers[self.index]
        return LayerWeights(
            attention_norm=attention_norm.weight.data,
            q_norm=q_norm,
            k_norm=k_norm,
            mlp_norm=mlp_norm.weight.data,
            linears=(qkv, out, gate_up, down),
            window=layer.window,
            rope=layer.rope,
        )

    def _attended(self, ops: Ops, mixed: Tensor, adaptation: Adaptation | None) -> Callable[[], Tensor]:
        """What attention adds to the residual stream, begun: where the MLP does not wait for it, ranks compute that
        its inner part while their parts come together. To be called once."""
        adapt = None if adaptation is None else partial(adaptation, self.index, "out")
        arrives = self._out.later(ops, mixed.flatten(1), adapt)
        return lambda: self._scaled(self._norms["attention_post_norm"](ops, arrives()))

    @property
    def _fuses(self) -> bool:
        """Whether a norm and what follows it may be one op: between ranks, gradients come together in between."""
        return self._group.size == 1 or not torch.is_grad_enabled()

    def _is_plain(self) -> bool:
        spec = self._spec
        added_as_is = not (spec.post_norm or spec.parallel) and spec.residual_scale == 1.0
        return added_as_is and isinstance(self.mlp, DenseMLP) and self.mlp.is_swiglu

    def _by_head(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spec = self._spec
        if spec.qkv == "grouped":
            groups = fused.view(len(fused), self._heads.kv.size, -1, spec.head_dim)
            return groups[:, :, :-2].flatten(1, 2), groups[:, :, -2].contiguous(), groups[:, :, -1].contiguous()
        q, k, v = (x.view(len(x), -1, spec.head_dim) for x in torch.split(fused, self._widths, dim=-1))
        return q, k, v

    def _qk_norm(self, name: str, ops: Ops, x: Tensor) -> Tensor:
        rows = x.flatten(1) if self._spec.qk_norm == "projection" else x.reshape(-1, x.shape[-1])
        return self._norms[name](ops, rows).view(x.shape)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self._spec.residual_scale == 1.0 else x * self._spec.residual_scale

    def _linear(self, name: str, ops: Ops, x: Tensor, adaptation: Adaptation | None) -> Tensor:
        linear = self.linears[name]
        return linear(ops, x) if adaptation is None else linear(ops, x, partial(adaptation, self.index, name))


def _norms(spec: DecoderSpec, heads: Heads, dtype: torch.dtype, device: torch.device, group: Group) -> dict[str, Norm]:
    kind = NORMS[spec.norm]

    def norm(size: int) -> Norm:
        return kind(size, spec.norm_eps, dtype=dtype, device=device)

    norms: dict[str, Norm] = {
        "attention_norm": norm(spec.hidden_size) if spec.pre_norm else Identity(),
        "attention_post_norm": norm(spec.hidden_size) if spec.post_norm else Identity(),
        "mlp_norm": norm(spec.hidden_size) if spec.pre_norm and not spec.shared_norm else Identity(),
        "mlp_post_norm": norm(spec.hidden_size) if spec.post_norm else Identity(),
    }
    for name, held in (("q_norm", heads.q), ("k_norm", heads.kv)):
        if spec.qk_norm == "head":
            norms[name] = norm(spec.head_dim)
        elif spec.qk_norm == "projection":
            norms[name] = _over_all(norm, held.scaled(spec.head_dim), spec, dtype, device, group)
        elif spec.qk_norm == "per_head":
            norms[name] = PerHeadLayerNorm(held, spec.head_dim, spec.norm_eps, dtype=dtype, device=device)
    return norms


def _over_all(
    norm: Callable[[int], Norm], held: Split, spec: DecoderSpec, dtype: torch.dtype, device: torch.device, group: Group
) -> Norm:
    """A norm over values that ranks hold parts of."""
    if group.size == 1:
        return norm(held.full)
    if spec.norm != "rms":
        raise ValueError(f"a norm of kind {spec.norm!r} over all heads at once is for one rank only; supported is: rms")
    return SplitRMSNorm(held, spec.norm_eps, dtype=dtype, device=device, group=group)
