"""Sequences packed into one flat batch, and models of all families."""

import json
from pathlib import Path

import torch
from torch import Tensor

import kernels
from runtime.checkpoints.safetensors_files import find_weights
from runtime.model.attention import PackedAttention
from runtime.model.decoder import Decoder
from runtime.model.families import find_model
from runtime.model.families.family import Family


def load(path: Path, *, max_len: int = 128) -> tuple[Decoder, type[Family]]:
    config = json.loads((path / "config.json").read_text())
    model = find_model(config)
    spec = model.spec(config)
    decoder = Decoder(spec, kernels.load("reference"), max_len=max_len, dtype=torch.float32, device=torch.device("cpu"))
    decoder.load(model.weights(find_weights(path).tensors(), spec))
    return decoder, model


def packed(decoder: Decoder, sequences: list[Tensor]) -> Tensor:
    """Whole sequences without a cache, as training runs them: logits [T, vocab]."""
    positions = torch.cat([torch.arange(len(ids)) for ids in sequences])
    attention = PackedAttention(decoder.ops, [len(ids) for ids in sequences], decoder.spec)
    return decoder.logits(decoder.forward(torch.cat(sequences), positions, attention))
