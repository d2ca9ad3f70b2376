"""Sampling without sorting: one program a row looks for the token at which the distribution function passes a point.

A probability's bits, read as an integer, are in the order of the probabilities. So the order from the likeliest token
on is searched bit by bit: the largest key for which the tokens of at least that key hold more than the point. Tokens of
one probability are taken in the order of their ids. top_k and top_p cut that order off, which is the same search.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import rows

BLOCK = 1024


@triton.jit
def _temper(logits, stride, temperature, probs, vocab, BLOCK: tl.constexpr):
    """One row's probabilities."""
    row = tl.program_id(0).to(tl.int64)
    inverse = tl.load(temperature + row)
    at = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, vocab, BLOCK):
        x = tl.load(logits + row * stride + first + at, mask=first + at < vocab, other=float("-inf"))
        most = tl.maximum(most, tl.div_rn(x, tl.zeros([BLOCK], tl.float32) + inverse))
    best = tl.max(most, axis=0)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocab, BLOCK):
        x = tl.load(logits + row * stride + first + at, mask=first + at < vocab, other=float("-inf"))
        total += tl.exp(tl.div_rn(x, tl.zeros([BLOCK], tl.float32) + inverse) - best)
    log_total = best + tl.log(tl.sum(total, axis=0))
    for first in range(0, vocab, BLOCK):
        x = tl.load(logits + row * stride + first + at, mask=first + at < vocab, other=float("-inf"))
        found = tl.exp(tl.div_rn(x, tl.zeros([BLOCK], tl.float32) + inverse) - log_total)
        tl.store(probs + row * vocab + first + at, found, mask=first + at < vocab)


@triton.jit
def _from(probs, vocab, key, BLOCK: tl.constexpr):
    """Mass (float64) and number of the tokens whose key is at least `key`, which is above 0."""
    at = tl.arange(0, BLOCK)
    mass = tl.full([], 0.0, tl.float64)
    count = tl.full([], 0, tl.int32)
    for first in range(0, vocab, BLOCK):
        p = tl.load(probs + first + at, mask=first + at < vocab, other=0.0)
        counted = p.to(tl.int32, bitcast=True) >= key
        mass += tl.sum(tl.where(counted, p, 0.0).to(tl.float64), axis=0)
        count += tl.sum(counted.to(tl.int32), axis=0)
    return mass, count


@triton.jit
def _key_at_rank(probs, vocab, rank, BLOCK: tl.constexpr):
    """The largest key that at least `rank` tokens reach; 0 when fewer have a probability above 0."""
    key = tl.full([], 0, tl.int32)
    for bit in range(30, -1, -1):
        tried = key + (tl.full([], 1, tl.int32) << bit)
        _, count = _from(probs, vocab, tried, BLOCK)
        key = tl.where(count >= rank, tried, key)
    return key


@triton.jit
def _key_at_mass(probs, vocab, point, reached, BLOCK: tl.constexpr):
    """The largest key whose tokens and the likelier ones hold more than `point`, or with `reached` at least that."""
    key = tl.full([], 0, tl.int32)
    for bit in range(30, -1, -1):
        tried = key + (tl.full([], 1, tl.int32) << bit)
        mass, _ = _from(probs, vocab, tried, BLOCK)
        key = tl.where((mass > point) | (reached & (mass >= point)), tried, key)
    return key


@triton.jit
def _value(key):
    return key.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _nth(probs, vocab, key, nth, BLOCK: tl.constexpr):
    """The id of the token number `nth` (from 0) among those of the key."""
    at = tl.arange(0, BLOCK)
    passed = tl.full([], 0, tl.int32)
    found = tl.full([], 0, tl.int32)
    for first in range(0, vocab, BLOCK):
        p = tl.load(probs + first + at, mask=first + at < vocab, other=-1.0)
        equal = (p.to(tl.int32, bitcast=True) == key).to(tl.int32)
        number = passed + tl.cumsum(equal, axis=0)
        found += tl.sum(tl.where((equal > 0) & (number == nth + 1), first + at, 0), axis=0)
        passed += tl.sum(equal, axis=0)
    return found


@triton.jit
def _in_order_of_ids(probs, vocab, uniform, BLOCK: tl.constexpr):
    """Without filters: the first token by id at which the distribution function is above the point."""
    at = tl.arange(0, BLOCK)
    total = tl.full([], 0.0, tl.float64)
    for first in range(0, vocab, BLOCK):
        p = tl.load(probs + first + at, mask=first + at < vocab, other=0.0)
        total += tl.sum(p.to(tl.float64), axis=0)
    point = uniform * total
    before = tl.full([], 0.0, tl.float64)
    index = tl.full([], 0, tl.int32)
    last = tl.full([], 0, tl.int32)
    for first in range(0, vocab, BLOCK):
        p = tl.load(probs + first + at, mask=first + at < vocab, other=0.0)
        reached = before + tl.cumsum(p.to(tl.float64), axis=0)
        index += tl.sum(((reached <= point) & (first + at < vocab)).to(tl.int32), axis=0)
        last = tl.maximum(last, tl.max(tl.where(p > 0.0, first + at, 0), axis=0))
        before += tl.sum(p.to(tl.float64), axis=0)
    # The point can round up to the total: then the last token that has any probability is meant.
    return tl.minimum(index, last)


@triton.jit
def _filtered(probs, vocab, uniform, top_k, top_p, min_p, BLOCK: tl.constexpr):
    """With filters. They leave every token above `end`, and the first `ties` of the tokens with that key."""
    top = _key_at_rank(probs, vocab, 1, BLOCK)
    least = tl.maximum((min_p * top.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True), 1)
    kept, count = _from(probs, vocab, least, BLOCK)
    limited = (top_k < vocab) | (min_p > 0.0)
    end, ties = least - 1, tl.full([], 0, tl.int32)
    if top_k < count:
        end = _key_at_rank(probs, vocab, top_k, BLOCK)
        above, more = _from(probs, vocab, end + 1, BLOCK)
        ties = (top_k - more).to(tl.int32)
        kept = above + ties * _value(end)
    if top_p < 1.0:
        share = top_p.to(tl.float64) * tl.where(limited, kept, 1.0)
        if share < kept:
            end = _key_at_mass(probs, vocab, share, True, BLOCK)
            above, _ = _from(probs, vocab, end + 1, BLOCK)
            ties = tl.maximum(tl.ceil((share - above) / _value(end)), 1.0).to(tl.int32)
            kept = above + ties * _value(end)
    point = uniform * kept
    key = tl.maximum(_key_at_mass(probs, vocab, point, False, BLOCK), tl.where(ties > 0, end, end + 1))
    above, more = _from(probs, vocab, key + 1, BLOCK)
    _, all_of_them = _from(probs, vocab, key, BLOCK)
    available = tl.where((key == end) & (ties > 0), ties, all_of_them - more)
    nth = tl.maximum((point - above) / _value(key), 0.0).to(tl.int32)
    return _nth(probs, vocab, key, tl.maximum(tl.minimum(nth, available - 1), 0), BLOCK)


@triton.jit
def _sample(probs, uniform, top_k, top_p, min_p, tokens, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    u, k, p, m = tl.load(uniform + row), tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    mine = probs + row * vocab
    if (k < vocab) | (p < 1.0) | (m > 0.0):
        tl.store(tokens + row, _filtered(mine, vocab, u, k, p, m, BLOCK).to(tl.int64))
    else:
        tl.store(tokens + row, _in_order_of_ids(mine, vocab, u, BLOCK).to(tl.int64))


def sample(logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """`Ops.sample`."""
    logits = rows(logits)
    count, vocab = logits.shape
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    if count:
        probs = torch.empty(count, vocab, device=logits.device)
        _temper[(count,)](logits, logits.stride(0), temperature, probs, vocab, BLOCK=BLOCK, enable_fp_fusion=False)
        _sample[(count,)](probs, uniform, top_k, top_p, min_p, tokens, vocab, BLOCK=BLOCK, enable_fp_fusion=False)
    return tokens
