"""The reference ops against the plain formulas, and paged attention against attention without pages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from runtime.messages import Row
from runtime.workers.batch import build_batch

OPS = kernels.load("reference")
BLOCK = 4


def naive_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None = None, softcap: float = 0.0
) -> torch.Tensor:
    """Causal attention of the last len(q) positions over all of k, or the last `window` of them, head by head."""
    groups = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        for i in range(len(q)):
            seen = len(k) - len(q) + i + 1
            seen_from = 0 if window is None else max(0, seen - window)
            scores = k[seen_from:seen, head // groups] @ q[i, head] * scale
            weights = (softcap * torch.tanh(scores / softcap) if softcap else scores).softmax(-1)
            out[i, head] = weights @ v[seen_from:seen, head // groups]
    return out


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=6),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    seed=st.integers(0, 2**16),
    window=st.sampled_from([None, 1, 5, 100]),
    softcap=st.sampled_from([0.0, 0.5]),
)
def test_paged_attention_equals_attention_without_pages(
    rows: list[tuple[int, int]], heads: tuple[int, int], seed: int, window: int | None, softcap: float
) -> None:
    """Mixed batches of decode and chunks, over blocks in random order, of a cache full of old numbers."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv = heads
    total_blocks = sum(-(-(start + count) // BLOCK) for start, count in rows) + 3
    order = iter(torch.randperm(total_blocks, generator=generator).tolist())
    cache = [torch.randn(total_blocks, BLOCK, num_kv, 8, generator=generator) for _ in range(2)]
    tables = torch.zeros(len(rows), 16, dtype=torch.int64).numpy()
    tokens: dict[int, list[int]] = {}
    expected, q_of, k_of, v_of = {}, {}, {}, {}
    for slot, (start, count) in enumerate(rows):
        blocks = [next(order) for _ in range(-(-(start + count) // BLOCK))]
        tables[slot, : len(blocks)] = blocks
        tokens[slot] = list(range(start + count))
        keys, values = (torch.randn(start + count, num_kv, 8, generator=generator) for _ in range(2))
        q_of[slot] = torch.randn(count, num_heads, 8, generator=generator)
        for position in range(start):
            cache[0][blocks[position // BLOCK], position % BLOCK] = keys[position]
            cache[1][blocks[position // BLOCK], position % BLOCK] = values[position]
        k_of[slot], v_of[slot] = keys[start:], values[start:]
        expected[slot] = naive_attention(q_of[slot], keys, values, 0.3, window, softcap)
    plan = [Row(slot=s, start=a, count=n, sample=True, new_blocks=[]) for s, (a, n) in enumerate(rows)]
    batch = build_batch(plan, tokens, tables, BLOCK, torch.device("cpu"))
    q, k, v = (torch.cat([part[slot] for slot in batch.slots]) for part in (q_of, k_of, v_of))
    half = torch.zeros(len(q), 4)
    OPS.rope_and_cache(q, k, v, half + 1, half, cache[0], cache[1], batch.paged.slots)  # angle 0: no rotation
    found = OPS.paged_attention(q, k, v, cache[0], cache[1], batch.paged, 0.3, window=window, softcap=softcap)
    assert torch.allclose(found, torch.cat([expected[slot] for slot in batch.slots]), atol=1e-5)


@pytest.mark.parametrize(("window", "softcap"), [(None, 0.0), (2, 0.0), (None, 0.4), (3, 0.4)])
def test_packed_attention_does_not_look_across_sequences(window: int | None, softcap: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(9, 4, 8, generator=generator)
    k, v = (torch.randn(9, 2, 8, generator=generator) for _ in range(2))
    found = OPS.packed_attention(q, k, v, [4, 5], 0.2, window=window, softcap=softcap)
    parts = (slice(4), slice(4, 9))
    expected = torch.cat([naive_attention(q[part], k[part], v[part], 0.2, window, softcap) for part in parts])
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_activation_follow_their_formulas(dtype: torch.dtype) -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = torch.linspace(0.5, 1.5, 16).to(dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    wide = x.double()
    norm = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert torch.allclose(OPS.rms_norm(x, weight, 1e-5).double(), norm, atol=tolerance)
    gate, up = wide[:, :8], wide[:, 8:]
    assert torch.allclose(OPS.silu_mul(x).double(), gate / (1 + (-gate).exp()) * up, atol=tolerance)


def test_rope_keeps_lengths_and_turns_by_the_position() -> None:
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(2))
    angles = torch.outer(torch.arange(3.0), torch.tensor([1.0, 0.5, 0.25, 0.125]))
    turned = OPS.rope(x, angles.cos(), angles.sin())
    assert torch.allclose(turned[0], x[0])
    as_complex = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angles).unsqueeze(1)
    assert torch.allclose(turned, torch.cat((as_complex.real, as_complex.imag), -1), atol=1e-6)


def test_rope_turns_only_the_first_dimensions() -> None:
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(2))
    angles = torch.outer(torch.arange(3.0), torch.tensor([1.0, 0.5]))
    turned = OPS.rope(x, angles.cos(), angles.sin())
    torch.testing.assert_close(turned[..., :4], OPS.rope(x[..., :4], angles.cos(), angles.sin()))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(OPS.rope(x, torch.empty(3, 0), torch.empty(3, 0)), x)


def test_a_token_goes_through_its_experts_and_no_other() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 6, generator=generator)
    gate_up, down = torch.randn(3, 10, 6, generator=generator), torch.randn(3, 6, 5, generator=generator)
    chosen, shares = torch.tensor([[0, 2], [2, 0], [1, 2], [1, 0]]), torch.rand(4, 2, generator=generator)
    found = OPS.moe(x, chosen, shares, gate_up, down)
    for token in range(4):
        expected = torch.zeros(6)
        for expert, share in zip(chosen[token].tolist(), shares[token], strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            expected += share * (down[expert] @ (gate / (1 + (-gate).exp()) * up))
        torch.testing.assert_close(found[token], expected)


def test_unknown_backend_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"abacus.*reference"):
        kernels.load("abacus")
