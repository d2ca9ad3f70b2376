"""Ranks in processes of their own, over gloo, against one rank in this process: the same tokens."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from runtime import LLM, SamplingParams
from runtime.checkpoints.peft import AdapterInvalid
from runtime.llm import Completion
from runtime.messages import Submission
from runtime.model.config import ModelLoadError
from runtime.text.grammar import GrammarBuilder, regex_part
from tests.adapter_files import make_adapter, peft_greedy
from tests.parity.families import make_model
from tests.tiny import VOCAB_SIZE, make_tiny_llama, make_tiny_tokenizer

PROMPTS = [[3 + (seed * 7 + at * at) % 500 for at in range(length)] for seed, length in ((1, 1), (2, 9), (3, 60))]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=12, temperature=1.5, top_p=0.9, seed=5, min_tokens=4)
GREEDY_TEXT = SamplingParams(max_tokens=60, temperature=0.0)
SAMPLED_TEXT = SamplingParams(max_tokens=60, temperature=1.5, seed=5)
PARAMS = [GREEDY, GREEDY, SAMPLED]


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that each of four ranks has whole blocks of 64 inputs, as int8 wants them."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama", hidden_size=256, intermediate_size=256)


@pytest.fixture(scope="module", params=[(2, "none"), (4, "none"), (4, "int8")], ids=str)
def ranks(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[tuple[LLM, LLM]]:
    """Several ranks, and one. With 4 each of the model's two key/value heads is on two of them."""
    size, quantization = request.param
    common = {"quantization": quantization, "threads": 1, "max_prefill_chunk": 32, "num_blocks": 64}
    threads = torch.get_num_threads()
    several = LLM(str(tiny_model), tp=size, **common)
    try:
        yield several, LLM(str(tiny_model), **common)
    finally:
        several.close()
        torch.set_num_threads(threads)


def test_tokens_equal_one_rank(ranks: tuple[LLM, LLM]) -> None:
    several, one = ranks
    for params in (GREEDY, PARAMS):  # greedy alone: the ranks exchange their best tokens only
        assert tokens(several.generate(PROMPTS, params)) == tokens(one.generate(PROMPTS, params))
    several.engine.scheduler.check_integrity()


def test_rules_and_log_probabilities_equal_one_rank(ranks: tuple[LLM, LLM]) -> None:
    """Of tokens that lie on different ranks."""
    bias = {3: 2.0, VOCAB_SIZE - 1: 3.0, VOCAB_SIZE // 2: -100.0}
    ruled = replace(SAMPLED, repetition_penalty=1.5, frequency_penalty=0.5, logit_bias=bias, logprobs=4)
    masked = replace(GREEDY, allowed_token_ids=tuple(range(0, VOCAB_SIZE, 7)), logprobs=0, prompt_logprobs=3)
    found, expected = (llm.generate(PROMPTS, [masked, masked, ruled]) for llm in ranks)
    assert tokens(found) == tokens(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours.logprobs) == len(ours.token_ids)
        for one, other in zip(
            [*ours.logprobs, *ours.prompt_logprobs], [*theirs.logprobs, *theirs.prompt_logprobs], strict=True
        ):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-3)


def test_grammars_hold_on_all_ranks(ranks: tuple[LLM, LLM]) -> None:
    found = []
    for llm in ranks:
        builder = GrammarBuilder(llm.engine.grammars.special_id)
        grammar = builder.build(builder.part("body", regex_part("[a-z]{3,20}: (newt|eft of the pond)", "regex")))
        asked = [
            Submission(request_id="r", prompt_ids=prompt, grammar=grammar, params=params)
            for prompt, params in zip(PROMPTS, [GREEDY_TEXT, SAMPLED_TEXT, SAMPLED_TEXT], strict=True)
        ]
        llm.engine.submit_all(asked)
        texts = dict.fromkeys((one.id for one in asked), "")
        while llm.engine.busy:
            for output in llm.engine.step():
                texts[output.id] += output.text
        found.append(list(texts.values()))
    assert found[0] == found[1]
    assert all(re.fullmatch("[a-z]{3,20}: (newt|eft of the pond)", text) for text in found[0])


def test_two_adapters_and_the_base_in_one_batch(ranks: tuple[LLM, LLM], tiny_model: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        make_adapter(tiny_model, tmp_path / str(number), seed=number, use_dora=number == 2)
    answers = []
    for llm in ranks:
        for key in ("1", "2"):
            llm.engine.prepare_adapter(key, str(tmp_path / key))
            llm.engine.load_adapter(key)
        found: dict[str, list[int]] = {key: [] for key in ("1", "2", "")}
        for key in found:
            submission = Submission(request_id=key or "base", prompt_ids=PROMPTS[1], params=GREEDY, adapter=key)
            llm.engine.submit(submission)
        while llm.engine.busy:
            for output in llm.engine.step():
                found[output.request_id.removeprefix("base")] += output.token_ids
        for key in ("1", "2"):
            llm.engine.unload_adapter(key)
        answers.append(found)
    assert answers[0] == answers[1]
    if ranks[0].settings.model.quantization == "none":
        for key in ("1", "2"):
            assert answers[0][key] == peft_greedy(tiny_model, tmp_path / key, PROMPTS[1], GREEDY.max_tokens or 0)
    assert len({tuple(answer) for answer in answers[0].values()}) == 3


def test_sums_that_are_on_their_way_while_the_mlp_computes(tmp_path: Path) -> None:
    """GPT-NeoX: attention and MLP side by side."""
    make_model(tmp_path, "gpt_neox", {"vocab_size": VOCAB_SIZE, "eos_token_id": None})
    make_tiny_tokenizer(tmp_path)
    several = LLM(str(tmp_path), tp=2, threads=1)
    try:
        found = tokens(several.generate(PROMPTS, GREEDY))
    finally:
        several.close()
    assert found == tokens(LLM(str(tmp_path)).generate(PROMPTS, GREEDY))


def test_what_is_no_adapter_is_refused_and_the_ranks_go_on(ranks: tuple[LLM, LLM], tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid):
        ranks[0].engine.prepare_adapter("none", str(tmp_path))
    assert not ranks[0].engine.lost


def test_refused_at_start(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelLoadError, match=r"tiny-llama: LlamaForCausalLM: 4 attention heads .* 3 ranks; parallel.tp can be 1, 2, 4"
    ):
        LLM(str(tiny_model), tp=3)
    with pytest.raises(ModelLoadError, match="2 ranks need a GPU each"):
        LLM(str(tiny_model), tp=2, device="cuda:0")
    # What only a rank finds out comes back as its own message.
    broken = make_tiny_llama(tmp_path / "broken", num_hidden_layers=1)
    config = (broken / "config.json").read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 2')
    (broken / "config.json").write_text(config)
    with pytest.raises(ModelLoadError, match="broken: the checkpoint lacks"):
        LLM(str(broken), tp=2)
