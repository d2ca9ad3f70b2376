"""Adapters with rows of embedding and head in the engine: mixed batches, ids beyond the base's, and rules over them.

The adapters are PEFT's, and so are the expected tokens.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from runtime import LLM, SamplingParams
from runtime.adapters.card import Card, encode_card, read_card
from runtime.adapters.versions import stage
from runtime.errors import InvalidRequest
from runtime.messages import Submission
from runtime.model.families.llama import Llama
from runtime.model.lora_base import LoraBase
from runtime.text.grammar import GrammarBuilder
from runtime.text.own_tokens import OwnToken
from tests.adapter_files import make_adapter
from tests.parity.llama import load
from tests.tiny import VOCAB_SIZE

PROMPT = [5, 77, 131, 9, 42, 200, 17]
NEW = [VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2]
TOKENS = tuple(OwnToken(id, f"<new{index}>", index == 2) for index, id in enumerate(NEW))


def make(model: Path, path: Path, *, rows: int = 0, **config: Any) -> Path:
    """An adapter that PEFT saves over a base whose embedding has `rows` more rows; all that it trains is random."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    if rows:
        base.resize_token_embeddings(VOCAB_SIZE + rows, mean_resizing=False)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **config))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in sorted(adapted.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    adapted.save_pretrained(path)
    return path


def greedy(model: Path, adapter: Path, prompt: list[int], count: int, *, rows: int = 0) -> list[int]:
    """The next tokens by PEFT."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    if rows:
        base.resize_token_embeddings(VOCAB_SIZE + rows, mean_resizing=False)
    adapted, ids = PeftModel.from_pretrained(base, adapter).eval(), list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(adapted(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


BOTH = {"embed_tokens": NEW, "lm_head": NEW}
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows": {"trainable_token_indices": {"embed_tokens": [5, 42, 300], "lm_head": [5, 42, 300]}},
    "copies": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "new": {"trainable_token_indices": BOTH, "rows": 3},
    "new in copies": {"modules_to_save": ["embed_tokens", "lm_head"], "rows": 3},
}


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    made = {name: make(tiny_model, root / name, **ADAPTERS[name]) for name in ADAPTERS if name != "plain"}
    made["plain"] = make_adapter(tiny_model, root / "plain")
    for name in ("new", "new in copies"):
        (made[name] / "eft.json").write_bytes(encode_card(Card(tokens=TOKENS, vocab_size=VOCAB_SIZE + 3)))
    return made


@pytest.fixture(scope="module")
def llm(tiny_model: Path, folders: dict[str, Path]) -> LLM:
    llm = LLM(str(tiny_model), max_batched_tokens=40, max_running=16)
    for key, path in folders.items():
        llm.engine.prepare_adapter(key, str(path))
        own = llm.tokenizer.with_tokens(TOKENS, rows=VOCAB_SIZE + 3) if key.startswith("new") else None
        llm.engine.load_adapter(key, own)
    return llm


@pytest.fixture(autouse=True)
def clean(llm: LLM) -> Iterator[None]:
    yield
    assert not llm.engine.busy
    llm.engine.scheduler.check_integrity()


def run(llm: LLM, *submissions: Submission) -> dict[str, Any]:
    """What each request generates, all of them at once: tokens, text and log-probabilities."""
    found: dict[str, Any] = {one.request_id: ([], [], []) for one in submissions}
    for submission in submissions:
        llm.engine.submit(submission)
    while llm.engine.busy:
        for output in llm.engine.step():
            assert output.error is None
            tokens, texts, logprobs = found[output.request_id]
            tokens += output.token_ids
            texts.append(output.text)
            logprobs += output.logprobs
    return {name: (tokens, "".join(texts), logprobs) for name, (tokens, texts, logprobs) in found.items()}


def ask(name: str, adapter: str, prompt: list[int] = PROMPT, **params: Any) -> Submission:
    given = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **params}
    return Submission(request_id=name, prompt_ids=prompt, params=SamplingParams(**given), adapter=adapter)


def prompt_of(adapter: str) -> list[int]:
    return [*PROMPT, NEW[0], 11, NEW[2]] if adapter.startswith("new") else [*PROMPT, 300]


def test_each_row_of_a_mixed_batch_answers_as_peft_does(llm: LLM, tiny_model: Path, folders: dict[str, Path]) -> None:
    asked = [ask(name or "base", name, prompt_of(name)) for name in ("", *folders)]
    together = run(llm, *asked)
    llm.engine.scheduler.blocks.reset_prefixes()
    assert together == {one.request_id: run(llm, one)[one.request_id] for one in asked}
    for name, folder in folders.items():
        rows = 3 if name.startswith("new") else 0
        assert together[name][0] == greedy(tiny_model, folder, prompt_of(name), 12, rows=rows), name
    assert len({tuple(tokens) for tokens, _, _ in together.values()}) == len(together)


@pytest.mark.parametrize("name", ["new", "new in copies"])
def test_a_new_token_is_sampled_and_has_its_text_for_its_adapter_alone(llm: LLM, name: str) -> None:
    bias = {NEW[0]: 90.0}
    (tokens, text, logprobs) = run(llm, ask("a", name, logit_bias=bias, max_tokens=2, logprobs=2))["a"]
    assert tokens == [NEW[0]] * 2
    assert text == "<new0>" * 2
    assert [one.logprob < 0 and len(one.top) for one in logprobs] == [2, 2]
    hidden = run(llm, ask("a", name, logit_bias={NEW[2]: 90.0}, max_tokens=2))["a"]
    assert hidden[:2] == ([NEW[2]] * 2, "")  # a special one


def test_ids_beyond_the_base_are_refused_for_others(llm: LLM) -> None:
    for adapter in ("", "plain", "copies"):
        with pytest.raises(InvalidRequest, match=f"from 0 to {VOCAB_SIZE - 1}, got {NEW[1]}"):
            llm.engine.submit(ask("a", adapter, [5, NEW[1]]))
    with pytest.raises(InvalidRequest, match=f"from 0 to {NEW[2]}, got {NEW[2] + 1}"):
        llm.engine.submit(ask("a", "new", [5, NEW[2] + 1]))


RULES: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {NEW[1]: 4.0}},
    "allowed": {"allowed_token_ids": [7, NEW[0], NEW[1]]},
    "allowed of the base": {"allowed_token_ids": [7, 9]},
    "stops": {"stop_token_ids": [NEW[0]], "min_tokens": 4, "logit_bias": {NEW[0]: 90.0}},
    "sampled": {"temperature": 1.5, "seed": 3, "top_p": 0.9, "top_k": 100, "logprobs": 1},
    "scored": {"prompt_logprobs": 3, "max_tokens": 1},
}


@pytest.mark.parametrize("rules", RULES)
def test_rules_over_more_ids_are_those_of_a_row_alone(llm: LLM, rules: str) -> None:
    """Beside rows of the base and of other widths, whose rules must not change either."""
    of_base = {key: value for key, value in RULES[rules].items() if key not in ("logit_bias", "stop_token_ids")}
    if rules == "allowed":
        of_base = {"allowed_token_ids": [7, 9]}
    asked = [
        ask("new", "new", prompt_of("new"), **RULES[rules]),
        ask("copies", "new in copies", prompt_of("new"), **RULES[rules]),
        ask("base", "", prompt_of(""), **of_base),
        ask("rows", "rows", prompt_of("rows"), **of_base),
    ]
    together = run(llm, *asked)
    llm.engine.scheduler.blocks.reset_prefixes()
    assert together == {one.request_id: run(llm, one)[one.request_id] for one in asked}
    if rules == "allowed":
        assert set(together["new"][0]) <= {7, *NEW}
        assert set(together["base"][0]) <= {7, 9}
    if rules == "stops":
        assert len(together["new"][0]) == 5
        assert together["new"][0][-1] == NEW[0]


def test_a_grammar_keeps_to_the_base_s_tokens(llm: LLM) -> None:
    source = GrammarBuilder(llm.engine.grammars.special_id).build('"yes" | "no"')
    asked = ask("a", "new", prompt_of("new"), logit_bias={NEW[0]: 90.0}, ignore_eos=False)
    beside = ask("b", "", prompt_of(""))
    found = run(llm, msgspec.structs.replace(asked, grammar=source), beside)
    assert found["a"][1] in ("yes", "no")


def test_a_resized_base_s_own_tokenizer_gives_the_texts(
    tiny_model: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """As Axolotl's users have it: the folder has a tokenizer.json beside PEFT's two files, and no card."""
    source = tmp_path / "source"
    shutil.copytree(folders["new"], source)
    (source / "eft.json").unlink()
    file = json.loads((tiny_model / "tokenizer.json").read_text())
    file["added_tokens"] += [{"id": token.id, "content": token.text, "special": token.special} for token in TOKENS]
    file["added_tokens"].append({"id": 600, "content": "<no row>", "special": True})
    (source / "tokenizer.json").write_text(json.dumps(file))
    base = LoraBase.of(load(tiny_model)[0], Llama, "tiny")
    stage(source, tmp_path / "1", base, lambda rank, digest: b"{}", max_rank=8)
    card = read_card(tmp_path / "1")
    assert set(TOKENS) <= set(card.tokens)
    assert card.vocab_size == VOCAB_SIZE + 3
    assert all(token.id < VOCAB_SIZE + 3 for token in card.tokens)
