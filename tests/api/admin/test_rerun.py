"""A job that is started again with changes, and its report."""

import pytest

from tests.api.admin.conftest import admin, start_job, with_keys
from tests.trainer.jobs.fakes import World

pytestmark = pytest.mark.anyio

FORM = {"recipe": b"name: shop\nsteps: 3\ndata: rows.jsonl\n", "file": ("rows.jsonl", b"{}\n{}\n")}


async def test_a_job_is_started_again_with_changes(world: World) -> None:
    client = admin(world)
    first = (await client.post("/admin/train", files=FORM)).json()["id"]
    await world.until(first, "succeeded")
    answer = await client.post(f"/admin/jobs/{first}/rerun", json={"set": {"steps": 5, "name": "other"}})
    assert answer.status_code == 201, answer.text
    second = answer.json()["id"]
    assert answer.headers["location"] == f"/admin/jobs/{second}"
    assert second != first
    assert [file["name"] for file in answer.json()["files"]] == ["rows.jsonl"]
    assert answer.json()["summary"]["rows"] == 2, "the files are those of the first"
    job = await world.until(second, "succeeded")
    assert (job.name, job.total_steps) == ("other", 5)
    events = (await client.get(f"/admin/jobs/{second}/events")).json()["data"]
    assert f'Started from {first} with steps = 5, name = "other".' in [event["message"] for event in events]
    recipe = (await client.get(f"/admin/jobs/{second}/recipe")).text
    assert recipe == "name: other\nsteps: 5\ndata: rows.jsonl\n"
    await client.delete(f"/admin/jobs/{first}")
    assert (await client.get(f"/admin/jobs/{second}/files/rows.jsonl")).content == b"{}\n{}\n"


async def test_the_plan_alone(world: World) -> None:
    client = admin(world)
    first = (await client.post("/admin/train", files=FORM)).json()["id"]
    await world.until(first, "succeeded")
    answer = await client.post(f"/admin/jobs/{first}/rerun?dry_run=1", json={"set": {"steps": 7}})
    assert (answer.status_code, answer.json()["total_steps"]) == (200, 7)
    assert len((await client.get("/admin/jobs")).json()["data"]) == 1
    assert [path.name for path in (world.path / "jobs").iterdir()] == [first]


async def test_what_is_wrong_is_named(world: World) -> None:
    client = admin(world)
    first = (await client.post("/admin/train", files=FORM)).json()["id"]
    await world.until(first, "succeeded")
    for body, param in (({"set": {"a b": 1}}, "set.a b"), ({"set": {"name": None}}, "name"), ({"set": 1}, "set")):
        answer = await client.post(f"/admin/jobs/{first}/rerun", json=body)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["param"] == param
    assert (await client.post("/admin/jobs/ftjob-none/rerun", json={})).status_code == 404
    (upload,) = (world.path / "jobs" / first / "uploads").iterdir()
    upload.unlink()
    answer = await client.post(f"/admin/jobs/{first}/rerun", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "files_deleted")
    assert [path.name for path in (world.path / "jobs").iterdir()] == [first]


async def test_a_key_starts_no_job_of_another_again(world: World, tmp_path: object) -> None:
    client = with_keys(world, world.path)
    ann, bob = ({"authorization": f"Bearer {name}"} for name in ("ann", "bob"))
    first = await start_job(client, **ann)
    await world.until(first, "succeeded")
    for method, path in (("POST", "rerun"), ("GET", "report")):
        answer = await client.request(method, f"/admin/jobs/{first}/{path}", headers=bob, json={})
        assert answer.status_code == 404, path
    answer = await client.post(f"/admin/jobs/{first}/rerun", json={}, headers=ann)
    assert (await world.manager.store.get(answer.json()["id"])).owner == (await world.manager.store.get(first)).owner


async def test_the_report(world: World) -> None:
    client = admin(world)
    job_id = await start_job(client)
    await world.until(job_id, "succeeded")
    answer = await client.get(f"/admin/jobs/{job_id}/report")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "shop: succeeded" in answer.text
    assert "<polyline" in answer.text
