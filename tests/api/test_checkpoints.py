"""Checkpoints of a job that runs, over HTTP: in the list of models, and answering as PEFT does with their files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from runtime.support import failpoints
from tests.adapter_files import peft_greedy
from tests.api.adapter_requests import ASK, adapter_settings, answer, error
from tests.api.conftest import RunningServer
from tests.waiting import wait_until

RECIPE = """
name: small
adapter: lora
lora_r: 4
lora_alpha: 16
lora_target_linear: true
datasets:
  - path: texts.jsonl
    type: completion
sequence_len: 32
micro_batch_size: 2
max_steps: 100000
learning_rate: 5e-2
lr_scheduler: constant
save_steps: 2
save_total_limit: 1000
"""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def http(tiny_model: Path, tmp_path: Path, state: Path) -> Iterator[httpx.Client]:
    """A server whose jobs take their time."""
    with RunningServer(adapter_settings(tiny_model, state, tmp_path)) as server:
        failpoints.configure("train.step=sleep:0.1")
        try:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                yield client
        finally:
            failpoints.configure("")


def start(http: httpx.Client) -> str:
    data = "".join(json.dumps({"text": f"The newt number {number} swims."}) + "\n" for number in range(8))
    files = {"recipe": ("recipe.yaml", RECIPE), "texts.jsonl": ("texts.jsonl", data)}
    response = http.post("/admin/train", files=files)
    assert response.status_code in (201, 202), response.text
    return str(response.json()["id"])


def models(http: httpx.Client) -> dict[str, dict[str, Any]]:
    return {model["id"]: model for model in http.get("/v1/models").json()["data"]}


def test_a_running_job_s_checkpoints(http: httpx.Client, tiny_model: Path, state: Path) -> None:
    job_id, base = start(http), tiny_model.name
    wait_until(lambda: "small:ckpt-step-4" in models(http))
    assert list(models(http))[:3] == [base, "small:ckpt-step-2", "small:ckpt-step-4"]
    asked = "small:ckpt-step-4"
    shown = http.get(f"/v1/models/{asked}").json()
    folder = state / "jobs" / job_id / "checkpoints" / "step-4" / "adapter_files"
    assert (shown["id"], shown["root"], shown["parent"]) == (asked, str(folder), base)
    assert shown["prompt_format"] == "text"
    expected = peft_greedy(tiny_model, folder, ASK["prompt"], 8)
    assert expected != answer(http, base)
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
        done = client.completions.create(
            model=asked,
            prompt=ASK["prompt"],
            max_tokens=8,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
    assert done.model == asked
    assert done.choices[0].model_extra is not None
    assert done.choices[0].model_extra["token_ids"] == expected
    assert http.get(f"/admin/jobs/{job_id}").json()["status"] == "running"
    http.post(f"/admin/jobs/{job_id}/pause")
    wait_until(lambda: list(models(http)) == [base])  # it does not run
    http.post(f"/admin/jobs/{job_id}/resume")
    wait_until(lambda: asked in models(http))
    http.post(f"/admin/jobs/{job_id}/cancel")
    wait_until(lambda: list(models(http)) == [base])
    assert error(http.post("/v1/completions", json={**ASK, "model": asked})) == (404, "model", "model_not_found")
