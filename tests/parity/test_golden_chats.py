"""Greedy answers of the demo model in int8 and int4 that were kept (`golden_chats.py` writes them, people read them).

Which of two words that are about as likely comes first is decided by the last bits, so by the instruction set. What is
tested therefore: every word of the answers kept is still the likeliest, or nearly so.
"""

import json
from pathlib import Path

import pytest
import torch

from kernels.cpu import CpuOps
from runtime.checkpoints import open_checkpoint
from runtime.model.attention import PackedAttention
from tests.parity.conftest import QuantisedDemo
from tests.parity.golden_chats import GOLDEN, QUANTIZATIONS, QUESTIONS, TOKENS, answers

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(CpuOps.unavailable() is not None, reason="made with the C++ ops"),
]

NEARLY, MEAN = 1.0, 0.05
"""How far a word's logit may lie below the largest: one, and all of them on average. Logits here are about 20."""


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def quantization(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_answers_kept_are_still_the_likeliest(
    demo_model: Path, quantised_demo: QuantisedDemo, quantization: str
) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[quantization]
    assert list(golden) == list(QUESTIONS)
    tokenizer, decoder = open_checkpoint(str(demo_model)).tokenizer, quantised_demo(quantization)
    below = []
    for question, answer in golden.items():
        prompt = tokenizer.encode_chat([{"role": "user", "content": question}])
        kept = tokenizer.encode(answer.rstrip(), add_special_tokens=False)
        assert 5 <= len(kept) <= TOKENS
        ids = torch.tensor([*prompt, *kept])
        with torch.inference_mode():
            attention = PackedAttention(decoder.ops, [len(ids)], decoder.spec)
            hidden = decoder.forward(ids, torch.arange(len(ids)), attention)
            logits = decoder.logits(hidden[len(prompt) - 1 : -1])
        below.append(logits.amax(1) - logits.gather(1, ids[len(prompt) :, None]).squeeze(1))
    differences = torch.cat(below)
    assert float(differences.max()) < NEARLY, [[round(float(one), 2) for one in some] for some in below]
    assert float(differences.mean()) < MEAN


def test_answers_make_sense(quantization: str) -> None:
    found = answers(quantization)
    assert "Tokyo" in found[0]
    assert "Red" in found[1]
