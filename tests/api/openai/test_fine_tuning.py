"""/v1/fine_tuning/jobs by the unmodified `openai` client: the jobs of /admin/train, in OpenAI's form."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from runtime.adapters.store import name_problem
from runtime.api.openai.fine_tuning_views import model_name
from tests.api.conftest import RunningServer
from tests.api.state import jsonl, stateful_settings, wait_for

ROWS = jsonl(
    *(
        {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"{n} newts"}]}
        for n in range(8)
    )
)


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(stateful_settings(tiny_model, tmp_path_factory.mktemp("state"))) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def base(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def upload(client: openai.OpenAI, content: bytes = ROWS) -> str:
    return client.files.create(file=("rows.jsonl", content), purpose="fine-tune").id


def ended(client: openai.OpenAI, job_id: str) -> Any:
    states = {"succeeded", "failed", "cancelled"}
    return wait_for(lambda: client.fine_tuning.jobs.retrieve(job_id), lambda job: job.status in states)


def test_a_job_from_its_file_to_its_model(client: openai.OpenAI, base: str, server: RunningServer) -> None:
    file, validation = upload(client), upload(client)
    chosen: Any = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": "auto"}
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=file,
        validation_file=validation,
        suffix="newts",
        seed=7,
        metadata={"project": "eft"},
        method={"type": "supervised", "supervised": {"hyperparameters": chosen}},
        extra_body={"recipe": {"lora_r": 4, "save_steps": 1, "loss_watchdog_threshold": 100.0}},
    )
    assert (job.object, job.model, job.training_file, job.validation_file) == (
        "fine_tuning.job", base, file, validation,
    )  # fmt: skip
    assert (job.seed, job.metadata) == (7, {"project": "eft"})
    assert job.hyperparameters.n_epochs == 2
    assert job.method is not None
    assert job.method.type == "supervised"
    client.files.delete(file)  # the job has its own
    done = ended(client, job.id)
    assert done.status == "succeeded", done.error
    assert done.fine_tuned_model.startswith("ft:")
    assert done.fine_tuned_model.endswith(f":newts:{job.id[-8:]}")
    assert done.trained_tokens > 0
    assert done.finished_at >= done.created_at
    answer = client.chat.completions.create(
        model=done.fine_tuned_model, messages=[{"role": "user", "content": "What is 3?"}], max_tokens=4
    )
    assert answer.model == done.fine_tuned_model
    assert client.models.retrieve(done.fine_tuned_model).id == done.fine_tuned_model
    record = httpx.get(f"{server.url}/admin/jobs/{job.id}").json()  # one record, two views
    assert (record["status"], record["total_steps"]) == ("succeeded", 4)

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
    assert len(events) == len({event.id for event in events}) >= 8
    assert events[-1].created_at <= events[0].created_at
    assert {event.type for event in events} == {"message", "metrics"}
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))
    steps = [checkpoint.step_number for checkpoint in checkpoints]
    assert steps == sorted(steps, reverse=True)
    assert steps
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-{steps[0]}"
    assert checkpoints[0].metrics.train_loss is not None
    assert [one.id for one in client.fine_tuning.jobs.list(limit=1)][-1:] == [job.id]

    assert job.result_files == []
    (results,) = done.result_files
    lines = list(csv.DictReader(client.files.content(results).text.splitlines()))
    assert [(line["step"], float(line["train_loss"]) > 0) for line in lines if line["train_loss"]] == [
        (str(step), True) for step in range(1, 5)
    ]
    evaluated = [event.data["loss"] for event in events if event.data.get("type") == "eval"]
    assert float(lines[-1]["valid_loss"]) == evaluated[0]
    described = client.files.retrieve(results)
    assert (described.purpose, described.bytes) == ("fine-tune-results", len(client.files.content(results).content))
    with pytest.raises(openai.ConflictError):
        client.files.delete(results)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(f"{results}0")


PREFERENCES = jsonl(
    *(
        {
            "input": {"messages": [{"role": "user", "content": f"What is {n}?"}]},
            "preferred_output": [{"role": "assistant", "content": f"{n} newts"}],
            "non_preferred_output": [{"role": "assistant", "content": f"{n} robots"}],
        }
        for n in range(8)
    )
)


def test_preferences_from_their_file_to_their_model(client: openai.OpenAI, base: str, server: RunningServer) -> None:
    options: Any = {"hyperparameters": {"beta": 0.5, "n_epochs": 2, "batch_size": 4}}
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=upload(client, PREFERENCES),
        validation_file=upload(client, PREFERENCES),
        method={"type": "dpo", "dpo": options},
        integrations=[{"type": "wandb", "wandb": {"project": "newts", "name": "mine"}}],
        extra_body={"recipe": {"lora_r": 4, "learning_rate": 0.01}},
    )
    assert job.method is not None
    assert job.method.type == "dpo"
    assert job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert job.method.dpo.hyperparameters.beta == 0.5
    (integration,) = job.integrations or []
    assert (integration.wandb.project, integration.wandb.name) == ("newts", "mine")
    recipe = httpx.get(f"{server.url}/admin/jobs/{job.id}/recipe").text
    assert '"wandb_project": "newts"' in recipe
    assert '"wandb_name": "mine"' in recipe
    done = ended(client, job.id)
    assert done.status == "succeeded", done.error
    answer = client.chat.completions.create(
        model=done.fine_tuned_model, messages=[{"role": "user", "content": "What is 3?"}], max_tokens=4
    )
    assert answer.model == done.fine_tuned_model
    record = httpx.get(f"{server.url}/admin/jobs/{job.id}").json()
    assert (record["total_steps"], record["summary"]["method"]) == (4, "dpo")
    metrics = [event.data for event in client.fine_tuning.jobs.list_events(job.id, limit=50) if event.type == "metrics"]
    margins = [data["metrics"]["rewards/margins"] for data in metrics if isinstance(data, dict)]
    assert len(margins) >= 4
    assert max(margins) > min(margins)


def test_preferences_are_not_trained_on_as_answers(client: openai.OpenAI, base: str) -> None:
    with pytest.raises(openai.BadRequestError, match="line 1 is a preference"):
        client.fine_tuning.jobs.create(model=base, training_file=upload(client, PREFERENCES))


def test_an_id_of_digits_is_no_version() -> None:
    name = model_name("a/b", "x", "ftjob-0123456712345678")
    assert name == "ft:a-b:eft:x:j12345678"
    assert name_problem(name) is None
    assert model_name("a/b", None, "ftjob-01234567abc45678") == "ft:a-b:eft::abc45678"


def test_lists_of_jobs_by_their_metadata(client: openai.OpenAI, base: str) -> None:
    calm = {"recipe": {"loss_watchdog_threshold": 100.0}}
    asked: Any = {
        "model": base,
        "training_file": upload(client),
        "hyperparameters": {"n_epochs": 1},
        "extra_body": calm,
    }
    labels: list[Any] = [{"set": "labels", "turn": turn} for turn in "12"] + [{}, {"set": "labels", "turn": "1"}]
    made = [client.fine_tuning.jobs.create(**asked, metadata=one).id for one in labels]

    def listed(**options: Any) -> list[str]:
        return [job.id for job in client.fine_tuning.jobs.list(**options)]

    assert listed(metadata={"set": "labels"}) == [made[3], made[1], made[0]]
    assert listed(metadata={"set": "labels"}, limit=1) == [made[3], made[1], made[0]]  # pages, to their end
    assert listed(metadata={"set": "labels", "turn": "1"}, limit=2) == [made[3], made[0]]
    assert listed(metadata={"set": "labels", "turn": "1"}, after=made[3]) == [made[0]]
    assert listed(metadata={"turn": "3"}) == listed(metadata={"set": "labels", "other": ""}) == []
    without = listed(extra_query={"metadata": "null"})
    assert made[2] in without
    assert not {made[0], made[1], made[3]} & set(without)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("metadata=x", "metadata"),
        ("metadata=null&metadata[a]=b", "metadata"),
        ("metadata[a]=b&metadata[a]=c", "metadata[a]"),
        ("metadata[a]=" + "x" * 513, "metadata"),
        ("&".join(f"metadata[{n}]=x" for n in range(17)), "metadata"),
        ("metadata%5B=x", "metadata["),
    ],
)
def test_metadata_that_lists_do_not_take(client: openai.OpenAI, query: str, param: str) -> None:
    answer = httpx.get(f"{client.base_url}fine_tuning/jobs?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_pause_resume_and_cancel(client: openai.OpenAI, base: str) -> None:
    calm = {"recipe": {"loss_watchdog_threshold": 100.0}}  # a random model's loss may rise
    asked: Any = {"model": base, "training_file": upload(client), "hyperparameters": {"n_epochs": 1000}}
    asked["extra_body"] = calm
    job = client.fine_tuning.jobs.create(**asked)
    client.fine_tuning.jobs.pause(job.id)
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).status, lambda status: status == "paused")
    client.fine_tuning.jobs.resume(job.id)
    client.fine_tuning.jobs.cancel(job.id)
    assert ended(client, job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(job.id)


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"method": {"type": "reinforcement", "reinforcement": {}}}, "method.type"),
        ({"method": {"type": "dpo"}}, "training_file"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, "beta"),
        ({"method": {"type": "dpo", "dpo": {}}, "hyperparameters": {"n_epochs": 1}}, "hyperparameters"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}] * 2}, "integrations"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x", "tags": ["a"]}}]}, "integrations[0].wandb.tags"),
        ({"integrations": [{"type": "trackio"}]}, "integrations[0].type"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"suffix": "a/b"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"hyperparameters": {"n_epochs": 0}}, "n_epochs"),
        ({"hyperparameters": {"batch_size": "large"}}, "hyperparameters.batch_size"),
        ({"recipe": {"name": "x"}}, "recipe.name"),
        ({"recipe": {"lora_rank": 4}}, "lora_rank"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
    ],
)
def test_what_is_refused(client: openai.OpenAI, base: str, changed: dict[str, Any], param: str) -> None:
    body = {"model": base, "training_file": upload(client), **changed}
    answer = httpx.post(f"{client.base_url}fine_tuning/jobs", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_files_and_models_that_are_not_there(client: openai.OpenAI, base: str) -> None:
    with pytest.raises(openai.NotFoundError) as no_file:
        client.fine_tuning.jobs.create(model=base, training_file="file-nothing")
    assert no_file.value.param == "training_file"
    with pytest.raises(openai.NotFoundError) as no_model:
        client.fine_tuning.jobs.create(model="gpt-7", training_file=upload(client))
    assert no_model.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve("ftjob-nothing")
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.list_events("ftjob-nothing")
    for content in (b"not json\n", b'{"text": "a"}\n'):
        with pytest.raises(openai.BadRequestError) as rows:
            client.fine_tuning.jobs.create(model=base, training_file=upload(client, content))
        assert rows.value.param == "training_file"
