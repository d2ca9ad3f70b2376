"""Steps of training with magnitudes against PEFT: losses, the adapter that is published, and its logits."""

from pathlib import Path
from typing import Any

import pytest

from runtime.checkpoints.peft import read_adapter
from runtime.model.families.llama import Llama
from runtime.model.lora_base import LoraBase
from runtime.trainer.course import Restored, RunProgress
from runtime.trainer.lora import parameters_of
from tests.adapter_files import peft_logits
from tests.parity.adapted import our_logits
from tests.parity.llama import load
from tests.parity.peft_training import IDS, logits, peft_of, spec_of, trained_by_peft, trained_by_us

PATTERNS = {"lora_rank_pattern": {r"layers\.1\..*": 6, "q_proj": 2}, "lora_alpha_pattern": {"up_proj|k_proj": 5.0}}


@pytest.mark.parametrize("keys", [{}, {"peft_use_rslora": True, "loraplus_lr_ratio": None}, PATTERNS])
def test_steps_and_the_adapter_are_peft_s(keys: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    """The norms change with every step, and so does what both compute by them."""
    decoder, _ = load(tiny_model)
    spec = spec_of(decoder, "gaussian", peft_use_dora=True, **keys)
    shape = spec.shape
    patterns = {"rank_pattern": shape.rank_pattern, "alpha_pattern": shape.alpha_pattern}
    oracle = peft_of(tiny_model, "gaussian", use_dora=True, use_rslora=shape.rslora, **patterns)
    oracle.save_pretrained(tmp_path / "first")
    base = LoraBase.of(decoder, Llama, "tiny")
    first = parameters_of(read_adapter(tmp_path / "first", base, max_rank=6).layers)
    start = Restored(RunProgress(), first, {}, None)
    losses, adapter = trained_by_us(tiny_model, decoder, spec, tmp_path / "run", start)
    assert losses == pytest.approx(trained_by_peft(oracle, spec.recipe.learning_rate), abs=1e-4)
    expected = logits(oracle)
    assert (our_logits(decoder, base, adapter, IDS) - expected).abs().max() < 1e-4
    assert (peft_logits(tiny_model, adapter, IDS.tolist()) - expected).abs().max() < 1e-4
    before, after = (read_adapter(path, base, max_rank=6).layers[0, "qkv"][0] for path in (tmp_path / "first", adapter))
    assert before.magnitude is not None
    assert after.magnitude is not None
    assert (before.magnitude - after.magnitude).abs().max() > 1e-4
