"""Metadata of a GGUF file for a model whose files are in Hugging Face's form: shape, rope, tokenizer."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.gguf.container import STRING, Metadata
from runtime.checkpoints.gguf.families import FAMILIES
from runtime.checkpoints.gguf.family import ROPE_FACTORS, GgufFamily
from runtime.checkpoints.gguf.tokenizer import CONTROL, NORMAL, SUPPORTED, USER_DEFINED, load_tokenizer
from runtime.checkpoints.gguf.writing import FLOAT32, INT32, Value, value_of
from runtime.checkpoints.model_loading import spec_of
from runtime.model.config import ModelLoadError
from runtime.model.rope import RopeSpec
from runtime.text.tokenizer import Tokenizer

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
    "Olmo2ForCausalLM": "olmo2",
    "GraniteForCausalLM": "granite",
}
"""Hugging Face's architecture → GGUF's. Of others a GGUF file is written from a GGUF base."""

UNUSED, BYTE = 5, 6
"""Kinds of token, besides those of `runtime.checkpoints.gguf.tokenizer`."""

SAMPLES = (
    "The quick brown fox jumped over 13 lazy dogs, didn't it?  I'VE seen 1234567 of them — 3.14 %!\n\n\tdef f(x):\n"
    "        return x**2  # naïve café\r\n",
    "Äpfel und Öl: 東京都 привет мир 🙂🙃 e\u0301 x'll we'RE  a\u00a0b\n \n  \n",
    " leading, trailing ",
    "CamelCaseWords http://example.com/a_b?c=d&e=1 $12,345.67",
)
"""Texts that the tokenizers in use cut differently."""


def family_of(checkpoint: Checkpoint) -> tuple[str, GgufFamily]:
    """GGUF's architecture and family of a model directory. Raises `ModelLoadError` naming the possible ones."""
    for name in checkpoint.config.get("architectures") or ():
        if name in ARCHITECTURES:
            return ARCHITECTURES[name], FAMILIES[ARCHITECTURES[name]]
    names = ", ".join(checkpoint.config.get("architectures") or ()) or "its architecture"
    raise ModelLoadError(
        f"{checkpoint.name}: GGUF files are not written of {names} from a directory; they are of: "
        f"{', '.join(ARCHITECTURES)}. Of other architectures, give the base as a GGUF file (--model), or export merged."
    )


def metadata_of(checkpoint: Checkpoint, architecture: str) -> dict[str, Value]:
    """Key → value. Raises `ModelLoadError` for a tokenizer or a rope scaling that the file cannot say."""
    spec = spec_of(checkpoint)
    own: dict[str, Any] = {
        "context_length": spec.max_position,
        "embedding_length": spec.hidden_size,
        "block_count": len(spec.layers),
        "feed_forward_length": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": float(spec.norm_eps),
        "rope.dimension_count": spec.head_dim,
        "rope.freq_base": float(spec.ropes[0].theta),
        **_rope_scaling(checkpoint, spec.ropes[0]),
    }
    windows = {layer.window for layer in spec.layers}
    if windows != {None}:
        if len(windows) > 1:
            raise ModelLoadError(
                f"{checkpoint.name}: a GGUF file of {architecture} has one sliding window for all layers."
            )
        own["attention.sliding_window"] = windows.pop()
    if architecture == "granite":
        config = checkpoint.config
        own["attention.scale"] = float(spec.attention_scale or 1.0)
        own["embedding_scale"] = float(spec.embedding_scale)
        own["residual_scale"] = float(spec.residual_scale)
        own["logit_scale"] = float(config.get("logits_scaling") or 1.0)
    return {
        "general.architecture": value_of(architecture),
        "general.type": value_of("model"),
        **{f"{architecture}.{key}": value_of(value) for key, value in own.items()},
        **_sampling(checkpoint),
        **_tokenizer(checkpoint, spec.vocab_size),
    }


def _rope_scaling(checkpoint: Checkpoint, rope: RopeSpec) -> dict[str, Any]:
    """Keys for stretched contexts; Llama 3's factors are a tensor (`rope_factors`)."""
    if rope.rope_type in ("default", "llama3"):
        return (
            {"rope.scaling.original_context_length": rope.original_max_position} if rope.rope_type == "llama3" else {}
        )
    if rope.rope_type in ("linear", "yarn"):
        return {
            "rope.scaling.type": rope.rope_type,
            "rope.scaling.factor": float(rope.factor),
            "rope.scaling.original_context_length": rope.original_max_position,
        }
    raise ModelLoadError(f"{checkpoint.name}: rope scaling {rope.rope_type!r} has no form in a GGUF file.")


def rope_factors(checkpoint: Checkpoint) -> dict[str, NDArray[np.float32]]:
    """Name of a tensor → the divisors of frequencies in Llama 3's rope scaling, float32 [head_dim / 2]; empty for
    others."""
    spec = spec_of(checkpoint)
    rope = spec.ropes[0]
    if rope.rope_type != "llama3":
        return {}
    plain, _ = RopeSpec(theta=rope.theta).frequencies(spec.head_dim, spec.max_position)
    scaled, _ = rope.frequencies(spec.head_dim, spec.max_position)
    return {ROPE_FACTORS: (plain / scaled).numpy().astype(np.float32)}


def _sampling(checkpoint: Checkpoint) -> dict[str, Value]:
    keys = {"temperature": "temp", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "penalty_repeat"}
    found = {f"general.sampling.{ours}": checkpoint.generation.get(key) for key, ours in keys.items()}
    values = {key: value_of(float(value)) for key, value in found.items() if isinstance(value, int | float)}
    if isinstance(top_k := checkpoint.generation.get("top_k"), int):
        values["general.sampling.top_k"] = Value(INT32, top_k)
    return values


# -- tokenizer -------------------------------------------------------------------------------------
#
# llama.cpp names the rule that cuts a text into words, and has no expressions in its files. The rule is found by trying
# the names: the reader's own tokenizer for each is compared with the model's.


def _tokenizer(checkpoint: Checkpoint, rows: int) -> dict[str, Value]:
    definition: dict[str, Any] = msgspec.json.decode(checkpoint.tokenizer.definition)
    model = definition["model"]
    if model.get("type") != "BPE":
        raise ModelLoadError(
            f"{checkpoint.name}: its tokenizer is a {model.get('type')} model; GGUF files are written with BPE alone. "
            "Give the base as a GGUF file (--model), or export merged."
        )
    common = _tokens(checkpoint.tokenizer, definition, rows)
    for candidate in _candidates(model, common["tokenizer.ggml.tokens"].value):
        fields = common | candidate
        if _same(checkpoint, fields, rows):
            return fields
    raise ModelLoadError(
        f"{checkpoint.name}: none of llama.cpp's rules cuts texts as its tokenizer does (tried: "
        f"{', '.join(SUPPORTED)}). "
        "Give the base as a GGUF file (--model), or export merged."
    )


def _tokens(tokenizer: Tokenizer, definition: dict[str, Any], rows: int) -> dict[str, Value]:
    texts, kinds = [f"[PAD{id}]" for id in range(rows)], [UNUSED] * rows
    bytes_fall_back = bool(definition["model"].get("byte_fallback"))
    for text, id in definition["model"]["vocab"].items():
        is_byte = bytes_fall_back and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        texts[id], kinds[id] = text, BYTE if is_byte else NORMAL
    for added in definition.get("added_tokens") or ():
        texts[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    found = {
        "tokenizer.ggml.tokens": Value(STRING, texts),
        "tokenizer.ggml.token_type": Value(INT32, kinds),
        "tokenizer.ggml.add_bos_token": value_of(tokenizer.encode("a")[:1] == [tokenizer.bos_id]),
    }
    named = {"bos": tokenizer.bos_id, "eos": next(iter(tokenizer.eos_ids), None)}
    named["eot"] = tokenizer.turn_end.token_id
    by_text = {text: id for id, text in enumerate(texts)}
    for role, name in (("unknown", "unk_token"), ("padding", "pad_token")):
        named[role] = by_text.get(tokenizer.template_tokens.get(name, ""))
    found |= {f"tokenizer.ggml.{role}_token_id": value_of(id) for role, id in named.items() if id is not None}
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = value_of(tokenizer.chat_template)
    return found


def _candidates(model: dict[str, Any], texts: list[str]) -> list[dict[str, Value]]:
    """The forms in which a file can describe a BPE."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if model.get("byte_fallback"):
        ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(pairs)))}
        scores = [-float(ranks[text]) if text in ranks else -1e6 for text in texts]
        form = {"tokenizer.ggml.model": value_of("llama"), "tokenizer.ggml.scores": Value(FLOAT32, scores)}
        return [form | {"tokenizer.ggml.add_space_prefix": value_of(prefix)} for prefix in (True, False)]
    merges = Value(STRING, [f"{left} {right}" for left, right in pairs])
    return [
        {
            "tokenizer.ggml.model": value_of("gpt2"),
            "tokenizer.ggml.pre": value_of(pre),
            "tokenizer.ggml.merges": merges,
        }
        for pre in SUPPORTED
    ]


def _same(checkpoint: Checkpoint, fields: dict[str, Value], rows: int) -> bool:
    """True where the reader's tokenizer for these fields gives the ids of the model's own."""
    plain = {key: value.value for key, value in fields.items()} | {"general.architecture": "x"}
    try:
        read = load_tokenizer(Metadata(plain, checkpoint.source), rows)
    except ModelLoadError:
        return False
    own = checkpoint.tokenizer
    return all(read.encode(text) == own.encode(text) for text in SAMPLES)
