"""OLMo 2: norms after attention and MLP instead of before, and over all queries and all keys of a token."""

from dataclasses import replace
from typing import Any, ClassVar

from runtime.model.families.llama import ATTENTION, MLP, Llama
from runtime.model.families.qwen import QK_NORMS
from runtime.model.spec import DecoderSpec


class Olmo2(Llama):
    """arXiv:2501.00656."""

    LAYER: ClassVar = {
        **ATTENTION,
        **MLP,
        **QK_NORMS,
        "post_attention_layernorm": ("attention_post_norm", ""),
        "post_feedforward_layernorm": ("mlp_post_norm", ""),
    }

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        spec = super().spec({"rms_norm_eps": 1e-5} | config)
        return replace(spec, mlp_bias=False, pre_norm=False, post_norm=True, qk_norm="projection")
