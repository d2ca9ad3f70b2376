"""Our decoder against transformers' LlamaForCausalLM: same weights, same logits, same gradients."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.checkpoints import open_checkpoint
from runtime.model.attention import PackedAttention
from runtime.model.decoder import Decoder
from runtime.model.families import find_model
from tests.parity.llama import VARIANTS, load
from tests.tiny import make_tiny_llama


def logits_of(decoder: Decoder, sequences: list[Tensor]) -> Tensor:
    """Packed, without a cache, as training runs it: [T, vocab]."""
    positions = torch.cat([torch.arange(len(ids)) for ids in sequences])
    attention = PackedAttention(decoder.ops, [len(ids) for ids in sequences], decoder.spec)
    return decoder.logits(decoder.forward(torch.cat(sequences), positions, attention))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    decoder, oracle = load(make_tiny_llama(tmp_path / "model", **VARIANTS[name]))
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 512, (length,), generator=generator) for length in (1, 7, 130)]
    with torch.no_grad():
        ours = logits_of(decoder, sequences).split([len(ids) for ids in sequences])
        for ids, logits in zip(sequences, ours, strict=True):
            expected = oracle(ids.unsqueeze(0)).logits[0]
            assert (logits - expected).abs().max() < 1e-3


def test_bfloat16_is_as_near_to_float32_as_transformers_is(tiny_model: Path) -> None:
    decoder, oracle = load(tiny_model, torch.bfloat16)
    exact, _ = load(tiny_model)
    ids = torch.randint(0, 512, (60,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        truth = logits_of(exact, [ids])
        theirs = (oracle(ids.unsqueeze(0)).logits[0].float() - truth).abs().mean()
        ours = (logits_of(decoder, [ids]) - truth).abs().mean()
    assert ours <= 1.25 * theirs
    assert ours > 0  # it did run in bfloat16


def test_input_gradients_equal_transformers(tiny_model: Path) -> None:
    """The same layers serve and train: the gradient that reaches the embeddings is transformers'."""
    decoder, oracle = load(tiny_model)
    ids = torch.randint(0, 512, (40,), generator=torch.Generator().manual_seed(2))
    ours = decoder.embedding.weight.data.requires_grad_(True)
    torch.nn.functional.cross_entropy(logits_of(decoder, [ids])[:-1], ids[1:]).backward()
    oracle(ids.unsqueeze(0), labels=ids.unsqueeze(0)).loss.backward()
    expected = oracle.get_input_embeddings().weight.grad
    assert ours.grad is not None
    assert torch.allclose(ours.grad, expected, atol=1e-5)
    assert expected.abs().max() > 1e-3  # the comparison is not one of zeros


def test_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"NewtForCausalLM.*LlamaForCausalLM"):
        find_model({"architectures": ["NewtForCausalLM"]})


def test_unknown_rope_scaling_is_refused(tiny_model: Path) -> None:
    config = open_checkpoint(str(tiny_model)).config | {
        "rope_scaling": {"rope_type": "spiral"},
        "rope_parameters": None,
    }
    with pytest.raises(ValueError, match=r"spiral.*linear"):
        find_model(config).spec(config)
