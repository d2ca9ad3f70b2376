"""A causal LM of transformers with the interface of `runtime.model.decoder.Decoder`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels import QUANTISERS, AdaptedTokens, Ops
from runtime.model.attention import Attention
from runtime.model.fallback.linears import (
    Attend,
    FallbackPass,
    Handed,
    LayerCall,
    attending,
    quantise,
    replaced,
    take_over,
)
from runtime.model.fallback.probe import LENGTHS, Anatomy, alike, facts, packed, run_base, stands
from runtime.model.group import SOLO
from runtime.model.layers import Linear, Parameter, WeightError
from runtime.model.lora import Adaptation
from runtime.model.spec import DecoderSpec, LayerSpec
from runtime.model.split import Vocabulary

# -- spec ------------------------------------------------------------------------------------------
#
# A transformers model as a `DecoderSpec`.

LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Keys of configs for the longest sequence, in tokens."""


@dataclass(frozen=True)
class FallbackSpec(DecoderSpec):
    """Layers may differ in their key/value heads."""

    shapes: tuple[tuple[int, int], ...] = ()

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]:
        return self.shapes


def fallback_spec(model: Any, anatomy: Anatomy) -> FallbackSpec:
    """Spec of a probed model. Raises `WeightError` where the config has no longest sequence."""
    config = model.config.get_text_config()
    first = anatomy.attention[0]
    longest = next((value for name in LENGTH_KEYS if (value := getattr(config, name, None))), None)
    if longest is None:
        raise WeightError(f"config.json says nowhere how long sequences may be; looked for: {', '.join(LENGTH_KEYS)}")
    caps = {one.softcap for one in anatomy.attention}
    if len(caps) != 1:
        raise WeightError(
            f"layers have different soft caps ({', '.join(map(str, sorted(caps)))}), which is not supported"
        )
    inputs, hidden = model.get_input_embeddings().weight.shape
    outputs = model.get_output_embeddings().weight.shape[0]
    if inputs < outputs:
        raise WeightError(f"it makes logits of {outputs} tokens, and its embedding has {inputs} rows")
    return FallbackSpec(
        vocab_size=outputs,
        hidden_size=getattr(config, "hidden_size", hidden),
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * hidden,
        num_heads=first.heads,
        num_kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        max_position=longest,
        norm_eps=0.0,
        tied=False,
        layers=tuple(LayerSpec(window=one.window, rope=None) for one in anatomy.attention),
        ropes=(),
        attention_scale=first.scale,
        softcap=first.softcap,
        shapes=tuple((one.kv_heads, one.head_dim) for one in anatomy.attention),
    )


# -- decoder ---------------------------------------------------------------------------------------

StageFunction = Callable[[Tensor], Tensor]
"""hidden [T, hidden] → [T, hidden]."""


class FallbackDecoder:
    """transformers' modules with our attention and our linears. Differentiable with respect to adapters."""

    def __init__(self, model: Any, anatomy: Anatomy, ops: Ops, *, max_len: int, quantization: str = "none") -> None:
        self.spec = fallback_spec(model, anatomy)
        self.group = SOLO
        self.vocabulary = Vocabulary(self.spec.vocab_size)
        self.kv_shapes = self.spec.kv_shapes
        self.ops = ops
        self.max_len = max_len
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.layers_path = anatomy.layers
        self._model = model
        self._base: nn.Module = getattr(model, anatomy.base)
        self._modules = list(model.get_submodule(anatomy.layers))
        self._running = FallbackPass()
        self.layers = [take_over(layer, index, self._running) for index, layer in enumerate(self._modules)]
        self._frame, self._stands = stands(model, anatomy)
        self._handed = Handed()
        self._head = replaced(model, anatomy.base, self._handed)
        self.targets = self._adaptable()
        """Names within a layer of the linears that adapters may change: every layer has them, and each gets every token
        once."""
        self.separable = self._is_separable()
        """True if layers can run one by one: each needs only the hidden states of the previous one."""
        quantisers = QUANTISERS.get(quantization)
        if quantisers is not None:
            for layer, module in zip(self.layers, self._modules, strict=True):
                quantise(layer, module, ops, quantisers.layers)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: Attention,
        adaptation: Adaptation | None = None,
        ops: Ops | None = None,
        *,
        logits_indices: Tensor | None = None,
    ) -> Tensor:
        """token_ids, positions [T] int64 → hidden states [T, hidden] as the head takes them: after the last norm. With
        `logits_indices` [n] int64: [n, hidden] of these tokens alone. `ops` replaces the decoder's own."""
        with self._as(ops or self.ops, attention, adaptation):
            hidden = run_base(self._base, token_ids, positions)
        return hidden if logits_indices is None else hidden[logits_indices]

    def normed(self, hidden: Tensor) -> Tensor:
        """Result of `forward` as it is: transformers' own norm was applied there."""
        return hidden

    def logits(self, hidden: Tensor, ops: Ops | None = None) -> Tensor:
        """hidden [rows, hidden] → [rows, vocab] float32. The head is torch's own: `ops` is unused, for the interface
        alone."""
        self._handed.hidden = hidden
        try:
            rows = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.device)
            out: Tensor = self._head(input_ids=rows, use_cache=False).logits[0]
            return out.float()
        finally:
            self._handed.hidden = None

    def local_logits(self, hidden: Tensor, ops: Ops | None = None) -> Tensor:
        """As `logits`: there is only one rank."""
        return self.logits(hidden, ops)

    @property
    def batch_variance(self) -> str | None:
        """As `Decoder.batch_variance`."""
        return "it runs in transformers"

    def parameters(self) -> dict[str, Parameter]:
        """Every weight by its name in transformers' model."""
        named = {name: Parameter.of(weight.data) for name, weight in self._model.named_parameters() if weight.ndim}
        for layer in self.layers:
            for name, linear in layer.linears.items():
                named[f"{self.layers_path}.{layer.index}.{name}.weight"] = linear.weight
        return named

    # -- in pieces, for training ---------------------------------------------------------------

    def embed(self, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, list[LayerCall]]:
        """Input of the first layer [T, hidden], and the further arguments of each layer."""
        run_base(self._frame, token_ids, positions)
        first = self._stands[0].seen
        calls = [stand.call for stand in self._stands if stand.call is not None]
        self._forget()
        assert first is not None
        return first[0], calls

    def run_layer(
        self, index: int, hidden: Tensor, call: LayerCall, ops: Ops, attention: Attention, adaptation: Adaptation | None
    ) -> Tensor:
        """One layer: hidden [T, hidden] → [T, hidden]; `call` is from `embed`."""
        with self._as(ops, attention, adaptation):
            out = self._modules[index](hidden.unsqueeze(0), *call.args, **call.options)
        found: Tensor = (out[0] if isinstance(out, tuple) else out)[0]
        return found

    def finish(self, hidden: Tensor) -> Tensor:
        """Output of the last layer for some tokens, [R, hidden] → the hidden states that the head takes, [R,
        hidden]."""
        self._stands[-1].gives = hidden.unsqueeze(0)
        try:
            none = torch.zeros(len(hidden), dtype=torch.int64, device=self.device)
            return run_base(self._frame, none, torch.arange(len(hidden), device=self.device))
        finally:
            self._forget()

    def _forget(self) -> None:
        for stand in self._stands:
            stand.call = stand.seen = stand.gives = None

    # -- how it attends ------------------------------------------------------------------------

    def _as(self, ops: Ops, attention: Attention, adaptation: Adaptation | None) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(self._running.by(ops, adaptation))
        stack.enter_context(attending(self._attend(attention)))
        return stack

    def _attend(self, attention: Attention) -> Attend:
        spec = self.spec

        def attend(
            module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, options: Mapping[str, Any]
        ) -> Tensor:
            if scale != spec.scale:
                q = q * (scale / spec.scale)
            width = v.shape[2]
            if width < q.shape[2]:
                v = torch.nn.functional.pad(v, (0, q.shape[2] - width))
            turned = q.new_empty(1, len(q), 0)  # rope has been applied
            layer: int = module.layer_idx  # type: ignore[assignment]
            return attention(layer, q, k, v, turned, turned)[..., :width]

        return attend

    # -- what it is ----------------------------------------------------------------------------

    def _adaptable(self) -> dict[str, Linear]:
        seen: dict[tuple[int, str], list[int]] = {}
        self._running.seen = lambda layer, name, rows: seen.setdefault((layer, name), []).append(rows)
        try:
            self._try()
        finally:
            self._running.seen = None
        first, *others = [
            {name: linear for name, linear in layer.linears.items() if seen.get((layer.index, name)) == [sum(LENGTHS)]}
            for layer in self.layers
        ]
        return {
            name: linear
            for name, linear in first.items()
            if all(name in one and one[name].weight.data.shape == linear.weight.data.shape for one in others)
        }

    def _is_separable(self) -> bool:
        ids, positions = _probe_batch(self.device)
        whole = self._try()
        with torch.inference_mode():
            hidden, calls = self.embed(ids, positions)
            if len(calls) != len(self._modules):
                return False
            for index, call in enumerate(calls):
                hidden = self.run_layer(index, hidden, call, self.ops, _Packed(self), None)
            return alike(self.finish(hidden), whole)

    def _try(self) -> Tensor:
        with torch.inference_mode():
            return self.forward(*_probe_batch(self.device), _Packed(self))


class _Packed:
    """Attention over the probe's sequences."""

    def __init__(self, decoder: FallbackDecoder) -> None:
        self._spec = decoder.spec

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        spec = self._spec
        options = {"sliding_window": spec.layers[layer].window, "softcap": spec.softcap}
        return packed(q, k, v, list(LENGTHS), facts(q, k, v, spec.scale, options))

    def paged(self, adapted: Sequence[AdaptedTokens]) -> None:
        return None


def _probe_batch(device: torch.device) -> tuple[Tensor, Tensor]:
    ids = torch.arange(sum(LENGTHS), device=device)
    return ids, torch.cat([torch.arange(length, device=device) for length in LENGTHS])
