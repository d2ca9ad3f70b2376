"""A micro-batch under a model of transformers': log-probabilities of its targets, from padded rows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runtime.trainer.data.example import Example
from runtime.trainer.losses import Loss, LossInputs, LossValue, Score


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """The S sequences of a micro-batch as rows of the same length L, padded at their ends."""

    token_ids: Tensor
    """[S, L] int64"""
    attention_mask: Tensor
    """[S, L] int64: 1 for tokens, 0 for padding."""
    rows: Tensor
    """[R] int64: places in [S * L] of tokens whose next one is a target, sequence by sequence."""
    targets: Tensor
    """[R] int64"""
    trained: tuple[int, ...]
    """[S] number of targets of each sequence."""
    weights: Tensor
    """[S] float32"""
    prompt_targets: tuple[int, ...]
    """[S] `Example.prompt_targets` of each sequence."""


def pad(examples: Sequence[Example], device: torch.device) -> PaddedBatch:
    """Lay the examples one above the other. Padding has id 0, and is neither attended to nor scored."""
    length = max(len(example) for example in examples)
    ids, mask, rows, targets, trained = [], [], [], [], []
    for index, example in enumerate(examples):
        padding = length - len(example)
        ids.append([*example.token_ids, *[0] * padding])
        mask.append([1] * len(example) + [0] * padding)
        places = [place for place, is_target in enumerate(example.trained) if is_target and place > 0]
        rows += [index * length + place - 1 for place in places]
        targets += [example.token_ids[place] for place in places]
        trained.append(len(places))
    return PaddedBatch(
        token_ids=torch.tensor(ids, device=device),
        attention_mask=torch.tensor(mask, device=device),
        rows=torch.tensor(rows, dtype=torch.int64, device=device),
        targets=torch.tensor(targets, dtype=torch.int64, device=device),
        trained=tuple(trained),
        weights=torch.tensor([example.weight for example in examples], device=device),
        prompt_targets=tuple(example.prompt_targets for example in examples),
    )


class ScoredModel(nn.Module):
    """A causal language model, of which the forward pass gives log-probabilities. What DDP and DeepSpeed wrap."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None) -> None:
        """`autocast`: type to compute in, where that is not the weights'."""
        super().__init__()
        self.model = model
        self._autocast = autocast

    def forward(self, token_ids: Tensor, attention_mask: Tensor, rows: Tensor, targets: Tensor) -> Any:
        """Log-probabilities [R] float32 in nats, and for each target whether it was the likeliest token, [R] bool."""
        kind, enabled = token_ids.device.type, self._autocast is not None
        with torch.autocast(kind, dtype=self._autocast or torch.bfloat16, enabled=enabled):
            logits = self.model(input_ids=token_ids, attention_mask=attention_mask, use_cache=False).logits
        chosen = logits.flatten(0, 1)[rows].float()
        logprobs = chosen.log_softmax(dim=-1)[torch.arange(len(targets), device=targets.device), targets]
        return logprobs, chosen.argmax(dim=-1) == targets


def call(module: Any, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
    """`ScoredModel.forward` on a batch, through whatever wraps it."""
    logprobs, correct = module(batch.token_ids, batch.attention_mask, batch.rows, batch.targets)
    return logprobs, correct


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Context in which the adapters of a PEFT model have no effect. Parameters stay as they are: PEFT's own way
    switches their gradients off and on, which the hooks of DDP and FSDP do not expect."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


def value_of(loss: Loss, batch: PaddedBatch, logprobs: Tensor, reference: Tensor | None) -> LossValue:
    """The loss of a micro-batch, differentiable by `logprobs`."""
    return loss(LossInputs(logprobs, reference, batch.trained, batch.weights, batch.prompt_targets))


def score_of(loss: Loss, batch: PaddedBatch, value: LossValue, correct: Tensor) -> Score:
    """The sums of a micro-batch."""
    units = loss.units(batch.trained)
    return Score(
        loss=float(value.total.detach()),
        units=units,
        correct=int(correct.sum()),
        tokens=sum(batch.trained),
        further={name: float(total.detach()) for name, total in value.metrics.items()},
        counts={name: value.counts.get(name, units) for name in value.metrics},
    )
