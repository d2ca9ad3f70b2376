"""Every rope scaling against transformers' ROPE_INIT_FUNCTIONS: the same frequencies and factor, at every length."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from runtime.model.rope import SCALINGS, RopeSpec

HEAD_DIM, CONTEXT = 32, 256
HALF = [1.0 + 0.25 * i for i in range(HEAD_DIM // 2)]
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, betas": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "yarn, mscale": {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, attention": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.25},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": HALF,
        "long_factor": [2 * one for one in HALF],
        "original_max_position_embeddings": 64,
    },
    "longrope, attention": {
        "rope_type": "longrope",
        "short_factor": HALF,
        "long_factor": HALF[::-1],
        "original_max_position_embeddings": 64,
        "factor": 2.0,
        "attention_factor": 1.5,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("max_len", [32, CONTEXT, 4 * CONTEXT])
@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("name", KINDS)
def test_frequencies_equal_transformers(name: str, partial: float, max_len: int) -> None:
    given = {"rope_theta": 50000.0, "partial_rotary_factor": partial, **KINDS[name]}
    for key in ("short_factor", "long_factor"):
        if key in given:
            given[key] = given[key][: int(HEAD_DIM * partial) // 2]
    shape = {"hidden_size": 4 * HEAD_DIM, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
    config = LlamaConfig(**shape, rope_parameters=dict(given))
    expected, factor = ROPE_INIT_FUNCTIONS[given["rope_type"]](config, torch.device("cpu"), seq_len=max_len)
    found, ours = RopeSpec.from_config({**shape, "rope_parameters": given}).frequencies(HEAD_DIM, max_len)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert ours == pytest.approx(factor, rel=1e-6)


def test_every_scaling_is_compared() -> None:
    assert {given["rope_type"] for given in KINDS.values()} == set(SCALINGS) - {"default"}


def test_a_stretched_context_can_be_asked_for() -> None:
    config = {"max_position_embeddings": 1000, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert RopeSpec.from_config(config).reach == 4000
    assert RopeSpec.from_config({"max_position_embeddings": 1000}).reach == 0


def test_longrope_needs_a_divisor_for_every_frequency() -> None:
    rope = RopeSpec(rope_type="longrope", short_factor=(1.0, 2.0), long_factor=(1.0,), original_max_position=64)
    with pytest.raises(ValueError, match=r"short_factor has 2 values, and there are 16"):
        rope.frequencies(HEAD_DIM, 32)
