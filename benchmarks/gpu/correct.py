"""Sections that say right or wrong: ops, greedy tokens, CUDA graphs, adapters in one batch, training losses."""

import importlib.util
import random
import tempfile
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

import kernels
from benchmarks.gpu.kernels import check
from benchmarks.gpu.report import Clock, Figures, NotHere, Wrong
from benchmarks.gpu.subject import LORA, SEED, Row, Subject, generate, largest_gap, merge
from kernels.triton import training_ops
from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.model_loading import load_decoder
from runtime.engine.assembly import Assembled
from runtime.model.families import find_model
from runtime.model.lora_base import LoraBase
from runtime.trainer.data.example import Example, collate
from runtime.trainer.lora import TrainableLora
from runtime.trainer.step import MicroStep
from runtime.workers.cuda_graphs import MOST

GAP = {torch.float32: 2e-3, torch.bfloat16: 0.5}
"""Most that a greedy token's logit may be below transformers' best: rounding moves logits, and tokens that are as good
change places."""
LOSS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Largest difference of a training loss."""
STEPS, LEARNING_RATE = 4, 2e-3


def ops(subject: Subject, clock: Clock, figures: Figures) -> None:
    """Every op of the backend that the device gets."""
    backend = kernels.load("auto", subject.device)
    figures["backend"] = kernels.chosen(subject.device)
    on_gpu = subject.device.type == "cuda"
    dtypes = [torch.float32, torch.bfloat16, torch.float16] if on_gpu else [torch.float32]
    worst: dict[str, float] = {}
    wrong: list[str] = []
    figures["checked"] = 0
    for result in check(backend, subject.device, dtypes):
        figures["checked"] += 1
        worst[result.dtype] = max(worst.get(result.dtype, 0.0), result.error)
        if not result.right:
            wrong.append(f"{result.op} in {result.dtype} is off by {result.error:.2g}, allowed {result.tolerance:.2g}")
    figures["largest error"] = worst
    if wrong:
        figures["wrong"] = wrong
        raise Wrong("; ".join(wrong))


def tokens(subject: Subject, clock: Clock, figures: Figures) -> None:
    """Greedy tokens, single and in a batch, against transformers."""
    rows = [Row(prompt) for prompt in subject.prompts(8)]
    with subject.engine() as assembled:
        made = generate(assembled, rows, 48).tokens
        single = generate(assembled, rows[:1], 48).tokens
    with subject.transformers() as peer:
        _compare(peer, subject, [*rows, rows[0]], made + single, figures)


def _compare(peer: Any, subject: Subject, rows: list[Row], made: list[list[int]], figures: Figures) -> None:
    """Raises `Wrong` where a token is worse than transformers' own by more than rounding."""
    found = [largest_gap(peer, row.prompt, tokens) for row, tokens in zip(rows, made, strict=True)]
    worst, best = max(gap for gap, _ in found), sum(count for _, count in found)
    figures["tokens"] = figures.get("tokens", 0) + sum(map(len, made))
    figures["transformers' own"] = figures.get("transformers' own", 0) + best
    figures["largest gap"] = max(figures.get("largest gap", 0.0), worst)
    if not worst <= GAP[subject.dtype]:
        raise Wrong(f"a token is {worst:.3g} below transformers' best logit; allowed {GAP[subject.dtype]}")


BATCH_KINDS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}],
    "sampled": [{"temperature": 0.8, "seed": 1}, {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 2}],
    "with rules": [
        {"repetition_penalty": 1.2, "logit_bias": {7: -5.0}},
        {"temperature": 0.8, "frequency_penalty": 0.5, "seed": 3},
    ],
}
"""Sampling fields of the rows of a batch, in turns."""
MIN_COMMON = 0.5
"""Least share of tokens before the first one that differs: rounding depends on the number of rows, and one token that
changes places changes all after it."""


def graphs(subject: Subject, clock: Clock, figures: Figures) -> None:
    """The same tokens with CUDA graphs and without, for batches of every kind and several numbers of rows, and both
    rates. Where nothing is recorded, as on a CPU, both are computed alike."""
    counts = [count for count in (1, 3, 8, 61, MOST) if count <= subject.most]
    prompts = {count: subject.prompts(count, 24) for count in counts}
    length = 32 if subject.device.type == "cuda" else 8
    made: dict[bool, dict[tuple[str, int], list[list[int]]]] = {False: {}, True: {}}
    for on, found in made.items():
        with tempfile.TemporaryDirectory() as folder, subject.engine(graphs=on) as assembled:
            for seed, name in enumerate("ab", SEED + 1):
                subject.make_adapter(assembled, Path(folder, name), seed)
                _load(assembled, name, Path(folder, name))
            for kind, count, rows in _batches(prompts):
                generate(assembled, rows, 4)  # records
                result = generate(assembled, rows, length)
                found[kind, count] = result.tokens
                figures[f"{kind}, {count} rows, {'graphs' if on else 'eager'}, tok/s"] = result.decode_rate
            recorded = assembled.engine.recorded
            if on:
                figures["recorded"] = [] if recorded is None else recorded.graphs.recorded
                figures["not recorded"] = {} if recorded is None else dict(recorded.refused)
    for (kind, count), tokens in made[True].items():
        share = _common(tokens, made[False][kind, count])
        if share < 1:
            figures.setdefault("tokens alike", {})[f"{kind}, {count} rows"] = share
        if share < MIN_COMMON:
            raise Wrong(f"{kind}, {count} rows: {share:.0%} of the tokens are those without graphs")
    with subject.transformers() as peer:
        for count in counts:
            if made[True]["greedy", count] != made[False]["greedy", count]:
                rows = [Row(prompt) for prompt in prompts[count]]
                _compare(peer, subject, rows, made[True]["greedy", count], figures)


def _batches(prompts: dict[int, list[list[int]]]) -> Iterator[tuple[str, int, list[Row]]]:
    """Kind, number of rows, and rows: each kind for the base alone, then with two adapters beside it."""
    for adapters in (("",), ("", "a", "b")):
        for kind, fields in BATCH_KINDS.items():
            for count, given in prompts.items():
                rows = [
                    Row(prompt, adapters[index % len(adapters)], fields[index % len(fields)])
                    for index, prompt in enumerate(given)
                ]
                yield kind + (", adapters" if len(adapters) > 1 else ""), count, rows


def _common(tokens: list[list[int]], others: list[list[int]]) -> float:
    """Share of the tokens that stand before the first one in their row that differs."""
    pairs = [list(zip(one, other, strict=True)) for one, other in zip(tokens, others, strict=True)]
    alike = sum(len(list(takewhile(lambda pair: pair[0] == pair[1], row))) for row in pairs)
    return alike / sum(map(len, pairs))


def adapters(subject: Subject, clock: Clock, figures: Figures) -> None:
    """Two adapters and the base in one batch, each row against transformers with that adapter merged."""
    with tempfile.TemporaryDirectory() as made, subject.engine() as assembled, subject.transformers() as peer:
        layers = {
            name: subject.make_adapter(assembled, Path(made, name), seed) for seed, name in enumerate("ab", SEED + 1)
        }
        for name in layers:
            _load(assembled, name, Path(made, name))
        rows = [Row(prompt, ("", "a", "b")[index % 3]) for index, prompt in enumerate(subject.prompts(9))]
        found = generate(assembled, rows, 24).tokens
        names = {"": None, **layers}
        for name, adapter in names.items():
            if adapter is not None:
                merge(peer, assembled, adapter)
            mine = [index for index, row in enumerate(rows) if row.adapter == name]
            _compare(peer, subject, [rows[index] for index in mine], [found[index] for index in mine], figures)
            if adapter is not None:
                merge(peer, assembled, adapter, -1.0)
        base = generate(assembled, [Row(row.prompt) for row in rows], 24).tokens
        changed = sum(base[index] != found[index] for index, row in enumerate(rows) if row.adapter)
        figures["adapted rows that differ from the base"] = changed
        if not changed:
            raise Wrong("the adapters changed no answer")


def _load(assembled: Assembled, name: str, folder: Path) -> None:
    assembled.engine.prepare_adapter(name, str(folder))
    assembled.engine.load_adapter(name)


# -- training --------------------------------------------------------------------------------------


def training(subject: Subject, clock: Clock, figures: Figures) -> None:
    """Losses of a few LoRA steps from the same weights on the same examples, ours and PEFT's."""
    if importlib.util.find_spec("peft") is None:
        raise NotHere("peft is not installed")
    checkpoint = open_checkpoint(subject.model)
    decoder = load_decoder(checkpoint, subject.settings.model, device=subject.device)
    base = LoraBase.described(decoder, find_model(checkpoint.config), "subject", "")
    targets: dict[tuple[int, str], tuple[str, ...]] = {}
    for layer in range(base.num_layers):
        for target in base.targets.values():
            place = (layer, target.linear)
            targets[place] = (*targets.get(place, ()), target.part)
    lora = TrainableLora(decoder, targets, LORA, seed=SEED)
    data = make_examples(subject, STEPS)
    with subject.transformers() as plain:
        peer = _peft_copy(plain, base, lora)
        optimizers = [
            torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
            for parameters in (
                [parameter for _, parameter in lora.parameters()],
                [parameter for parameter in peer.parameters() if parameter.requires_grad],
            )
        ]
        ours, theirs = [], []
        for examples in data:
            micro = MicroStep(decoder, training_ops(decoder.ops), lora, collate(examples, subject.device))
            run_whole(micro, 1 / sum(example.num_trained for example in examples))
            ours.append(micro.score.mean)
            theirs.append(_peft_step(peer, examples, subject.device))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    figures["our losses"], figures["PEFT's"] = ours, theirs
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    figures["largest difference"] = worst
    if not worst <= LOSS[subject.dtype]:
        raise Wrong(f"losses differ by {worst:.3g}, allowed {LOSS[subject.dtype]}")
    if not ours[-1] < ours[0]:
        raise Wrong(f"the loss on the same examples did not fall: {ours}")


def make_examples(subject: Subject, steps: int) -> list[list[Example]]:
    """The same two sequences, of other lengths and partly trained on, for every step."""
    rng = random.Random(SEED)
    examples = []
    for ids in subject.prompts(2, min(128, subject.context // 2)):
        begin = rng.randint(1, len(ids) // 2)
        kept = ids[: rng.randint(len(ids) * 3 // 4, len(ids))]
        examples.append(Example(kept, [place >= begin for place in range(len(kept))]))
    return [examples] * steps


def run_whole(micro: MicroStep, weight: float) -> None:
    """Forward and backward in the largest slices."""
    slices = micro.forward_backward(weight)
    try:
        wanted = next(slices)
        while True:
            wanted = slices.send(wanted.amount)
    except StopIteration:
        return


def _peft_copy(model: Any, base: LoraBase, lora: TrainableLora) -> Any:
    from peft import LoraConfig, get_peft_model

    modules = [name.split(".")[-1] for name in base.targets]
    config = LoraConfig(r=LORA.rank, lora_alpha=int(LORA.alpha), target_modules=modules, task_type="CAUSAL_LM")
    peer: Any = get_peft_model(model, config)
    with torch.no_grad():
        for (layer, linear), parts in lora.layers_of(lora.capture()).items():
            for part in parts:
                module = peer.get_submodule(f"base_model.model.{base.module(layer, linear, part.part)}")
                module.lora_A["default"].weight.copy_(part.a)
                module.lora_B["default"].weight.copy_(part.b)
    return peer.train()


def _peft_step(peer: Any, examples: list[Example], device: torch.device) -> float:
    """Every sequence by itself; the mean over the trained tokens of all."""
    total, trained = 0.0, sum(example.num_trained for example in examples)
    for example in examples:
        ids = torch.tensor([example.token_ids], device=device)
        mask = torch.tensor(example.trained[1:], device=device)
        logits = peer(input_ids=ids).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits, torch.where(mask, ids[0, 1:], -100), reduction="sum", ignore_index=-100
        )
        torch.autograd.backward(loss / trained)
        total += float(loss.detach())
    return total / trained
