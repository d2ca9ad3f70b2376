"""Recipes whose data files were uploaded to /v1/files before."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import RunningServer
from tests.api.state import stateful_settings, wait_for

ROW = {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In the pond."}]}
RECIPE = "adapter: lora\nlora_r: 4\nmax_steps: 1\nlearning_rate: 0.001\nname: newt\ndatasets:\n  - path: "


@pytest.fixture(scope="module")
def client(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        RunningServer(stateful_settings(tiny_model, tmp_path_factory.mktemp("state"))) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def upload(client: httpx.Client, name: str, data: str, purpose: str = "fine-tune") -> str:
    answer = client.post("/v1/files", data={"purpose": purpose}, files={"file": (name, data.encode())})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def post(client: httpx.Client, recipe: str, **query: Any) -> httpx.Response:
    headers = {"Content-Type": "application/yaml"}
    return client.post("/admin/train", content=recipe.encode(), headers=headers, params=query)


def test_a_stored_file_is_a_path(client: httpx.Client) -> None:
    """Also one without lines of JSON: the name under which it was uploaded says what it holds."""
    lines = upload(client, "rows.jsonl", "\n".join([json.dumps(ROW)] * 3))
    table = upload(client, "rows.csv", "prompt,completion\nWhere?,Here\nWho?,Me\n")
    plan = post(client, f"{RECIPE}{lines}\n  - path: {table}\n", dry_run=1)
    assert plan.status_code == 200, plan.text
    assert plan.json()["summary"]["train"]["examples"] == 5
    job = post(client, f"{RECIPE}{lines}\n").json()
    assert client.delete(f"/v1/files/{lines}").status_code == 200  # the job has its own
    states = {"succeeded", "failed", "cancelled"}
    done = wait_for(lambda: client.get(f"/admin/jobs/{job['id']}").json(), lambda job: job["status"] in states)
    assert done["status"] == "succeeded", done


def test_files_that_no_job_may_read(client: httpx.Client) -> None:
    absent = post(client, f"{RECIPE}file-{'0' * 24}\n", dry_run=1)
    assert absent.status_code == 400
    assert "is no file of /v1/files that this key may read" in absent.json()["error"]["message"]
    assert absent.json()["error"]["param"] == "datasets[0].path"
    batch = upload(client, "rows.jsonl", "{}", purpose="user_data")
    other = post(client, f"{RECIPE}{batch}\n", dry_run=1)
    assert other.status_code == 400
    assert "the purpose fine-tune" in other.json()["error"]["message"]
