"""Models without a family here, served through transformers' modules, against transformers and PEFT themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.training import TrainingOps
from runtime import LLM, SamplingParams
from runtime.engine.assembly import assemble
from runtime.messages import Submission
from runtime.model.fallback import FallbackDecoder
from runtime.model.lora import LoraShape
from runtime.trainer.data.example import Example, collate
from runtime.trainer.fallback_step import FallbackStep
from runtime.trainer.lora import TrainableLora
from settings.load import load as load_settings
from tests.parity.fallbacks import CASES, make_fallback
from tests.parity.gradients import drive
from tests.parity.peft_training import peft_loss

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
PROMPTS = [[(11 * row + 5 * place) % 500 + 3 for place in range(length)] for row, length in enumerate((1, 6, 23, 45))]
RANK, ALPHA = 4, 12


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("model")
    return path, make_fallback(path, request.param)


def greedy(model: Any, ids: list[int]) -> list[int]:
    out = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, pad_token_id=0)
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens


def decoder_of(path: Path, **flags: object) -> FallbackDecoder:
    decoder = assemble(load_settings(env={}, flags={"model": str(path), "num_blocks": 8, **flags}).settings).decoder
    assert isinstance(decoder, FallbackDecoder)
    return decoder


def adapter_of(path: Path, decoder: FallbackDecoder, target: Path, seed: int, *, dora: bool = False) -> Path:
    """A random adapter of all that can be adapted, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    modules = [f"{decoder.layers_path}.{layer}.{name}" for layer in range(4) for name in decoder.targets]
    transposed = "c_attn" in str(modules)
    shape = {"r": RANK, "lora_alpha": ALPHA, "use_dora": dora, "fan_in_fan_out": transposed}
    adapted = get_peft_model(base, LoraConfig(target_modules=modules, task_type="CAUSAL_LM", **shape))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= torch.rand(parameter.shape, generator=generator) + 0.5
        elif "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    adapted.save_pretrained(target)
    return target


def test_tokens_equal_transformers_however_they_are_batched(case: tuple[Path, Any]) -> None:
    """Four rows together, prompts in chunks, in few blocks; then once more out of the prefix cache."""
    path, oracle = case
    llm = LLM(str(path), max_batched_tokens=24, max_prefill_chunk=11, block_size=4, num_blocks=60)
    expected = [greedy(oracle, ids) for ids in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    assert [one.token_ids for one in llm.generate(PROMPTS, GREEDY)] == expected
    again = llm.generate([PROMPTS[3]], GREEDY)[0]
    assert again.token_ids == expected[3]
    assert again.cached_tokens >= 40 or path.joinpath("config.json").read_text().count("sliding_window") > 0
    llm.engine.scheduler.check_integrity()


def test_each_row_has_its_own_adapter(case: tuple[Path, Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path, oracle = case
    llm = LLM(str(path), max_batched_tokens=24, num_blocks=60)
    folders = {
        key: adapter_of(path, decoder_of(path), tmp_path / key, seed, dora=key == "b") for seed, key in enumerate("ab")
    }
    expected = {("", 2): greedy(oracle, PROMPTS[2])}
    for key, folder in folders.items():
        llm.engine.prepare_adapter(key, str(folder))
        llm.engine.load_adapter(key)
        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(base, folder).eval()
        expected |= {(key, row): greedy(adapted, PROMPTS[row]) for row in (1, 2)}
    for key, row in expected:
        submission = Submission(request_id=f"{key}/{row}", prompt_ids=PROMPTS[row], params=GREEDY, adapter=key)
        llm.engine.submit(submission)
    found: dict[str, list[int]] = {}
    while llm.engine.busy:
        for output in llm.engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
    assert found == {f"{key}/{row}": tokens for (key, row), tokens in expected.items()}
    assert len({tuple(expected[key, 2]) for key in ("", "a", "b")}) == 3


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_gradients_equal_peft(
    case: tuple[Path, Any], tmp_path: Path, checkpointing: bool, separable: bool, dora: bool
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path, _ = case
    decoder = decoder_of(path)
    assert decoder.separable
    decoder.separable = separable
    layers = range(decoder.spec.num_layers)
    targets = {(layer, name): ("",) for layer in layers for name in decoder.targets}
    lora = TrainableLora(decoder, targets, LoraShape(rank=RANK, alpha=ALPHA, dora=dora), seed=3)
    adapter = adapter_of(path, decoder, tmp_path / "adapter", 5, dora=dora)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    oracle = PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()
    modules = {
        place: oracle.get_submodule(f"base_model.model.{decoder.layers_path}.{place[0]}.{place[1]}")
        for place in lora.linears
    }
    with torch.no_grad():
        for place, adapted in lora.linears.items():
            adapted.a.copy_(modules[place].lora_A["default"].weight)
            adapted.b[0].copy_(modules[place].lora_B["default"].weight)
            for m in adapted.m:
                m.copy_(modules[place].lora_magnitude_vector["default"].weight)
    lora.changed()
    examples = [Example(ids, [place >= 3 for place in range(len(ids))]) for ids in PROMPTS[1:3]]
    trained = sum(example.num_trained for example in examples)
    loss = peft_loss(oracle, examples)
    loss.backward()
    micro = FallbackStep(decoder, TrainingOps(), lora, collate(examples, decoder.device), checkpointing=checkpointing)
    drive(micro.forward_backward(1 / trained), "odd")
    assert micro.score.mean == pytest.approx(loss.item(), abs=1e-4)
    for place, adapted in lora.linears.items():
        torch.testing.assert_close(adapted.a.grad, modules[place].lora_A["default"].weight.grad, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(
            adapted.b[0].grad, modules[place].lora_B["default"].weight.grad, atol=1e-4, rtol=1e-3
        )
        for m in adapted.m:
            expected = modules[place].lora_magnitude_vector["default"].weight.grad
            torch.testing.assert_close(m.grad, expected, atol=1e-4, rtol=1e-3)
    scored = FallbackStep(decoder, TrainingOps(), lora, collate(examples, decoder.device))
    drive(scored.evaluate(), "whole")
    assert scored.score.mean == pytest.approx(micro.score.mean, abs=1e-5)
