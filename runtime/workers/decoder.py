"""The one decoder: every architecture is a `DecoderSpec`, serving and training run the same layers.

Inputs are a flat batch of T tokens. Attention is handed in (`runtime.workers.attention`), so the decoder
knows neither the KV cache nor packing; adapters are handed in too (`runtime.workers.adaptation`), so it knows
no LoRA. It never samples. Differentiable throughout.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import Ops
from runtime.workers.adaptation import Adaptation
from runtime.workers.attention import Attention
from runtime.workers.layers import Embedding, Linear, Parameter, RMSNorm, WeightError
from runtime.workers.rope import RopeSpec

LINEARS = ("qkv", "out", "gate_up", "down")
"""A layer's linears, by attribute name; each may be fused of parts (`Linear.parts`)."""


@dataclass(frozen=True)
class DecoderSpec:
    """What distinguishes one architecture's decoder from another's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    """Longest sequence that the checkpoint was made for, in tokens."""
    norm_eps: float
    rope: RopeSpec
    tied: bool
    """The logits use the embedding's weight."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return float(self.head_dim**-0.5)


class DecoderLayer:
    """Attention and MLP, each after a norm and added to the residual stream."""

    def __init__(self, spec: DecoderSpec, index: int, dtype: torch.dtype, device: torch.device) -> None:
        self.index = index
        self._spec = spec
        hidden, heads, inner = spec.hidden_size, spec.num_heads * spec.head_dim, spec.intermediate_size
        self._split = [heads, spec.num_kv_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim]
        qkv = dict(zip("qkv", self._split, strict=True))
        self.qkv = Linear(hidden, qkv, bias=spec.qkv_bias, dtype=dtype, device=device)
        self.out = Linear(heads, {"": hidden}, bias=spec.out_bias, dtype=dtype, device=device)
        gate_up = {"gate": inner, "up": inner}
        self.gate_up = Linear(hidden, gate_up, bias=spec.mlp_bias, dtype=dtype, device=device)
        self.down = Linear(inner, {"": hidden}, bias=spec.mlp_bias, dtype=dtype, device=device)
        self.attention_norm = RMSNorm(hidden, spec.norm_eps, dtype=dtype, device=device)
        self.mlp_norm = RMSNorm(hidden, spec.norm_eps, dtype=dtype, device=device)

    def __call__(
        self, ops: Ops, hidden: Tensor, attention: Attention, cos: Tensor, sin: Tensor, adaptation: Adaptation | None
    ) -> Tensor:
        """hidden [T, hidden] → the same; cos, sin [T, head_dim / 2] of the tokens' positions."""
        q, k, v = self.project(ops, hidden, adaptation)
        return self.finish(ops, hidden, attention(self.index, q, k, v, cos, sin), adaptation)

    def project(self, ops: Ops, hidden: Tensor, adaptation: Adaptation | None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [T, hidden] → q [T, H, D], k and v [T, G, D], before rope. Token by token: T may be any part."""
        if adaptation is None:
            norm = self.attention_norm
            fused = ops.norm_linear(hidden, norm.weight.data, norm.eps, *self.qkv.tensors)
        else:
            fused = self._adapted("qkv", ops, self.attention_norm(ops, hidden), adaptation)
        q, k, v = (x.view(len(x), -1, self._spec.head_dim) for x in torch.split(fused, self._split, dim=-1))
        return q, k, v

    def finish(self, ops: Ops, hidden: Tensor, mixed: Tensor, adaptation: Adaptation | None) -> Tensor:
        """What attention found [T, H, D], and the layer's input [T, hidden] → its output. Token by token too."""
        mixed = mixed.flatten(1)
        if adaptation is None:
            norm = self.mlp_norm
            hidden = ops.linear_add(hidden, mixed, *self.out.tensors)
            inner = ops.norm_swiglu(hidden, norm.weight.data, norm.eps, *self.gate_up.tensors)
            return ops.linear_add(hidden, inner, *self.down.tensors)
        hidden = hidden + self._adapted("out", ops, mixed, adaptation)
        gate_up = self._adapted("gate_up", ops, self.mlp_norm(ops, hidden), adaptation)
        return hidden + self._adapted("down", ops, ops.silu_mul(gate_up), adaptation)

    def _adapted(self, name: str, ops: Ops, x: Tensor, adaptation: Adaptation) -> Tensor:
        linear: Linear = getattr(self, name)
        return adaptation(self.index, name, x, linear(ops, x))


class Decoder:
    """Embedding, layers, final norm, logits: `embed`, then each of `layers`, then `logits`."""

    def __init__(self, spec: DecoderSpec, ops: Ops, *, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        self.spec = spec
        self.ops = ops
        self.max_len = max_len
        """Positions that there are angles for: the longest sequence, in tokens."""
        self.dtype = dtype
        self.device = device
        self.embedding = Embedding(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device)
        self.layers = [DecoderLayer(spec, index, dtype, device) for index in range(spec.num_layers)]
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype=dtype, device=device)
        self._head = None if spec.tied else Embedding(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device)
        self._cos, self._sin = spec.rope.table(spec.head_dim, max_len, dtype, device)

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: Attention, adaptation: Adaptation | None = None
    ) -> Tensor:
        """token_ids, positions [T] int64 → hidden states [T, hidden] after the last layer, before the norm."""
        hidden = self.embedding(token_ids)
        cos, sin = self.angles(positions)
        for layer in self.layers:
            hidden = layer(self.ops, hidden, attention, cos, sin, adaptation)
        return hidden

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The rope cosines and sines [T, head_dim / 2] of positions [T]."""
        return self._cos[positions], self._sin[positions]

    def logits(self, hidden: Tensor, ops: Ops | None = None) -> Tensor:
        """hidden [rows, hidden], only those rows that are wanted → [rows, vocab] float32. `ops` instead of its own."""
        ops = ops or self.ops
        head = self._head or self.embedding
        return ops.norm_linear(hidden, self.norm.weight.data, self.norm.eps, head.weight.value).float()

    def parameters(self) -> dict[str, Parameter]:
        """Every weight by its place in the decoder, such as `layers.0.qkv.weight`."""
        named: dict[str, Parameter] = {
            "embedding.weight": self.embedding.weight,
            "norm.weight": self.norm.weight,
        }
        if self._head is not None:
            named["head.weight"] = self._head.weight
        for layer in self.layers:
            prefix = f"layers.{layer.index}."
            for name in LINEARS:
                linear: Linear = getattr(layer, name)
                named[f"{prefix}{name}.weight"] = linear.weight
                if linear.bias is not None:
                    named[f"{prefix}{name}.bias"] = linear.bias
            named[f"{prefix}attention_norm.weight"] = layer.attention_norm.weight
            named[f"{prefix}mlp_norm.weight"] = layer.mlp_norm.weight
        return named

    def load(self, tensors: Iterable[tuple[str, str, Tensor]], *, quantise: bool = False) -> None:
        """Fill the weights from (parameter, part, tensor), with `quantise` matrices to int8 as soon as they are
        complete. Raises `WeightError` naming what does not fit or lacks."""
        parameters = self.parameters()
        for name, part, tensor in tensors:
            try:
                parameter = parameters[name]
                parameter.fill(part, tensor)
                if quantise and parameter.data.ndim == 2 and not parameter.missing:
                    parameter.quantise()
            except KeyError:
                raise WeightError(f"the checkpoint has {name!r}, which this architecture does not") from None
            except WeightError as error:
                raise WeightError(f"{name} ({part or 'all'}): {error}") from None
        lacking = [f"{name} ({', '.join(p.missing)})" for name, p in parameters.items() if p.missing]
        if lacking:
            raise WeightError(f"the checkpoint lacks {len(lacking)} weights, the first: {lacking[0]}")
