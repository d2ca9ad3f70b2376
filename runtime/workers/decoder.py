"""The one decoder: every architecture is a `DecoderSpec`, serving and training run the same layers.

Inputs are a flat batch of T tokens. Attention is handed in (`runtime.workers.attention`), so the decoder
knows neither the KV cache nor packing; adapters are handed in too (`runtime.workers.adaptation`), so it knows
no LoRA. It never samples. Differentiable throughout.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from kernels import QUANTISERS, Ops, QuantisedWeight, Weight
from runtime.workers.adaptation import Adaptation
from runtime.workers.attention import Attention
from runtime.workers.decoder_layer import DecoderLayer
from runtime.workers.layers import Embedding, Parameter, WeightError
from runtime.workers.norms import NORMS
from runtime.workers.spec import LINEARS, DecoderSpec

__all__ = ["LINEARS", "Decoder", "DecoderLayer", "DecoderSpec"]


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
        self.positions = (
            Embedding(spec.max_position, spec.hidden_size, dtype=dtype, device=device)
            if spec.learned_positions
            else None
        )
        self.layers = [DecoderLayer(spec, index, dtype, device) for index in range(spec.num_layers)]
        self.norm = NORMS[spec.norm](spec.hidden_size, spec.norm_eps, dtype=dtype, device=device)
        self._head = None if spec.tied else Embedding(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device)
        # Rounded as the weights are: so was it when the model was trained.
        self._embedding_scale = float(torch.tensor(spec.embedding_scale, dtype=dtype))
        tables = [rope.table(spec.head_dim, max_len, dtype, device) for rope in spec.ropes]
        none = torch.empty(max_len, 0, dtype=dtype, device=device)
        self._cos = torch.stack([cos for cos, _ in tables] or [none])
        self._sin = torch.stack([sin for _, sin in tables] or [none])

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: Attention, adaptation: Adaptation | None = None
    ) -> Tensor:
        """token_ids, positions [T] int64 → hidden states [T, hidden] after the last layer, before the norm."""
        hidden = self.embed(token_ids, positions)
        cos, sin = self.angles(positions)
        for layer in self.layers:
            hidden = layer(self.ops, hidden, attention, cos, sin, adaptation)
        return hidden

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
        ops = ops or self.ops
        head = self._head or self.embedding
        logits = self.norm.then_linear(ops, hidden, head.weight.value, None).float()
        if self.spec.logit_scale != 1.0:
            logits = logits * self.spec.logit_scale
        cap = self.spec.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def head_rows(self, tokens: slice) -> Tensor:
        """The weights that give the logits of some of the vocabulary, in floating point: [tokens, hidden]."""
        weight = (self._head or self.embedding).weight
        if weight.quantised is None:
            return weight.data[tokens]
        return weight.quantised.rows(torch.arange(tokens.start, tokens.stop, device=self.device)).to(self.dtype)

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
        for name, part, tensor in tensors:
            try:
                parameter = parameters[name]
                if self.spec.experts is not None and isinstance(tensor, QuantisedWeight):
                    tensor = tensor.dequantise()
                parameter.fill(part, tensor, self.ops)
                if quantisers and parameter.data.ndim == 2 and not parameter.missing and not parameter.quantised:
                    parameter.quantise(self.ops, quantisers[0 if name.startswith("layers.") else 1])
            except KeyError:
                raise WeightError(f"the checkpoint has {name!r}, which this architecture does not") from None
            except WeightError as error:
                raise WeightError(f"{name} ({part or 'all'}): {error}") from None
        lacking = [f"{name} ({', '.join(p.missing)})" for name, p in parameters.items() if p.missing]
        if lacking:
            raise WeightError(f"the checkpoint lacks {len(lacking)} weights, the first: {lacking[0]}")
