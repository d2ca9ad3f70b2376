"""A transformers model as a `DecoderSpec`."""

from dataclasses import dataclass
from typing import Any

from runtime.model.fallback.probe import Anatomy
from runtime.model.layers import WeightError
from runtime.model.spec import DecoderSpec, LayerSpec

LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
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
    longest = next((value for name in LENGTHS if (value := getattr(config, name, None))), None)
    if longest is None:
        raise WeightError(f"config.json says nowhere how long sequences may be; looked for: {', '.join(LENGTHS)}")
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
