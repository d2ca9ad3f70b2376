"""DeepSpeed's and FSDP's configurations, and the devices that are set aside."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from runtime.engine.devices import TrainingDevices, training_devices
from runtime.engine.launched import DEEPSPEED, MAX_CONFIG, deepspeed_config
from runtime.errors import InvalidRequest
from runtime.model.config import ModelLoadError
from runtime.trainer.launched.zero import complete
from runtime.trainer.recipe.launch import fsdp_options, launch_of
from settings.load import load
from settings.schema import Settings
from tests.trainer.launched.recipes import make


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
