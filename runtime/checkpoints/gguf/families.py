"""The supported families of GGUF files, by `general.architecture`, in Hugging Face's terms.

Tensor names, order of rows and, in `configs`, configuration. The conversions of llama.cpp's convert_hf_to_gguf.py,
which made the files, are undone.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from runtime.checkpoints.gguf import configs
from runtime.checkpoints.gguf.family import (
    GgufFamily,
    as_row,
    by_group,
    by_head,
    interleaved_k,
    interleaved_q,
    less_one,
    transposed,
)
from runtime.model.config import ModelLoadError

if TYPE_CHECKING:
    from runtime.checkpoints.gguf.container import Metadata

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
}
HEADS = {"attn_q": interleaved_q, "attn_k": interleaved_k}

LLAMA = GgufFamily(
    architecture="LlamaForCausalLM",
    config=configs.llama,
    outside=OUTSIDE,
    layer={**ATTENTION, **NORMS, **MLP},
    undo=HEADS,
)
PLAIN = replace(LLAMA, undo={})
"""Llama's names, with rows in Hugging Face's order."""
MIXTRAL = replace(
    LLAMA,
    architecture="MixtralForCausalLM",
    config=configs.mixtral,
    layer={
        **ATTENTION,
        **NORMS,
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
        "ffn_up_exps": "block_sparse_moe.experts.*.w3",
        "ffn_down_exps": "block_sparse_moe.experts.*.w2",
    },
)
QWEN2_MOE = replace(
    PLAIN,
    architecture="Qwen2MoeForCausalLM",
    config=configs.qwen2_moe,
    layer={
        **ATTENTION,
        **NORMS,
        **EXPERTS,
        "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
        "ffn_up_shexp": "mlp.shared_expert.up_proj",
        "ffn_down_shexp": "mlp.shared_expert.down_proj",
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    },
    undo={"ffn_gate_inp_shexp": as_row},
)
PHI3 = replace(
    PLAIN,
    architecture="Phi3ForCausalLM",
    config=configs.phi3,
    layer={
        **NORMS,
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
)
GEMMA2 = replace(
    PLAIN,
    architecture="Gemma2ForCausalLM",
    config=configs.gemma2,
    layer={
        **ATTENTION,
        **MLP,
        **POST_NORMS,
        "attn_norm": "input_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
    },
    undo_all=less_one,
)
GPT2 = GgufFamily(
    architecture="GPT2LMHeadModel",
    config=configs.gpt2,
    outside={
        "token_embd.weight": "transformer.wte.weight",
        "position_embd.weight": "transformer.wpe.weight",
        "output_norm.weight": "transformer.ln_f.weight",
        "output_norm.bias": "transformer.ln_f.bias",
        "output.weight": "lm_head.weight",
    },
    prefix="transformer.h.",
    layer={
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    undo=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), transposed),
)
GPT_NEOX = GgufFamily(
    architecture="GPTNeoXForCausalLM",
    config=configs.gpt_neox,
    outside={
        "token_embd.weight": "gpt_neox.embed_in.weight",
        "output_norm.weight": "gpt_neox.final_layer_norm.weight",
        "output_norm.bias": "gpt_neox.final_layer_norm.bias",
        "output.weight": "embed_out.weight",
    },
    prefix="gpt_neox.layers.",
    layer={
        "attn_norm": "input_layernorm",
        "attn_qkv": "attention.query_key_value",
        "attn_output": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    },
    undo={"attn_qkv": by_head},
)
FALCON = GgufFamily(
    architecture="FalconForCausalLM",
    config=configs.falcon,
    outside={
        "token_embd.weight": "transformer.word_embeddings.weight",
        "output_norm.weight": "transformer.ln_f.weight",
        "output_norm.bias": "transformer.ln_f.bias",
        "output.weight": "lm_head.weight",
    },
    prefix="transformer.h.",
    layer={
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attention.query_key_value",
        "attn_output": "self_attention.dense",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    },
    undo={"attn_qkv": by_group},
)
FALCON_TWO_NORMS = replace(FALCON, layer={**FALCON.layer, "attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"})

FAMILIES = {
    "llama": LLAMA,
    "falcon": FALCON,
    "gemma2": GEMMA2,
    "gemma3": replace(
        GEMMA2, architecture="Gemma3ForCausalLM", config=configs.gemma3, layer={**GEMMA2.layer, **QK_NORMS}
    ),
    "gpt2": GPT2,
    "gptneox": GPT_NEOX,
    "granite": replace(LLAMA, architecture="GraniteForCausalLM", config=configs.granite),
    "olmo2": replace(
        PLAIN,
        architecture="Olmo2ForCausalLM",
        config=configs.olmo2,
        layer={**ATTENTION, **MLP, **QK_NORMS, **POST_NORMS},
    ),
    "phi3": PHI3,
    "qwen2": replace(PLAIN, architecture="Qwen2ForCausalLM", config=configs.qwen2),
    "qwen2moe": QWEN2_MOE,
    "qwen3": replace(PLAIN, architecture="Qwen3ForCausalLM", config=configs.qwen3, layer={**PLAIN.layer, **QK_NORMS}),
    "qwen3moe": replace(
        PLAIN,
        architecture="Qwen3MoeForCausalLM",
        config=configs.qwen3_moe,
        layer={**ATTENTION, **NORMS, **EXPERTS, **QK_NORMS},
    ),
    "smollm3": replace(LLAMA, architecture="SmolLM3ForCausalLM", config=configs.smollm3),
    "stablelm": replace(
        PLAIN,
        architecture="StableLmForCausalLM",
        config=configs.stablelm,
        outside={**OUTSIDE, "output_norm.bias": "model.norm.bias"},
        layer={
            **PLAIN.layer,
            "attn_q_norm": "self_attn.q_layernorm.norms.*",
            "attn_k_norm": "self_attn.k_layernorm.norms.*",
        },
    ),
}
SUPPORTED = tuple(FAMILIES)


def find_family(metadata: "Metadata", tensors: set[str]) -> GgufFamily:
    """The family of a file. Raises `ModelLoadError` naming the supported ones."""
    name = metadata.architecture
    if name not in FAMILIES:
        raise ModelLoadError(
            f"{metadata.path}: GGUF files of architecture {name!r} are not supported; supported are: "
            f"{', '.join(SUPPORTED)}."
        )
    if name == "llama" and metadata.integer(".expert_count"):
        return MIXTRAL
    if name == "llama" and metadata.integer(".attention.sliding_window"):
        return replace(LLAMA, architecture="MistralForCausalLM")
    if name == "falcon" and "blk.0.attn_norm_2.weight" in tensors:
        return FALCON_TWO_NORMS
    return FAMILIES[name]
