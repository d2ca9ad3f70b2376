"""The one decoder: every architecture is a `DecoderSpec`, serving and training run the same layers.

Inputs are a flat batch of T tokens. Attention is handed in (`runtime.workers.attention`), so the decoder
knows neither the KV cache nor packing; adapters are handed in too (`runtime.workers.adaptation`), so it knows
no LoRA. It never samples. Differentiable throughout.
"""

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from kernels import QUANTISERS, Layers, LayerStack, Ops, QuantisedWeight, Quantiser, Quantisers, Weight
from runtime.workers.adaptation import Adaptation
from runtime.workers.attention import Attention, PagedAttention
from runtime.workers.batch_adaptation import BatchAdaptation
from runtime.workers.decoder_layer import DecoderLayer
from runtime.workers.group import SOLO, Group
from runtime.workers.heads import Heads
from runtime.workers.layers import Embedding, Parameter, WeightError
from runtime.workers.norms import NORMS
from runtime.workers.spec import LINEARS, DecoderSpec
from runtime.workers.split import Split
from runtime.workers.vocabulary import Vocabulary

__all__ = ["LINEARS", "Decoder", "DecoderLayer", "DecoderSpec"]


class Decoder:
    """Embedding, layers, final norm, logits: `embed`, then each of `layers`, then `logits`.

    One of `group`'s ranks holds its share of heads, inner values and vocabulary; hidden states and what is returned
    are alike on all.
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
        """Raises `ValueError` for what the spec asks and cannot be had, or cannot be shared by so many ranks."""
        self.spec = spec
        self.group = group
        self.heads = Heads.of(spec, group)
        """Those of every layer that are computed here."""
        self.vocabulary = Vocabulary(spec.vocab_size, group)
        self.ops = ops
        self.max_len = max_len
        """Positions that there are angles for: the longest sequence, in tokens."""
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
        self._head = None if spec.tied else self._embedding()
        # Rounded as the weights are: so was it when the model was trained.
        self._embedding_scale = float(torch.tensor(spec.embedding_scale, dtype=dtype))
        tables = [rope.table(spec.head_dim, max_len, dtype, device) for rope in spec.ropes]
        none = torch.empty(max_len, 0, dtype=dtype, device=device)
        self._cos = torch.stack([cos for cos, _ in tables] or [none])
        self._sin = torch.stack([sin for _, sin in tables] or [none])

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]:
        """Of every layer in this rank's cache: key/value heads, and their size."""
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
        wanted: Tensor | None = None,
    ) -> Tensor:
        """token_ids, positions [T] int64 → hidden states [T, hidden] after the last layer, before the norm; or
        [n, hidden], of the tokens `wanted` [n] int64 alone, in ascending order."""
        hidden = self.embed(token_ids, positions)
        cos, sin = self.angles(positions)
        if (found := self._at_once(hidden, cos, sin, attention, adaptation, wanted)) is not None:
            return found
        for layer in self.layers:
            hidden = layer(self.ops, hidden, attention, cos, sin, adaptation)
        return hidden if wanted is None else hidden[wanted]

    def _at_once(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: Attention,
        adaptation: Adaptation | None,
        wanted: Tensor | None,
    ) -> Tensor | None:
        """What all layers make of `hidden`, where the backend runs them in one call: while serving."""
        if not isinstance(attention, PagedAttention) or torch.is_grad_enabled():
            return None
        adapted = adaptation.adapted if isinstance(adaptation, BatchAdaptation) else ()
        if self._joined is None or (adaptation is not None and not adapted):
            return None
        return attention.through(self._joined, hidden, cos, sin, adapted, wanted)

    @cached_property
    def _joined(self) -> Layers | None:
        """All layers in one call. Made when the first batch comes: by then weights stay what they are."""
        weights = [layer.weights for layer in self.layers]
        known = tuple(layer for layer in weights if layer is not None)
        if not known or len(known) < len(weights):
            return None
        spec, heads = self.spec, self.heads
        stack = LayerStack(
            known, heads.q.size, heads.kv.size, spec.head_dim, spec.norm_eps, spec.scale, softcap=spec.softcap
        )
        return self.ops.join_layers(stack)

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """token_ids, positions [T] int64 → what the first layer sees, [T, hidden]."""
        hidden = self.embedding(token_ids)
        if self.positions is not None:
            hidden = hidden + self.positions(positions)
        return hidden if self._embedding_scale == 1.0 else hidden * self._embedding_scale

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [tables, T, turned dimensions / 2] of positions [T], for every one of the spec's ropes;
        attention picks the layer's."""
        return self._cos[:, positions], self._sin[:, positions]

    def logits(self, hidden: Tensor, ops: Ops | None = None) -> Tensor:
        """hidden [rows, hidden], only those rows that are wanted → [rows, vocab] float32. `ops` instead of its own."""
        return self.vocabulary.join(self.own_logits(hidden, ops))

    def own_logits(self, hidden: Tensor, ops: Ops | None = None) -> Tensor:
        """The same for this rank's tokens alone, see `vocabulary`."""
        ops = ops or self.ops
        weight = self.head
        if self.group.size == 1 or not torch.is_grad_enabled():
            logits = self.norm.then_linear(ops, hidden, weight, None).float()
        else:
            logits = ops.linear(self.group.enter(self.norm(ops, hidden)), weight).float()
        if self.spec.logit_scale != 1.0:
            logits = logits * self.spec.logit_scale
        cap = self.spec.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    @property
    def head(self) -> Weight:
        """What the normed hidden states are multiplied with for this rank's logits, [own tokens, hidden]."""
        return (self._head or self.embedding).weight.value

    def head_rows(self, tokens: slice) -> Tensor:
        """The weights that give the logits of some of this rank's vocabulary, as far as it goes, in floating point:
        [tokens, hidden]."""
        weight = (self._head or self.embedding).weight
        if weight.quantised is None:
            return weight.data[tokens]
        index = torch.arange(self.vocabulary.split.size, device=self.device)[tokens]
        return weight.quantised.rows(index).to(self.dtype)

    def parameters(self) -> dict[str, Parameter]:
        """Every weight by its place in the decoder, such as `layers.0.qkv.weight`."""
        named = {"embedding.weight": self.embedding.weight}
        if self.positions is not None:
            named["positions.weight"] = self.positions.weight
        named |= {f"norm.{key}": parameter for key, parameter in self.norm.parameters.items()}
        if self._head is not None:
            named["head.weight"] = self._head.weight
        for layer in self.layers:
            named |= {f"layers.{layer.index}.{name}": parameter for name, parameter in layer.parameters.items()}
        return named

    def load(self, tensors: Iterable[tuple[str, str, Weight]], *, quantization: str = "none") -> None:
        """Fill the weights from (parameter, part, tensor), and quantise matrices as soon as they are complete:
        `quantization` is "none" or one of `kernels.QUANTISERS`. Weights that come in integers stay as they are, but
        in mixtures of experts, which compute in floating point. Raises `WeightError` naming what does not fit or
        lacks."""
        quantisers = QUANTISERS.get(quantization)
        parameters = self.parameters()
        for parameter in parameters.values():
            parameter.stays = quantisers is None
        for name, part, tensor in tensors:
            try:
                parameter = parameters[name]
                if self.spec.experts is not None and isinstance(tensor, QuantisedWeight):
                    tensor = tensor.dequantise()
                parameter.fill(part, tensor, self.ops)
                if quantisers and parameter.data.ndim == 2 and not parameter.missing and not parameter.quantised:
                    parameter.quantise(self.ops, _quantiser(quantisers, name))
            except KeyError:
                raise WeightError(f"the checkpoint has {name!r}, which this architecture does not") from None
            except WeightError as error:
                raise WeightError(f"{name} ({part or 'all'}): {error}") from None
        lacking = [f"{name} ({', '.join(p.missing)})" for name, p in parameters.items() if p.missing]
        if lacking:
            raise WeightError(f"the checkpoint lacks {len(lacking)} weights, the first: {lacking[0]}")


def _quantiser(quantisers: Quantisers, name: str) -> Quantiser:
    """For a weight by its place in the decoder."""
    if not name.startswith("layers."):
        return quantisers.vocabulary
    return quantisers.expanding if name.endswith(".gate_up.weight") else quantisers.layers
