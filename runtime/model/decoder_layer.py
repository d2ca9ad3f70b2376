"""One layer of the decoder: a single `forward`, for every architecture, backend and adapter.

Its four parts are stages of training too (`runtime.trainer.stages`). Each works token by token, so training cuts them
into slices.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import LayerWeights, LinearWeights, Ops, PagedContext, RidingTokens
from runtime.model.attention import Attention
from runtime.model.group import SOLO, Group
from runtime.model.layers import Adapt, Linear, Parameter, RowLinear
from runtime.model.lora import Adaptation
from runtime.model.mlp import MLP, DenseMLP, Experts
from runtime.model.norms import NORMS, Identity, Norm, PerHeadLayerNorm, SplitRMSNorm
from runtime.model.spec import LINEARS, DecoderSpec
from runtime.model.split import Heads, Split


@dataclass(frozen=True, eq=False)
class LayerContext:
    """A batch of T tokens, as all layers see it."""

    attention: Attention
    cos: Tensor
    """[tables, T, R / 2], as `sin`: see `Decoder.angles`."""
    sin: Tensor
    adaptation: Adaptation | None = None
    logits_indices: Tensor | None = None
    """[n] int64, ascending: the tokens whose hidden states are needed after the last layer. None: all."""
    riding: RidingTokens | None = None
    """The last tokens, where they are of a sequence in training."""

    @property
    def paged(self) -> PagedContext | None:
        """See `kernels.stack.ForwardContext`."""
        adapted = () if self.adaptation is None else self.adaptation.adapted
        paged = None if adapted is None else self.attention.paged(adapted)
        return paged if paged is None or self.riding is None else replace(paged, riding=self.riding)


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
        """The linears of this layer, a subset of `LINEARS`."""
        self._norms: dict[str, Norm] = _norms(spec, heads, dtype, device, group)
        self._adds_as_is = not spec.post_norm and spec.residual_scale == 1.0
        """True if outputs are added to the residual stream as they are."""

    def forward(self, ops: Ops, hidden: Tensor, context: LayerContext) -> Tensor:
        """hidden [T, hidden] → [T, hidden]."""
        adaptation = context.adaptation
        q, k, v = self.project(ops, hidden, adaptation)
        mixed = context.attention(self.index, q, k, v, context.cos, context.sin)
        attended = self._begin_mix(ops, hidden, mixed, adaptation)
        if self._spec.parallel:
            inner = self.expand(ops, hidden, adaptation)  # between ranks, during the all-reduce of what is attended
            residual = attended()
        else:
            residual = attended()
            inner = self.expand(ops, residual, adaptation)
        return self.contract(ops, residual, inner, adaptation)

    def project(self, ops: Ops, hidden: Tensor, adaptation: Adaptation | None) -> tuple[Tensor, Tensor, Tensor]:
        """The first part: hidden [T, hidden] → this rank's q [T, H, D], k and v [T, G, D], before rope."""
        norm, adapt = self._norms["attention_norm"], self._adapt("qkv", adaptation)
        q, k, v = self._by_head(norm.norm_linear(ops, hidden, self.linears["qkv"], adapt))
        if self._spec.qk_norm == "none":
            return q, k, v
        return self._qk_norm("q_norm", ops, q), self._qk_norm("k_norm", ops, k), v

    def mix(self, ops: Ops, hidden: Tensor, mixed: Tensor, adaptation: Adaptation | None) -> Tensor:
        """The second part: the layer's input with attention's output `mixed` [T, H, D] added through a linear, the
        residual stream [T, hidden]."""
        return self._begin_mix(ops, hidden, mixed, adaptation)()

    def expand(self, ops: Ops, residual: Tensor, adaptation: Adaptation | None) -> Tensor:
        """The third part: the MLP up to its inner activations, [T, any]. `residual` [T, hidden] is the result of `mix`,
        or in a parallel layer the layer's input."""
        norm = self._norms["attention_norm" if self._spec.shared_norm else "mlp_norm"]
        return self.mlp.expand(ops, norm, residual, self._adapt("gate_up", adaptation))

    def contract(self, ops: Ops, residual: Tensor, inner: Tensor, adaptation: Adaptation | None) -> Tensor:
        """The last part: the MLP's output added to the result of `mix`, [T, hidden]."""
        adapt = self._adapt("down", adaptation)
        if self._adds_as_is:
            return self.mlp.contract_add(ops, residual, inner, adapt)
        return residual + self._scaled(self._norms["mlp_post_norm"](ops, self.mlp.contract(ops, inner, adapt)))

    def _begin_mix(
        self, ops: Ops, hidden: Tensor, mixed: Tensor, adaptation: Adaptation | None
    ) -> Callable[[], Tensor]:
        """Begin `mix`; calling the result returns the residual stream. Between ranks the all-reduce runs meanwhile."""
        x, adapt = mixed.flatten(1), self._adapt("out", adaptation)
        if self._adds_as_is:
            return self._out.begin_residual_add(ops, hidden, x, adapt)
        arrives = self._out.begin(ops, x, adapt)
        return lambda: hidden + self._scaled(self._norms["attention_post_norm"](ops, arrives()))

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Every weight by its place in the layer, such as `qkv.weight`."""
        named = {f"{name}.{key}": p for name in ("qkv", "out") for key, p in self.linears[name].parameters.items()}
        named |= self.mlp.parameters
        return named | {f"{name}.{key}": p for name, norm in self._norms.items() for key, p in norm.parameters.items()}

    @property
    def is_llama(self) -> bool:
        """True for a layer as `kernels.LayerWeights` describes it, held by one rank."""
        spec = self._spec
        plain = spec.norm == "rms" and spec.pre_norm and not (spec.shared_norm or spec.parallel)
        heads = spec.qkv != "grouped" and spec.qk_norm in ("none", "head")
        return plain and heads and self._adds_as_is and self.mlp.is_swiglu and self._group.size == 1

    def skips(self, linear: str) -> bool:
        """True for a layer that `is_llama` if the gradient of the part with this linear does not depend on the linear's
        output, or depends on its gates and ups alone."""
        return linear != "qkv" or self._spec.qk_norm == "none"

    @property
    def weights(self) -> LayerWeights:
        """All weights of a layer that `is_llama`."""
        assert self.is_llama
        norms = {name: norm.parameters["weight"].data for name, norm in self._norms.items() if norm.parameters}
        qkv, out, gate_up, down = (LinearWeights(*self.linears[name].tensors) for name in LINEARS)
        layer = self._spec.layers[self.index]
        return LayerWeights(
            attention_norm=norms["attention_norm"],
            q_norm=norms.get("q_norm"),
            k_norm=norms.get("k_norm"),
            mlp_norm=norms["mlp_norm"],
            linears=(qkv, out, gate_up, down),
            window=layer.window,
            rope=layer.rope,
        )

    def _adapt(self, name: str, adaptation: Adaptation | None) -> Adapt | None:
        return None if adaptation is None else adaptation.at(self.index, name)

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
    """Norm over values that are split over ranks."""
    if group.size == 1:
        return norm(held.full)
    if spec.norm != "rms":
        raise ValueError(f"a norm of kind {spec.norm!r} over all heads at once is for one rank only; supported is: rms")
    return SplitRMSNorm(held, spec.norm_eps, dtype=dtype, device=device, group=group)
