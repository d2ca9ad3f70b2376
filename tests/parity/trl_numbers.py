"""Losses, metrics and gradients of TRL's own trainers on a fixed batch, for `test_trl_losses.py`.

`trl_losses.json` was written with TRL 1.16.0, transformers 5.24.0 and PEFT, in an environment that has TRL:

    PYTHONPATH=. python -m tests.parity.trl_numbers > tests/parity/trl_losses.json

Weights and tokens are sines and a congruential sequence, so they are the same on every machine. The trainers are made
as their documentation has it, and asked for the loss of a batch of token ids.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.tiny import make_tiny_llama, make_tiny_tokenizer

RANK, ALPHA = 4, 12
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHOWN = 3
"""Values of each gradient that are recorded, beside its norm."""


class Row(NamedTuple):
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    label: bool


def rows() -> list[Row]:
    """Four rows of different lengths."""
    state = 12345
    made = []
    for sizes, label in (((5, 7, 4), True), ((9, 3, 8), False), ((2, 12, 12), False), ((6, 5, 1), True)):
        parts = []
        for size in sizes:
            part = []
            for _ in range(size):
                state = (1103515245 * state + 12345) % 2**31
                part.append(3 + state % 500)
            parts.append(part)
        made.append(Row(*parts, label))
    return made


def sine_model(path: Path) -> Path:
    """A tiny Llama whose weights are sines."""
    from transformers import LlamaForCausalLM

    make_tiny_llama(path)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            waves = _waves(parameter, 0.7 + 0.013 * number)
            parameter.copy_(1 + 0.1 * waves if "norm" in name else 0.25 * waves)
    model.save_pretrained(path)
    return path


def sine_adapter(path: Path) -> Any:
    """The model with a LoRA adapter of PEFT's, neither of whose matrices is zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(path, dtype=torch.float32), config)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if "lora_" in name:
                parameter.copy_(0.15 * _waves(parameter, 0.51 + 0.017 * number))
    return model


def _waves(parameter: Tensor, step: float) -> Tensor:
    count = parameter.numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * step + 1).view(parameter.shape).float()


def _padded(sequences: list[list[int]], value: int = 0) -> Tensor:
    size = max(map(len, sequences))
    return torch.tensor([one + [value] * (size - len(one)) for one in sequences])


def _masked(pairs: list[tuple[list[int], list[int]]], prefix: str = "") -> dict[str, Tensor]:
    """Inputs of the trainers for prompts and answers."""
    return {
        f"{prefix}input_ids": _padded([prompt + answer for prompt, answer in pairs]),
        f"{prefix}attention_mask": _padded([[1] * (len(prompt) + len(answer)) for prompt, answer in pairs]),
        f"{prefix}completion_mask": _padded([[0] * len(prompt) + [1] * len(answer) for prompt, answer in pairs]),
    }


def _pairs() -> dict[str, Tensor]:
    data = rows()
    return _masked([(row.prompt, row.chosen) for row in data] + [(row.prompt, row.rejected) for row in data])


def _labelled() -> dict[str, Tensor]:
    data = rows()
    answers = [row.chosen for row in data]
    return {
        **_masked([(row.prompt, row.chosen) for row in data]),
        **_masked(list(zip([row.prompt for row in data], [answers[-1], *answers[:-1]], strict=True)), "KL_"),
        "label": torch.tensor([row.label for row in data]),
    }


def _separate() -> dict[str, Tensor]:
    """The older trainers' inputs."""
    found = {}
    for name in ("chosen", "rejected"):
        pairs = [(row.prompt, getattr(row, name)) for row in rows()]
        found[f"{name}_input_ids"] = _padded([prompt + answer for prompt, answer in pairs])
        found[f"{name}_attention_mask"] = _padded([[1] * (len(prompt) + len(answer)) for prompt, answer in pairs])
        found[f"{name}_labels"] = _padded([[-100] * len(prompt) + answer for prompt, answer in pairs], -100)
    return found


def _record(model: Any, loss: Tensor, metrics: dict[str, float]) -> dict[str, Any]:
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.grad is not None:
            values = parameter.grad.flatten()
            grads[name] = {"norm": _short(values.norm()), "first": [_short(value) for value in values[:SHOWN]]}
    return {"loss": _short(loss), "metrics": {key: _short(value) for key, value in metrics.items()}, "grads": grads}


def _short(value: Tensor | float) -> float:
    return float(f"{float(value):.7g}")


def main() -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    path = sine_model(Path(tempfile.mkdtemp()))
    make_tiny_tokenizer(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.eos_token = "<|endoftext|>"
    pairs = Dataset.from_list([{"prompt": "a newt", "chosen": " is small", "rejected": " is a robot"}] * 4)
    labels = Dataset.from_list([{"prompt": "a newt", "completion": " is small", "label": at < 2} for at in range(4)])
    common = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }

    def made(trainer: Any, config: Any, data: Any, **options: Any) -> Any:
        return trainer(
            model=sine_adapter(path), args=config(**common, **options), train_dataset=data, processing_class=tokenizer
        )

    def modern(trainer: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
        # An adapter that comes with the model would be the reference, in a copy: ours is trained from the base.
        trainer.model.delete_adapter("ref")
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, inputs, False)
        metrics = {
            name: values[-1] for name, values in trainer._metrics["train"].items() if "/" in name or name == "kl"
        }
        return _record(trainer.model, loss, {name: value for name, value in metrics.items() if "logits" not in name})

    def older(trainer: Any) -> dict[str, Any]:
        trainer.model.train()
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model, _separate(), "train")
        kept = {name: float(value) for name, value in metrics.items() if "logits" not in name}
        return _record(trainer.model, loss, kept)

    found = {}
    for name, options in {
        "dpo": {"beta": 0.3},
        "dpo hinge": {"beta": 0.3, "loss_type": ["hinge"]},
        "dpo ipo": {"beta": 0.3, "loss_type": ["ipo"]},
        "dpo robust": {"beta": 0.3, "loss_type": ["robust"], "label_smoothing": 0.1},
        "dpo sigmoid_norm": {"beta": 0.3, "loss_type": ["sigmoid_norm"]},
        "dpo nca_pair": {"beta": 0.3, "loss_type": ["nca_pair"]},
        "dpo sppo_hard": {"beta": 0.3, "loss_type": ["sppo_hard"]},
        "dpo apo_zero": {"beta": 0.3, "loss_type": ["apo_zero"]},
        "dpo apo_down": {"beta": 0.3, "loss_type": ["apo_down"]},
        "dpo sigmoid sft": {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    }.items():
        found[name] = modern(made(DPOTrainer, DPOConfig, pairs, **options), _pairs())
    for name, options in {
        "kto": {"beta": 0.3},
        "kto weights": {"beta": 0.3, "desirable_weight": 0.2, "undesirable_weight": 1.5},
    }.items():
        found[name] = modern(made(KTOTrainer, KTOConfig, labels, **options), _labelled())
    found["orpo"] = older(made(ORPOTrainer, ORPOConfig, pairs, beta=0.3))
    for name, options in {
        "cpo": {"beta": 0.3, "cpo_alpha": 0.7},
        "cpo smoothed": {"beta": 0.3, "cpo_alpha": 0.0, "label_smoothing": 0.2},
        "simpo": {"beta": 2.0, "loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.6},
        "simpo sft": {"beta": 2.0, "loss_type": "simpo", "cpo_alpha": 1.0, "simpo_gamma": 0.6},
    }.items():
        found[name] = older(made(CPOTrainer, CPOConfig, pairs, **options))
    lines = (f"{json.dumps(name)}: {json.dumps(found[name], sort_keys=True)}" for name in sorted(found))
    sys.stdout.write("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
