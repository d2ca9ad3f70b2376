"""DoRA (arXiv:2402.09353): each output of W + scale * B A is brought to a magnitude of its own.

y = m / n * (W x + scale * B A x) + bias, where n is the norm of each row of W + scale * B A and m the magnitude, as in
PEFT. In training n counts as a constant.
"""

import torch
from torch import Tensor

from kernels import OutputFactors
from runtime.model.layers import Linear
from runtime.model.lora import LoraPart

ROWS = 1024
"""Rows of a weight in floating point at once."""


def row_norms(linear: Linear, part: str, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Norms of the rows of W + scale * B A for the held outputs of a part, [held out] float32. a [rank, held in], b
    [held out, rank], both float32 on the linear's device. Ranks that split the inputs call this together."""
    start, squares = linear.weight.starts[part], torch.empty(len(b), device=b.device)
    for first in range(0, len(b), ROWS):
        some = b[first : first + ROWS]
        rows = linear.weight.rows(start + first, start + first + len(some))
        squares[first : first + ROWS] = torch.addmm(rows, some, a, alpha=scale).square_().sum(1)
    if not linear.inputs.is_whole:
        squares = linear.group.all_reduce(squares)
    return squares.sqrt_()


def output_factors(linear: Linear, parts: list[LoraPart], device: torch.device) -> tuple[OutputFactors, list[LoraPart]]:
    """The factors of a linear's outputs under an adapter with magnitudes, 1 for parts that it leaves alone, and the
    adapter's parts with these factors in B."""
    excess = torch.zeros(sum(split.size for split in linear.outputs.values()), device=device)
    scaled = []
    for part in parts:
        assert part.magnitude is not None
        a, b = (factor.to(device) for factor in linear.lora(part.part, part.a, part.b))
        held = linear.outputs[part.part]
        norms = row_norms(linear, part.part, a, b, part.scale)
        factor = held.pick(part.magnitude).to(device) / norms
        start = linear.weight.starts[part.part]
        excess[start : start + held.size] = factor - 1
        whole = torch.zeros(held.full, device=device)
        held.put(whole, factor)
        scaled.append(LoraPart(part.part, part.a, part.b * whole.unsqueeze(1).to(part.b.device), part.scale))
    bias = linear.adapted_bias
    return OutputFactors(excess, None if bias is None else bias.float()), scaled
