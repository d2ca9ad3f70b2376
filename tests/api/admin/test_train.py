"""POST /admin/train: what is taken as a recipe, with which files, and what is refused."""

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.errors import InvalidRequest
from runtime.trainer.jobs.records import JobSubmission
from tests.api.admin.conftest import RECIPE, YAML, admin, start_job
from tests.trainer.jobs.fakes import World

pytestmark = pytest.mark.anyio

TYPES = [
    "application/yaml",
    "application/x-yaml",
    "text/yaml",
    "text/plain; charset=utf-8",
    "application/octet-stream",
    "application/x-www-form-urlencoded",
]


def stored(world: World) -> list[str]:
    return [path.name for path in world.manager.directories.root.iterdir()]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("media_type", TYPES)
async def test_a_recipe_becomes_a_job(world: World, media_type: str) -> None:
    answer = await admin(world).post("/admin/train", content=RECIPE, headers={"content-type": media_type})
    assert answer.status_code == 201
    job = answer.json()
    assert job["id"].startswith("ftjob-")
    assert (job["object"], job["name"], job["total_steps"]) == ("job", "shop", 3)
    assert answer.headers["location"] == f"/admin/jobs/{job['id']}"
    assert (await world.until(job["id"], "succeeded")).adapter == "shop@1"


async def test_files_are_sent_along(world: World) -> None:
    files = {
        "recipe": ("recipe.yaml", b"name: shop\ndata: data/train set.jsonl\n"),
        "file": ("data/train set.jsonl", b'{"a": 1}\n' * 3),
        "other": ("../../etc/passwd", b"\n"),
    }
    answer = await admin(world).post("/admin/train", files=files)
    assert answer.status_code == 201
    job = answer.json()
    assert job["summary"]["rows"] == 4
    assert job["files"] == [
        {"name": "data/train set.jsonl", "bytes": 27},
        {"name": "../../etc/passwd", "bytes": 1},
    ]
    uploads = world.manager.directories.uploads(job["id"])
    assert sorted(path.name for path in uploads.iterdir()) == ["000-data_train_set.jsonl", "001-.._.._etc_passwd"]


@pytest.mark.parametrize(
    ("part", "filename", "name"),
    [
        ("file", "x.jsonl", "x.jsonl"),
        ("data/x.jsonl", "x.jsonl", "data/x.jsonl"),
        ("data/x.jsonl", "y.jsonl", "data/x.jsonl"),
        ("data/x.jsonl", "other/x.jsonl", "other/x.jsonl"),
        ("file", "data/x.jsonl", "data/x.jsonl"),
    ],
)
async def test_a_part_may_be_named_by_the_recipes_path(world: World, part: str, filename: str, name: str) -> None:
    files = {"recipe": ("r", RECIPE), part: (filename, b"1\n")}
    job = (await admin(world).post("/admin/train", files=files)).json()
    assert [file["name"] for file in job["files"]] == [name]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (RECIPE.replace(b"\n", b""), "--data-binary @recipe.yml"),
        (b"# a comment first" + RECIPE.replace(b"\n", b""), "--data-binary @recipe.yml"),
        (b"recipe=name%3A%20shop%0Asteps%3A%203", "--data-binary @recipe.yml"),
        (b"recipe.yml", "write --data-binary @recipe.yml"),
        (b"settings/recipes/tickets.YAML\n", "write --data-binary @settings/recipes/tickets.YAML"),
    ],
)
@pytest.mark.parametrize("media_type", ["application/x-www-form-urlencoded", "application/yaml"])
async def test_what_curl_sends_with_d_is_told_the_right_flag(
    world: World, body: bytes, says: str, media_type: str
) -> None:
    if media_type == "application/yaml" and b": " not in body and b"%" in body:
        return  # what a form would hold, and is one text in YAML
    answer = await admin(world).post("/admin/train", content=body, headers={"content-type": media_type})
    assert answer.status_code == 400
    error = error_of(answer)
    assert says in error["message"]
    assert "-F recipe=@recipe.yml -F file=@data.jsonl" in error["message"]
    assert error["param"] == "recipe"
    assert stored(world) == []


async def test_a_recipe_part_without_an_at_sign(world: World) -> None:
    answer = await admin(world).post("/admin/train", files={"recipe": (None, b"orders.yml")})
    assert "write -F recipe=@orders.yml" in error_of(answer)["message"]


async def test_a_form_without_a_recipe_names_the_file_that_is_one(world: World) -> None:
    files = {"file": ("orders.yml", RECIPE), "other": ("orders.jsonl", b"1\n")}
    answer = await admin(world).post("/admin/train", files=files)
    assert "-F recipe=@orders.yml" in error_of(answer)["message"]


async def test_a_large_file_goes_to_disk_whole(world: World) -> None:
    content = bytes(range(256)) * 20_000  # over several buffers, line breaks and hyphens in it
    files = {"recipe": ("r", RECIPE), "file": ("data.bin", content)}
    job = (await admin(world).post("/admin/train", files=files)).json()
    assert (world.manager.directories.uploads(job["id"]) / "000-data.bin").read_bytes() == content


async def test_a_dry_run_says_what_would_be_and_stores_nothing(world: World) -> None:
    files = {"recipe": ("r", RECIPE), "file": ("a.jsonl", b"\n\n")}
    answer = await admin(world).post("/admin/train?dry_run=1", files=files)
    assert answer.status_code == 200
    plan = answer.json()
    assert (plan["object"], plan["name"], plan["total_steps"], plan["summary"]["rows"]) == ("job.plan", "shop", 3, 2)
    assert stored(world) == []
    assert (await admin(world).get("/admin/jobs")).json()["data"] == []


@pytest.mark.parametrize("prefer", ["wait=0", 'respond-async, wait="0"', "wait=0; a=b"])
async def test_data_that_takes_long_to_read_is_a_202(world: World, prefer: str) -> None:
    world.preparer.hold = True
    headers = {**YAML, "prefer": prefer}
    answer = await admin(world).post("/admin/train", content=RECIPE + b"reads: 7\n", headers=headers)
    assert (answer.status_code, answer.json()["status"], answer.json()["name"]) == (202, "validating", None)
    async with asyncio.timeout(10):
        while (job := (await admin(world).get(f"/admin/jobs/{answer.json()['id']}")).json())["rows_read"] is None:
            await world.settle()
    assert job["rows_read"] == 7
    world.preparer.hold = False
    await world.until(answer.json()["id"], "succeeded")


async def test_an_idempotency_key(by_hand: World) -> None:
    client, headers = admin(by_hand), {**YAML, "idempotency-key": "k1"}
    first = await client.post("/admin/train", content=RECIPE, headers=headers)
    again = await client.post("/admin/train", content=RECIPE, headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    assert set(stored(by_hand)) <= {first.json()["id"]}
    other = await client.post("/admin/train", content=RECIPE + b"steps: 4\n", headers=headers)
    assert other.status_code == 409
    assert error_of(other)["code"] == "idempotency_key_reused"
    form = await client.post(
        "/admin/train", files={"recipe": RECIPE, "file": ("a", b"1")}, headers={"idempotency-key": "k1"}
    )
    assert form.status_code == 409


async def test_a_name_that_a_job_is_making(by_hand: World) -> None:
    client = admin(by_hand)
    job_id = await start_job(client)
    answer = await client.post("/admin/train", content=RECIPE, headers=YAML)
    assert answer.status_code == 409
    assert error_of(answer)["param"] == "name"
    assert job_id in error_of(answer)["message"]


async def test_a_full_queue(tmp_path: Any) -> None:
    world = World(tmp_path, steps_itself=False, max_waiting=1)
    await world.start()
    client = admin(world)
    await world.until(await start_job(client, b"name: a\n"), "running")
    await start_job(client, b"name: b\n")
    answer = await client.post("/admin/train", content=b"name: c\n", headers=YAML)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "60"
    assert error_of(answer)["type"] == "rate_limit_error"
    await world.stop(0.0)


def form(*parts: bytes, end: bytes = b"--X--\r\n") -> bytes:
    return b"".join(b"--X\r\n" + part + b"\r\n" for part in parts) + end


def part(disposition: bytes, content: bytes = b"x") -> bytes:
    return b"Content-Disposition: form-data; " + disposition + b"\r\n\r\n" + content


GOOD = part(b'name="recipe"', RECIPE)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        pytest.param(form(part(b'name="file"; filename="a"')), 400, "recipe", id="no recipe"),
        pytest.param(form(GOOD, GOOD), 400, "recipe", id="two recipes"),
        pytest.param(form(part(b'name="recipe"', b"  ")), 400, "recipe", id="empty recipe"),
        pytest.param(form(part(b'name="recipe"', b"x" * 2000)), 413, "recipe", id="large recipe"),
        pytest.param(form(GOOD, part(b'name="model"', b"y")), 400, "model", id="field that is no file"),
        pytest.param(form(GOOD, part(b'name="f"; filename=""')), 400, "f", id="file without a name"),
        pytest.param(form(GOOD, part(b'name="f"; filename="' + b"a" * 300 + b'"')), 400, "f", id="long name"),
        pytest.param(form(GOOD, part(b'name="f"; filename="a\x00b"')), 400, "f", id="NUL in a name"),
        pytest.param(form(GOOD, *[part(b'name="f"; filename="a"')] * 2), 400, "f", id="one name twice"),
        pytest.param(
            form(GOOD, *[part(b'name="f"; filename="%d"' % n) for n in range(101)]), 400, None, id="many files"
        ),
        pytest.param(form(GOOD, part(b'name="f"; filename="a"', b"x" * 20_000)), 413, None, id="large file"),
        pytest.param(form(GOOD, end=b""), 400, None, id="no end"),
        pytest.param(b"junk", 400, None, id="no form"),
        pytest.param(b"", 400, None, id="nothing"),
        pytest.param(form(b"X-Long: " + b"y" * 9000 + b"\r\n\r\n"), 400, None, id="large part header"),
        pytest.param(form(b"Content-Type: a/b\r\n\r\nx"), 400, None, id="part without a name"),
    ],
)
async def test_forms_that_are_refused(world: World, body: bytes, status: int, param: str | None) -> None:
    client = admin(world, max_recipe=1000, max_upload=16_000)
    headers = {"content-type": "multipart/form-data; boundary=X"}
    answer = await client.post("/admin/train", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert error_of(answer)["param"] == param
    assert stored(world) == []


@pytest.mark.parametrize(
    ("name", "how"), [("dry_run", "?dry_run=1"), ("file", "-F file=@data.jsonl"), ("learning_rate", "with an @")]
)
async def test_a_field_that_is_no_file_is_told_where_it_goes(world: World, name: str, how: str) -> None:
    body = form(GOOD, part(f'name="{name}"'.encode(), b"1"))
    headers = {"content-type": "multipart/form-data; boundary=X"}
    answer = await admin(world).post("/admin/train", content=body, headers=headers)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == name
    assert how in error_of(answer)["message"]
    assert stored(world) == []


@pytest.mark.parametrize(
    ("query", "headers", "body", "status", "param"),
    [
        pytest.param("", YAML, b"", 400, "recipe", id="empty"),
        pytest.param("", YAML, b"steps: 1\n", 400, "name", id="what the recipe's reader refuses"),
        pytest.param("", YAML, b"x" * 1001, 413, None, id="large"),
        pytest.param("", {"content-type": "application/xml"}, RECIPE, 415, None, id="XML"),
        pytest.param("", {"content-type": "multipart/form-data"}, RECIPE, 400, None, id="no boundary"),
        pytest.param("", {**YAML, "content-encoding": "gzip"}, RECIPE, 415, None, id="gzip"),
        pytest.param("", {**YAML, "idempotency-key": "k" * 256}, RECIPE, 400, "Idempotency-Key", id="long key"),
        pytest.param("?dry_run=maybe", YAML, RECIPE, 400, "dry_run", id="dry_run"),
        pytest.param("?dry_rum=1", YAML, RECIPE, 400, "dry_rum", id="unknown parameter"),
        pytest.param("?dry_run=1", YAML, b"steps: 1\n", 400, "name", id="dry run of a wrong recipe"),
    ],
)
async def test_requests_that_are_refused(
    world: World, query: str, headers: dict[str, str], body: bytes, status: int, param: str | None
) -> None:
    answer = await admin(world, max_recipe=1000).post(f"/admin/train{query}", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert error_of(answer)["param"] == param
    assert stored(world) == []
    assert (await admin(world).get("/admin/jobs")).json()["data"] == []


async def test_where_there_are_no_jobs_it_says_so() -> None:
    for method, path in (("POST", "/admin/train"), ("GET", "/admin/jobs"), ("POST", "/admin/jobs/x/cancel")):
        answer = await admin(None).request(method, path)
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "training_unavailable"


async def test_a_full_disk_refuses_a_file(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runtime.api.admin.train._write", full)
    answer = await admin(world).post("/admin/train", files={"recipe": RECIPE, "file": ("a", b"1")})
    assert answer.status_code == 503
    assert error_of(answer)["code"] == "storage_unavailable"
    assert stored(world) == []


async def test_a_full_disk_refuses_a_file_whenever_it_is_full(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of the steps from the first folder to the last sync; nothing is left."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "/secret/path")

    for place in ("make_directory", "create_file", "sync_directory"):
        with monkeypatch.context() as patch:
            patch.setattr(f"runtime.api.admin.train.{place}", full)
            answer = await admin(world).post("/admin/train", files={"recipe": RECIPE, "file": ("a", b"1")})
            assert answer.status_code == 503, place
            assert "secret" not in error_of(answer)["message"]
        assert stored(world) == [], place
    for place in ("make_directory", "replace_file"):
        with monkeypatch.context() as patch:
            patch.setattr(f"runtime.trainer.jobs.manager.{place}", full)
            answer = await admin(world).post("/admin/train", files={"recipe": RECIPE, "file": ("a", b"1")})
            assert answer.status_code == 503, place
        assert stored(world) == [], place
    assert (await admin(world).get("/admin/jobs")).json()["data"] == []


async def test_files_are_on_the_disk_before_the_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new folder's parent is synced, and each file, before the job has a row."""
    synced: list[Path] = []

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr("os.fsync", fsync)
    create, seen = world.manager.store.create, list[list[Path]]()

    async def created(*args: Any, **more: Any) -> Any:
        seen.append(list(synced))
        return await create(*args, **more)

    monkeypatch.setattr(world.manager.store, "create", created)
    answer = await admin(world).post("/admin/train", files={"recipe": RECIPE, "file": ("a.jsonl", b"1")})
    assert answer.status_code == 201
    jobs = world.manager.directories.root
    folder = jobs / answer.json()["id"]
    (before,) = seen
    incoming = world.manager.directories.incoming(folder.name)
    assert incoming / "000-a.jsonl" in before
    for path in (jobs, incoming, folder):
        assert path in before, path
    assert before.index(incoming) < before.index(folder), "the files, then the name that they get"


async def test_a_job_refused_at_the_moment_that_its_client_s_patience_ends_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a 404: the row was going while the wait for it ended."""
    remove, wait, removing = world.manager.store.remove, asyncio.wait, asyncio.Event()
    patience = 123.0  # ends when the row goes, however slow the disk is

    async def slowly(job_id: str) -> None:
        removing.set()
        await asyncio.sleep(0.05)
        await remove(job_id)

    async def waits(tasks: Any, timeout: float | None = None) -> Any:
        if timeout == patience:
            await removing.wait()
            return await wait(tasks, timeout=0)
        return await wait(tasks, timeout=timeout)

    monkeypatch.setattr(world.manager.store, "remove", slowly)
    monkeypatch.setattr(asyncio, "wait", waits)
    with pytest.raises(InvalidRequest, match="name"):
        await world.manager.submit(JobSubmission(id=world.manager.new_id(), recipe=b"x"), patience=patience)
    assert (await admin(world).get("/admin/jobs")).json()["data"] == []
