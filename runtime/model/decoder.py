"""The decoder. Every architecture is a `DecoderSpec`; serving and training run the same layers.

Inputs are a flat batch of T tokens. Attention is an argument (`runtime.model.attention`): the decoder depends neither
on the KV cache nor on packing. So are adapters (`runtime.model.lora.Adaptation`): it does not depend on LoRA. The ops
decide what runs in one call: a norm and a linear, or all layers (`Ops.fuse_layers`). It never samples.

With ops that are differentiable it is differentiable, also layer by layer and part by part, as training runs it.
"""

from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import Tensor

from kernels import (
    QUANTISERS,
    ForwardLayers,
    FusedLayers,
    LayerStack,
    Ops,
    QuantisedWeight,
    Quantiser,
    Quantisers,
    RidingTokens,
    Weight,
)
from kernels.bfloat16 import BFloat16Weight
from runtime.model.attention import Attention
from runtime.model.decoder_layer import DecoderLayer, LayerContext
from runtime.model.group import SOLO, Group
from runtime.model.layers import Embedding, Linear, Parameter, WeightError
from runtime.model.lora import Adaptation
from runtime.model.norms import NORMS
from runtime.model.spec import LINEARS, DecoderSpec
from runtime.model.split import Heads, Split, Vocabulary

__all__ = ["LINEARS", "Decoder", "DecoderLayer", "DecoderSpec"]


class Decoder:
    """Embedding, layers, final norm, logits: `embed`, then each of `layers`, then `logits`.

    Each rank of `group` holds its share of heads, inner values and vocabulary. Hidden states and results are alike on
    all ranks.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        ops: Ops,
        *,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
        group: Group = SOLO,
    ) -> None:
        """Allocate the layers. Raises `ValueError` for a spec that is not supported, or that cannot be split over the
        ranks of `group`."""
        self.spec = spec
        self.group = group
        self.heads = Heads.of(spec, group)
        """The heads of every layer that this rank computes."""
        self.vocabulary = Vocabulary(spec.vocab_size, group)
        self.ops = ops
        self.max_len = max_len
        """Number of positions that have angles: the longest sequence, in tokens."""
        self.dtype = dtype
        self.device = device
        self.embedding = self._embedding()
        self.positions = (
            Embedding(Split.whole(spec.max_position), spec.hidden_size, dtype=dtype, device=device)
            if spec.learned_positions
            else None
        )
        self.layers = [DecoderLayer(spec, self.heads, index, dtype, device, group) for index in range(spec.num_layers)]
        self.norm = NORMS[spec.norm](spec.hidden_size, spec.norm_eps, dtype=dtype, device=device)
        self._head = Linear(
            spec.hidden_size, {"": self.vocabulary.split}, bias=False, dtype=dtype, device=device, group=group
        )
        if spec.tied:
            self._head.weight = self.embedding.weight
        # Rounded like the weights, as in the model's training.
        self.embedding_scale = float(torch.tensor(spec.embedding_scale, dtype=dtype))
        """Factor of embeddings."""
        tables = [rope.table(spec.head_dim, max_len, dtype, device) for rope in spec.ropes]
        none = torch.empty(max_len, 0, dtype=dtype, device=device)
        self._cos = torch.stack([cos for cos, _ in tables] or [none])
        self._sin = torch.stack([sin for _, sin in tables] or [none])

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]:
        """(kv_heads, head_dim) of every layer in this rank's cache."""
        return ((self.heads.kv.size, self.spec.head_dim),) * self.spec.num_layers

    def _embedding(self) -> Embedding:
        size, dtype, device = self.spec.hidden_size, self.dtype, self.device
        return Embedding(self.vocabulary.split, size, dtype=dtype, device=device, group=self.group)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: Attention,
        adaptation: Adaptation | None = None,
        *,
        logits_indices: Tensor | None = None,
        riding: RidingTokens | None = None,
    ) -> Tensor:
        """token_ids, positions [T] int64 → hidden states [T, hidden] after the last layer, before the norm. With
        `logits_indices` [n] int64, in ascending order: [n, hidden] of these tokens alone. `riding`: the last tokens,
        which the others are not changed by, where `kept_widths` are known."""
        cos, sin = self.angles(positions)
        context = LayerContext(attention, cos, sin, adaptation, logits_indices, riding)
        hidden = self.embed(token_ids, positions, adaptation)
        if riding is not None:
            hidden[-riding.count :] = riding.inputs
        return self._forward_layers(hidden, context)

    @property
    def kept_widths(self) -> tuple[int, int, int, int] | None:
        """`KeptLayers.widths`, where tokens of training may ride in batches of serving: one call runs all layers, and
        it multiplies as training does, with nothing quantised. None: they may not."""
        layers = self._forward_layers
        exact = all(
            parameter.quantised is None or isinstance(parameter.quantised, BFloat16Weight)
            for layer in self.layers
            for parameter in layer.parameters.values()
        )
        return layers.widths if exact and isinstance(layers, FusedLayers) else None

    @cached_property
    def _forward_layers(self) -> ForwardLayers[LayerContext]:
        """`_layer_by_layer`, or all layers in one call where the backend has one for them. Chosen at the first batch:
        from then on the weights do not change."""
        if not all(layer.is_llama for layer in self.layers):
            return self._layer_by_layer
        spec, heads = self.spec, self.heads
        stack = LayerStack(
            tuple(layer.weights for layer in self.layers),
            heads.q.size,
            heads.kv.size,
            spec.head_dim,
            spec.norm_eps,
            spec.scale,
            softcap=spec.softcap,
        )
        return self.ops.fuse_layers(stack, self._layer_by_layer)

    def _layer_by_layer(self, hidden: Tensor, context: LayerContext) -> Tensor:
        for layer in self.layers:
            hidden = layer.forward(self.ops, hidden, context)
        return hidden if context.logits_indices is None else hidden[context.logits_indices]

    def embed(self, token_ids: Tensor, positions: Tensor, adaptation: Adaptation | None = None) -> Tensor:
        """token_ids, positions [T] int64 → input of the first layer, [T, hidden]."""
        hidden = self.embedding(token_ids) if adaptation is None else adaptation.embed(token_ids, self.embedding)
        if self.positions is not None:
            hidden = hidden + self.positions(positions)
        return hidden if self.embedding_scale == 1.0 else hidden * self.embedding_scale

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [tables, T, rotated dimensions / 2] of positions [T], for each of the spec's ropes;
        attention picks the layer's."""
        return self._cos[:, positions], self._sin[:, positions]

    def normed(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] after the last layer → the same after the last norm."""
        return self.norm(self.ops, hidden)

    def logits(self, hidden: Tensor, ops: Ops | None = None) -> Tensor:
        """hidden [rows, hidden] → [rows, vocab] float32. `ops` replaces the decoder's own."""
        return self.vocabulary.join(self.local_logits(hidden, ops))

    def local_logits(self, hidden: Tensor, ops: Ops | None = None) -> Tensor:
        """As `logits`, for this rank's tokens alone: [rows, own tokens], see `vocabulary`."""
        return self._bent(self.norm.norm_linear(ops or self.ops, hidden, self._head).float())

    def row_logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """hidden [R, hidden] after the last layer → [R, n] float32: logits of n tokens with these rows [n, hidden] of a
        head."""
        return self._bent(self.ops.linear(self.normed(hidden), rows).float())

    def _bent(self, logits: Tensor) -> Tensor:
        """Logits [R, any] of the head with the model's scale and soft cap."""
        if self.spec.logit_scale != 1.0:
            logits = logits * self.spec.logit_scale
        cap = self.spec.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    @property
    def head(self) -> Weight:
        """Weight [own tokens, hidden] that maps normed hidden states to this rank's logits."""
        return self._head.weight.value

    def head_rows(self, tokens: slice) -> Tensor:
        """Rows `tokens` of `head`, as far as this rank's vocabulary reaches, in floating point: [tokens, hidden], of a
        quantised weight those of its `factor`."""
        weight = self._head.weight
        if weight.quantised is None:
            return weight.data[tokens]
        first, last, _ = tokens.indices(self.vocabulary.split.size)
        return weight.quantised.factor_rows(slice(first, last)).to(self.dtype)

    @property
    def batch_variance(self) -> str | None:
        """Reason why a token's logits may depend on its batch, on the chunks of the prompt or on the number of threads;
        None where their bits do not."""
        if not self.ops.batch_invariant:
            return f"the {self.ops.name} kernels do not promise it, only those for the CPU in C++ do"
        if self.device.type != "cpu" or self.dtype.itemsize != 4:
            return "it is promised on the CPU only, with weights that are computed with in float32"
        if self.spec.experts is not None:
            return "mixtures of experts group tokens by expert"
        return None

    def parameters(self) -> dict[str, Parameter]:
        """Every weight by its place in the decoder, such as `layers.0.qkv.weight`."""
        named = {"embedding.weight": self.embedding.weight}
        if self.positions is not None:
            named["positions.weight"] = self.positions.weight
        named |= {f"norm.{key}": parameter for key, parameter in self.norm.parameters.items()}
        if not self.spec.tied:
            named["head.weight"] = self._head.weight
        for layer in self.layers:
            named |= {f"layers.{layer.index}.{name}": parameter for name, parameter in layer.parameters.items()}
        return named

    def load(
        self,
        tensors: Iterable[tuple[str, str, Weight]],
        *,
        quantization: str = "none",
        name_of: Callable[[str, str], str] = "{} ({})".format,
        keep: Callable[[str, QuantisedWeight, tuple[Tensor, Tensor]], None] | None = None,
    ) -> None:
        """Fill the weights from (parameter, part, tensor), and quantise matrices as soon as they are complete:
        `quantization` is "none" or one of `kernels.QUANTISERS`. Weights stored in integers stay as they are, except in
        mixtures of experts, which compute in floating point. Raises `WeightError` naming the misfitting or missing
        parts; `name_of` maps a parameter and part to a name. `keep` gets each weight that was quantised, by its
        parameter, with the sample of its values from before."""
        quantisers = QUANTISERS.get(quantization)
        parameters = self.parameters()
        for parameter in parameters.values():
            parameter.stays = quantisers is None
        for name, part, tensor in tensors:
            if name not in parameters or part not in parameters[name].parts:
                raise WeightError(f"the checkpoint has {name_of(name, part)!r}, which this architecture does not")
            parameter = parameters[name]
            if self.spec.experts is not None and isinstance(tensor, QuantisedWeight):
                tensor = tensor.dequantise()
            try:
                parameter.fill(part, tensor, self.ops)
            except WeightError as error:
                raise WeightError(f"{name_of(name, part)}: {error}{self.spec.sizes}") from None
            if quantisers and parameter.data.ndim == 2 and not parameter.missing and not parameter.quantised:
                quantised = parameter.quantise(self.ops, _quantiser(quantisers, name))
                if keep is not None:
                    keep(name, quantised, parameter.sample())
        lacking = [name_of(name, part) for name, parameter in parameters.items() for part in parameter.missing]
        if lacking:
            raise WeightError(f"the checkpoint lacks {len(lacking)} weights, the first: {lacking[0]}")


def _quantiser(quantisers: Quantisers, name: str) -> Quantiser:
    """Quantiser of a weight, by its place in the decoder."""
    if not name.startswith("layers."):
        return quantisers.vocabulary
    return quantisers.expanding if name.endswith(".gate_up.weight") else quantisers.layers
