"""Masks of grammars on logits: the form for a CPU and the packed one for other devices, for all rows and for some."""

import math

import numpy as np
import pytest
import torch

from runtime.workers.grammar_masks import Masks

VOCAB = 37


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("indices", [[0, 1, 2, 3], [2, 0], [3]])
def test_banned_tokens_get_no_probability(packed: bool, indices: list[int]) -> None:
    allowed = np.random.default_rng(0).integers(0, 2, (len(indices), VOCAB))
    bits = np.packbits(np.pad(allowed, ((0, 0), (0, 64 - VOCAB))).astype(np.uint8), axis=1, bitorder="little")
    banned = None if packed else torch.from_numpy(allowed == 0)
    masks = Masks(indices=indices, bits=bits, banned=banned, vocab_size=VOCAB)
    logits = torch.randn(4, VOCAB)
    expected = logits.clone()
    for row, index in enumerate(indices):
        for token in range(VOCAB):
            if not allowed[row][token]:
                expected[index, token] = -math.inf
    masks.apply(logits)
    assert torch.equal(logits, expected)


def test_no_masks_change_nothing() -> None:
    logits = torch.randn(2, VOCAB)
    expected = logits.clone()
    Masks(vocab_size=VOCAB).apply(logits)
    assert torch.equal(logits, expected)
