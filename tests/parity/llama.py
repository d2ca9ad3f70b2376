"""Variants of tiny Llamas, and how they are loaded here and by transformers."""

from pathlib import Path
from typing import Any

import torch

import kernels
from runtime.checkpoints import open_checkpoint
from runtime.model.decoder import Decoder
from runtime.model.families import find_model

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 32},
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "rope linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "rope llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def load(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Decoder, Any]:
    from transformers import LlamaForCausalLM

    checkpoint = open_checkpoint(str(path))
    model = find_model(checkpoint.config)
    spec = model.spec(checkpoint.config)
    decoder = Decoder(
        spec,
        kernels.load("reference"),
        max_len=spec.max_position,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    decoder.load(model.weights(checkpoint.tensors(), spec))
    return decoder, LlamaForCausalLM.from_pretrained(path, dtype=dtype).eval()
