"""The loss where one op goes from hidden states to losses and their gradient, and keeps no logits.

On a GPU a slice is one call over some rows, which reads the vocabulary's weights three times. With fewer than
`LEAST_ROWS` that takes longer than computing with them; with more than `MOST_ROWS` the op's own chunk of logits grows
large (64 MiB in bfloat16). Between them `Pacer` cuts to what requests allow. By arithmetic, not measured: the least
rows, with a vocabulary of 128k and a hidden size of 4096, are 0.8 TFLOP, a millisecond or two of an H100.
"""

import torch
from torch import Tensor

from kernels.training import TrainingOps
from runtime.trainer.loss import Score
from runtime.workers.decoder import Decoder

LEAST_ROWS, MOST_ROWS = 256, 4096


def fuses(decoder: Decoder, ops: TrainingOps, hidden: Tensor) -> bool:
    """Whether the op takes these hidden states, and this rank has the whole vocabulary."""
    return decoder.group.size == 1 and ops.fuses_loss(hidden)


def fused_cross_entropy(
    decoder: Decoder, ops: TrainingOps, hidden: Tensor, targets: Tensor, weight: float | None
) -> tuple[Score, Tensor | None]:
    """hidden [R, hidden] before the final norm, targets [R] token ids → the rows' score; and with a `weight` the
    gradient of `weight` times the summed loss, [R, hidden]. What `loss.Vocabulary` gives in parts."""
    leaf = hidden.detach().requires_grad_(weight is not None)
    with torch.set_grad_enabled(weight is not None):
        above = decoder.norm(ops, leaf)
    spec = decoder.spec
    found = ops.linear_cross_entropy(
        above.detach(), decoder.head, targets, weight, scale=spec.logit_scale, softcap=spec.logit_softcap
    )
    score = Score(float(found.loss.double().sum()), int(found.correct.sum()), len(targets))
    if found.grad is None:
        return score, None
    above.backward(found.grad)  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return score, leaf.grad
