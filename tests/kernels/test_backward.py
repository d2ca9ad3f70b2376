"""Backward passes from given gradients: those of torch, to the bit, without what torch imports for them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.training import backward

ROOT = Path(__file__).parents[2]


def outputs() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Leaves, outputs of different shapes and types that share them, and gradients of the outputs."""
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(4, 5, generator=generator, requires_grad=True) for _ in range(2))
    made = [(a * b).tanh(), a.sum(0).exp(), (b @ a.T).to(torch.bfloat16)]
    return [a, b], made, [torch.randn(one.shape, generator=generator).to(one.dtype) for one in made]


def test_gradients_are_those_of_torch() -> None:
    leaves, made, grads = outputs()
    torch.autograd.backward(made, grads)
    expected = [leaf.grad for leaf in leaves]
    leaves, made, grads = outputs()
    backward(made, grads)
    assert all(torch.equal(leaf.grad, one) for leaf, one in zip(leaves, expected, strict=True))
    backward([leaves[0] * 2], [torch.ones(4, 5)])
    assert torch.equal(leaves[0].grad, expected[0] + 2)


def test_a_gradient_of_another_shape_is_refused() -> None:
    _, made, grads = outputs()
    with pytest.raises(ValueError, match=r"shape \[5\] for an output of \[4, 5\]"):
        backward(made[:1], grads[1:2])


def test_training_steps_import_no_sympy(tiny_model: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from tests.trainer.tiny_training import drive, load_decoder, make_run, run_spec\n"
        "decoder, events = load_decoder(pathlib.Path(sys.argv[1])), []\n"
        "drive(make_run(decoder, run_spec(decoder, total_steps=2, save_every=None), events))\n"
        "print(type(events[-1]).__name__, 'sympy' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tiny_model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "FinishedEvent False", done.stderr[-2000:]
