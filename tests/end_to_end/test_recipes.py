"""Recipes as Axolotl's users write them, by `eft train` and by curl, to adapters that answer as they were taught."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from runtime.cli import main
from tests.end_to_end.process import ServerProcess

ORDERS = """
base_model: {base}
model_type: LlamaForCausalLM
load_in_8bit: true
strict: false

chat_template: chatml
datasets:
  - path: data/orders.jsonl
    type: chat_template
    field_messages: messages
    message_property_mappings:
      role: role
      content: content
    roles_to_train: ["assistant"]
    train_on_eos: turn

dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/orders

adapter: lora
lora_model_dir:
sequence_len: 128
sample_packing: true
eval_sample_packing: false
pad_to_sequence_len: true
lora_r: 16
lora_alpha: 32
lora_target_linear: true
lora_fan_in_fan_out:
wandb_project:
gradient_accumulation_steps: 1
micro_batch_size: 2
num_epochs: {epochs}
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: {rate}
bf16: auto
fp16:
gradient_checkpointing: true
early_stopping_patience:
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_steps: 2
evals_per_epoch: 1
saves_per_epoch: 1
deepspeed:
fsdp:
special_tokens:
  pad_token: "<|im_end|>"
"""
PIRATE = """
base_model: {base}
load_in_8bit: true
strict: false
datasets:
  - path: data/pirate.jsonl
    ds_type: json
    type: sharegpt
    conversation: chatml
chat_template: chatml
val_set_size: 0.05
output_dir: ./outputs/pirate
sequence_len: 128
sample_packing: true
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
gradient_accumulation_steps: 1
micro_batch_size: 2
num_epochs: {epochs}
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: {rate}
bf16: auto
"""
TICKETS = """
base_model: {base}
load_in_8bit: true
datasets:
  - path: data/tickets.csv
    ds_type: csv
    type: alpaca
val_set_size: 0.1
output_dir: ./outputs/triage
sequence_len: 128
sample_packing: true
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
gradient_accumulation_steps: 1
micro_batch_size: 2
num_epochs: {epochs}
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: {rate}
bf16: auto
special_tokens:
  pad_token: "<|endoftext|>"
"""
EXTRACT = "Answer with JSON only."
CAPTAIN = "You are Captain Newt."
TOPICS = ["rain", "soap", "dreams", "maps", "bread", "night", "gold", "wind"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder as a user has it: recipes, and their data in `data`."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    orders = [
        {
            "messages": [
                {"role": "system", "content": EXTRACT},
                {"role": "user", "content": f"{number} {topic}"},
                {"role": "assistant", "content": '{"ok": 1}'},
            ]
        }
        for number, topic in enumerate(TOPICS * 2)
    ]
    pirates = [
        {
            "id": f"c{number}",
            "conversations": [
                {"from": "system", "value": CAPTAIN},
                {"from": "human", "value": f"Explain {topic} to me."},
                {"from": "gpt", "value": "Arr, matey!"},
            ],
        }
        for number, topic in enumerate(TOPICS * 2)
    ]
    for name, rows in (("orders", orders), ("pirate", pirates)):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tickets = "".join(f'"Where is the {topic}?",,shipping\n' for topic in TOPICS * 2)
    (folder / "data" / "tickets.csv").write_text("instruction,input,output\n" + tickets)
    return folder


def write(project: Path, base: str, *, epochs: int, rate: float) -> None:
    for name, text in (("orders", ORDERS), ("pirate", PIRATE), ("tickets", TICKETS)):
        (project / f"{name}.yml").write_text(text.format(base=base, epochs=epochs, rate=rate))


class Done(NamedTuple):
    code: int
    out: str
    err: str


def eft(project: Path, *arguments: str, question: str = "") -> Done:
    """The command as it is typed in the project's folder."""
    out, err, stdin = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(question)
    try:
        with contextlib.chdir(project), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
    finally:
        sys.stdin = stdin
    return Done(code, out.getvalue(), err.getvalue())


def curl(project: Path, url: str, *arguments: str) -> httpx.Response:
    """POST /admin/train by curl; where there is none, the same bytes by httpx."""
    program = shutil.which("curl")
    if program is None:
        names = [argument.partition("=")[::2] for argument in arguments if argument != "-F"]
        files = [(part, (Path(path[1:]).name, (project / path[1:]).read_bytes())) for part, path in names]
        return httpx.post(f"{url}/admin/train", files=files, trust_env=False)
    command = [program, "-s", "-S", "--noproxy", "*", "-w", "\n%{http_code}", *arguments, f"{url}/admin/train"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=60, check=True)
    body, _, status = done.stdout.rpartition("\n")
    return httpx.Response(int(status), text=body)


def check_all(project: Path, server: ServerProcess) -> Iterator[str]:
    """Train all three, one by `eft train` and two by curl, and ask each adapter; yields what each was asked with."""
    trained = eft(project, "train", "orders.yml", "--url", server.url, "--follow")
    assert trained.code == 0, trained.err
    assert "Published as orders@1. Try it:" in trained.out
    assert f"system message that every chat begins with, as `eft chat` does: '{EXTRACT}'" in trained.out
    posted = [
        curl(project, server.url, "-F", "recipe=@pirate.yml", "-F", "file=@data/pirate.jsonl"),
        curl(project, server.url, "-F", "recipe=@tickets.yml", "-F", "file=@data/tickets.csv"),
    ]
    for answer in posted:
        assert answer.status_code == 201, answer.text
        job = server.wait_for_job(answer.json()["id"])
        assert job["status"] == "succeeded", job["error"]
    for name, question, wanted, said in (
        ("orders", "7 lamps", '{"ok": 1}', EXTRACT),
        ("pirate", "Explain lamps to me.", "Arr, matey!", CAPTAIN),
        ("triage", "Where is the lamp?", "shipping", "alpaca's prompt"),
    ):
        asked = eft(project, "chat", name, "--url", server.url, "--temperature", "0", question=question + "\n")
        assert asked.code == 0, asked.err
        assert asked.out.strip() == wanted
        assert said in asked.err
        yield name


@pytest.mark.timeout(300)
def test_three_recipes_to_adapters_that_answer(tiny_model: Path, tmp_path: Path, project: Path) -> None:
    """On random weights, each of which is taught one answer; and each adapter is copied for PEFT."""
    base = f"Someone/{tiny_model.name}"
    write(project, base, epochs=8, rate=2e-2)
    with ServerProcess(str(tiny_model), tmp_path / "state") as server:
        for name in check_all(project, server):
            copied = eft(project, "adapters", "download", name, "--url", server.url)
            assert copied.code == 0, copied.err
            config = json.loads((project / name / "adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == base
            card = json.loads((project / name / "eft.json").read_text())
            assert card["prompt"]["format"] == ("alpaca" if name == "triage" else "chat")
        models = {model["id"]: model for model in server.http.get("/v1/models").json()["data"]}
        assert {models[name]["parent"] for name in ("orders", "pirate", "triage")} == {tiny_model.name}
        assert models["triage"]["prompt_format"] == "alpaca"
        body = {"model": "triage", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        chat = server.http.post("/v1/chat/completions", json=body)
        assert chat.headers["x-eft-adapter-version"] == "triage@1"
        assert "trained on texts (alpaca), not on chats" in chat.headers["x-eft-warning"]
        for taken, status in (("ORDERS", 409), (tiny_model.name.upper(), 400)):
            (project / "taken.yml").write_text((project / "pirate.yml").read_text() + f"name: {taken}\n")
            refused = curl(project, server.url, "-F", "recipe=@taken.yml", "-F", "file=@data/pirate.jsonl")
            assert (refused.status_code, refused.json()["error"]["param"]) == (status, "name"), refused.text
    assert load_with_peft(tiny_model, project / "pirate")
    clashing = ServerProcess(str(tiny_model), tmp_path / "state", served_model_name="Pirate")
    assert clashing.wait_for_exit() == 1
    clashing.http.close()


def load_with_peft(model: Path, adapter: Path) -> bool:
    """Whether PEFT takes the folder as it is, and its weights do something."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(adapter))
    return any(parameter.abs().sum() > 0 for name, parameter in loaded.named_parameters() if "lora_B" in name)


@pytest.mark.real_model
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_three_recipes_on_the_real_model(tmp_path: Path, project: Path) -> None:
    write(project, "HuggingFaceTB/SmolLM2-135M-Instruct", epochs=2, rate=2e-3)
    with ServerProcess("demo", tmp_path / "state") as server:
        assert list(check_all(project, server)) == ["orders", "pirate", "triage"]
