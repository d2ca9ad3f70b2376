"""Ids that the model may sample are valid as input: rows beyond the tokenizer's tokens, and ids that it leaves out."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from runtime import LLM, SamplingParams
from runtime.errors import InvalidRequest
from tests.api.conftest import RunningServer, tiny_settings
from tests.tiny import make_tiny_llama

ROWS, TOKENS = 640, 512
GREEDY = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("padded"), vocab_size=ROWS)


@pytest.fixture(scope="module")
def llm(padded: Path) -> LLM:
    return LLM(str(padded), num_blocks=64)


def test_what_was_sampled_can_be_sent_back(llm: LLM, padded: Path) -> None:
    params = SamplingParams(max_tokens=64, temperature=1.5, seed=3, ignore_eos=True)
    (sampled,) = llm.generate([[5, 6, 7]], params)
    assert max(sampled.token_ids) >= TOKENS
    prompt = [5, 6, 7, *sampled.token_ids]
    theirs = AutoModelForCausalLM.from_pretrained(padded)
    with torch.inference_mode():
        expected = int(theirs(torch.tensor([prompt])).logits[0, -1].argmax())
    assert llm.generate([prompt], GREEDY)[0].token_ids == [expected]
    assert sampled.text == AutoTokenizer.from_pretrained(padded).decode(sampled.token_ids, skip_special_tokens=True)


def test_the_bound_is_the_embedding(llm: LLM) -> None:
    assert llm.engine.vocab_size == ROWS
    assert llm.generate([[ROWS - 1]], GREEDY)[0].token_ids
    for prompt in ([ROWS], [-1], [5, 10**6, 5]):
        with pytest.raises(InvalidRequest, match=f"from 0 to {ROWS - 1}, got"):
            llm.generate([prompt], GREEDY)


def test_any_row_can_stop_an_output(llm: LLM) -> None:
    stopping = SamplingParams(max_tokens=200, temperature=1.5, seed=3, ignore_eos=True, stop_token_ids=(ROWS - 1, 600))
    assert llm.generate([[5, 6, 7]], stopping)[0].token_ids
    with pytest.raises(InvalidRequest, match=f"from 0 to {ROWS - 1}, got {ROWS}"):
        llm.generate([[5]], SamplingParams(stop_token_ids=(ROWS,)))


def test_a_token_must_be_left_before_min_tokens(padded: Path) -> None:
    llm = LLM(str(padded), num_blocks=64, max_stop_token_ids=ROWS)
    every = tuple(range(ROWS))
    params = SamplingParams(max_tokens=4, min_tokens=2, ignore_eos=True, stop_token_ids=every)
    with pytest.raises(InvalidRequest, match="must leave a token to generate before min_tokens") as refused:
        llm.generate([[5]], params)
    assert refused.value.param == "stop_token_ids"
    with pytest.raises(InvalidRequest):  # the end of sequence is one of them
        llm.generate([[5]], SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=(*every[:2], *every[3:])))
    left = SamplingParams(max_tokens=4, min_tokens=2, temperature=0.0, ignore_eos=True, stop_token_ids=every[:-1])
    (done,) = llm.generate([[5]], left)
    assert done.token_ids[:2] == [ROWS - 1] * 2
    # Without min_tokens they may all be stops: the first token is the last.
    assert len(llm.generate([[5]], SamplingParams(max_tokens=4, stop_token_ids=every))[0].token_ids) == 1


@pytest.fixture(scope="module")
def gap(padded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer's last token has the id 600, and there is none from 511 to 599."""
    copy = tmp_path_factory.mktemp("gap") / "model"
    shutil.copytree(padded, copy)
    file = copy / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    text = next(text for text, id in content["model"]["vocab"].items() if id == 511)
    content["model"]["vocab"][text] = 600
    file.write_text(json.dumps(content), encoding="utf-8")
    return copy


def test_a_left_out_id_over_http(gap: Path) -> None:
    def post(path: str, body: dict[str, Any]) -> Any:
        answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    with RunningServer(tiny_settings(gap)) as server:
        text = post("/detokenize", {"tokens": [600]})["prompt"]
        assert post("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"] == [600]
        assert post("/detokenize", {"tokens": [511, 555, 639, 600]})["prompt"] == text
        for prompt in (text, [600], [555], [639], [[600], [639]]):
            body = {"prompt": prompt, "max_tokens": 1, "echo": True, "stop_token_ids": [639, 555]}
            shown = post("/v1/completions", body)["choices"][0]["text"]
            assert shown.startswith(text) or prompt in ([555], [639])
        answer = httpx.post(f"{server.url}/detokenize", json={"tokens": [640]})
        assert answer.status_code == 400
        assert "from 0 to 639, got 640" in answer.json()["error"]["message"]
