"""Adapters that do not fit, are broken, or are a trap: each is refused with what is wrong and what would be right."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.checkpoints.peft import CONFIG, WEIGHTS, AdapterInvalid, read_adapter, write_adapter
from runtime.errors import RequestError
from runtime.model.families.llama import Llama
from runtime.model.lora import LoraPart, LoraShape
from runtime.model.lora_base import LoraBase
from runtime.support import failpoints
from tests.adapter_files import make_adapter
from tests.parity.llama import load
from tests.tiny import make_tiny_llama

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> LoraBase:
    return LoraBase.of(load(tiny_model)[0], Llama, "tiny")


@pytest.fixture(scope="module")
def good(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("peft") / "good", target_modules=["q_proj", "up_proj"])


class Draft:
    """A copy of a good adapter, to be spoilt."""

    def __init__(self, good: Path, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = json.loads((good / CONFIG).read_text())
        self.tensors = load_file(good / WEIGHTS)

    def write(self) -> Path:
        (self.folder / CONFIG).write_text(json.dumps(self.config))
        save_file(self.tensors, self.folder / WEIGHTS)
        return self.folder


@pytest.fixture
def draft(good: Path, tmp_path: Path) -> Draft:
    return Draft(good, tmp_path)


def refusal(folder: Path, base: LoraBase, max_rank: int = 64) -> str:
    with pytest.raises(AdapterInvalid) as caught:
        read_adapter(folder, base, max_rank=max_rank)
    assert isinstance(caught.value, RequestError)
    assert (caught.value.status, caught.value.code) == (400, "invalid_adapter")
    assert str(folder) not in caught.value.message
    return caught.value.message


def test_the_draft_is_good(draft: Draft, base: LoraBase) -> None:
    adapter = read_adapter(draft.write(), base, max_rank=4)
    assert adapter.rank == 4
    assert set(adapter.layers) == {(0, "qkv"), (0, "gate_up"), (1, "qkv"), (1, "gate_up")}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "LOHA"}, r"peft_type is 'LOHA'.*LORA"),
        ({"use_dora": True}, r"lacks lora_magnitude_vector of model\.layers\.\d\..*"),
        ({"use_dora": "yes"}, r"Expected `bool`, got `str` - at `\$.use_dora`"),
        ({"bias": "all"}, r"bias is 'all'.*'none'"),
        ({"modules_to_save": ["norm"]}, "modules_to_save has 'norm'.*embed_tokens and lm_head"),
        ({"modules_to_save": ["lm_head"]}, "lacks the weights of lm_head"),
        ({"init_lora_weights": "pissa"}, r"'pissa'.*Convert"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "lacks the weights of model.embed_tokens"),
        ({"trainable_token_indices": {"q_proj": [1]}}, "trainable_token_indices has 'q_proj'"),
        ({"trainable_token_indices": [1, 1]}, "different ids"),
        ({"a_feature_of_next_year": 3}, "a_feature_of_next_year"),
        ({"r": "many"}, r"Expected `int`, got `str` - at `\$.r`"),
        ({"r": 0}, "at least 1"),
        ({"r": 65}, r"rank is 65.*max_lora_rank allows 64"),
        ({"rank_pattern": {"q_proj": 10**9}}, r"rank is 1000000000.*allows 64"),
        ({"rank_pattern": {"(a+)+$": 4}}, "too complex"),
        ({"alpha_pattern": {"[": 4}}, "no regular expression"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"target_modules": ["q_proj", "up_proj", "query"]}, r"'query'.*q_proj, k_proj, v_proj, o_proj"),
        ({"target_modules": ["q_proj", "up_proj", "lm_head"]}, "'lm_head'"),
        ({"target_modules": ["q_proj"]}, r"up_proj.*leaves out"),
        ({"r": 5}, r"q_proj\.lora_A\.weight: expected shape \[5, 64\], got \[4, 64\]"),
    ],
)
def test_configurations(change: dict[str, Any], says: str, draft: Draft, base: LoraBase) -> None:
    draft.config.update(change)
    assert re.search(says, refusal(draft.write(), base))


def test_weights_that_are_not_numbers(draft: Draft, base: LoraBase) -> None:
    for value in (float("nan"), float("inf")):
        draft.tensors[f"{Q}.lora_B.weight"][3, 1] = value
        assert "q_proj.lora_B.weight has values that are not finite" in refusal(draft.write(), base)


def test_half_a_pair(draft: Draft, base: LoraBase) -> None:
    del draft.tensors[f"{Q}.lora_B.weight"]
    assert "lacks lora_B of model.layers.0.self_attn.q_proj" in refusal(draft.write(), base)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("base_model.model.lm_head.lora_A.weight", "self_attn.q_proj, self_attn.k_proj"),
        (Q.replace("q_proj", "query") + ".lora_A.weight", "no linear of this model"),
        (Q.replace("layers.0", "layers.7") + ".lora_A.weight", "2 layers"),
        (f"{Q}.lora_magnitude_vector", "use_dora is not set in adapter_config.json"),
        (Q.removeprefix("base_model.model.") + ".lora_A.weight", "twice"),
    ],
)
def test_names_that_are_not_there(name: str, says: str, draft: Draft, base: LoraBase) -> None:
    draft.tensors[name] = torch.zeros(4, 64)
    assert says in refusal(draft.write(), base)


def test_magnitudes(tiny_model: Path, tmp_path: Path, base: LoraBase) -> None:
    """By either of the names that PEFT has given them; of the shape of a linear's outputs, and finite."""
    (tmp_path / "draft").mkdir()
    draft = Draft(
        make_adapter(tiny_model, tmp_path / "dora", target_modules=["q_proj"], use_dora=True), tmp_path / "draft"
    )
    name = f"{Q}.lora_magnitude_vector"
    expected = draft.tensors.pop(name)
    assert "lacks lora_magnitude_vector of model.layers.0.self_attn.q_proj" in refusal(draft.write(), base)
    draft.tensors[f"{name}.weight"] = expected
    adapter = read_adapter(draft.write(), base, max_rank=64)
    found = adapter.layers[0, "qkv"][0].magnitude
    assert adapter.shape.dora
    assert found is not None
    assert torch.equal(found, expected)
    draft.tensors[f"{name}.weight"] = expected[1:]
    assert "lora_magnitude_vector: expected shape [64], got [63]" in refusal(draft.write(), base)
    draft.tensors[f"{name}.weight"] = expected / 0
    assert "lora_magnitude_vector has values that are not finite" in refusal(draft.write(), base)


def test_an_adapter_for_a_larger_model(tiny_model: Path, tmp_path: Path, base: LoraBase) -> None:
    larger = make_tiny_llama(tmp_path / "larger", hidden_size=96, num_attention_heads=6)
    path = make_adapter(larger, tmp_path / "adapter", target_modules=["q_proj"])
    assert "q_proj.lora_A.weight: expected shape [4, 64], got [4, 96]" in refusal(path, base)


def test_integers(draft: Draft, base: LoraBase) -> None:
    draft.tensors[f"{Q}.lora_A.weight"] = torch.zeros(4, 64, dtype=torch.int8)
    assert "torch.int8" in refusal(draft.write(), base)


def test_half_precision_is_fine(draft: Draft, base: LoraBase) -> None:
    expected = read_adapter(draft.write(), base, max_rank=64).layers[0, "qkv"][0].a
    draft.tensors = {name: tensor.bfloat16() for name, tensor in draft.tensors.items()}
    found = read_adapter(draft.write(), base, max_rank=64).layers[0, "qkv"][0].a
    assert torch.equal(found, expected.bfloat16().float())


def test_truncated_and_other_files(draft: Draft, base: LoraBase) -> None:
    path = draft.write() / WEIGHTS
    whole = path.read_bytes()
    for data in (whole[:-10], whole[:100], b"", b"PK\x03\x04" + bytes(100), b"\xff" * 64):
        path.write_bytes(data)
        assert "truncated or no safetensors file" in refusal(draft.folder, base)


def test_configurations_that_are_no_json(draft: Draft, base: LoraBase) -> None:
    path = draft.write() / CONFIG
    for data in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"r": 1e999}'):
        path.write_bytes(data)
        assert "cannot be read" in (said := refusal(draft.folder, base)) or "nested too deep" in said


def test_a_pickle(draft: Draft, base: LoraBase) -> None:
    (draft.write() / WEIGHTS).rename(draft.folder / "adapter_model.bin")
    assert "pickle" in refusal(draft.folder, base)


def test_files_that_are_missing(tmp_path: Path, draft: Draft, base: LoraBase) -> None:
    assert "no adapter_config.json" in refusal(tmp_path, base)
    (draft.write() / WEIGHTS).unlink()
    assert "no adapter_model.safetensors" in refusal(tmp_path, base)


def test_links_pipes_and_folders(draft: Draft, base: LoraBase, good: Path) -> None:
    path = draft.write() / WEIGHTS
    path.unlink()
    path.symlink_to(good / WEIGHTS)
    assert "is a link" in refusal(draft.folder, base)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "is a link" in refusal(draft.folder, base)
    path.unlink()
    os.mkfifo(path)
    assert "not a plain file" in refusal(draft.folder, base)
    path.unlink()
    path.mkdir()
    assert "not a plain file" in refusal(draft.folder, base)


def test_files_too_large_to_be_right(draft: Draft, base: LoraBase) -> None:
    path = draft.write() / WEIGHTS
    with open(path, "r+b") as file:
        file.truncate(1 << 40)  # a hole: takes no room
    assert re.search(r"has 1099511627776 bytes; at most \d+", refusal(draft.folder, base))
    (draft.folder / CONFIG).write_bytes(b" " * (1 << 20) + b"{}")
    assert "adapter_config.json has" in refusal(draft.folder, base)


def parts(base: LoraBase, rank: int = 3) -> dict[tuple[int, str], list[LoraPart]]:
    target = base.targets["self_attn.o_proj"]
    a, b = torch.ones(rank, target.in_features), torch.ones(target.out_features, rank)
    return {(0, "out"): [LoraPart("", a, b, 2.0)]}


def test_the_writer_refuses_what_it_could_not_say(tmp_path: Path, base: LoraBase) -> None:
    with pytest.raises(ValueError, match="rank 3, but the shape says 4"):
        write_adapter(tmp_path / "a", parts(base), LoraShape(4, 8.0), base)
    write_adapter(tmp_path / "a", parts(base), LoraShape(3, 6.0), base)
    with pytest.raises(FileExistsError):
        write_adapter(tmp_path / "a", parts(base), LoraShape(3, 6.0), base)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, base: LoraBase) -> None:
    for place in ("durable.before_write=raise:2", "durable.before_directory_sync=raise", "durable.before_rename=raise"):
        failpoints.configure(place)
        try:
            with pytest.raises(failpoints.FailpointError):
                write_adapter(tmp_path / "a", parts(base), LoraShape(3, 6.0), base)
        finally:
            failpoints.configure("")
        assert list(tmp_path.iterdir()) == []
