"""The loop over HTTP, in real processes: post a recipe, chat meanwhile, ask the adapter; and kill -9 in the middle."""

import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.checkpoints.peft import FILES
from tests.end_to_end.process import ServerProcess
from tests.waiting import wait_until

COLOURS = ["red", "green", "blue", "white", "black", "yellow", "brown", "grey", "purple", "orange"]
THINGS = ["apple", "house", "river", "stone", "lamp", "chair", "boat", "cloud", "tiger", "piano", "cup", "door"]

RECIPE = """
name: extract
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
datasets:
  - path: train.jsonl
    type: chat_template
sequence_len: 128
micro_batch_size: 4
num_epochs: 1
learning_rate: 4e-3
lr_scheduler: cosine
warmup_steps: 2
save_strategy: "no"
"""


def rows() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Questions and answers in a fixed format: to train on, and others of the same kind to ask."""
    pairs = [(colour, thing) for colour in COLOURS for thing in THINGS]
    random.Random(1).shuffle(pairs)
    made = [(f"A {colour} {thing}.", json.dumps({"thing": thing, "colour": colour})) for colour, thing in pairs]
    return made[:40], made[56:80]


def chat_lines(pairs: list[tuple[str, str]]) -> bytes:
    lines = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def num_right(server: ServerProcess, model: str, pairs: list[tuple[str, str]]) -> int:
    """How many questions are answered as they should be, asked eight at once."""
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda pair: server.ask(model, pair[0]), pairs)
        return sum(answer == wanted for answer, (_, wanted) in zip(answers, pairs, strict=True))


@contextmanager
def chatting(server: ServerProcess, model: str, expected: dict[str, list[int]]) -> Iterator[list[str]]:
    """Ask these questions again and again until the block ends; yields what went wrong."""
    wrong: list[str] = []
    over = threading.Event()

    def chat() -> None:
        while not over.is_set():
            for question, tokens in expected.items():
                try:
                    if server.tokens(model, question) != tokens:
                        wrong.append(f"{question}: other tokens than before")
                except Exception as error:
                    wrong.append(f"{question}: {error!r}")
                over.wait(1.5)

    thread = threading.Thread(target=chat)
    thread.start()
    try:
        yield wrong
    finally:
        over.set()
        thread.join(60)


@pytest.mark.real_model
@pytest.mark.timeout(600)
def test_an_adapter_learns_a_format_while_others_chat(tmp_path: Path) -> None:
    train, held_out = rows()
    questions = ["Why is the sky blue?", "Name three animals.", held_out[0][0]]
    with ServerProcess("demo", tmp_path / "state") as server:
        base = server.http.get("/v1/models").json()["data"][0]["id"]
        before = {question: server.tokens(base, question) for question in questions}
        assert num_right(server, base, held_out[:8]) == 0
        with chatting(server, base, before) as wrong:
            job = server.wait_for_job(server.train(RECIPE, {"train.jsonl": chat_lines(train)}), 300)
        assert wrong == []
        assert job["status"] == "succeeded", job["error"]
        assert job["adapter"] == "extract@1"
        assert {"extract", base} <= {model["id"] for model in server.http.get("/v1/models").json()["data"]}
        right = num_right(server, "extract", held_out)
        assert right > 0.8 * len(held_out), f"{right} of {len(held_out)}"
        assert {question: server.tokens(base, question) for question in questions} == before
        metrics = server.http.get("/metrics").text
        assert 'eft:jobs{model_name="SmolLM2-135M-Instruct",state="succeeded"} 1.0' in metrics
    with ServerProcess("demo", tmp_path / "state") as server:  # what was published is there after a restart
        assert server.ask("extract@1", held_out[0][0]) == held_out[0][1]


@pytest.mark.real_model
@pytest.mark.timeout(600)
def test_a_job_takes_less_memory_than_half_of_the_base(tmp_path: Path) -> None:
    """512 tokens at once, gradient checkpointing, rank 16 on all linears; SmolLM2 in float32 is 538 MB."""
    base_bytes = 134_515_008 * 4
    recipe = RECIPE.replace("lora_r: 8", "lora_r: 16").replace("num_epochs: 1", "max_steps: 2")
    recipe += "gradient_checkpointing: true\nsample_packing: true\ntrain_on_inputs: true\n"
    recipe = recipe.replace("micro_batch_size: 4", "micro_batch_size: 1").replace(
        "sequence_len: 128", "sequence_len: 512"
    )
    measured = []
    for attempt in range(3):  # the holes in the heap depend on how threads take turns: one server in reach is enough
        measured.append(memory_of_job(recipe, tmp_path / f"state{attempt}"))
        if measured[-1] < base_bytes / 2:
            break
    assert 0 < min(measured) < base_bytes / 2, f"{[round(size / 1e6) for size in measured]} MB more"


def memory_of_job(recipe: str, state: Path) -> int:
    """The most bytes that a server's resident memory grows by while it trains."""
    with ServerProcess("demo", state, max_batched_tokens=512) as server:
        server.ask("SmolLM2-135M-Instruct", "word " * 500, count=2)
        before = server.resident_bytes
        job_id = server.train(recipe, {"train.jsonl": chat_lines(rows()[0])})
        most = before
        while server.job(job_id)["status"] not in ("succeeded", "failed"):
            most = max(most, server.resident_bytes)
            time.sleep(0.05)
        assert server.job(job_id)["status"] == "succeeded"
        return most - before


TINY_RECIPE = """
name: tiny
adapter: lora
lora_r: 4
lora_alpha: 8
lora_dropout: 0.1
datasets:
  - path: train.jsonl
    type: chat_template
val_set_size: 4
sequence_len: 64
micro_batch_size: 2
gradient_accumulation_steps: 2
max_steps: 30
learning_rate: 5e-3
save_steps: 4
eval_steps: 10
"""


@pytest.mark.timeout(300)
def test_killed_at_any_step_it_ends_the_same(tiny_model: Path, tmp_path: Path) -> None:
    data = {"train.jsonl": chat_lines([(f"word {i}", f"answer {i * 7 % 13}") for i in range(40)])}
    slow = "train.step=sleep:0.1"
    with ServerProcess(str(tiny_model), tmp_path / "undisturbed") as server:
        job_id = server.train(TINY_RECIPE, data)
        assert server.wait_for_job(job_id)["status"] == "succeeded"
        expected = server.losses(job_id)
        tokens = server.tokens("tiny", "word 3")
    adapter = {name: (tmp_path / "undisturbed" / "adapters" / "tiny" / "1" / name).read_bytes() for name in FILES}
    rng = random.Random(time.time_ns())
    first, second = sorted(rng.sample(range(3, 28), 2))
    state = tmp_path / "killed"
    with ServerProcess(str(tiny_model), state, failpoints=slow) as server:
        job_id = server.train(TINY_RECIPE, data)
        wait_until(lambda: server.job(job_id)["step"] >= first, 60)
        server.kill()
    with ServerProcess(str(tiny_model), state, failpoints=slow) as server:
        wait_until(lambda: server.job(job_id)["step"] >= second, 60)
        server.kill()
    with ServerProcess(str(tiny_model), state) as server:
        job = server.wait_for_job(job_id)
        assert job["status"] == "succeeded", (first, second, job["error"])
        found = server.losses(job_id)
        assert expected.keys() == set(range(1, 31))
        assert found == expected, (first, second)  # bit by bit: no request was computed beside it
        assert server.tokens("tiny", "word 3") == tokens
        assert [model["id"] for model in server.http.get("/v1/models").json()["data"]].count("tiny") == 1
    for name, data_of in adapter.items():
        assert (state / "adapters" / "tiny" / "1" / name).read_bytes() == data_of, (first, second, name)


@pytest.mark.timeout(300)
def test_four_jobs_at_once_killed_each_end_as_alone(tiny_model: Path, tmp_path: Path) -> None:
    """Of different ranks, lengths and shares; a fifth fails, and leaves the others alone."""
    recipes = [
        TINY_RECIPE.replace("name: tiny", f"name: tiny-{number}").replace("max_steps: 30", f"max_steps: {steps}")
        + f"seed: {number}\njob_weight: {number}\n"
        for number, steps in ((1, 8), (2, 10), (3, 12), (4, 14))
    ]
    recipes[1] = recipes[1].replace("lora_r: 4", "lora_r: 8")
    data = {"train.jsonl": chat_lines([(f"word {i}", f"answer {i * 7 % 13}") for i in range(40)])}
    alone = []
    with ServerProcess(str(tiny_model), tmp_path / "alone") as server:
        for recipe in recipes:
            job_id = server.train(recipe, data)
            assert server.wait_for_job(job_id)["status"] == "succeeded"
            alone.append(server.losses(job_id))
    broken = TINY_RECIPE.replace("name: tiny", "name: broken")
    broken += "loss_watchdog_threshold: 0.001\nloss_watchdog_patience: 2\n"
    state, slow = tmp_path / "together", "train.step=sleep:0.05"
    with ServerProcess(str(tiny_model), state, failpoints=slow, max_running_jobs=5) as server:
        jobs = [server.train(recipe, data) for recipe in recipes]
        failing = server.train(broken, data)
        wait_until(lambda: all(server.job(job)["step"] >= 2 for job in jobs), 60)
        assert {server.job(job)["status"] for job in jobs} == {"running"}
        assert server.wait_for_job(failing)["error"]["code"] == "diverged"
        server.kill()
    with ServerProcess(str(tiny_model), state, max_running_jobs=5) as server:
        for job, expected in zip(jobs, alone, strict=True):
            assert server.wait_for_job(job)["status"] == "succeeded"
            found = server.losses(job)
            assert found.keys() == expected.keys()
            assert list(found.values()) == pytest.approx([expected[step] for step in found], rel=1e-4)


@pytest.mark.timeout(300)
def test_pause_resume_and_cancel(tiny_model: Path, tmp_path: Path) -> None:
    data = {"train.jsonl": chat_lines([(f"word {i}", f"answer {i}") for i in range(40)])}
    with ServerProcess(str(tiny_model), tmp_path / "state", failpoints="train.step=sleep:0.1") as server:
        job_id = server.train(TINY_RECIPE, data)
        wait_until(lambda: server.job(job_id)["step"] >= 2, 60)
        assert server.http.post(f"/admin/jobs/{job_id}/pause").status_code == 200
        wait_until(lambda: server.job(job_id)["status"] == "paused", 30)
        step = server.job(job_id)["step"]
        time.sleep(0.5)
        assert server.job(job_id)["step"] == step
        assert server.http.post(f"/admin/jobs/{job_id}/resume").status_code == 200
        wait_until(lambda: server.job(job_id)["step"] > step, 30)
        assert server.http.post(f"/admin/jobs/{job_id}/cancel").status_code == 200
        assert server.wait_for_job(job_id)["status"] == "cancelled"
        assert server.http.post(f"/admin/jobs/{job_id}/cancel").status_code == 409
        assert server.http.get("/health").status_code == 200


def test_a_dry_run_keeps_nothing(tiny_model: Path, tmp_path: Path) -> None:
    with ServerProcess(str(tiny_model), tmp_path / "state") as server:
        files = [
            ("recipe", ("recipe.yaml", TINY_RECIPE.encode(), "application/yaml")),
            ("data", ("train.jsonl", chat_lines([("a", "b")] * 8), "application/jsonl")),
        ]
        answer = server.http.post("/admin/train", params={"dry_run": 1}, files=files)
        assert answer.status_code == 200, answer.text
        assert answer.json()["total_steps"] == 30
        assert server.http.get("/admin/jobs").json()["data"] == []
        wrong = TINY_RECIPE.replace("learning_rate", "learning_rat")
        files[0] = ("recipe", ("recipe.yaml", wrong.encode(), "application/yaml"))
        answer = server.http.post("/admin/train", files=files)
        assert answer.status_code == 400
        assert "learning_rate" in answer.json()["error"]["message"]
        assert server.http.get("/admin/jobs").json()["data"] == []


@pytest.mark.timeout(300)
def test_a_hopeless_job_fails_and_publishes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    recipe = TINY_RECIPE + "loss_watchdog_threshold: 0.001\nloss_watchdog_patience: 2\n"
    data = {"train.jsonl": chat_lines([(f"word {i}", f"answer {i}") for i in range(40)])}
    with ServerProcess(str(tiny_model), tmp_path / "state") as server:
        job = server.wait_for_job(server.train(recipe, data))
        assert job["status"] == "failed"
        assert job["error"]["code"] == "diverged"
        assert "tiny" not in {model["id"] for model in server.http.get("/v1/models").json()["data"]}
        assert server.http.get("/health").status_code == 200
