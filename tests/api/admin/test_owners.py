"""Jobs belong to the key that made them: others do not see them, at any endpoint; an admin key sees all."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime.support.database import Database
from runtime.trainer.jobs import rows
from runtime.trainer.jobs.records import JobRecord
from runtime.trainer.jobs.recovery import adopt
from tests.api.admin.conftest import RECIPE, app_of, start_job, with_keys
from tests.trainer.jobs.fakes import World

pytestmark = pytest.mark.anyio
ROUTES = [
    ("GET", "/admin/jobs/{}"),
    ("GET", "/admin/jobs/{}/events"),
    ("GET", "/admin/jobs/{}/metrics"),
    ("GET", "/admin/jobs/{}/logs"),
    ("GET", "/admin/jobs/{}/recipe"),
    ("GET", "/admin/jobs/{}/report"),
    ("GET", "/admin/jobs/{}/files/train.jsonl"),
    ("POST", "/admin/jobs/{}/rerun"),
    ("POST", "/admin/jobs/{}/pause"),
    ("POST", "/admin/jobs/{}/resume"),
    ("POST", "/admin/jobs/{}/cancel"),
    ("DELETE", "/admin/jobs/{}"),
    ("GET", "/v1/fine_tuning/jobs/{}"),
    ("GET", "/v1/fine_tuning/jobs/{}/events"),
    ("GET", "/v1/fine_tuning/jobs/{}/checkpoints"),
    ("POST", "/v1/fine_tuning/jobs/{}/pause"),
    ("POST", "/v1/fine_tuning/jobs/{}/resume"),
    ("POST", "/v1/fine_tuning/jobs/{}/cancel"),
]


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}"}


async def test_every_route_of_a_job_is_tried(by_hand: World) -> None:
    paths = {
        (method, route.path.replace("{job_id:str}", "{}").replace("{name:path}", "train.jsonl"))
        for route in app_of(by_hand).routes
        if "{job_id:str}" in route.path
        for handler in route.route_handlers
        for method in handler.http_methods
        if method != "OPTIONS"
    }
    assert paths == set(ROUTES)


async def test_another_key_finds_no_job(by_hand: World, tmp_path: Path) -> None:
    async with with_keys(by_hand, tmp_path) as client:
        job = await start_job(client, **bearer("ann"))
        for method, path in ROUTES:
            answer = await client.request(method, path.format(job), headers=bearer("bob"))
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found"), path
        for method, path in ROUTES:
            if method == "GET":
                for name in ("ann", "root"):
                    answer = await client.get(path.format(job), headers=bearer(name))
                    found = 404 if "/files/" in path else 200  # the recipe came alone
                    assert answer.status_code == found, (path, answer.text)
                    assert found == 200 or answer.json()["error"]["code"] == "file_not_found"
        for path in ("/admin/jobs", "/v1/fine_tuning/jobs"):
            listed = {name: (await client.get(path, headers=bearer(name))).json() for name in ("ann", "bob", "root")}
            assert [len(page["data"]) for page in listed.values()] == [1, 0, 1]
            behind = await client.get(path, params={"after": job}, headers=bearer("bob"))
            assert (behind.status_code, behind.json()["error"]["param"]) == (404, "after")
        assert (await client.post(f"/admin/jobs/{job}/cancel", headers=bearer("root"))).status_code == 200


async def test_an_idempotency_key_is_that_of_one_owner(by_hand: World, tmp_path: Path) -> None:
    async with with_keys(by_hand, tmp_path) as client:
        key = {"idempotency-key": "k", "content-type": "application/yaml"}
        first = await client.post("/admin/train", content=RECIPE, headers={**bearer("ann"), **key})
        again = await client.post("/admin/train", content=RECIPE, headers={**bearer("ann"), **key})
        assert (first.status_code, again.status_code) == (201, 200)
        other = await client.post("/admin/train", content=RECIPE, headers={**bearer("bob"), **key})
        assert other.status_code == 409
        assert first.json()["id"] not in other.text


async def test_the_owner_is_in_the_record_of_the_folder(by_hand: World, tmp_path: Path) -> None:
    """A job that is made again from its folder, after the database was lost, belongs to the same key."""
    async with with_keys(by_hand, tmp_path) as client:
        job = await start_job(client, **bearer("ann"))
    path = by_hand.manager.directories.record(job)
    record = msgspec.json.decode(path.read_bytes(), type=JobRecord)
    assert record.job.owner != ""
    database = Database(tmp_path / "new", [rows.SCHEMA])
    adopted: Any = database.run(lambda c: adopt(c, by_hand.manager.directories)).result()
    assert adopted == ([job], [])
    assert database.run(lambda c: rows.get(c, job)).result().owner == record.job.owner
    database.close()


async def test_lists_take_the_same_parameters(by_hand: World, tmp_path: Path) -> None:
    async with with_keys(by_hand, tmp_path) as client:
        jobs = [await start_job(client, b"name: j%d\nsteps: 3\n" % number, **bearer("ann")) for number in range(3)]

        async def page(path: str, **params: Any) -> dict[str, Any]:
            answer = await client.get(path, params=params, headers=bearer("ann"))
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        for path in ("/admin/jobs", "/v1/fine_tuning/jobs"):
            first = await page(path, limit=2)
            assert [one["id"] for one in first["data"]] == jobs[:0:-1]
            assert (first["first_id"], first["last_id"], first["has_more"]) == (jobs[2], jobs[1], True)
            rest = await page(path, limit=2, after=first["last_id"])
            assert ([one["id"] for one in rest["data"]], rest["has_more"]) == ([jobs[0]], False)
            assert [one["id"] for one in (await page(path, order="asc", after=jobs[0]))["data"]] == jobs[1:]
        events = f"/v1/fine_tuning/jobs/{jobs[0]}/events"
        newest, oldest = (await page(events))["data"], (await page(events, order="asc"))["data"]
        assert newest == oldest[::-1]
        assert (await page(events, order="asc", after=oldest[0]["id"]))["data"] == oldest[1:]
        for path in ("/admin/jobs", "/v1/fine_tuning/jobs", events, f"/v1/fine_tuning/jobs/{jobs[0]}/checkpoints"):
            for name, value in (("limit", "0"), ("limit", "101"), ("order", "up"), ("before", "x"), ("after", "x")):
                answer = await client.get(path, params={name: value}, headers=bearer("ann"))
                assert answer.status_code == (404 if name == "after" else 400), (path, name)
                assert answer.json()["error"]["param"] == name
