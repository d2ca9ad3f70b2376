"""StableLM: layer norms, rope on a part of every head, in some sizes a norm for every head."""

from dataclasses import replace
from typing import Any, ClassVar

from runtime.model.config import flag
from runtime.model.families.family import eps
from runtime.model.families.llama import Llama
from runtime.model.rope import RopeSpec
from runtime.model.spec import DecoderSpec


class StableLm(Llama):
    """arXiv:2402.17834."""

    LAYER: ClassVar = {
        **Llama.LAYER,
        "self_attn.q_layernorm.norms.*": ("q_norm", "*"),
        "self_attn.k_layernorm.norms.*": ("k_norm", "*"),
    }
    OUTSIDE: ClassVar = {**Llama.OUTSIDE, "model.norm.bias": "norm.bias"}

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        parallel = flag(config, "use_parallel_residual", False)
        return replace(
            super().spec(config),
            norm_eps=eps(config, "layer_norm_eps", 1e-5),
            ropes=(RopeSpec.from_config(config, partial=0.25),),
            qkv_bias=flag(config, "use_qkv_bias", False),
            qk_norm="per_head" if flag(config, "qk_layernorm", False) else "none",
            norm="layer",
            parallel=parallel,
            shared_norm=parallel,
        )
