"""A call of every op that has a kernel in Triton, with small tensors on the CPU: for `compile_all`."""

import torch

from kernels import Int8GroupWeight, LoraFactors, LoraSegment, LoraTable, PagedRows, cache, quantise_int4, quantise_int8
from kernels.triton.ops import TritonOps
from kernels.triton.training import TritonTrainingOps

CACHES = {torch.float32: [torch.float32], torch.bfloat16: [torch.bfloat16, torch.int8]}
"""Beside activations of a type."""
HEADS, KV, DIM, BLOCKS, BLOCK = 4, 2, 64, 4, 16


def calls(ops: TritonOps, dtype: torch.dtype) -> None:
    layers(ops, dtype)
    linears(ops, dtype)
    for stored in CACHES[dtype]:
        attention(ops, dtype, stored)
    adapters(ops, dtype)
    TritonTrainingOps().linear_cross_entropy(
        torch.zeros(3, 64, dtype=dtype),
        torch.zeros(70, 64, dtype=dtype),
        torch.zeros(3, dtype=torch.int64),
        torch.ones(3),
    )
    ones = torch.ones(2)
    ops.sample(torch.zeros(2, 70), ones.double(), ones, torch.full((2,), 70), ones, torch.zeros(2))


def layers(ops: TritonOps, dtype: torch.dtype) -> None:
    x, weight = torch.zeros(3, 64, dtype=dtype), torch.zeros(64, dtype=dtype)
    ops.rms_norm(x, weight, 1e-5)
    ops.rms_norm_plus_one(x, weight, 1e-5)
    ops.silu_mul(x)
    for tanh in (True, False):
        ops.gelu_mul(x, tanh=tanh)
        ops.gelu(x, tanh=tanh)


def linears(ops: TritonOps, dtype: torch.dtype) -> None:
    values = torch.zeros(48, 64)
    grouped = Int8GroupWeight.of(values, torch.zeros(48, 2))
    for weight in (quantise_int8(values), quantise_int4(values), grouped):
        ops.linear(torch.zeros(3, 64, dtype=dtype), weight, torch.zeros(48, dtype=dtype))


def attention(ops: TritonOps, dtype: torch.dtype, stored: torch.dtype) -> None:
    q, k, v = torch.zeros(3, HEADS + 2 * KV, DIM, dtype=dtype).split([HEADS, KV, KV], dim=1)
    angles = torch.zeros(3, DIM // 2, dtype=dtype)
    keys, values = (torch.zeros(BLOCKS, BLOCK, KV, cache.width(stored, DIM), dtype=stored) for _ in range(2))
    ops.rope_and_cache(q, k, v, angles, angles, keys, values, torch.arange(3))
    rows = PagedRows(torch.arange(3), [1, 2], [5, 0], torch.zeros(2, 1, dtype=torch.int64), BLOCK)
    for window, softcap in ((None, 0.0), (4, 30.0)):
        ops.paged_attention(q, k, v, keys, values, rows, 0.1, window=window, softcap=softcap)


def adapters(ops: TritonOps, dtype: torch.dtype) -> None:
    b = (torch.zeros(32, 4, dtype=dtype), torch.zeros(16, 8, dtype=dtype))
    factors = LoraFactors(torch.zeros(12, 64, dtype=dtype), b, (0, 32), torch.zeros(12, dtype=dtype))
    segments = [LoraSegment(torch.tensor([0, 2]), factors), LoraSegment(torch.tensor([1]), factors)]
    ops.lora_apply(torch.zeros(3, 64, dtype=dtype), torch.zeros(3, 48, dtype=dtype), segments)
    table = LoraTable(torch.zeros(2, 13, dtype=torch.int64), 2, 12, 8, 32, (None, factors))
    x, y = torch.zeros(3, 64, dtype=dtype), torch.zeros(3, 48, dtype=dtype)
    ops.lora_apply_table(x, y, table, torch.tensor([0, 1, 0]))
