"""GPT-NeoX and Pythia: attention and MLP side by side, rope on a part of every head."""

from dataclasses import replace
from typing import Any, ClassVar

from runtime.model.config import flag, number
from runtime.model.families.family import Family, activation, eps, lora_targets
from runtime.model.families.llama import Llama
from runtime.model.rope import MIN_THETA, RopeSpec
from runtime.model.spec import DecoderSpec


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
    LORA_TARGETS: ClassVar = lora_targets(LAYER)

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        theta = number(config, "rotary_emb_base", 10000.0, at_least=MIN_THETA)
        partial = number(config, "rotary_pct", 0.25, at_least=0.0, at_most=1.0)
        bias = flag(config, "attention_bias", True)
        own = {"hidden_act": activation(config, "hidden_act", "gelu", gated=False), "num_key_value_heads": None}
        return replace(
            Llama.spec(config | own),
            norm_eps=eps(config, "layer_norm_eps", 1e-5),
            ropes=(RopeSpec.from_config(config, theta=theta, partial=partial),),
            qkv="grouped",
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=True,
            gated=False,
            norm="layer",
            parallel=flag(config, "use_parallel_residual", True),
        )
