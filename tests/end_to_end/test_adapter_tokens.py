"""Tokens and rows that go with an adapter: trained by a recipe, asked over the API, and loaded by PEFT."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from runtime.cli.client import in_process
from settings.load import load
from tests.end_to_end.process import ServerProcess
from tests.end_to_end.test_training import RECIPE, chat_lines, num_right, rows
from tests.jobs import finished, served, upload
from tests.tiny import VOCAB_SIZE

EXAMPLES = Path(__file__).parents[2] / "settings" / "recipes"
FACT, END = VOCAB_SIZE, VOCAB_SIZE + 1
SMOLLM2_ROWS = 49152
ROWS = [{"text": f"Say. <fact>{text}"} for text in ("A newt swims.", "An eft walks.")] * 3
TAIL = (
    "datasets:\n  - path: a.jsonl\n    type: completion\nadapter: lora\nlora_r: 8\nmax_steps: 40\nlearning_rate: 0.01\n"
    "name: newt\nsequence_len: 64\nmicro_batch_size: 6\n"
)
TOKENS = "tokens: ['<fact>']\nspecial_tokens:\n  eos_token: <end>\n"
RECIPES = {
    "rows": TOKENS,
    "copies": TOKENS + "lora_modules_to_save: [embed_tokens, lm_head]\n",
}


def by_peft(model: Path, adapter: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    base.resize_token_embeddings(VOCAB_SIZE + 2, mean_resizing=False)
    adapted, ids = PeftModel.from_pretrained(base, adapter).eval(), list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(adapted(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


async def post(client: httpx.AsyncClient, path: str, model: str, **body: Any) -> Any:
    answer = await client.post(path, json={"model": model, **body})
    return answer.json() if answer.status_code == 200 else (answer.status_code, answer.json()["error"])


async def complete(client: httpx.AsyncClient, model: str, prompt: Any, **body: Any) -> Any:
    given = {"temperature": 0, "max_tokens": 12, "return_token_ids": True, **body}
    answer = await post(client, "/v1/completions", model, prompt=prompt, **given)
    return answer if isinstance(answer, tuple) else answer["choices"][0]


@pytest.mark.anyio
@pytest.mark.parametrize("kind", RECIPES)
async def test_tokens_are_trained_and_asked(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    base = tiny_model.name
    async with in_process(served(tiny_model, tmp_path), training=True) as client:
        job = await finished(client, upload(RECIPES[kind] + TAIL, ROWS))
        assert any("2 tokens are new ('<fact>', '<end>')" in note for note in job["summary"]["notes"])
        ids = (await post(client, "/tokenize", "newt", prompt="Say. <fact>"))["tokens"]
        assert ids[-1] == FACT
        assert FACT not in (await post(client, "/tokenize", base, prompt="Say. <fact>"))["tokens"]
        assert (await post(client, "/detokenize", "newt", tokens=ids))["prompt"] == "Say. <fact>"
        for path, body in (("/detokenize", {"tokens": ids}), ("/v1/completions", {"prompt": ids})):
            status, error = await post(client, path, base, **body)
            assert (status, f"from 0 to {VOCAB_SIZE - 1}, got {FACT}" in error["message"]) == (400, True)
        status, error = await complete(client, base, "Say.", logit_bias={str(FACT): 1})
        assert (status, error["param"]) == (400, "logit_bias")
        # It says the new token after what came before it in training, and ends with the other.
        told, beside = await asyncio.gather(
            complete(client, "newt", "Say.", logprobs=1), complete(client, base, "Say.", ignore_eos=True)
        )
        assert "<fact>" in told["text"]
        assert told["finish_reason"] == "stop"
        assert told["token_ids"][-1] == END
        assert "<end>" not in told["text"]
        assert FACT in told["token_ids"]
        assert "<fact>" in told["logprobs"]["tokens"]
        assert max(beside["token_ids"]) < VOCAB_SIZE
        shown = await complete(client, "newt", "Say.", skip_special_tokens=False, ignore_eos=True)
        assert "<end>" in shown["text"]
        forced = await complete(client, "newt", [5, END, 7], logit_bias={str(FACT): 100}, max_tokens=3)
        assert forced["text"] == "<fact>" * 3
        expected = by_peft(tiny_model, tmp_path / "adapters/newt/1", [*ids, 40, END], 8)
        free = await complete(client, "newt", [*ids, 40, END], max_tokens=8, ignore_eos=True)
        assert free["token_ids"] == expected
    async with in_process(served(tiny_model, tmp_path), training=True) as client:  # the next process has them, too
        assert (await complete(client, "newt", "Say.")) == {**told, "logprobs": None}


@pytest.mark.anyio
async def test_the_example(tiny_model: Path, tmp_path: Path) -> None:
    text = (EXAMPLES / "tokens.yaml").read_text().replace("data/markers.jsonl", "a.jsonl")
    rows = [json.loads(line) for line in (EXAMPLES / "data/markers.jsonl").read_text().splitlines()]
    async with in_process(served(tiny_model, tmp_path), training=True) as client:
        job = await finished(client, upload(text, rows))
        assert any("3 tokens are new ('<fact>', '</fact>', '<end>')" in note for note in job["summary"]["notes"])
        ids = (await post(client, "/tokenize", "tokens", prompt="<fact>a</fact>"))["tokens"]
        assert (ids[0], ids[-1]) == (VOCAB_SIZE, VOCAB_SIZE + 1)


@pytest.mark.anyio
async def test_a_limit_that_is_named(tiny_model: Path, tmp_path: Path) -> None:
    flags = {"model": str(tiny_model), "state_dir": str(tmp_path), "max_vocabulary_bytes": "100KiB"}
    async with in_process(load(flags=flags, env={}), training=True) as client:
        recipe = RECIPES["copies"] + TAIL
        posted = await client.post(
            "/admin/train", files={"recipe": recipe.encode(), "file": ("a.jsonl", '{"text": "a"}')}
        )
        assert posted.status_code == 400
        assert "adapters.max_vocabulary_bytes allows 102400" in posted.json()["error"]["message"]


GEMMA = """
embedding_lr: 0.01
chat_template: gemma
tokens: ["<start_of_turn>"]
special_tokens:
  eos_token: <end_of_turn>
"""


@pytest.mark.real_model
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_model_learns_another_template_with_tokens_that_it_lacks(tmp_path: Path) -> None:
    """SmolLM2, whose own template is ChatML, answers in Gemma's and stops at its end of a turn; the base does not."""
    pairs, held_out = rows()
    recipe = RECIPE.replace("num_epochs: 1", "num_epochs: 2") + GEMMA
    with ServerProcess("demo", tmp_path / "state") as server:
        base = server.http.get("/v1/models").json()["data"][0]["id"]
        before = server.tokens(base, held_out[0][0])
        job = server.wait_for_job(server.train(recipe, {"train.jsonl": chat_lines(pairs)}), 400)
        assert job["status"] == "succeeded", job["error"]
        assert any("2 tokens are new" in note for note in job["summary"]["notes"])
        chat = [{"role": "user", "content": held_out[0][0]}]
        answer = server.http.post("/tokenize", json={"model": "extract", "messages": chat}).json()
        spelled = server.http.post("/detokenize", json={"model": "extract", "tokens": answer["tokens"]}).json()
        assert spelled["prompt"].count("<start_of_turn>") == 2
        assert max(answer["tokens"]) >= SMOLLM2_ROWS
        right = num_right(server, "extract", held_out)
        assert right > 0.8 * len(held_out), f"{right} of {len(held_out)}"
        body = {"model": "extract", "messages": chat, "max_tokens": 60, "temperature": 0, "return_token_ids": True}
        ended = server.http.post("/v1/chat/completions", json=body).json()["choices"][0]
        assert ended["finish_reason"] == "stop"
        assert ended["token_ids"][-1] >= SMOLLM2_ROWS
        assert server.tokens(base, held_out[0][0]) == before
