"""/admin/jobs: lists, one job, metrics, logs, and what can be asked of a job."""

import csv
import io
import json
from typing import Any

import pytest
from msgspec.structs import replace

from runtime.events import EvalEvent, FinishedEvent
from tests.api.admin.conftest import admin, start_job
from tests.trainer.jobs.fakes import World, step_event

pytestmark = pytest.mark.anyio


async def test_the_list_is_paged_and_filtered(by_hand: World) -> None:
    client = admin(by_hand)
    ids = [await start_job(client, f"name: a{n}\n".encode()) for n in range(5)]
    await by_hand.until(ids[0], "running")
    page = (await client.get("/admin/jobs?limit=2")).json()
    assert (page["object"], page["has_more"]) == ("list", True)
    assert [job["id"] for job in page["data"]] == [ids[4], ids[3]]
    page = (await client.get(f"/admin/jobs?limit=3&after={ids[3]}")).json()
    assert ([job["id"] for job in page["data"]], page["has_more"]) == ([ids[2], ids[1], ids[0]], False)
    page = (await client.get("/admin/jobs?status=running,failed")).json()
    assert [job["id"] for job in page["data"]] == [ids[0]]
    page = (await client.get("/admin/jobs?status=running&status=queued")).json()
    assert len(page["data"]) == 5


async def test_one_job(by_hand: World) -> None:
    client = admin(by_hand)
    job_id = await start_job(client, b"name: a\nsteps: 6\nevery: 2\n")
    await by_hand.until(job_id, "running")
    await by_hand.settle()
    await by_hand.step(4)
    job = (await client.get(f"/admin/jobs/{job_id}")).json()
    assert (job["status"], job["step"], job["total_steps"], job["loss"]) == ("running", 4, 6, 0.25)
    assert job["trained_tokens"] == 40
    assert [checkpoint["step"] for checkpoint in job["checkpoints"]] == [2, 4]
    assert job["step_progress"] is None
    assert 0 <= job["estimated_finish"] - job["started_at"] - 4 <= 10  # 2 steps of 2 seconds each
    await by_hand.step(2)
    await by_hand.until(job_id, "succeeded")
    job = (await client.get(f"/admin/jobs/{job_id}")).json()
    assert (job["status"], job["adapter"], job["error"], job["estimated_finish"]) == ("succeeded", "a@1", None, None)
    assert job["finished_at"] >= job["started_at"]


@pytest.mark.parametrize("good", ["yes", "no"])
async def test_the_gate_of_a_job_is_reported(world: World, good: str) -> None:
    client = admin(world)
    job_id = await start_job(client, f"name: a\nsteps: 2\ngood: {good}\n".encode())
    await world.until(job_id, "succeeded")
    gate = (await client.get(f"/admin/jobs/{job_id}")).json()["gate"]
    assert (gate["condition"], gate["met"]) == ("always", good == "yes")
    assert gate["reason"] == f"train_loss is {gate['metrics']['train_loss']}"
    assert gate["metrics"]["eval_loss"] == 0.5


async def test_a_job_at_work_has_no_report_of_its_gate(by_hand: World) -> None:
    client = admin(by_hand)
    job_id = await start_job(client)
    assert (await client.get(f"/admin/jobs/{job_id}")).json()["gate"] is None


async def test_a_job_says_whether_it_can_be_resumed(by_hand: World) -> None:
    client = admin(by_hand)

    async def resumable(job_id: str) -> bool:
        return bool((await client.get(f"/admin/jobs/{job_id}")).json()["resumable"])

    bare = await start_job(client, b"name: bare\nsteps: 3\nevery: 1\n")
    await by_hand.until(bare, "running")
    await by_hand.settle()
    assert not await resumable(bare)
    by_hand.runs.current.fail("nan_loss")
    await by_hand.until(bare, "failed")
    assert not await resumable(bare)
    trained = await start_job(client, b"name: trained\nsteps: 3\nevery: 1\n")
    await by_hand.until(trained, "running")
    await by_hand.settle()
    await by_hand.step()
    by_hand.runs.current.fail("nan_loss")
    await by_hand.until(trained, "failed")
    assert await resumable(trained)
    answers = [await client.post(f"/admin/jobs/{job_id}/resume") for job_id in (bare, trained)]
    assert [answer.status_code for answer in answers] == [409, 200]
    assert not answers[1].json()["resumable"]


async def test_a_failed_job_says_why(by_hand: World) -> None:
    client = admin(by_hand)
    job_id = await start_job(client)
    await by_hand.until(job_id, "running")
    await by_hand.settle()
    by_hand.runs.current.fail("nan_loss")
    await by_hand.until(job_id, "failed")
    error = (await client.get(f"/admin/jobs/{job_id}")).json()["error"]
    assert error == {"code": "nan_loss", "message": "The loss is not a number.", "param": None}


async def test_metrics_as_json_and_csv(world: World) -> None:
    client = admin(world)
    job_id = await start_job(client)
    await world.until(job_id, "succeeded")
    page = (await client.get(f"/admin/jobs/{job_id}/metrics")).json()
    assert [(row["type"], row["step"], row["loss"]) for row in page["data"]] == [
        ("step", 1, 1.0), ("step", 2, 0.5), ("step", 3, pytest.approx(1 / 3)), ("eval", 3, 0.5),
    ]  # fmt: skip
    page = (await client.get(f"/admin/jobs/{job_id}/metrics?after=1&limit=1")).json()
    assert ([row["step"] for row in page["data"]], page["has_more"]) == ([2], True)
    answer = await client.get(f"/admin/jobs/{job_id}/metrics", headers={"accept": "text/csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [(row["type"], row["step"], row["learning_rate"]) for row in rows] == [
        ("step", "1", "0.0001"), ("step", "2", "0.0001"), ("step", "3", "0.0001"), ("eval", "3", ""),
    ]  # fmt: skip


async def test_metrics_of_the_loss_go_wherever_loss_and_accuracy_go(by_hand: World) -> None:
    client = admin(by_hand)
    job_id = await start_job(client)
    await by_hand.until(job_id, "running")
    await by_hand.settle()
    run = by_hand.runs.current
    run.done = 3
    run.emit(replace(step_event(3), metrics={"rewards/margins": 0.25, "rewards/std": float("nan")}))
    run.emit(EvalEvent(step=3, loss=0.5, accuracy=0.75, tokens=10, metrics={"rewards/margins": 0.5}))
    run.emit(FinishedEvent(step=3, best_step=3))
    await by_hand.until(job_id, "succeeded")
    expected = [{"rewards/margins": 0.25, "rewards/std": None}, {"rewards/margins": 0.5}]
    rows = (await client.get(f"/admin/jobs/{job_id}/metrics")).json()["data"]
    assert [row["metrics"] for row in rows] == expected
    assert [row["loss"] for row in rows] == [pytest.approx(1 / 3), 0.5]
    events = (await client.get(f"/admin/jobs/{job_id}/events")).json()["data"]
    assert [event["data"]["metrics"] for event in events if event["type"] == "metrics"] == expected
    answer = await client.get(f"/admin/jobs/{job_id}/metrics", headers={"accept": "text/csv"})
    table = csv.DictReader(io.StringIO(answer.text))
    assert [(row["loss"], row["rewards/margins"], row["rewards/std"]) for row in table] == [
        (str(1 / 3), "0.25", ""), ("0.5", "0.5", ""),
    ]  # fmt: skip
    (published,) = by_hand.publisher.published
    assert published["metrics"] == {
        "step": 3, "train_loss": pytest.approx(1 / 3), "train_accuracy": 0.5, "train_rewards/margins": 0.25,
        "eval_loss": 0.5, "eval_accuracy": 0.75, "eval_rewards/margins": 0.5,
    }  # fmt: skip


async def test_the_log_is_json_lines(world: World) -> None:
    client = admin(world)
    job_id = await start_job(client)
    await world.until(job_id, "succeeded")
    await world.settle()
    answer = await client.get(f"/admin/jobs/{job_id}/logs")
    assert answer.headers["content-type"].startswith("application/jsonl")
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert lines[-1]["message"] == "Published as shop@1."
    answer = await client.get(f"/admin/jobs/{job_id}/logs?lines=2")
    assert [json.loads(line) for line in answer.text.splitlines()] == lines[-2:]


async def test_holding_and_ending(by_hand: World) -> None:
    client = admin(by_hand)
    running = await start_job(client, b"name: a\n")
    queued = await start_job(client, b"name: b\n")
    await by_hand.until(running, "running")
    await by_hand.settle()

    async def post(job_id: str, action: str) -> tuple[int, Any]:
        answer = await client.post(f"/admin/jobs/{job_id}/{action}")
        body = answer.json()
        return answer.status_code, body.get("status") or body["error"]["code"]

    assert await post(queued, "pause") == (200, "paused")
    assert await post(queued, "resume") == (200, "queued")
    assert await post(queued, "resume") == (409, "job_state")
    assert await post(queued, "cancel") == (200, "cancelled")
    assert await post(queued, "cancel") == (409, "job_state")
    answer = await client.post(f"/admin/jobs/{running}/cancel")
    assert (answer.json()["status"], answer.json()["wanted"]) == ("running", "cancel")
    assert await post(running, "pause") == (409, "job_state")
    await by_hand.step()
    await by_hand.until(running, "cancelled")


@pytest.mark.parametrize("path", ["", "/events", "/metrics", "/logs"])
async def test_a_job_that_is_not_there(world: World, path: str) -> None:
    answer = await admin(world).get(f"/admin/jobs/ftjob-no{path}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "job_not_found"
    streamed = await admin(world).get("/admin/jobs/ftjob-no/events", headers={"accept": "text/event-stream"})
    assert streamed.status_code == 404


@pytest.mark.parametrize("action", ["cancel", "pause", "resume"])
async def test_nothing_can_be_asked_of_a_job_that_is_not_there(world: World, action: str) -> None:
    assert (await admin(world).post(f"/admin/jobs/ftjob-no/{action}")).status_code == 404


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("?limit=0", "limit"),
        ("?limit=101", "limit"),
        ("?limit=1e3", "limit"),
        ("?status=done", "status"),
        ("?stauts=running", "stauts"),
    ],
)
async def test_parameters_that_make_no_sense(world: World, query: str, param: str) -> None:
    answer = await admin(world).get(f"/admin/jobs{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_after_a_job_that_is_not_there(world: World) -> None:
    assert (await admin(world).get("/admin/jobs?after=ftjob-no")).status_code == 404


async def test_a_job_that_has_ended_can_be_deleted(world: World) -> None:
    client = admin(world)
    job_id = await start_job(client)
    await world.until(job_id, "succeeded")
    await world.settle()
    answer = await client.delete(f"/admin/jobs/{job_id}")
    assert (answer.status_code, answer.json()) == (200, {"object": "job", "id": job_id, "deleted": True})
    assert list(world.manager.directories.root.iterdir()) == []
    for method, path in (("GET", ""), ("GET", "/events"), ("GET", "/logs"), ("DELETE", ""), ("POST", "/cancel")):
        answer = await client.request(method, f"/admin/jobs/{job_id}{path}")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "job_not_found"
    assert (await client.get("/admin/jobs")).json()["data"] == []
    assert len(world.publisher.published) == 1


async def test_a_job_that_has_not_ended_is_not_deleted(by_hand: World) -> None:
    client = admin(by_hand)
    job_id = await start_job(client)
    await by_hand.until(job_id, "running")
    answer = await client.delete(f"/admin/jobs/{job_id}")
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "job_state"
    assert (await client.get(f"/admin/jobs/{job_id}")).status_code == 200
    assert (await client.delete(f"/admin/jobs/{job_id}?force=1")).status_code == 400


async def test_the_recipe_and_the_files_come_back_as_they_were_sent(world: World) -> None:
    client = admin(world)
    recipe, rows = b"name: a\n# of mine\n", b'{"text": "newt"}\n'
    form = {"recipe": ("r.yaml", recipe), "data/rows.jsonl": ("rows.jsonl", rows)}
    job_id = (await client.post("/admin/train", files=form)).json()["id"]
    await world.until(job_id, "succeeded")
    answer = await client.get(f"/admin/jobs/{job_id}/recipe")
    assert (answer.content, answer.headers["content-type"]) == (recipe, "application/yaml")
    (file,) = (await client.get(f"/admin/jobs/{job_id}")).json()["files"]
    answer = await client.get(f"/admin/jobs/{job_id}/files/{file['name']}")
    assert (answer.content, answer.headers["content-length"]) == (rows, str(len(rows)))
    for name in ("other.jsonl", "%2e%2e/%2e%2e/job.json"):
        missing = await client.get(f"/admin/jobs/{job_id}/files/{name}")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "file_not_found")
    (next(world.manager.directories.uploads(job_id).iterdir())).unlink()
    answer = await client.get(f"/admin/jobs/{job_id}/files/{file['name']}")
    assert "was deleted" in answer.json()["error"]["message"]


async def test_the_schema_of_recipes(world: World) -> None:
    schema = (await admin(world).get("/admin/train/schema")).json()
    assert schema["$defs"]["Recipe"]["properties"]["lora_r"]["minimum"] == 1
