"""Numbers that clients send: what is out of range, too long or no number is a 400, in whatever way it is spelt."""

import pytest

from tests.api.admin.conftest import admin, start_job
from tests.trainer.jobs.fakes import World

pytestmark = pytest.mark.anyio

HOSTILE = [
    "00000000000199999999", "0" * 12 + "9" * 20, "0" * 5000, "9" * 5000, "9" * 16, "9" * 17, "9" * 19,
    "18446744073709551616", "-1", "-0", "+1", "1.0", "1e3", "0x10", "1_000", " 1", "1 ", "", "٣", "१", "nan", "null",
    "1,2", "²",
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE)
async def test_query_parameters(world: World, value: str) -> None:
    client = admin(world)
    job = await start_job(client)
    for path, name in (
        ("/admin/jobs", "limit"),
        (f"/admin/jobs/{job}/events", "limit"),
        (f"/admin/jobs/{job}/events", "after"),
        (f"/admin/jobs/{job}/metrics", "limit"),
        (f"/admin/jobs/{job}/metrics", "after"),
        (f"/admin/jobs/{job}/logs", "lines"),
    ):
        answer = await client.get(path, params={name: value})
        assert answer.status_code == 400, (path, name)
        assert answer.json()["error"]["param"] == name
        assert len(answer.text) < 500


@pytest.mark.parametrize("value", ["1", "01", "0000000000000020", "100"])
async def test_in_range_it_may_be_spelt_with_zeros(world: World, value: str) -> None:
    assert (await admin(world).get("/admin/jobs", params={"limit": value})).status_code == 200


async def test_a_parameter_given_twice(world: World) -> None:
    for query in ("limit=1&limit=2", "limit=1&limit=1"):
        answer = await admin(world).get(f"/admin/jobs?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit")
    answer = await admin(world).post("/admin/train?dry_run=0&dry_run=1", content=b"name: a\n")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "dry_run")
