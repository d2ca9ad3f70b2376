"""GPT-2: learned positions, layer norms, an ungated MLP, and weights stored transposed."""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from torch import Tensor

from kernels import Weight
from runtime.workers.models.family import Family, lora_targets, positive
from runtime.workers.spec import DecoderSpec, LayerSpec


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
    UNUSED: ClassVar = (".attn.bias", ".attn.masked_bias")
    LORA_TARGETS: ClassVar = lora_targets(LAYER)

    @classmethod
    def spec(cls, config: dict[str, Any]) -> DecoderSpec:
        for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if config.get(key):
                raise ValueError(f"{key} is not supported for GPT-2")
        heads, hidden = positive(config, "n_head"), positive(config, "n_embd")
        return DecoderSpec(
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            intermediate_size=config.get("n_inner") or 4 * hidden,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=hidden // heads,
            max_position=config.get("n_positions", 1024),
            norm_eps=config.get("layer_norm_epsilon", 1e-5),
            tied=bool(config.get("tie_word_embeddings", True)),
            layers=(LayerSpec(rope=None),) * positive(config, "n_layer"),
            ropes=(),
            qkv="fused",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            attention_scale=None if config.get("scale_attn_weights", True) else 1.0,
            gated=False,
            activation=config.get("activation_function", "gelu_new"),
            norm="layer",
            learned_positions=True,
        )

    @classmethod
    def weights(cls, tensors: Iterable[tuple[str, Weight]], spec: DecoderSpec) -> Iterator[tuple[str, str, Weight]]:
        full = ((_full(name), tensor) for name, tensor in tensors)
        for name, part, tensor in super().weights(full, spec):
            linear = name.split(".")[-2] in {place[0] for place in cls.LORA_TARGETS.values()}
            if linear and name.endswith(".weight") and isinstance(tensor, Tensor):  # in integers it is [out, in]
                tensor = tensor.t()
            yield name, part, tensor


def _full(name: str) -> str:
    """The first checkpoints are of the model without its head, whose names lack the prefix."""
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
