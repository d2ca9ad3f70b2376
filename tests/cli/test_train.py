"""`eft train` and `eft jobs`, over a socket and in this process."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.progress import TimeRemainingColumn

from runtime.cli import client
from runtime.cli.output import _bar
from runtime.cli.recipe_files import read_recipe
from runtime.cli.train import _Pace
from runtime.engine.state import OpenedState
from runtime.support.logs import configure
from settings.schema import ObservabilitySettings
from tests.cli.conftest import Eft
from tests.cli.fake_api import listening
from tests.cli.jobs_api import KEY, JobsApi
from tests.trainer.jobs.fakes import World

RECIPE = "name: shop\nsteps: 4\n"


@pytest.fixture(autouse=True)
def _quiet_logs() -> None:
    configure(ObservabilitySettings(log_level="error"))


@pytest.fixture
def jobs_api(tmp_path: Path) -> JobsApi:
    return JobsApi(tmp_path / "state")


@pytest.fixture
def jobs_url(jobs_api: JobsApi, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("EFT_ADMIN_KEY", KEY)
    with listening(jobs_api) as address:  # type: ignore[arg-type]
        yield address


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


# -- eft train -------------------------------------------------------------------------------


def test_following_a_job_to_its_end(eft: Eft, jobs_url: str, recipe: Path) -> None:
    done = eft("train", recipe, "--url", jobs_url, "--follow")
    assert done.code == 0
    assert done.out == f"Published as shop@1. Try it:\n  eft chat shop --url {jobs_url}\n"
    assert "Started." in done.err
    assert "Published as shop@1." in done.err


def test_steps_are_shown_as_plain_lines(eft: Eft, jobs_url: str, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.cli.output.INTERVAL", 0.0)
    done = eft("train", recipe, "--url", jobs_url, "--follow")
    # 20 tokens in 2 seconds a step, and 2 steps of 2 seconds to go.
    assert "shop: 2/4 loss 0.5000, 10 tok/s, 00:00:04 left" in done.err.splitlines()
    assert "shop: 4/4 loss 0.2500, 10 tok/s, 00:00:00 left" in done.err.splitlines()


def test_how_far_the_reading_is_is_shown(
    eft: Eft, jobs_url: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.cli.output.INTERVAL", 0.0)
    recipe.write_text(RECIPE + "reads: 1234\n")
    done = eft("train", recipe, "--url", jobs_url, "--follow")
    assert "shop: 1,234 rows read" in done.err.splitlines()


def test_a_step_that_takes_long_is_shown_as_it_goes(
    eft: Eft, jobs_url: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.cli.output.INTERVAL", 0.0)
    recipe.write_text(RECIPE + "slow: yes\nwarning: all steps are warmup\n")
    done = eft("train", recipe, "--url", jobs_url, "--follow")
    lines = done.err.splitlines()
    assert "shop: 0/4 step 1 50% done, 00:01:10 left" in lines
    assert "shop: 3/4 step 4 50% done, loss 0.3333, 00:00:10 left" in lines  # the last loss stays in sight
    assert lines.index("shop: 0/4 step 1 50% done, 00:01:10 left") < lines.index(
        "shop: 1/4 loss 1.0000, 10 tok/s, 00:00:06 left"
    )
    assert "warning: all steps are warmup" in lines


def test_the_bar_leaves_the_time_left_to_the_notes() -> None:
    """Two estimates side by side, a few seconds apart, would only puzzle."""
    shown = {remaining: [type(column) for column in _bar(remaining).columns] for remaining in (True, False)}
    assert TimeRemainingColumn in shown[True]
    assert TimeRemainingColumn not in shown[False]


def test_one_slow_step_does_not_change_the_time_left_by_much() -> None:
    """The step after an evaluation has the evaluation's time in it."""
    pace = _Pace()
    for step in range(1, 10):
        pace.after({"step": step, "seconds": 2.0, "tokens": 20, "loss": 1.0}, 30)
    note = pace.after({"step": 10, "seconds": 22.0, "tokens": 20, "loss": 0.5}, 30)
    assert note == "loss 0.5000, 5 tok/s, 00:01:20 left"  # 20 steps of 40 s / 10, not of 22 s
    for step in range(11, 31):
        note = pace.after({"step": step, "seconds": 1.0, "tokens": 20, "loss": None}, 30)
    assert note == "loss nan, 20 tok/s, 00:00:00 left"


def test_a_stream_that_breaks_is_taken_up_again(
    eft: Eft, jobs_api: JobsApi, jobs_url: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.cli.train._PAUSE", 0.01)
    monkeypatch.setattr("runtime.cli.output.INTERVAL", 0.0)
    jobs_api.cut_streams = 3
    done = eft("train", recipe, "--url", jobs_url, "--follow")
    assert done.code == 0
    assert jobs_api.cut_streams == 0
    assert [line.split()[1] for line in done.err.splitlines() if " loss " in line and line.startswith("shop")] == [
        "1/4", "2/4", "3/4", "4/4",
    ]  # fmt: skip


def test_without_follow_it_says_how_to(eft: Eft, jobs_url: str, recipe: Path) -> None:
    done = eft("train", recipe, "--url", jobs_url)
    assert done.code == 0
    job_id = done.out.split()[0]
    assert done.out.splitlines()[1] == f"  eft jobs events {job_id} --follow --url {jobs_url}"
    assert eft("jobs", "events", job_id, "--follow", "--url", jobs_url).code == 0


def test_json_is_the_job(eft: Eft, jobs_url: str, recipe: Path) -> None:
    done = eft("train", recipe, "--url", jobs_url, "--follow", "--json")
    job = json.loads(done.out)
    assert (job["status"], job["adapter"], job["step"]) == ("succeeded", "shop@1", 4)


def test_a_dry_run_makes_no_job(eft: Eft, jobs_url: str, recipe: Path) -> None:
    done = eft("train", recipe, "--url", jobs_url, "--dry-run")
    assert done.code == 0
    assert done.out.startswith("shop: 4 steps\n")
    assert json.loads(eft("jobs", "list", "--url", jobs_url, "--json").out)["data"] == []


def test_another_name(eft: Eft, jobs_url: str, recipe: Path) -> None:
    done = eft("train", recipe, "--url", jobs_url, "--follow", "--name", "store")
    assert "Published as store@1" in done.out


def test_the_data_files_of_the_recipe_are_sent(eft: Eft, jobs_api: JobsApi, jobs_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "a.jsonl").write_text("{}\n{}\n")
    (tmp_path / "b.jsonl").write_text("{}\n")
    (folder / "recipe.yaml").write_text(
        "name: shop\ndata: data/a.jsonl\n"
        "datasets:\n  - path: data/a.jsonl\n  - path: b.jsonl\n  - path: on/the/server\n"
    )
    done = eft("train", folder / "recipe.yaml", "--url", jobs_url, "--json")
    job = json.loads(done.out)
    assert job["files"] == [{"name": "data/a.jsonl", "bytes": 6}, {"name": "b.jsonl", "bytes": 3}]
    assert job["summary"]["rows"] == 3


def test_a_file_beside_the_recipe_stands_in_for_one_of_its_name(
    eft: Eft, jobs_api: JobsApi, jobs_url: str, tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "a.jsonl").write_text("{}\n")
    (folder / "recipe.yaml").write_text("name: shop\ndata: data/a.jsonl\ndatasets:\n  - path: data/a.jsonl\n")
    done = eft("train", folder / "recipe.yaml", "--url", jobs_url, "--json")
    assert json.loads(done.out)["files"] == [{"name": "data/a.jsonl", "bytes": 3}]
    assert f"data/a.jsonl is not there: {folder / 'a.jsonl'}, which has its name, is used" in done.err


def test_of_two_that_share_a_base_name_none_stands_in(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("datasets: [{path: x/a.jsonl}]\ntest_datasets: [{path: y/a.jsonl}]\n")
    assert read_recipe(recipe).data == {}
    assert set(read_recipe(recipe).missing) == {"x/a.jsonl", "y/a.jsonl"}


def test_what_is_missing_is_named_with_the_nearest_name(eft: Eft, jobs_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "orders.jsonl").write_text("{}\n")
    (folder / "recipe.yaml").write_text("name: a\ndata: data/ordres.jsonl\ndatasets:\n  - path: data/ordres.jsonl\n")
    done = eft("train", folder / "recipe.yaml", "--url", jobs_url)
    assert done.code == 1
    assert "eft: 400: data/ordres.jsonl was not sent.\n" in done.err
    assert f"beside the recipe; did you mean {folder / 'data' / 'orders.jsonl'}?" in done.err


@pytest.mark.parametrize("refusal", ["rows is missing: it is neither", "'rows' was not sent along, and may not"])
def test_a_folder_is_called_one_with_what_is_in_it(tmp_path: Path, refusal: str) -> None:
    """Neither a folder without data nor a refusal of something else gives examples."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("datasets: [{path: rows}]\n")
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "notes.txt").touch()
    said = f"{refusal}\nrows is a folder: name the files in it that are the data"
    assert read_recipe(recipe).explain(refusal) == said
    for name in ("d.csv", "a.jsonl", "b.csv", "c.parquet"):
        (rows / name).touch()
    assert read_recipe(recipe).explain(refusal) == f"{said}, such as data_files: [a.jsonl, b.csv, c.parquet]"
    other = "learning_rate: rows is missing"
    assert read_recipe(recipe).explain(other) == other


@pytest.mark.parametrize(
    ("lines", "code", "message"),
    [
        ("steps: 1\n", 1, "eft: 400: name: missing.\n"),
        ("name: a\ngood: no\n", 3, ""),
        ("name: a\ndata: gone.jsonl\n", 1, "eft: 400: gone.jsonl was not sent.\n"),
    ],
)
def test_exit_codes(eft: Eft, jobs_url: str, recipe: Path, lines: str, code: int, message: str) -> None:
    recipe.write_text(lines)
    done = eft("train", recipe, "--url", jobs_url, "--follow")
    assert done.code == code
    assert message in done.err


def test_wrong_usage(eft: Eft, recipe: Path, tmp_path: Path) -> None:
    assert eft("train", tmp_path / "none.yaml").code == 2
    assert eft("train", recipe, "--min-share", "0.5").code == 2
    assert eft("train", recipe, "--model", "demo", "--url", "http://127.0.0.1:1").code == 2
    done = eft("train", recipe, "--url", "http://127.0.0.1:1")
    assert done.code == 1
    assert "no server answers" in done.err


def test_a_wrong_key(eft: Eft, jobs_url: str) -> None:
    # Without a body: the plain server of this test closes on one that is still being sent.
    done = eft("jobs", "list", "--url", jobs_url, "--admin-key", "wrong")
    assert (done.code, done.err) == (1, "eft: 401: The admin key is not valid.\n")


def test_in_this_process(eft: Eft, tiny_model: Path, recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    world = World(tmp_path / "state")

    @asynccontextmanager
    async def open_state(service: Any, settings: Any) -> AsyncIterator[OpenedState]:
        yield OpenedState(adapters=None, jobs=await world.start())
        await world.stop()

    monkeypatch.setattr(client, "open_state", open_state)
    done = eft("train", recipe, "--model", tiny_model)
    assert done.code == 0
    assert done.out == (
        f"Published as shop@1. Try it:\n  eft serve {tiny_model}\n  eft chat shop --url http://127.0.0.1:8000\n"
    )


# -- the recipe's files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nsteps: 1\n", "name: 'it''s'\nsteps: 1\n"),
        ("steps: 1\n", "name: 'it''s'\nsteps: 1\n"),
        ("# top\n---\nx: {name: a}\nname:   'a'  # mine\n", "# top\n---\nx: {name: a}\nname:   'it''s'  # mine\n"),
        ("# only a comment\n", "name: 'it''s'\n# only a comment\n"),
        ("name: |\n  a\n  b\nx: 1\n", "name: 'it''s'\nx: 1\n"),
    ],
)
def test_a_name_changes_nothing_else(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    found = read_recipe(path, name="it's").recipe.decode()
    assert found.split() == expected.split()
    import yaml

    assert yaml.safe_load(found)["name"] == "it's"


@pytest.mark.parametrize("text", ["a: [", "a: *b", "[" * 3000, "!!python/object:os.system x", "datasets: 3", "- 1"])
def test_a_recipe_that_is_none_is_sent_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert read_recipe(path).recipe == text.encode()
    assert read_recipe(path).data == {}


def test_one_dataset_needs_no_list_and_a_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "a.jsonl").write_text("{}")
    path = tmp_path / "r.yaml"
    path.write_text("datasets: {path: ~/a.jsonl}\n")
    assert read_recipe(path).data == {"~/a.jsonl": tmp_path / "home" / "a.jsonl"}
    assert list(read_recipe(path).notices) == []


def test_files_by_folder_and_name(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "data" / name).write_text("{}")
    path = tmp_path / "r.yaml"
    path.write_text("test_datasets: [{path: data, data_files: [a.jsonl, b.jsonl]}]\ndatasets: [{path: 5}, 7]\n")
    assert sorted(read_recipe(path).data) == ["data/a.jsonl", "data/b.jsonl"]


# -- eft jobs --------------------------------------------------------------------------------


@pytest.fixture
def job_id(eft: Eft, jobs_url: str, recipe: Path) -> str:
    """Of a job that succeeded."""
    return str(json.loads(eft("train", recipe, "--url", jobs_url, "--follow", "--json").out)["id"])


def test_list(eft: Eft, jobs_url: str, job_id: str) -> None:
    rows = [line.split() for line in eft("jobs", "list", "--url", jobs_url).out.splitlines()]
    assert rows[0] == ["id", "status", "name", "step", "loss", "created", "adapter"]
    assert rows[1][:5] == [job_id, "succeeded", "shop", "4/4", "0.2500"]
    assert eft("jobs", "list", "--url", jobs_url, "--status", "failed").out.splitlines()[1:] == []
    assert eft("jobs", "list", "--url", jobs_url, "--status", "done").code == 1


def test_show_events_and_logs(eft: Eft, jobs_url: str, job_id: str) -> None:
    assert json.loads(eft("jobs", "show", job_id, "--url", jobs_url, "--json").out)["status"] == "succeeded"
    assert '"total_steps": 4' in eft("jobs", "show", job_id, "--url", jobs_url).out
    plain = eft("jobs", "events", job_id, "--url", jobs_url).out.splitlines()
    assert plain[-1].endswith("Published as shop@1.")
    stored = eft("jobs", "events", job_id, "--url", jobs_url, "--json").out.splitlines()
    live = eft("jobs", "events", job_id, "--url", jobs_url, "--json", "--follow").out.splitlines()
    assert stored == live
    assert len(stored) == len(plain)
    logs = eft("jobs", "logs", job_id, "--url", jobs_url, "--lines", 2).out.splitlines()
    assert len(logs) == 2


def test_what_cannot_be_done_is_said(eft: Eft, jobs_url: str, job_id: str) -> None:
    done = eft("jobs", "cancel", job_id, "--url", jobs_url)
    assert (done.code, done.err) == (1, "eft: 409: The job is succeeded: it cannot be cancelled.\n")
    assert eft("jobs", "show", "ftjob-no", "--url", jobs_url).code == 1


def test_holding_a_job(eft: Eft, tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFT_ADMIN_KEY", KEY)
    with listening(JobsApi(tmp_path / "held", steps_itself=False)) as url:  # type: ignore[arg-type]
        eft("train", recipe, "--url", url)
        second = json.loads(eft("train", recipe, "--url", url, "--name", "b", "--json").out)["id"]
        assert eft("jobs", "pause", second, "--url", url).out == f"{second} is paused.\n"
        assert eft("jobs", "resume", second, "--url", url).out == f"{second} is queued.\n"
        assert json.loads(eft("jobs", "cancel", second, "--url", url, "--json").out)["status"] == "cancelled"
        first = json.loads(eft("jobs", "list", "--url", url, "--json", "--status", "running").out)["data"][0]["id"]
        done = eft("jobs", "cancel", first, "--url", url)
        assert done.out == f"{first} is running, and will cancel after this step.\n"


# -- eft jobs rm -----------------------------------------------------------------------------


def test_deleting_jobs(eft: Eft, jobs_url: str, recipe: Path) -> None:
    assert eft("train", recipe, "--url", jobs_url, "--follow").code == 0
    (job_id,) = [job["id"] for job in json.loads(eft("jobs", "list", "--url", jobs_url, "--json").out)["data"]]
    done = eft("jobs", "rm", "ftjob-unknown", job_id, "--url", jobs_url)
    assert (done.code, done.out) == (1, f"Deleted {job_id}.\n")
    assert "ftjob-unknown: 404" in done.err
    assert json.loads(eft("jobs", "list", "--url", jobs_url, "--json").out)["data"] == []
    assert eft("jobs", "rm", "--url", jobs_url).code == 2
