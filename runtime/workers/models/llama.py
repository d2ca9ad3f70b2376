"""Llama 2, 3 and 3.x, SmolLM2, TinyLlama, Yi: everything that calls itself LlamaForCausalLM."""

import re
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from torch import Tensor

from runtime.workers.decoder import LINEARS, DecoderSpec
from runtime.workers.rope import RopeSpec

LAYER = {
    "self_attn.q_proj": ("qkv", "q"),
    "self_attn.k_proj": ("qkv", "k"),
    "self_attn.v_proj": ("qkv", "v"),
    "self_attn.o_proj": ("out", ""),
    "mlp.gate_proj": ("gate_up", "gate"),
    "mlp.up_proj": ("gate_up", "up"),
    "mlp.down_proj": ("down", ""),
    "input_layernorm": ("attention_norm", ""),
    "post_attention_layernorm": ("mlp_norm", ""),
}
"""A layer's tensors in the checkpoint, and the part of which parameter they fill."""
OUTSIDE = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


class Llama:
    """RMSNorm, rope, grouped-query attention, SwiGLU (arXiv:2302.13971, arXiv:2407.21783)."""

    LORA_TARGETS: ClassVar = {name: place for name, place in LAYER.items() if place[0] in LINEARS}

    @staticmethod
    def spec(config: dict[str, Any]) -> DecoderSpec:
        if (act := config.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"hidden_act {act!r} is not supported for Llama; supported is: silu")
        heads = config["num_attention_heads"]
        bias = bool(config.get("attention_bias", False))
        return DecoderSpec(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_position=config.get("max_position_embeddings", 2048),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=RopeSpec.from_config(config),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
        )

    @staticmethod
    def weights(tensors: Iterable[tuple[str, Tensor]], spec: DecoderSpec) -> Iterator[tuple[str, str, Tensor]]:
        for name, tensor in tensors:
            if match := _LAYER_NAME.fullmatch(name):
                layer, inner, kind = match.groups()
                if inner in LAYER:
                    parameter, part = LAYER[inner]
                    yield f"layers.{layer}.{parameter}.{kind}", part, tensor
                    continue
            if name in OUTSIDE:
                if name != "lm_head.weight" or not spec.tied:
                    yield OUTSIDE[name], "", tensor
            elif not name.endswith("rotary_emb.inv_freq"):  # old checkpoints store what is computed
                yield name, "", tensor
