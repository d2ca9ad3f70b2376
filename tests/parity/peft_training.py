"""Some steps of training here and through PEFT, on the same rows with the same optimiser."""

from pathlib import Path
from typing import Any

import torch

from runtime.checkpoints.peft import write_adapter
from runtime.events import RunEvent, StepEvent
from runtime.model.decoder import Decoder
from runtime.model.families.llama import Llama
from runtime.model.lora_base import LoraBase
from runtime.trainer.course import Restored
from runtime.trainer.data.example import Example
from runtime.trainer.run import TrainingRun
from runtime.trainer.sliced_run import RunSpec
from tests.adapter_files import ALL
from tests.trainer.tiny_training import drive, examples, run_spec

IDS = torch.randint(0, 512, (40,), generator=torch.Generator().manual_seed(5))
DATA = examples(8, seed=4)


def spec_of(decoder: Decoder, kind: str, **keys: Any) -> RunSpec:
    plain = {"lr_scheduler": "constant", "max_grad_norm": 0.0, "gradient_accumulation_steps": 1}
    return run_spec(
        decoder, total_steps=4, warmup_steps=0, save_every=None, peft_init_lora_weights=kind, **{**plain, **keys}
    )


def peft_of(path: Path, kind: str, **config: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **config}
    base = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(init_lora_weights=kind, **fields)).train()


def trained_by_us(
    path: Path, decoder: Decoder, spec: RunSpec, target: Path, restored: Restored | None
) -> tuple[list[float], Path]:
    """The losses of the steps, and the adapter as it is published."""
    events: list[RunEvent] = []
    batches = [DATA[first : first + 2] for first in range(0, 8, 2)]
    base = LoraBase.of(decoder, Llama, "tiny")
    run = TrainingRun(
        decoder,
        spec,
        lambda epoch: batches,
        [],
        events.append,
        lambda directory, adapter: write_adapter(directory, adapter.layers, adapter.shape, base),
        restored=restored,
    )
    drive(run)
    target.mkdir()
    run.take_snapshot(4).write(target)
    return [event.loss for event in events if isinstance(event, StepEvent)], target / "adapter_files"


def peft_loss(model: Any, data: list[Example]) -> torch.Tensor:
    """The mean over the trained tokens, each sequence by itself."""
    total, count = torch.zeros(()), 0
    for example in data:
        ids = torch.tensor([example.token_ids])
        logits = model(input_ids=ids).logits[0, :-1]
        targets = torch.where(torch.tensor(example.trained[1:]), ids[0, 1:], -100)
        total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
        count += example.num_trained
    return total / count


def trained_by_peft(model: Any, rate: float) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    losses = []
    for first in range(0, 8, 2):
        loss = peft_loss(model, DATA[first : first + 2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS.unsqueeze(0)).logits[0]
    return found
