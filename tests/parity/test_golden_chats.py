"""Greedy answers of the demo model in int8 and int4 against the ones that were kept (`golden_chats.py` writes them)."""

import json
from pathlib import Path

import pytest

from kernels.cpu import CpuOps
from tests.parity.golden_chats import GOLDEN, QUANTIZATIONS, QUESTIONS, answers

pytestmark = pytest.mark.real_model

MOST_CHANGED = 2
"""Another instruction set rounds otherwise, and so may take another word where two are about as likely."""


@pytest.mark.skipif(CpuOps.unavailable() is not None, reason="the reference attends in another order")
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_answers_are_the_ones_that_were_kept(demo_model: Path, quantization: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[quantization]
    found = dict(zip(QUESTIONS, answers(quantization), strict=True))
    changed = {question: found[question] for question in QUESTIONS if found[question] != golden[question]}
    assert len(changed) <= MOST_CHANGED, changed
    assert "Tokyo" in found[QUESTIONS[0]]
    assert "Red" in found[QUESTIONS[1]]
