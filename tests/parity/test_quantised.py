"""The demo model in integers: close to float32 on text that Python ships with."""

import pydoc_data.topics
from pathlib import Path

import pytest
import torch

from runtime.checkpoints import open_checkpoint
from runtime.model.attention import PackedAttention
from runtime.model.decoder import Decoder
from tests.parity.conftest import QuantisedDemo

pytestmark = pytest.mark.real_model
TOPICS = sorted(pydoc_data.topics.topics)[::4]
"""Twenty of them, 4,371 tokens: with four, chance was half of the difference."""


def perplexity(model: Path, decoder: Decoder) -> float:
    tokenizer = open_checkpoint(str(model)).tokenizer
    losses = []
    with torch.inference_mode():
        for topic in TOPICS:
            ids = torch.tensor(tokenizer.encode(pydoc_data.topics.topics[topic])[:256])
            attention = PackedAttention(decoder.ops, [len(ids)], decoder.spec)
            hidden = decoder.forward(ids, torch.arange(len(ids)), attention)
            logits = decoder.logits(hidden[:-1])
            losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    return float(torch.cat(losses).mean().exp())


@pytest.fixture(scope="module")
def exact(demo_model: Path, quantised_demo: QuantisedDemo) -> float:
    return perplexity(demo_model, quantised_demo("none"))


@pytest.mark.parametrize(("quantization", "most"), [("int8", 0.01), ("int4", 0.06)])
def test_perplexity_stays_near_float32s(
    demo_model: Path, quantised_demo: QuantisedDemo, exact: float, quantization: str, most: float
) -> None:
    assert abs(perplexity(demo_model, quantised_demo(quantization)) / exact - 1) < most
