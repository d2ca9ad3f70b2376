"""`eft models verify`: whole checkpoints of every kind pass, and damage of every kind is found."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.checkpoints import verification as logits
from tests.checkpoints.gguf.files import write_gguf
from tests.checkpoints.quantised_files import write_quantised
from tests.cli.conftest import Eft
from tests.parity.fallbacks import make_fallback


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def verified(eft: Eft, model: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    done = eft("models", "verify", str(model), "--json")
    report = json.loads(done.out)
    assert report["ok"] is (done.code == 0)
    return done.code, {check["name"]: check for check in report["checks"]}


def test_a_whole_checkpoint(eft: Eft, copy: Path) -> None:
    weights = copy / "model.safetensors"
    (copy / "SHA256SUMS").write_text(f"{hashlib.sha256(weights.read_bytes()).hexdigest()}  {weights.name}\n")
    code, checks = verified(eft, copy)
    assert code == 0
    assert "sha256 as it should be" in checks["model.safetensors"]["found"]
    assert checks["greedy tokens"]["found"] == "all 64 equal"
    assert checks["logits"]["ok"]
    assert checks["missing"]["found"] == checks["unused"]["found"] == "none"
    assert "Nothing is wrong." in eft("models", "verify", str(copy)).out


def test_other_formats(eft: Eft, tiny_model: Path, tmp_path: Path) -> None:
    for model in (
        write_gguf(tmp_path / "it.gguf", tiny_model),
        write_quantised(tiny_model, tmp_path / "gptq", "gptq"),
    ):
        code, checks = verified(eft, model)
        assert code == 0, checks
        assert checks["logits"]["ok"]


def test_a_model_without_a_family(eft: Eft, tmp_path: Path) -> None:
    make_fallback(tmp_path, "cohere2")
    code, checks = verified(eft, tmp_path)
    assert code == 0, checks
    assert checks["architecture"]["found"] == "Cohere2ForCausalLM: transformers' modules"
    assert checks["greedy tokens"]["found"] == "all 64 equal"


def change(tensors: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        held = load_file(path / "model.safetensors")
        tensors(held)
        save_file(held, path / "model.safetensors", metadata={"format": "pt"})

    return damage


def wrong_sum(path: Path) -> None:
    (path / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")


def absent_file(path: Path) -> None:
    (path / "SHA256SUMS").write_text(f"{'0' * 64}  other.safetensors\n")


def wrong_blob(path: Path) -> None:
    """As the hub's cache has it: the name of the blob is its sum."""
    blob = path / ("0" * 64)
    (path / "model.safetensors").rename(blob)
    os.symlink(blob, path / "model.safetensors")


def wrong_note(path: Path) -> None:
    notes = path / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "model.safetensors.metadata").write_text(f"commit\n{'1' * 64}\n1.0\n")


def other_config(path: Path) -> None:
    """Loads, and means something else: only transformers and we would disagree, or a family that reads it wrongly."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"hidden_act": "newt"}))


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (
            change(lambda t: t.pop("model.layers.1.self_attn.k_proj.weight")),
            "missing",
            "1: model.layers.1.self_attn.k_proj.weight",
        ),
        (change(lambda t: t.update(odd=torch.zeros(1))), "unknown", "1: odd"),
        (
            change(lambda t: t.update({"model.norm.weight": torch.zeros(3)})),
            "of another shape",
            "1: model.norm.weight is [3] and not [64]",
        ),
        (wrong_sum, "model.safetensors", "but its sha256 is not 0000"),
        (absent_file, "other.safetensors", "and not there"),
        (wrong_blob, "model.safetensors", "but its sha256 is not 0000"),
        (wrong_note, "model.safetensors", "but its sha256 is not 1111"),
        (other_config, "loading", "hidden_act must be one of"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damage_is_found(eft: Eft, copy: Path, damage: Callable[[Path], None], name: str, message: str) -> None:
    damage(copy)
    code, checks = verified(eft, copy)
    assert code == 1
    assert checks[name]["ok"] is False
    assert message in checks[name]["found"]
    assert "logits" not in checks


def test_unused_tensors_are_told_and_are_no_fault(eft: Eft, copy: Path) -> None:
    change(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))(copy)
    code, checks = verified(eft, copy)
    assert code == 0
    assert checks["unused"]["found"] == "1: model.layers.0.self_attn.rotary_emb.inv_freq"


def test_a_model_that_computes_something_else_is_found(eft: Eft, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' side with one weight changed stands for a family that is wrong."""
    load = logits._load

    def changed(checkpoint: Any) -> Any:
        model = load(checkpoint)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
        return model

    monkeypatch.setattr(logits, "_load", changed)
    code, checks = verified(eft, copy)
    assert code == 1
    assert not checks["logits"]["ok"]
    assert "(limit" in checks["logits"]["found"]
