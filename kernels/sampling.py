"""Sampling in plain torch, by inversion: the token at which the distribution function passes a given point.

One uniform number a token, made from the request's seed and the token's position, makes a sample
reproducible; inverting row by row makes it independent of what else is in the batch.
"""

import torch
from torch import Tensor

FIRST_LOOK = 1024
"""Number of the likeliest tokens to sort before all of them; nearly always they hold the nucleus."""


def sample(logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """See `kernels.interface.Ops.sample`."""
    logits = logits / temperature.unsqueeze(1)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    # The choice between the two ways depends on a row's own parameters only, never on its neighbours.
    filtered = (top_k < logits.shape[1]) | (top_p < 1.0) | (min_p > 0.0)
    if bool((~filtered).any()):
        free = ~filtered
        tokens[free] = _invert(logits[free].softmax(-1), uniform[free])
    if bool(filtered.any()):
        tokens[filtered] = _sample_filtered(
            logits[filtered], uniform[filtered], top_k[filtered], top_p[filtered], min_p[filtered]
        )
    return tokens


def _sample_filtered(logits: Tensor, uniform: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    vocab = logits.shape[1]
    log_total = logits.logsumexp(-1, keepdim=True)
    values, ids = logits.topk(min(FIRST_LOOK, vocab), dim=-1)
    weights, complete = _keep((values - log_total).exp(), vocab, top_k, top_p, min_p)
    chosen = ids.gather(1, _invert(weights, uniform).unsqueeze(1)).squeeze(1)
    if not bool(complete.all()):
        rest = ~complete
        values, ids = logits[rest].sort(dim=-1, descending=True)
        weights, _ = _keep((values - log_total[rest]).exp(), vocab, top_k[rest], top_p[rest], min_p[rest])
        chosen[rest] = ids.gather(1, _invert(weights, uniform[rest]).unsqueeze(1)).squeeze(1)
    return chosen


def _keep(probs: Tensor, vocab: int, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """Zero what the filters drop, and return for each row True if nothing beyond these columns could be kept.

    probs [R, n]: the n likeliest of `vocab` tokens in descending order, as shares of the whole.
    """
    rank = torch.arange(probs.shape[1], device=probs.device)
    passed = (probs >= min_p.unsqueeze(1) * probs[:, :1]) & (rank < top_k.unsqueeze(1))
    weights = probs * passed
    # top_p is a share of what min_p and top_k left, which without those two is everything.
    limited = (top_k < vocab) | (min_p > 0)
    mass = torch.where(limited, weights.sum(-1), 1.0)
    before = weights.cumsum(-1) - weights
    weights = weights * ((before < (top_p * mass).unsqueeze(1)) | (rank == 0))
    all_seen = torch.full_like(limited, probs.shape[1] == vocab)
    cut = torch.where(limited, ~passed[:, -1], weights[:, -1] == 0)
    return weights, all_seen | cut


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The index whose share of the row's mass covers `uniform`. weights [R, n] ≥ 0, not normalised."""
    cumulative = weights.double().cumsum(-1)
    point = (uniform * cumulative[:, -1]).unsqueeze(1)
    index = torch.searchsorted(cumulative, point, right=True).squeeze(1)
    # The point can round up to the total: then the last index that has any weight is meant.
    last = weights.shape[1] - 1 - (weights.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(index, last)
