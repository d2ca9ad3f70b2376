"""Two real Q4_K_M files, with blocks in Q5_0, Q8_0, Q4_K and Q6_K, against transformers reading the same files.

transformers dequantises with the `gguf` package and builds its tokenizers by itself. Hundreds of megabytes are fetched
and several gigabytes of memory used: `pytest -m slow tests/checkpoints/gguf/test_real_ggufs.py`.
"""

import gc
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from runtime import LLM, SamplingParams
from runtime.checkpoints.gguf.blocks import type_name
from runtime.checkpoints.gguf.container import GgufFile
from runtime.errors import InvalidRequest
from tests.checkpoints.gguf.real_ggufs import GEMMA, QWEN, RealGguf

pytestmark = [pytest.mark.slow, pytest.mark.real_model, pytest.mark.timeout(1800)]

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time there was a"]
TEXT = "The newt – ünï 😀 1234 and   spaces\n\tdef f(x): return x  # ok\n日本語"
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many legs has a spider?"},
    {"role": "assistant", "content": "Eight."},
    {"role": "user", "content": "And an ant?"},
]
TOKENS = 32


@dataclass
class Both:
    path: Path
    llm: LLM
    tokenizer: Any
    greedy: list[list[int]]
    """What transformers answers to the prompts, and to the chat where the file has a template."""


@pytest.fixture(scope="module", params=[GEMMA, QWEN], ids=lambda file: file.name)
def both(request: pytest.FixtureRequest) -> Both:
    file: RealGguf = request.param
    path = file.path()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    greedy = []
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    if tokenizer.chat_template is not None:
        prompts.append(tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False))
    for prompt in prompts:
        ids = torch.tensor([prompt])
        done = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
        greedy.append(done[0, ids.shape[1] :].tolist())
    del model
    gc.collect()
    llm = LLM(str(path), num_blocks=256, max_model_len=1024)
    return Both(path, llm, tokenizer, greedy)


def test_the_formats_that_did_not_load_are_in_it(both: Both) -> None:
    kinds = Counter(type_name(info.type) for info in GgufFile(both.path).tensors.values())
    assert kinds["Q5_0"] > 50
    assert {"Q4_K", "Q6_K", "Q8_0"} <= kinds.keys()


def test_greedy_tokens_equal_those_of_transformers(both: Both) -> None:
    done = both.llm.generate(PROMPTS, SamplingParams(max_tokens=TOKENS, temperature=0.0))
    assert [answer.token_ids for answer in done] == both.greedy[: len(PROMPTS)]


def test_the_tokenizer_is_that_of_transformers(both: Both) -> None:
    ids = both.llm.tokenizer.encode(TEXT)
    assert ids == both.tokenizer(TEXT).input_ids
    assert both.llm.tokenizer.decode(ids) == both.tokenizer.decode(ids, skip_special_tokens=True)
    executor: Any = both.llm.engine._executor
    assert both.llm.tokenizer.vocab_size == executor._worker._decoder.spec.vocab_size


def test_chats(both: Both) -> None:
    """Gemma's file is of the base model and has no template, which is said; Qwen's renders as in transformers."""
    if both.tokenizer.chat_template is None:
        with pytest.raises(InvalidRequest, match="no chat template"):
            both.llm.chat(CHAT, SamplingParams(max_tokens=1))
        return
    assert both.llm.tokenizer.encode_chat(CHAT) == both.tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=False
    )
    assert not both.llm.tokenizer.turn_end.problems
    (answer,) = both.llm.chat(CHAT, SamplingParams(max_tokens=TOKENS, temperature=0.0))
    assert answer.token_ids == both.greedy[-1]
    assert answer.finish_reason == "stop"
