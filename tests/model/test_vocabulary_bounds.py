"""Token ids and the rows of the embedding: more ids than rows are refused at load, more rows than ids are all valid."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from runtime import LLM, SamplingParams
from runtime.errors import InvalidRequest
from runtime.messages import Admission, Row, StepPlan
from runtime.model.config import ModelLoadError
from runtime.trainer.data.formats import TextEncoder
from runtime.workers.batch import TokenOutOfRange
from runtime.workers.executor import InProcessExecutor
from tests.checkpoints.gguf.files import bpe_vocabulary, write_gguf
from tests.parity.fallbacks import make_fallback
from tests.tiny import VOCAB_SIZE, make_tiny_llama

ROWS = 640
HOLE = 600
"""Id of the token that is moved away from the others."""
GREEDY = SamplingParams(max_tokens=2, temperature=0)


def add_tokens(model: Path, count: int) -> Path:
    """Tokens that only tokenizer_config.json lists, as files that were edited by hand have them."""
    path = model / "tokenizer_config.json"
    flags = dict.fromkeys(("special", "normalized", "lstrip", "rstrip", "single_word"), False)
    added = {str(VOCAB_SIZE + i): {"content": f"<t{i}>", **flags} for i in range(count)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": added}))
    return model


def move_token(model: Path, target: int) -> str:
    """Give the last token another id, and return it."""
    file = json.loads((model / "tokenizer.json").read_text())
    text: str = next(text for text, id in file["model"]["vocab"].items() if id == VOCAB_SIZE - 1)
    file["model"]["vocab"][text] = target
    (model / "tokenizer.json").write_text(json.dumps(file))
    return text


def directory(path: Path) -> Path:
    return add_tokens(make_tiny_llama(path), 1)


def hole(path: Path) -> Path:
    model = make_tiny_llama(path)
    move_token(model, HOLE)
    return model


def fallback(path: Path) -> Path:
    make_fallback(path, "phi")
    return add_tokens(path, 1)


def gguf(path: Path) -> Path:
    model = make_tiny_llama(path)
    known = bpe_vocabulary(model)
    more = {"tokens": [*known["tokens"], "<t0>"], "token_type": [*known["token_type"], 1]}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    return write_gguf(path / "m.gguf", model, metadata=metadata)


@pytest.mark.parametrize(
    ("make", "ids"),
    [(directory, 513), (hole, 601), (fallback, 513), (gguf, 513)],
    ids=["directory", "hole", "fallback", "gguf"],
)
def test_ids_without_a_row_are_refused_with_both_counts(tmp_path: Path, make: Callable[[Path], Path], ids: int) -> None:
    with pytest.raises(ModelLoadError, match=rf"\b{ids}\b.*embedding has 512 rows"):
        LLM(str(make(tmp_path / "m")), num_blocks=8)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4", "nf4"])
def test_quantised_models_are_refused_as_well(tmp_path: Path, quantization: str) -> None:
    with pytest.raises(ModelLoadError, match="513 in all, and the embedding has 512 rows"):
        LLM(str(directory(tmp_path)), quantization=quantization, num_blocks=8)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", [512, [2, 9000]])
def test_an_end_without_a_row_is_refused(tmp_path: Path, file: str, ids: object) -> None:
    path = make_tiny_llama(tmp_path) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ids}))
    with pytest.raises(ModelLoadError, match=r"eos_token_id .*(512|9000).* 512 rows"):
        LLM(str(tmp_path), num_blocks=8)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More rows than tokens, and a token in the middle of the rows without one."""
    model = make_tiny_llama(tmp_path_factory.mktemp("padded"), vocab_size=ROWS)
    move_token(model, HOLE)
    return model


@pytest.fixture(scope="module")
def llm(padded: Path) -> LLM:
    return LLM(str(padded), num_blocks=64)


def test_what_is_sampled_can_be_sent_back(llm: LLM, padded: Path) -> None:
    """The next token is transformers' for a prompt with ids that no token has."""
    params = SamplingParams(max_tokens=64, temperature=1.5, seed=3, ignore_eos=True)
    sampled = llm.generate([[5, 6, 7]], params)[0].token_ids
    assert any(id >= VOCAB_SIZE and id != HOLE for id in sampled), "nothing is tested otherwise"
    prompt = [5, 6, 7, *sampled, ROWS - 1]
    oracle = LlamaForCausalLM.from_pretrained(padded, dtype=torch.float32)
    with torch.inference_mode():
        expected = int(oracle(torch.tensor([prompt])).logits[0, -1].argmax())
    assert llm.generate([prompt], GREEDY)[0].token_ids[0] == expected


def test_ids_without_a_token_are_no_text(llm: LLM, padded: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(padded)
    for ids in ([5, 511, 6], [639], [5, HOLE, 6], [620, 70, 630]):
        assert llm.tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert llm.tokenizer.decode_one(639) == llm.tokenizer.token_text(639) == ""


def test_bounds_at_the_door_are_the_embeddings(llm: LLM) -> None:
    assert llm.tokenizer.vocab_size == ROWS
    for bad in (ROWS, -1):
        with pytest.raises(InvalidRequest, match=f"0 to {ROWS - 1}"):
            llm.generate([[5, bad]], GREEDY)
        with pytest.raises(InvalidRequest, match=f"0 to {ROWS - 1}"):
            llm.generate([[5]], SamplingParams(max_tokens=2, stop_token_ids=(bad,)))
    stopped = SamplingParams(max_tokens=3, min_tokens=1, stop_token_ids=(ROWS - 1, 511), temperature=1, seed=1)
    assert llm.generate([[5, 6]], stopped)[0].finish_reason in ("stop", "length")


def test_a_token_after_a_hole_is_a_token(llm: LLM) -> None:
    text = llm.tokenizer.decode([HOLE])
    assert llm.tokenizer.encode(text) == [HOLE]
    assert llm.generate([text], GREEDY)[0].prompt_ids == [HOLE]
    assert TextEncoder(llm.tokenizer, everything=False).text(text + text).token_ids[:2] == [HOLE, HOLE]


@pytest.mark.parametrize("quantization", ["none", "int8", "int4", "nf4"])
@pytest.mark.parametrize("wrong", [VOCAB_SIZE, 10**6, -1])
def test_a_wrong_id_fails_its_own_row(tiny_model: Path, quantization: str, wrong: int) -> None:
    """Behind the doors, where none should come: kernels that read quantised rows trust ids. Nor do ids that
    may not be sampled index anything."""
    llm = LLM(str(tiny_model), quantization=quantization, num_blocks=64)
    expected = llm.generate([[5, 6, 7]], GREEDY)[0].token_ids
    executor: Any = llm.engine._executor
    assert isinstance(executor, InProcessExecutor)
    admitted = [
        Admission(
            slot=slot,
            token_ids=ids,
            block_ids=[slot + 1],
            prompt_len=3,
            params=SamplingParams(max_tokens=2, min_tokens=1, temperature=0),
            seed=0,
            suppressed_ids=[VOCAB_SIZE, 10**6],  # cannot be sampled anyway
        )
        for slot, ids in enumerate(([5, 6, 7], [5, wrong, 7]))
    ]
    rows = [Row(slot=slot, start=0, count=3, new_blocks=[], sample=True) for slot in (0, 1)]
    result = executor.execute(StepPlan(step=1, rows=rows, admitted=admitted))
    assert (result.slots, result.tokens, list(result.failed)) == ([0], expected[:1], [1])
    with pytest.raises(TokenOutOfRange, match=f"token id {wrong} .*{VOCAB_SIZE} rows"):
        executor._worker.compute(1, rows[1:])
