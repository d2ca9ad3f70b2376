"""Loader of a model directory into a transformers model with our attention function."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kernels import Ops
from runtime.model.config import architectures
from runtime.model.fallback.decoder import FallbackDecoder
from runtime.model.fallback.linears import NAME
from runtime.model.fallback.probe import examine
from runtime.model.layers import WeightError
from runtime.model.lora_base import LoraBase, Target, fingerprint

GROWING = ("dynamic", "longrope")
"""Rope scalings that depend on the longest sequence of a batch."""


def load_fallback(
    directory: Path,
    config: dict[str, Any],
    ops: Ops,
    *,
    max_len: int | None,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str = "none",
) -> FallbackDecoder:
    """Load and probe the model in `directory`. Raises `WeightError` with the reason why it cannot be served."""
    kind = _class(config)
    if kind._is_stateful or not kind._supports_attention_backend:
        why = "keeps a state that is not attention" if kind._is_stateful else "does not use its attention interface"
        raise WeightError(f"{kind.__name__} of transformers {why}, so it cannot run over a paged cache")
    if not directory.is_dir():
        raise WeightError(f"{kind.__name__} is served through transformers, which needs a directory with safetensors")
    if quantization == "gguf":
        raise WeightError("quantization gguf is for GGUF files; this is not one")
    if config.get("quantization_config"):
        raise WeightError(
            f"{kind.__name__} is served through transformers, for which quantised weights are not supported"
        )
    model = _read(kind, directory, dtype).to(device)
    _check_rope(model, max_len)
    try:
        decoder = FallbackDecoder(model, examine(model), ops, max_len=max_len or 0, quantization=quantization)
    except WeightError:
        raise
    except Exception as error:  # the model's own code may raise anything on a plain batch
        raise WeightError(f"{kind.__name__} of transformers fails on a few tokens: {error}") from error
    decoder.max_len = decoder.max_len or decoder.spec.max_position
    return decoder


def lora_base(model: FallbackDecoder, name: str) -> LoraBase:
    """Base model of adapters: they may change the linears that every layer has."""
    targets = {
        module: Target(module, "", 0, linear.in_features, linear.parts[""]) for module, linear in model.targets.items()
    }
    return LoraBase(name, fingerprint(model), model.layers_path, model.spec.num_layers, targets)


def _class(config: dict[str, Any]) -> Any:
    names = architectures(config)
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    for name in names:
        if name in known and (kind := getattr(transformers, name, None)) is not None:
            return kind
    asked = ", ".join(names) or "none named in config.json"
    raise WeightError(
        f"architecture not supported: {asked}. It is neither one of ours (`eft models list`) nor a causal "
        f"language model of transformers {transformers.__version__}"
    )


def _read(kind: Any, directory: Path, dtype: torch.dtype) -> Any:
    try:
        with _quiet():
            model, told = kind.from_pretrained(
                directory,
                dtype=dtype,
                attn_implementation=NAME,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # the model's configuration or code may raise anything for an unexpected value
        raise WeightError(f"transformers cannot load {kind.__name__}: {error}") from error
    for what in ("missing_keys", "mismatched_keys"):
        if told[what]:
            raise WeightError(f"the checkpoint lacks {len(told[what])} weights, the first: {min(map(str, told[what]))}")
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):  # for a loss that is not used here
        text.output_router_logits = False
    return model.eval().requires_grad_(False)


def _check_rope(model: Any, max_len: int | None) -> None:
    """Refuse angles that change while a sequence is served: its cached keys keep theirs."""
    text = model.config.get_text_config()
    given = json.dumps(getattr(text, "rope_parameters", None) or {}, default=str)
    kind = next((kind for kind in GROWING if f'"{kind}"' in given), None)
    if kind is None:
        return
    longest = getattr(text, "max_position_embeddings", 0)
    original = (getattr(text, "rope_parameters", None) or {}).get("original_max_position_embeddings") or longest
    if (max_len or longest) > original:
        raise WeightError(
            f"rope scaling {kind!r} changes with the length of a sequence past {original} tokens, which is not "
            f"supported for models served through transformers: set max_model_len to at most {original}"
        )


@contextlib.contextmanager
def _quiet() -> Any:
    """Context without transformers' progress bars and reports on stderr: problems are raised."""
    from transformers.utils import logging

    told: Any = logging
    level, bars = told.get_verbosity(), told.is_progress_bar_enabled()
    told.set_verbosity_error()
    told.disable_progress_bar()
    try:
        yield
    finally:
        told.set_verbosity(level)
        if bars:
            told.enable_progress_bar()
