"""GPT-2: learned positions, layer norms, an ungated MLP, and weights stored transposed."""

from typing import Any, ClassVar

from runtime.model.config import count, flag, integer, optional_integer
from runtime.model.families.family import Family, PartPlace, activation, eps, head_dim, lora_targets
from runtime.model.spec import DecoderSpec, LayerSpec


class GPT2(Family):
    """Radford et al., 2019: Language Models are Unsupervised Multitask Learners."""

    LAYERS: ClassVar = "transformer.h."
    LAYER: ClassVar = {
        "attn.c_attn": ("qkv", ""),
        "attn.c_proj": ("out", ""),
        "mlp.c_fc": ("gate_up", "up"),
        "mlp.c_proj": ("down", ""),
        "ln_1": ("attention_norm", ""),
        "ln_2": ("mlp_norm", ""),
    }
    OUTSIDE: ClassVar = {
        "transformer.wte.weight": "embedding.weight",
        "transformer.wpe.weight": "positions.weight",
        "transformer.ln_f.weight": "norm.weight",
        "transformer.ln_f.bias": "norm.bias",
        "lm_head.weight": "head.weight",
    }
    LORA_TARGETS: ClassVar = lora_targets(LAYER)
    TRANSPOSED: ClassVar = True

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if flag(config, key, False):
                raise ValueError(f"{key} is not supported for GPT-2")
        heads, hidden = count(config, "n_head"), integer(config, "n_embd")
        return DecoderSpec(
            vocab_size=integer(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=optional_integer(config, "n_inner") or 4 * hidden,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim(config, hidden, heads, keys=("n_embd", "n_head")),
            max_position=integer(config, "n_positions", 1024, at_least=2),
            norm_eps=eps(config, "layer_norm_epsilon", 1e-5),
            tied=flag(config, "tie_word_embeddings", True),
            layers=(LayerSpec(rope=None),) * count(config, "n_layer"),
            ropes=(),
            qkv="fused",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            attention_scale=None if flag(config, "scale_attn_weights", True) else 1.0,
            gated=False,
            activation=activation(config, "activation_function", "gelu_new", gated=False),
            norm="layer",
            learned_positions=True,
        )

    @classmethod
    def place(cls, name: str) -> PartPlace | None:
        return super().place(_full(name))


def _full(name: str) -> str:
    """Name with the prefix: the first checkpoints are of the model without its head, whose names lack it."""
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
