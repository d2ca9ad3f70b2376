"""Adapters in training, and slices driven to their gradients."""

from pathlib import Path
from typing import Any

import torch

from runtime.model.decoder import Decoder
from runtime.model.families.llama import Llama
from runtime.model.lora import LoraShape
from runtime.trainer.data.example import Example
from runtime.trainer.lora import TrainableLora
from runtime.trainer.slices import Slices
from tests.parity.families import SHAPE
from tests.trainer.tiny_training import all_targets, llama_sizes


def drive(slices: Slices, how: str) -> None:
    """Do it all at once, in the smallest slices that are allowed, or in uneven ones."""
    sizes = iter(range(10**9))
    try:
        wanted = next(slices)
        while True:
            least = min(wanted.least, wanted.amount)
            granted = {"whole": wanted.amount, "least": least, "odd": least + 7 * (next(sizes) % 3)}[how]
            wanted = slices.send(min(granted, wanted.amount))
    except StopIteration:
        return


def adapter(decoder: Decoder, shape: LoraShape) -> TrainableLora:
    targets = all_targets(decoder)
    lora = TrainableLora(decoder, targets, shape, seed=3, sizes=llama_sizes(decoder, targets, shape))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in lora.parameters():
            if ".b." in name:
                parameter.normal_(std=0.2, generator=generator)
            if ".m." in name:
                parameter *= torch.rand(parameter.shape, generator=generator) + 0.5
    lora.changed()
    return lora


def data() -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    lengths = (25, 9)
    ids = [torch.randint(0, SHAPE["vocab_size"], (length,), generator=generator).tolist() for length in lengths]
    return [Example(one, [place >= 3 for place in range(len(one))]) for one in ids]


def peft_model(path: Path, lora: TrainableLora, *, dropout: float = 0.0) -> Any:
    """transformers + PEFT with the very same adapter weights; B is not zero, so that A has a gradient."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    shape = lora.shape
    modules = [name.split(".")[-1] for name in Llama.LORA_TARGETS]
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        target_modules=modules,
        use_rslora=shape.rslora,
        use_dora=shape.dora,
        rank_pattern=shape.rank_pattern,
        alpha_pattern=shape.alpha_pattern,
        lora_dropout=dropout,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(path, dtype=torch.float32), config)
    with torch.no_grad():
        for (layer, linear), parts in lora.layers_of(lora.capture()).items():
            for part in parts:
                module = peft_module(model, layer, linear, part.part)
                module.lora_A["default"].weight.copy_(part.a)
                module.lora_B["default"].weight.copy_(part.b)
                if part.magnitude is not None:
                    module.lora_magnitude_vector["default"].weight.copy_(part.magnitude)
    return model.train()


def peft_module(model: Any, layer: int, linear: str, part: str) -> Any:
    (name,) = (name for name, place in Llama.LORA_TARGETS.items() if place == (linear, part))
    return model.get_submodule(f"base_model.model.model.layers.{layer}.{name}")
