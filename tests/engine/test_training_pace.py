"""The time that a dry run says: from steps that are tried before the first job, then from the steps of jobs."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.cli.client import in_process
from runtime.engine import training_pace
from runtime.engine.training_pace import TRIAL_TOKENS, TrainingPace, trial_of
from runtime.trainer.plan.plan import Plan
from settings.load import load
from tests.jobs import finished, upload
from tests.trainer.plan.test_run_of_plan import make_plan
from tests.trainer.tiny_training import load_decoder

pytestmark = pytest.mark.anyio

ROWS = [
    {"messages": [{"role": "user", "content": "hello " * n}, {"role": "assistant", "content": "ahoy"}]}
    for n in range(1, 7)
]
KEYS = "adapter: lora\nlora_r: 4\nlora_target_linear: true\nmax_steps: 7\nlearning_rate: 0.001\nmicro_batch_size: 2\n"
KEYS += "loss_watchdog_threshold: 100\n"  # the tiny model knows nothing
RECIPE = "name: ahoy\ndatasets:\n  - path: a.jsonl\n    type: chat_template\n" + KEYS


@pytest.fixture
async def client(tiny_model: Path, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    settings = load(flags={"model": str(tiny_model), "state_dir": str(tmp_path)}, env={})
    async with in_process(settings, training=True) as client:
        yield client


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Plans that were tried."""
    made: list[Plan] = []
    measured = TrainingPace._measured

    def counted(self: TrainingPace, short: Plan) -> float | None:
        made.append(short)
        return measured(self, short)

    monkeypatch.setattr(TrainingPace, "_measured", counted)
    return made


async def estimate(client: httpx.AsyncClient, recipe: str = RECIPE) -> dict[str, Any]:
    answer = await client.post("/admin/train?dry_run=1", files=upload(recipe, ROWS))
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["summary"]["estimate"]
    return found


async def test_a_dry_run_tries_two_steps_until_jobs_say_how_long_they_take(
    client: httpx.AsyncClient, trials: list[Plan]
) -> None:
    first = await estimate(client)
    assert (first["basis"], len(trials)) == ("trial", 1)
    assert first["seconds"] > 0
    again = await estimate(client, RECIPE.replace("0.001", "0.002").replace("max_steps: 7", "max_steps: 14"))
    assert (again["basis"], len(trials)) == ("trial", 1)
    assert again["seconds"] == pytest.approx(2 * first["seconds"], rel=0.01)
    assert (await estimate(client, RECIPE.replace("lora_r: 4", "lora_r: 8")))["basis"] == "trial"
    assert len(trials) == 2
    assert (await client.get("/admin/jobs")).json()["data"] == []
    assert (await client.get("/admin/adapters")).json()["adapters"] == []
    job = await finished(client, upload(RECIPE, ROWS))
    assert job["status"] == "succeeded"
    assert ((await estimate(client))["basis"], len(trials)) == ("jobs", 2)


async def test_a_trial_that_comes_to_nothing_leaves_the_time_open(
    client: httpx.AsyncClient, trials: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_pace, "MAX_TRIAL_SECONDS", 0.0)
    for _ in range(2):
        found = await estimate(client)
        assert (found["seconds"], found["basis"]) == (None, None)
    assert len(trials) == 1  # the second is not tried: it would take as long again


async def test_a_trial_that_fails_leaves_the_time_open(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: TrainingPace, short: Plan) -> float | None:
        raise ValueError("no run")

    monkeypatch.setattr(TrainingPace, "_measured", broken)
    assert (await estimate(client))["basis"] is None


def test_a_trial_is_short(tiny_model: Path) -> None:
    plan = make_plan(tiny_model, load_decoder(tiny_model), micro_batch_size=64, val_set_size=2, num_epochs=3)
    short = trial_of(plan)
    assert 0 < sum(map(len, short.train)) <= TRIAL_TOKENS
    assert short.recipe.micro_batch_size == len(short.train) < 64
    assert (short.test, short.schedule.eval_every, short.schedule.save_every) == ([], None, None)
    assert short.schedule.microbatches_per_epoch == 1
    lengths = sorted(map(len, plan.train))
    assert lengths[0] <= len(short.train[0]) == lengths[len(lengths) // 2]
    long = trial_of(make_plan(tiny_model, load_decoder(tiny_model), micro_batch_size=1))
    assert len(long.train) == 1
