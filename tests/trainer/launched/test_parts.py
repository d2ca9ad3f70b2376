"""The parts of launched jobs by themselves: scores against transformers' own loss, devices, configurations, files."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch

from runtime.checkpoints.model_library import ModelLibrary, ModelRecord
from runtime.engine.devices import TrainingDevices, training_devices
from runtime.engine.launched import DEEPSPEED, MAX_CONFIG, deepspeed_config
from runtime.errors import InvalidRequest
from runtime.events import CheckpointEvent, PausedEvent
from runtime.model.config import ModelLoadError
from runtime.trainer.data.example import Example
from runtime.trainer.launched.agent import PARENT, run_agent
from runtime.trainer.launched.files import (
    FAILED,
    FAILED_CODE,
    KILLED,
    KILLED_CODE,
    RESTARTS,
    AgentRecord,
    JobFolder,
    LaunchEnd,
    RankReport,
    ReportReader,
    framed,
    newest_checkpoint,
)
from runtime.trainer.launched.process import LeftProcess, Nodes
from runtime.trainer.launched.scoring import ScoredModel, call, pad, without_adapters
from runtime.trainer.launched.spread import LossScale
from runtime.trainer.launched.zero import complete
from runtime.trainer.recipe import Document, Recipe, RecipeError, recipe_from
from runtime.trainer.recipe.launch import fsdp_options, launch_of
from settings.load import load
from settings.schema import Settings
from tests.tiny import make_tiny_llama

BASIC: dict[str, Any] = {"learning_rate": 1e-4, "datasets": [{"path": "a.jsonl"}]}


def make(available: int = 2, /, **keys: Any) -> Recipe:
    return recipe_from(Document({**BASIC, **keys}), max_lora_rank=64, devices=available)


def problems(available: int = 2, /, **keys: Any) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        make(available, **keys)
    return {problem.key: problem.message for problem in caught.value.problems}


# -- recipes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "method", "full"),
    [
        ({}, "ddp", True),
        ({"adapter": "lora", "ddp": True}, "ddp", False),
        ({"adapter": "lora", "devices": 1}, "ddp", False),
        ({"adapter": "qlora", "fsdp": ["full_shard", "auto_wrap"]}, "fsdp", False),
        ({"fsdp_config": {"fsdp_offload_params": True}, "fsdp_version": 2}, "fsdp", True),
        ({"adapter": "lora", "deepspeed": "deepspeed_configs/zero3.json"}, "deepspeed", False),
        ({"adapter": "lora", "ddp_find_unused_parameters": True}, "ddp", False),
    ],
)
def test_recipes_that_ask_for_devices_of_their_own(keys: dict[str, Any], method: str, full: bool) -> None:
    launch = launch_of(make(**keys), 2)
    assert launch is not None
    assert (launch.method, launch.full, launch.ranks) == (method, full, keys.get("devices", 2))


@pytest.mark.parametrize("keys", [{}, {"bf16": "auto"}, {"fp16": True}])
def test_other_adapters_are_trained_inside_the_server(keys: dict[str, Any]) -> None:
    assert launch_of(make(adapter="lora", **keys), 2) is None


@pytest.mark.parametrize("key", ["deepspeed", "fsdp", "fsdp_config", "ddp", "devices", "bf16"])
def test_without_devices_the_keys_are_noted(key: str) -> None:
    value: Any = {"fsdp_config": {"offload_params": True}, "devices": 2, "bf16": "auto"}.get(key, "zero2")
    recipe = make(0, adapter="lora", **{key: True if key == "ddp" else value})
    assert launch_of(recipe, 0) is None
    assert [note for note in recipe.notes if note.startswith(f"{key} is ignored: ")]


def test_without_devices_all_weights_are_refused_in_a_sentence() -> None:
    found = problems(0, deepspeed="zero2")
    assert list(found) == ["adapter"]
    assert "trainer.devices" in found["adapter"]


@pytest.mark.parametrize(
    ("keys", "key", "text"),
    [
        ({"devices": 3}, "devices", "at most 2"),
        ({"deepspeed": "zero2", "fsdp": ["full_shard"]}, "deepspeed", "two ways"),
        ({"bf16": True, "fp16": True}, "fp16", "one of them"),
        ({"rl": "dpo"}, "rl", "`adapter: lora`"),
        ({"optimizer": "muon"}, "optimizer", "adamw_torch_fused"),
        ({"deepspeed": "zero2", "optimizer": "lion"}, "optimizer", "deepspeed"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha", "leave it out"),
        ({"loraplus_lr_ratio": 4}, "loraplus_lr_ratio", "leave it out"),
        ({"unfrozen_parameters": ["^lm_head"]}, "unfrozen_parameters", "without an adapter"),
        ({"adapter": "lora", "devices": 2, "peft_use_dora": True}, "peft_use_dora", "serving process"),
        ({"adapter": "lora", "ddp": True, "lora_model_dir": "ahoy"}, "lora_model_dir", "serving process"),
        ({"adapter": "lora", "devices": 2, "tokens": ["<x>"]}, "tokens", "serving process"),
        ({"adapter": "lora", "ddp": True, "added_tokens_overrides": {"5": "<x>"}}, "added_tokens_overrides", "serving"),
        ({"adapter": "lora", "devices": 2, "lora_modules_to_save": ["lm_head"]}, "lora_modules_to_save", "serving"),
        ({"adapter": "lora", "devices": 2, "peft_init_lora_weights": "pissa"}, "peft_init_lora_weights", "pissa"),
        ({"fsdp_config": {"offload_parms": True}}, "fsdp_config.offload_parms", "offload_params"),
    ],
)
def test_what_a_launched_job_cannot_have(keys: dict[str, Any], key: str, text: str) -> None:
    found = problems(**keys)
    assert list(found) == [key]
    assert text in found[key]


def test_notes_of_a_whole_model() -> None:
    notes = make(lora_r=8, load_in_4bit=True, fsdp_config={"fsdp_state_dict_type": "FULL_STATE_DICT"}).notes
    assert "lora_r is ignored: there is no adapter." in notes
    assert any(note.startswith("fsdp_config.fsdp_state_dict_type is ignored: ") for note in notes) or any(
        note.startswith("fsdp_config.state_dict_type is ignored: ") for note in notes
    )
    assert any(note.startswith("load_in_4bit is ignored: weights are float32") for note in notes)


def test_older_fsdp_says_the_same() -> None:
    older = fsdp_options(make(fsdp=["shard_grad_op auto_wrap", "offload"]))
    assert (older.offload_params, older.reshard_after_forward) == (True, False)
    newer = fsdp_options(make(fsdp_config={"sharding_strategy": "SHARD_GRAD_OP", "activation_checkpointing": True}))
    assert (newer.offload_params, newer.reshard_after_forward, newer.activation_checkpointing) == (False, False, True)


@pytest.mark.parametrize(
    ("keys", "precision"),
    [
        ({}, "float32"),
        ({"bf16": True}, "bfloat16"),
        ({"bf16": "auto", "fp16": False}, "auto"),
        ({"fp16": True}, "float16"),
    ],
)
def test_precision(keys: dict[str, Any], precision: str) -> None:
    launch = launch_of(make(**keys), 1)
    assert launch is not None
    assert launch.precision == precision


# -- deepspeed ---------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "name", ["zero1", "zero2", "zero3", "zero3_bf16_cpuoffload_all", "zero3_bf16_cpuoffload_params"]
)
def test_paths_of_axolotl_are_read_as_the_shipped_ones(name: str) -> None:
    by_path, note = deepspeed_config(make(deepspeed=f"deepspeed_configs/{name}.json"), {})
    by_name, none = deepspeed_config(make(deepspeed=name), {})
    assert by_path == by_name
    assert note is not None
    assert name in note
    assert none is None
    assert by_name["zero_optimization"]["stage"] == int(name[4])


@pytest.mark.usefixtures("installed")
def test_files_that_are_sent_and_mappings(tmp_path: Path) -> None:
    sent = tmp_path / "ds.json"
    sent.write_text('{"zero_optimization": {"stage": 2}}')
    assert deepspeed_config(make(deepspeed="x/ds.json"), {"ds.json": sent})[0] == {"zero_optimization": {"stage": 2}}
    assert (
        deepspeed_config(make(deepspeed={"zero_optimization": {"stage": 1}}), {})[0]["zero_optimization"]["stage"] == 1
    )
    sent.write_text("[]")
    for recipe in (
        make(deepspeed="ds.json"),
        make(deepspeed="../settings/zero9.json"),
        make(deepspeed="../../etc/zero"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            deepspeed_config(recipe, {"ds.json": sent})
        assert caught.value.param == "deepspeed"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"flops_profiler": {"enabled": True, "output_file": "/tmp/x"}}, "flops_profiler"),
        ({"csv_monitor": {"enabled": True, "output_path": "/tmp"}}, "csv_monitor"),
        ({"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}}, "offload_param"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "nvme_path": "/tmp"}}}, "offload_optimizer"),
    ],
)
def test_a_configuration_writes_and_sends_nothing(config: dict[str, Any], named: str, tmp_path: Path) -> None:
    sent = tmp_path / "ds.json"
    sent.write_bytes(msgspec.json.encode(config))
    for given in (config, "ds.json"):
        with pytest.raises(InvalidRequest, match=named):
            deepspeed_config(make(deepspeed=given), {"ds.json": sent})
    sent.write_bytes(b'{"fp16": {"enabled": false}}' + b" " * MAX_CONFIG)
    with pytest.raises(InvalidRequest, match=str(MAX_CONFIG)):
        deepspeed_config(make(deepspeed="ds.json"), {"ds.json": sent})


@pytest.mark.parametrize("rendezvous", [None, "node-0:29400"])
def test_processes_of_one_node_meet_by_a_file(rendezvous: str | None, tmp_path: Path) -> None:
    """torchrun unpickles what it finds where its agents meet."""
    arguments = Nodes(per_node=2, rendezvous=rendezvous).arguments(JobFolder(tmp_path), "job", max_restarts=0)
    place = arguments[arguments.index("--rdzv-endpoint") + 1]
    assert place == (rendezvous or str(JobFolder(tmp_path).meeting))
    assert ("store_type=file" in arguments) == (rendezvous is None)
    assert "--standalone" not in arguments


def test_without_deepspeed_its_recipes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match="eft-server\\[distributed\\]"):
        deepspeed_config(make(deepspeed="zero2"), {})


@pytest.mark.parametrize("path", sorted(DEEPSPEED.glob("*.json")), ids=lambda path: path.stem)
def test_the_recipe_decides_over_the_configuration(path: Path) -> None:
    given = msgspec.json.decode(path.read_bytes())
    recipe = make(micro_batch_size=2, gradient_accumulation_steps=3, max_grad_norm=0.5)
    config = complete({**given, "optimizer": {"type": "AdamW"}}, recipe, ranks=4, compute="bfloat16")
    assert "auto" not in str(config)
    assert (config["train_batch_size"], config["gradient_clipping"]) == (24, 0.5)
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (True, False)
    assert "optimizer" not in config
    assert config["zero_optimization"]["stage"] == given["zero_optimization"]["stage"]


@pytest.mark.parametrize("path", sorted((DEEPSPEED.parent / "fsdp").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_fsdp_configurations_are_parts_of_recipes(path: Path) -> None:
    from runtime.trainer.recipe.document import read_document

    recipe = make(**read_document(path.read_bytes()).values)
    launch = launch_of(recipe, 2)
    assert launch is not None
    assert launch.method == "fsdp"
    assert not [note for note in recipe.notes if "ignored" in note]
    assert fsdp_options(recipe).offload_params is ("offload" in path.stem)


# -- devices -----------------------------------------------------------------------------------------


def settings_of(**flags: Any) -> Settings:
    return load(flags=flags, env={}).settings


@pytest.mark.parametrize(
    ("devices", "device", "problem"),
    [
        (["cuda:0"], "cuda:0", "serves the model"),
        (["cuda:1"], "cuda:1", "serves the model"),
        (["cuda:1", "cuda:1"], "cuda:0", "twice"),
        (["cuda:7"], "cuda:0", "has 4 GPUs"),
        (["cpu", "cuda:1"], "cuda:0", "'cpu'"),
    ],
)
def test_devices_that_cannot_be_set_aside(
    devices: list[str], device: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ModelLoadError, match=problem):
        training_devices(settings_of(devices=devices, device=device))


def test_devices_that_are_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    found = training_devices(settings_of(devices=["cuda:2", "cuda:3"], device="cuda:0"))
    assert found == TrainingDevices(kind="cuda", indices=(2, 3))
    assert found.visible(2) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert found.visible(1) == {"CUDA_VISIBLE_DEVICES": "6"}
    assert training_devices(settings_of()) is None
    cpus = training_devices(settings_of(devices=["cpu", "cpu"]))
    assert cpus == TrainingDevices(kind="cpu", indices=(0, 1))


# -- scores ------------------------------------------------------------------------------------------


def test_padded_rows_score_as_transformers_loss_does(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_tiny_llama(tmp_path / "tiny")).eval()
    examples = [
        Example([5, 6, 7, 8, 9], [False, False, True, True, True]),
        Example([10, 11, 12], [False, True, True], weight=0.5),
    ]
    batch = pad(examples, torch.device("cpu"))
    with torch.no_grad():
        logprobs, correct = call(ScoredModel(model, None), batch)
    assert (batch.trained, len(logprobs), len(correct)) == ((3, 2), 5, 5)
    for example, part in zip(examples, logprobs.split(list(batch.trained)), strict=True):
        ids = torch.tensor([example.token_ids])
        labels = torch.where(torch.tensor([example.trained]), ids, -100)
        with torch.no_grad():
            expected = model(input_ids=ids, labels=labels).loss
        assert float(-part.mean()) == pytest.approx(float(expected), abs=1e-5)


def test_a_model_without_its_adapters(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(make_tiny_llama(tmp_path / "tiny")).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = base(ids).logits.clone()
        model = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])).eval()
        assert not torch.equal(model(ids).logits, expected)
        with without_adapters(model):
            assert torch.equal(model(ids).logits, expected)
        assert not torch.equal(model(ids).logits, expected)
    assert all(one.requires_grad for name, one in model.named_parameters() if "lora_" in name)


def test_the_scale_of_the_loss_follows_overflows() -> None:
    scale, off = LossScale(enabled=True), LossScale(enabled=False)
    first = scale.value
    scale.settle(finite=False)
    assert scale.value == first / 2
    for _ in range(LossScale.GROWTH_STEPS):
        scale.settle(finite=True)
    assert scale.value == first
    while not scale.exhausted:
        scale.settle(finite=False)
    assert scale.value == LossScale.LEAST
    off.settle(finite=False)
    assert (off.value, off.exhausted) == (1.0, False)


# -- files -------------------------------------------------------------------------------------------


def test_reports_are_read_as_they_are_written_over_restarts(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    reader = ReportReader(folder, 3)
    assert reader.read() == []
    first, second = RankReport(CheckpointEvent(step=1, best=True), "a"), RankReport(PausedEvent(step=2))
    data = framed(first) + framed(second)
    path = folder.reports(3 * RESTARTS)
    path.write_bytes(data[:-5])
    assert reader.read() == [first]
    path.write_bytes(data)
    folder.reports(3 * RESTARTS + 1).write_bytes(framed(first))
    assert reader.read() == [second, first]


def test_the_first_error_says_how_a_job_ended(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    assert folder.first_error() is None
    folder.write_end(KILLED)
    assert folder.end() == KILLED
    folder.write_error(1, LaunchEnd(crashed=False, message="first"))
    time.sleep(0.01)
    folder.write_error(0, LaunchEnd(crashed=False, message="second"))
    assert folder.first_error() == LaunchEnd(crashed=False, message="first")
    folder.meeting.write_text("stale")
    folder.clear()
    assert folder.end() is None
    assert not folder.meeting.exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("cannot read '/srv/models/tiny/config.json', nor /tmp/x: 1/2 of a/b"),
         "A rank of this job failed: RuntimeError: cannot read 'config.json', nor x: 1/2 of a/b"),
        (OSError("/srv/models/tiny does not appear to have a file"),
         "The job cannot go on: tiny does not appear to have a file."),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/srv/models/tiny"),
         "The job cannot go on: No such file or directory."),
        (MemoryError(), "There is not enough memory for this job: lower micro_batch_size or sequence_len."),
    ],
)  # fmt: skip
def test_errors_of_ranks_name_no_path_of_the_server(error: Exception, message: str) -> None:
    from runtime.trainer.launched.agent import _end_of

    assert _end_of(error).message == message


def test_the_newest_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    for name in ("step-9", "step-10", "step-11.partial"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "step-10"


def test_versions_of_whole_models(tmp_path: Path) -> None:
    library, source = ModelLibrary(tmp_path), tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")

    def record(job: str) -> ModelRecord:
        return ModelRecord(job=job, step=3, metrics={}, base="tiny", created=1.0)

    assert library.publish("words", source, record("a")) == "words@1"
    assert library.publish("words", source, record("b")) == "words@2"
    assert library.publish("words", source, record("a")) == "words@1"  # again, after a crash
    found = library.find("words@2")
    assert found is not None
    assert (found / "config.json").read_text() == "{}"
    for label in ("words", "words@3", "../words@1", "words@01", "words@1/..", "words@0"):
        assert library.find(label) is None
    assert library.versions("words")[2].job == "b"


def test_a_process_ends_with_its_parent(tmp_path: Path) -> None:
    """The child of a parent that is killed is killed too, whatever it does."""
    child = "import os, time, sys; from runtime.support.threads import die_with; die_with(os.getppid()); "
    child += "print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        for _ in range(100):
            if not _alive(pid):
                break
            time.sleep(0.1)
        assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z" and os.path.exists(f"/proc/{pid}")


def test_a_process_that_an_earlier_server_left() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True) as process:
        started = psutil.Process(process.pid).create_time()
        left = LeftProcess(AgentRecord(pid=process.pid, started=started, attempt=1))
        other = LeftProcess(AgentRecord(pid=process.pid, started=started - 60, attempt=1))
        assert (left.poll(), other.poll(), other.wait()) == (None, 0, 0)  # an id may be given anew
        with pytest.raises(subprocess.TimeoutExpired):
            left.wait(0.01)
        left.kill()
        assert left.wait(10) == 0  # though its parent has not asked for its end yet
        assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("code", [-signal.SIGKILL, FAILED_CODE])
@pytest.mark.parametrize("noted", [True, False])
def test_how_torchrun_ended(code: int, noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that was killed is tried again; one that raised is not, though it could not write that down."""
    from types import SimpleNamespace

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    folder, end = JobFolder(tmp_path), LaunchEnd(crashed=False, message="no room", code="disk_full")

    def fail(arguments: list[str]) -> None:
        if noted:
            folder.write_error(0, end)
        raise ChildFailedError("rank", {0: SimpleNamespace(exitcode=code)})  # type: ignore[dict-item]

    monkeypatch.setenv(PARENT, "")  # to have it as it was
    monkeypatch.setattr(ChildFailedError, "__init__", lambda self, name, failures: setattr(self, "failures", failures))
    monkeypatch.setattr(run, "main", fail)
    assert run_agent(0, [], folder) == (KILLED_CODE if code < 0 else FAILED_CODE)
    assert folder.end() == (KILLED if code < 0 else end if noted else FAILED)


def test_another_program_at_the_meeting_place(tmp_path: Path) -> None:
    """It takes the connection and says nothing, for which torchrun waits without end."""
    folder = JobFolder(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        arguments = Nodes(per_node=1, count=2, rendezvous=place).arguments(folder, "job", max_restarts=0)
        program = "import sys; from runtime.trainer.launched import agent; agent.MEETING_SECONDS = 1.0; "
        program += "sys.exit(agent.main(sys.argv[1:]))"
        command = [sys.executable, "-c", program, "agent", "0", str(tmp_path), *arguments]
        done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    assert done.returncode == FAILED_CODE
    found = folder.end()
    assert found is not None
    assert (found.crashed, found.code) == (False, "nodes_not_met")


def test_torchrun_itself_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import run

    def fail(arguments: list[str]) -> None:
        raise ConnectionError("The connection to the C10d store has failed.")

    monkeypatch.setenv(PARENT, "")
    monkeypatch.setattr(run, "main", fail)
    folder = JobFolder(tmp_path)
    assert run_agent(0, [], folder) == FAILED_CODE
    found = folder.end()
    assert found is not None
    assert not found.crashed
    assert "C10d store has failed" in found.message


def test_an_adapters_own_tokens_are_refused(tmp_path: Path) -> None:
    from dataclasses import replace
    from types import SimpleNamespace
    from typing import cast

    from runtime.engine.launched import refuse_own_tokens
    from runtime.model.vocabulary import RowTargets
    from runtime.trainer.plan.plan import Plan
    from runtime.trainer.plan.vocabulary import VocabularyPlan

    own = VocabularyPlan(tokenizer=cast(Any, None), eos_id=3, rows=RowTargets())
    recipe = make(adapter="lora", ddp=True, special_tokens={"eos_token": "x"})
    plan = cast(Plan, SimpleNamespace(vocabulary=own, recipe=recipe, launch=launch_of(recipe, 2)))
    with pytest.raises(InvalidRequest) as caught:
        refuse_own_tokens(plan)
    assert caught.value.param == "special_tokens"
    plan.vocabulary = replace(own, eos_id=None)  # type: ignore[misc]
    refuse_own_tokens(plan)
