"""GPT-NeoX and Pythia: attention and MLP side by side, rope on a part of every head."""

from dataclasses import replace
from typing import Any, ClassVar

from runtime.workers.models.family import Family, lora_targets
from runtime.workers.models.llama import Llama
from runtime.workers.rope import RopeSpec
from runtime.workers.spec import DecoderSpec


class GPTNeoX(Family):
    """arXiv:2204.06745, arXiv:2304.01373. The checkpoint stores query, key and value head by head."""

    LAYERS: ClassVar = "gpt_neox.layers."
    LAYER: ClassVar = {
        "attention.query_key_value": ("qkv", ""),
        "attention.dense": ("out", ""),
        "mlp.dense_h_to_4h": ("gate_up", "up"),
        "mlp.dense_4h_to_h": ("down", ""),
        "input_layernorm": ("attention_norm", ""),
        "post_attention_layernorm": ("mlp_norm", ""),
    }
    OUTSIDE: ClassVar = {
        "gpt_neox.embed_in.weight": "embedding.weight",
        "gpt_neox.final_layer_norm.weight": "norm.weight",
        "gpt_neox.final_layer_norm.bias": "norm.bias",
        "embed_out.weight": "head.weight",
        "lm_head.weight": "head.weight",
    }
    UNUSED: ClassVar = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
    LORA_TARGETS: ClassVar = lora_targets(LAYER)

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        theta, partial = config.get("rotary_emb_base", 10000.0), config.get("rotary_pct", 0.25)
        bias = bool(config.get("attention_bias", True))
        return replace(
            Llama.spec({"hidden_act": "gelu"} | config | {"num_key_value_heads": None}),
            norm_eps=config.get("layer_norm_eps", 1e-5),
            ropes=(RopeSpec.from_config(config, theta=theta, partial=partial),),
            qkv="grouped",
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=True,
            gated=False,
            norm="layer",
            parallel=bool(config.get("use_parallel_residual", True)),
        )
