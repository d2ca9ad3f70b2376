"""The fused loss against torch's autograd, which sees all logits at once."""

import pytest
import torch

from kernels import quantise_int8
from kernels.training import TrainingOps
from kernels.triton import training_ops
from tests.kernels.triton.backend import DEVICE, REFERENCE, TRAINING, random

PLAIN = training_ops(REFERENCE)


def test_which_ops_there_are() -> None:
    assert TRAINING.fuses_loss(random(2, 4, seed=0))
    assert type(PLAIN) is TrainingOps
    assert not PLAIN.fuses_loss(random(2, 4, seed=0))


@pytest.mark.parametrize(("rows", "vocab"), [(0, 5), (1, 1), (3, 70), (2, 8192 + 11)])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.5, 3.0)])
def test_loss_and_gradient(rows: int, vocab: int, scale: float, softcap: float) -> None:
    hidden, weight = random(rows, 24, seed=1), random(vocab, 24, seed=2)
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    if rows:
        targets[0] = (hidden[0] @ weight.t()).argmax()  # one that is right
    shares = random(rows, 1, seed=4).squeeze(1)
    for head in (weight, quantise_int8(weight)):
        found, expected = (
            ops.linear_cross_entropy(hidden, head, targets, shares, scale=scale, softcap=softcap)
            for ops in (TRAINING, PLAIN)
        )
        assert torch.allclose(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.correct, expected.correct)
        assert found.grad is not None
        assert expected.grad is not None
        assert torch.allclose(found.grad, expected.grad, rtol=1e-4, atol=1e-5)
        scored = TRAINING.linear_cross_entropy(hidden, head, targets, None, scale=scale, softcap=softcap)
        assert scored.grad is None
        assert torch.equal(scored.loss, found.loss)
