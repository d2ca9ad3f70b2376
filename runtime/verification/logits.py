"""What a model computes here against what transformers computes from the same checkpoint, in float32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import QuantisedWeight
from runtime.verification.report import Check
from runtime.workers.attention import PackedAttention
from runtime.workers.loading import Checkpoint
from runtime.workers.model import Model

PROMPTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "1, 2, 3, 4, 5,",
    "A young newt is called an eft. When the rain comes in spring, thousands of them cross the road at night;",
)
TOKENS = 16
"""Greedy ones after each prompt."""
EXACT, ROUNDED = 1e-3, 0.1
"""How far logits may be apart, as a share of their spread: at most, of floats; and in the root mean square, of weights
in integers, whose activations are rounded to a byte too. What is wrong is off by a whole spread and more."""

Logits = Callable[[list[int]], Tensor]
"""Token ids [T] → logits [T, vocab]."""


def ours(model: Model) -> Logits:
    def logits(ids: list[int]) -> Tensor:
        positions = torch.arange(len(ids), device=model.device)
        attention = PackedAttention(model.ops, [len(ids)], model.spec)
        with torch.inference_mode():
            token_ids = torch.tensor(ids, device=model.device)
            return model.logits(model.forward(token_ids, positions, attention)).cpu()

    return logits


def transformers_logits(checkpoint: Checkpoint) -> Logits:
    """A directory of floats transformers loads itself; of other formats it gets the tensors as we read them."""
    model = _load(checkpoint)

    def logits(ids: list[int]) -> Tensor:
        with torch.inference_mode():
            found: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0].float()
        return found

    return logits


def _load(checkpoint: Checkpoint) -> Any:
    import transformers

    plain = checkpoint.source.is_dir() and not checkpoint.config.get("quantization_config")
    if plain:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.source, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
        )
        return model.eval()
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    kind = getattr(transformers, config["architectures"][0])
    model = kind._from_config(kind.config_class(**config), attn_implementation="eager").float().eval()
    tensors = {
        name: value.dequantise() if isinstance(value, QuantisedWeight) else value.float()
        for name, value in checkpoint.tensors()
    }
    told = model.load_state_dict(tensors, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if lacking := [name for name in told.missing_keys if name not in tied]:
        raise ValueError(f"transformers has {len(lacking)} weights under other names, such as {lacking[0]}")
    model.tie_weights()
    return model


def compare(prompts: list[list[int]], mine: list[Tensor], theirs: Logits, *, integers: bool) -> list[Check]:
    """`prompts` with our greedy tokens after them, and our logits of these ids."""
    apart, typical, spread, wrong, checked = 0.0, 0.0, 0.0, [], 0
    for number, (ids, own) in enumerate(zip(prompts, mine, strict=True), 1):
        expected = theirs(ids)
        difference = float((own - expected).abs().max())
        apart, spread = max(apart, difference), max(spread, float(expected.std()))
        typical = max(typical, float((own - expected).square().mean().sqrt()))
        for place in range(len(ids) - TOKENS - 1, len(ids) - 1):
            best = expected[place].topk(2)
            checked += 1
            if ids[place + 1] != int(best.indices[0]):
                margin = float(best.values[0] - best.values[1])
                wrong.append((number, place + 1, margin, margin > 2 * difference))
                break
    limit = (ROUNDED if integers else EXACT) * max(spread, 1e-6)
    found = f"{typical:.2g} apart in the root mean square" if integers else f"at most {apart:.2g} apart"
    said = f"{found}, of a spread of {spread:.3g} (limit {limit:.2g})"
    return [Check("logits", said, (typical if integers else apart) <= limit), _tokens(checked, wrong)]


def _tokens(checked: int, wrong: list[tuple[int, int, float, bool]]) -> Check:
    if not wrong:
        return Check("greedy tokens", f"all {checked} equal")
    number, place, margin, clear = next((one for one in wrong if one[3]), wrong[0])
    why = "" if clear else f": two tokens were {margin:.2g} apart, less than rounding"
    return Check("greedy tokens", f"prompt {number} differs at token {place}{why}", ok=not clear)


def greedy(logits: Logits, ids: list[int]) -> list[int]:
    """`ids` and the greedy tokens after them."""
    ids = list(ids)
    for _ in range(TOKENS):
        ids.append(int(logits(ids)[-1].argmax()))
    return ids
