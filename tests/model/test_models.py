"""The registry of architectures, and a plugin that adds one: installed, found, loaded, served."""

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from runtime import LLM, SamplingParams
from runtime.model.families import REGISTRY, find_model, plugins, supported
from runtime.model.spec import LINEARS
from tests.tiny import make_tiny_tokenizer

PLUGIN = Path(__file__).parent.parent / "plugin"
HIDDEN, HEADS, GROUPS, DIM, INNER, VOCAB = 32, 4, 2, 8, 48, 512


def install(site: Path, name: str, entries: str) -> None:
    """What pip would write for a package: its metadata, with the entry points of its pyproject.toml."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[eft.models]\n{entries}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, with the example plugin in it."""
    group = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]["entry-points"]["eft.models"]
    install(tmp_path / "site", "newt_model", "\n".join(f"{name} = {value}" for name, value in group.items()))
    monkeypatch.syspath_prepend(str(PLUGIN))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield tmp_path / "site"
    sys.modules.pop("newt_model", None)


def newt_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"spawn.weight": (VOCAB, HIDDEN), "shore.weight": (HIDDEN,)}
    for layer in range(2):
        shapes |= {
            f"pond.{layer}.{name}.weight": shape
            for name, shape in {
                "swim": ((HEADS + 2 * GROUPS) * DIM, HIDDEN),
                "rest": (HIDDEN, HEADS * DIM),
                "gate": (INNER, HIDDEN),
                "up": (INNER, HIDDEN),
                "down": (HIDDEN, INNER),
                "norm": (HIDDEN,),
            }.items()
        }
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def newt_logits(weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """The architecture written out once more, plainly: logits of the last token."""

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (HIDDEN,), weight, 1e-6)

    def turned(x: Tensor) -> Tensor:  # [heads, T, DIM]: the first half of every head is turned
        angles = torch.outer(torch.arange(len(ids)).float(), 10000.0 ** -(torch.arange(0, DIM // 2, 2) / (DIM // 2)))
        as_complex = torch.complex(x[..., : DIM // 4], x[..., DIM // 4 : DIM // 2]) * torch.exp(1j * angles)
        return torch.cat((as_complex.real, as_complex.imag, x[..., DIM // 2 :]), -1)

    hidden = weights["spawn.weight"][ids]
    for layer in range(2):
        w = {name: weights[f"pond.{layer}.{name}.weight"] for name in ("swim", "rest", "gate", "up", "down", "norm")}
        x = normed(hidden, w["norm"])
        by_group = (x @ w["swim"].T).view(len(ids), GROUPS, HEADS // GROUPS + 2, DIM)
        q = turned(by_group[:, :, :-2].reshape(len(ids), HEADS, DIM).transpose(0, 1))
        k, v = (by_group[:, :, i].transpose(0, 1).repeat_interleave(HEADS // GROUPS, 0) for i in (-2, -1))
        mixed = F.scaled_dot_product_attention(q, turned(k), v, is_causal=True).transpose(0, 1).flatten(1)
        hidden = hidden + mixed @ w["rest"].T + (F.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"].T
    return normed(hidden[-1], weights["shore.weight"]) @ weights["spawn.weight"].T


def test_a_plugin_is_found_and_serves(site: Path, tmp_path: Path) -> None:
    path = tmp_path / "newt"
    path.mkdir()
    make_tiny_tokenizer(path)
    weights = newt_tensors()
    save_file(weights, path / "model.safetensors")
    config: dict[str, Any] = {
        "architectures": ["NewtForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 128,
    }
    (path / "config.json").write_text(json.dumps(config))
    assert "NewtForCausalLM" in supported()
    ids = [7, 8, 9, 10, 11]
    llm = LLM(str(path), max_prefill_chunk=3)
    (completion,) = llm.generate([ids], SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True))
    for token in completion.token_ids:
        assert token == int(newt_logits(weights, ids).argmax())
        ids.append(token)


def test_two_plugins_of_one_architecture_are_refused(site: Path) -> None:
    install(site, "other_newt", "NewtForCausalLM = other_newt:Newt")
    with pytest.raises(ValueError, match=r"two plugins bring 'NewtForCausalLM': \w+:Newt and \w+:Newt"):
        plugins()


@pytest.mark.parametrize(
    ("entry", "reason"),
    [("not_there:Newt", "No module named 'not_there'"), ("json:dumps", "is no subclass of Family")],
)
def test_a_broken_plugin_is_named_when_it_is_asked_for(site: Path, entry: str, reason: str) -> None:
    install(site, "broken", f"AxolotlForCausalLM = {entry}")
    with pytest.raises(ValueError, match=rf"AxolotlForCausalLM \({entry}\).*{re.escape(reason)}"):
        find_model({"architectures": ["AxolotlForCausalLM"]})
    assert find_model({"architectures": ["LlamaForCausalLM"]}) is REGISTRY["LlamaForCausalLM"]


@pytest.mark.parametrize("name", REGISTRY)
def test_adapters_are_for_linears_that_every_layer_has(name: str) -> None:
    family = REGISTRY[name]
    assert family.LORA_TARGETS
    assert {linear for linear, _ in family.LORA_TARGETS.values()} <= set(LINEARS)
    assert family.LORA_TARGETS.keys() <= family.LAYER.keys()


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("FalconForCausalLM", {"alibi": True}, "alibi"),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Qwen2ForCausalLM", {"layer_types": ["chunked_attention"] * 2}, "chunked_attention.*full_attention"),
        ("Qwen2ForCausalLM", {"layer_types": ["full_attention"]}, "1 entries for 2 layers"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 2 layers"),
        (
            "LlamaForCausalLM",
            {"num_hidden_layers": "2"},
            'num_hidden_layers must be an integer from 1 to 4096, got "2"',
        ),
        (
            "LlamaForCausalLM",
            {"num_attention_heads": 0},
            "num_attention_heads must be an integer from 1 to 4096, got 0",
        ),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "spiral"}}, "spiral.*longrope"),
    ],
)
def test_what_is_not_supported_is_refused(architecture: str, changes: dict[str, Any], message: str) -> None:
    config: dict[str, Any] = {
        "architectures": [architecture],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
    }
    with pytest.raises(ValueError, match=message):
        find_model(config).spec(config | changes)
