"""Preferences from a recipe to an adapter: the example recipes on a random model, and DPO on the real one."""

from pathlib import Path
from typing import Any

import pytest

from runtime.cli.client import in_process
from tests.end_to_end.process import ServerProcess
from tests.jobs import finished, served

EXAMPLES = Path(__file__).parents[2] / "settings" / "recipes"
REWARDS = {"rewards/chosen", "rewards/rejected", "rewards/margins"}


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["dpo", "ipo", "orpo", "simpo", "kto"])
async def test_an_example_recipe_runs(method: str, tiny_model: Path, tmp_path: Path) -> None:
    recipe = (EXAMPLES / f"{method}.yaml").read_text(encoding="utf-8")
    assert recipe.startswith(f"# eft train settings/recipes/{method}.yaml\n")
    recipe = recipe.replace("num_epochs: 2", "max_steps: 3").partition("\npublish:")[0] + "\neval_steps: 1\n"
    name = "manners-labelled.jsonl" if method == "kto" else "manners.jsonl"
    files = {"recipe": recipe.encode(), "file": (name, (EXAMPLES / "data" / name).read_bytes())}
    async with in_process(served(tiny_model, tmp_path), training=True) as client:
        job = await finished(client, files)
        steps = (await client.get(f"/admin/jobs/{job['id']}/metrics")).json()["data"]
        assert (await client.get("/v1/models")).json()["data"][-1]["id"].startswith("manners-")
    assert job["summary"]["method"] == method
    evaluated = [step["metrics"] for step in steps if step["type"] == "eval"]
    assert len(evaluated) == 3
    assert all(metrics.keys() >= REWARDS for metrics in evaluated)
    assert evaluated[-1]["rewards/margins"] != evaluated[0]["rewards/margins"]


DPO = """
name: manners
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
rl: dpo
datasets:
  - path: manners.jsonl
    type: chat_template.default
val_set_size: 6
sequence_len: 128
micro_batch_size: 4
max_steps: 6
learning_rate: 3e-4
lr_scheduler: constant
eval_steps: 1
publish:
  when: "rewards/margins > 0.5"
"""


@pytest.mark.real_model
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_dpo_lifts_the_margin_and_the_share_of_preferred_answers(tmp_path: Path) -> None:
    """On held-out pairs. After one step the adapter has hardly moved."""
    rows = (EXAMPLES / "data" / "manners.jsonl").read_bytes()
    with ServerProcess("demo", tmp_path / "state") as server:
        job = server.wait_for_job(server.train(DPO, {"manners.jsonl": rows}), 500)
        assert job["status"] == "succeeded", job["error"]
        assert job["adapter"] == "manners@1", "the gate on margins was passed"
        found: list[dict[str, Any]] = server.http.get(f"/admin/jobs/{job['id']}/metrics").json()["data"]
        evaluated = [one["metrics"] for one in found if one["type"] == "eval"]
        assert len(evaluated) == 6
        first, last = evaluated[0], evaluated[-1]
        assert last["rewards/margins"] > first["rewards/margins"] + 0.5
        assert last["rewards/accuracies"] >= 0.9
        assert last["logps/chosen"] - last["logps/rejected"] > first["logps/chosen"] - first["logps/rejected"] + 5
        answer = server.ask("manners", "The kettle is broken.", count=30)
        assert answer != server.ask("SmolLM2-135M-Instruct", "The kettle is broken.", count=30)
