"""Adapters for the tiny model, made by PEFT itself, and what PEFT says they answer."""

from pathlib import Path
from typing import Any

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(model: Path, path: Path, *, seed: int = 1, spread: float = 0.15, **config: Any) -> Path:
    """Write a random adapter for the model in `model` to `path`, as PEFT saves it, and return `path`.

    `config` are fields of PEFT's `LoraConfig`. Both factors are random, so it changes the answers.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM"}
    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(**{**fields, **config}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= torch.rand(parameter.shape, generator=generator) + 0.5
        elif "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * spread
    adapted.save_pretrained(path)
    return path


def peft_logits(model: Path, adapter: Path, token_ids: list[int]) -> Any:
    """[T, vocab], by PEFT."""
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        return adapted(torch.tensor([token_ids])).logits[0]


def peft_greedy(model: Path, adapter: Path, token_ids: list[int], count: int) -> list[int]:
    """`count` greedy tokens after `token_ids`, by PEFT."""
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    ids = list(token_ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(adapted(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(token_ids) :]
