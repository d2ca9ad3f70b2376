"""Launched jobs over HTTP: the same losses as the embedded trainer's, and what is killed goes on.

The embedded trainer's losses are the expected ones; its own oracle is PEFT (tests/trainer/test_run.py). A step of two
ranks has twice the micro-batches, so it is a step of one rank with twice the accumulation.
"""

import importlib.util
import os
import signal
import time
from pathlib import Path

import pytest

from tests.end_to_end.process import ServerProcess
from tests.tiny import make_tiny_llama
from tests.trainer.launched.jobs import LORA, RECIPE, ROWS, agents_of, ranks_of
from tests.waiting import wait_until

DATA = {"rows.jsonl": ROWS}
TWO = ["cpu", "cpu"]
SAME = {"abs": 1e-3}
FULL_SHARD = "fsdp: [full_shard, auto_wrap]\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny"))


def trained(server: ServerProcess, recipe: str) -> list[float]:
    """The losses of a job, from its first step to its last."""
    return followed(server, server.train(recipe, DATA))


def followed(server: ServerProcess, job_id: str) -> list[float]:
    job = server.wait_for_job(job_id)
    assert job["status"] == "succeeded", job["error"]
    found = server.losses(job_id)
    assert sorted(found) == list(range(1, len(found) + 1))
    return [found[step] for step in sorted(found)]


@pytest.mark.timeout(480)
def test_two_ranks_learn_what_one_does_though_one_is_killed(tiny: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with ServerProcess(tiny, state, failpoints="launched.step@4=sleep:3", devices=TWO) as server:
        job = server.train(LORA + "ddp: true\nsave_steps: 2\n", DATA)
        wait_until(lambda: 3 in server.losses(job), 180)
        assert len(ranks_of(state)) == 2
        os.kill(ranks_of(state)[1], signal.SIGKILL)
        server.ask("tiny", "Why is the sky blue?")  # serving goes on
        losses = followed(server, job)
        assert losses == pytest.approx(trained(server, LORA + "gradient_accumulation_steps: 2\n"), **SAME)
        assert len(losses) == 8
        assert server.tokens("words@1", "Say newt 0") == server.tokens("words@2", "Say newt 0")
        assert ranks_of(state) == agents_of(state) == []


@pytest.mark.timeout(480)
def test_a_whole_model_is_trained_and_served(tiny: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with ServerProcess(tiny, state, devices=TWO) as server:
        job = server.train(RECIPE + FULL_SHARD + "val_set_size: 4\nnum_epochs: 2\n", DATA)
        losses = followed(server, job)
        assert losses[-1] < losses[0] / 3
        assert server.job(job)["adapter"] == "words@1"
        base = server.tokens("tiny", "Say newt 0")
    with ServerProcess("words@1", state) as server:
        assert [one["id"] for one in server.http.get("/v1/models").json()["data"]] == ["words"]
        served = server.tokens("words", "Say newt 0")
    assert served == generated(state / "models" / "words" / "1", "Say newt 0", len(served))
    assert served != base


def generated(model: Path, prompt: str, count: int) -> list[int]:
    """transformers' greedy answer, as token ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    ids = torch.tensor([ids["input_ids"] if not isinstance(ids, list) else ids])
    whole = AutoModelForCausalLM.from_pretrained(model)
    found = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return found[0, ids.shape[1] :].tolist()


# -- slow --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "keys",
    [
        "",
        "dpo",
        "lora_r: 8\nloraplus_lr_ratio: 4\noptimizer: lion\nlr_scheduler: linear\nval_set_size: 4\nevals_per_epoch: 2\n",
        "sample_packing: true\ngroup_by_length: false\nnum_epochs: 3\n",
    ],
)
def test_one_rank_learns_what_the_embedded_trainer_does(tiny: str, tmp_path: Path, keys: str) -> None:
    with ServerProcess(tiny, tmp_path / "state", devices=TWO) as server:
        recipe, data = with_keys(keys)
        launched, embedded = (
            followed(server, server.train(recipe + further, data)) for further in ("devices: 1\n", "")
        )
        assert launched == pytest.approx(embedded, **SAME)


def with_keys(keys: str) -> tuple[str, dict[str, bytes]]:
    """A recipe with further keys in place of its own, and its data."""
    if keys == "dpo":
        row = '{"messages": [{"role": "user", "content": "Say %s"}], "chosen": {"role": "assistant", "content": "%s"}, '
        row += '"rejected": {"role": "assistant", "content": "no"}}\n'
        pairs = "".join(row % (word, word) for word in ("newt", "eft", "pond", "rain", "moss", "fern"))
        recipe = LORA.replace("type: chat_template", "type: chat_template.default")
        return recipe + "rl: dpo\n", {"rows.jsonl": pairs.encode()}
    names = {line.partition(":")[0] for line in keys.splitlines()}
    kept = [line for line in LORA.splitlines() if line.partition(":")[0] not in names]
    return "\n".join(kept) + "\n" + keys, DATA


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("base", [LORA, RECIPE])
@pytest.mark.parametrize("method", [FULL_SHARD, "ddp: true\n"])
def test_two_ranks_learn_what_one_rank_does(tiny: str, tmp_path: Path, base: str, method: str) -> None:
    """3 micro-batches in the last step of an epoch: one rank has nothing to do in it."""
    recipe = base + method + "val_set_size: 6\nnum_epochs: 2\n"
    with ServerProcess(tiny, tmp_path / "state", devices=TWO) as server:
        two = trained(server, recipe)
        one = trained(server, recipe + "devices: 1\ngradient_accumulation_steps: 2\n")
        assert two == pytest.approx(one, **SAME)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pause_resume_cancel_and_deaths(tiny: str, tmp_path: Path) -> None:
    """One job is paused and resumed, loses its launcher, and its server; another one is cancelled."""
    state = tmp_path / "state"
    recipe = LORA + FULL_SHARD + "save_steps: 1\nval_set_size: 4\nevals_per_epoch: 4\n"
    slow = "launched.step=sleep:1"
    with ServerProcess(tiny, state, failpoints=slow, devices=TWO) as server:
        job = server.train(recipe, DATA)
        wait_until(lambda: 1 in server.losses(job), 180)
        assert server.http.post(f"/admin/jobs/{job}/pause").status_code == 200
        wait_until(lambda: server.job(job)["status"] == "paused", 60)
        wait_until(lambda: not ranks_of(state), 30)  # a paused job holds no devices
        assert server.http.post(f"/admin/jobs/{job}/resume").status_code == 200
        wait_until(lambda: 3 in server.losses(job), 180)
        os.kill(agents_of(state)[0], signal.SIGKILL)
        wait_until(lambda: 4 in server.losses(job), 180)
        server.kill()
        wait_until(lambda: not ranks_of(state) and not agents_of(state), 10)
    with ServerProcess(tiny, state, devices=TWO) as server:
        losses = followed(server, job)
        expected = trained(server, recipe.replace(FULL_SHARD, "gradient_accumulation_steps: 2\n"))
        assert losses == pytest.approx(expected, **SAME)
        other = server.train(LORA + "ddp: true\nnum_epochs: 100\n", DATA)
        wait_until(lambda: 1 in server.losses(other), 180)
        assert server.http.post(f"/admin/jobs/{other}/cancel").status_code == 200
        wait_until(lambda: server.job(other)["status"] == "cancelled", 20)
        wait_until(lambda: not ranks_of(state), 10)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_that_ends_takes_a_launched_job_along(tiny: str, tmp_path: Path) -> None:
    """At SIGTERM the job writes a checkpoint, and the next server goes on from it."""
    state = tmp_path / "state"
    with ServerProcess(tiny, state, failpoints="launched.step=sleep:0.5", devices=TWO) as server:
        job = server.train(LORA + "ddp: true\nsave_strategy: 'no'\n", DATA)
        wait_until(lambda: 2 in server.losses(job), 180)
    assert ranks_of(state) == agents_of(state) == []
    with ServerProcess(tiny, state, devices=TWO) as server:
        losses = followed(server, job)
        assert losses == pytest.approx(trained(server, LORA + "gradient_accumulation_steps: 2\n"), **SAME)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_outlive_the_server_where_that_is_asked_for(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next server follows the same processes; a job that is cancelled ends them."""
    monkeypatch.setenv("EFT_TRAINER_OUTLIVE_SERVER", "true")
    state, recipe = tmp_path / "state", LORA + "ddp: true\nsave_steps: 3\n"
    with ServerProcess(tiny, state, failpoints="launched.step=sleep:2", devices=TWO) as server:
        job = server.train(recipe, DATA)
        wait_until(lambda: 1 in server.losses(job), 180)
        ranks = ranks_of(state)
        server.kill()
    time.sleep(1)
    assert ranks_of(state) == ranks
    with ServerProcess(tiny, state, devices=TWO) as server:
        wait_until(lambda: 4 in server.losses(job), 180)
        assert ranks_of(state) == ranks
        losses = followed(server, job)
        assert losses == pytest.approx(trained(server, LORA + "gradient_accumulation_steps: 2\n"), **SAME)
        other = server.train(recipe + "num_epochs: 1000\n", DATA)
        wait_until(lambda: 1 in server.losses(other), 180)
        server.kill()
    with ServerProcess(tiny, state, devices=TWO) as server:
        wait_until(lambda: server.job(other)["status"] == "running", 60)
        assert server.http.post(f"/admin/jobs/{other}/cancel").status_code == 200
        wait_until(lambda: not ranks_of(state) and not agents_of(state), 30)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_that_are_always_killed_end_their_job_alone(tiny: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with ServerProcess(tiny, state, failpoints="launched.step=sleep:60", devices=TWO, max_restarts=1) as server:
        job = server.train(LORA + "ddp: true\n", DATA)
        for _ in range(2):
            wait_until(lambda: len(ranks_of(state)) == 2, 60)
            time.sleep(1)
            os.kill(ranks_of(state)[0], signal.SIGKILL)
            wait_until(lambda: len(ranks_of(state)) < 2, 60)
        ended = server.wait_for_job(job, 60)
        assert (ended["status"], ended["error"]["code"]) == ("failed", "ranks_killed")
        assert "trainer.max_restarts is 1" in ended["error"]["message"]
        server.ask("tiny", "Why is the sky blue?")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
@pytest.mark.parametrize(
    ("base", "config"),
    [(LORA, "deepspeed_configs/zero2.json"), (LORA, "zero1"), (LORA, "zero3"), (RECIPE, "zero2"), (RECIPE, "zero3")],
)
def test_deepspeed_learns_what_one_rank_does(tiny: str, tmp_path: Path, base: str, config: str) -> None:
    """One rank is the embedded trainer, or with all weights a launched one without DeepSpeed. The job is paused and
    resumed on its way, and loses a rank."""
    state = tmp_path / "state"
    with ServerProcess(tiny, state, failpoints="launched.step=sleep:1", devices=TWO) as server:
        job = server.train(base + f"deepspeed: {config}\nsave_steps: 2\n", DATA)
        wait_until(lambda: 1 in server.losses(job), 180)
        assert server.http.post(f"/admin/jobs/{job}/pause").status_code == 200
        wait_until(lambda: server.job(job)["status"] == "paused", 60)
        assert server.http.post(f"/admin/jobs/{job}/resume").status_code == 200
        wait_until(lambda: 5 in server.losses(job), 180)
        os.kill(ranks_of(state)[1], signal.SIGKILL)
        losses = followed(server, job)
    with ServerProcess(tiny, state, devices=TWO) as server:
        alone = "gradient_accumulation_steps: 2\n" + ("" if base is LORA else "devices: 1\n")
        assert losses == pytest.approx(trained(server, base + alone), **SAME)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_is_trained_whole_and_with_an_adapter(tmp_path: Path) -> None:
    """Two ranks learn what one does; the server answers with the adapter, and moves to the model."""
    state, further = tmp_path / "state", "max_steps: 3\nlearning_rate: 1e-4\n"
    base, lora = ("\n".join(line for line in one.splitlines() if "learning_rate" not in line) + "\n" + further
                  for one in (RECIPE, LORA))  # fmt: skip
    alone = "gradient_accumulation_steps: 2\n"
    with ServerProcess("demo", state, devices=TWO) as server:
        whole = trained(server, base + FULL_SHARD)
        assert whole == pytest.approx(trained(server, base.replace("words", "other") + "devices: 1\n" + alone), **SAME)
        assert whole[-1] < whole[0]
        adapted = trained(server, lora.replace("words", "adapter") + "ddp: true\n")
        assert adapted == pytest.approx(trained(server, lora.replace("words", "beside") + alone), **SAME)
        name = server.http.get("/admin/model").json()["name"]
        before = server.tokens(name, "Say newt 0")
        assert server.tokens("adapter", "Say newt 0") == server.tokens("beside", "Say newt 0")
        assert server.http.post("/admin/model/swap", json={"model": "words@1"}).status_code == 202
        wait_until(lambda: server.http.get("/admin/model").json()["swap"]["finished_at"] is not None, 120)
        assert server.http.get("/admin/model").json()["model"] == "words@1"
        served = server.tokens(name, "Say newt 0")
    assert served == generated(state / "models" / "words" / "1", "Say newt 0", len(served))
    assert served != before
