"""`eft recipe`."""

import json
from pathlib import Path

import httpx
import msgspec
import pytest

from runtime.trainer.recipe.reference import json_schema, reference
from settings.schema import TrainerSettings
from tests.api.conftest import RunningServer, tiny_settings
from tests.cli.conftest import Eft
from tests.parity.fallbacks import make_fallback

RECIPE = """
adapter: lora
lora_r: 4
learning_rate: 2e-4
datasets:
  - path: rows.jsonl
val_set_size: 1
bf16: auto
"""
ROWS = "".join(
    json.dumps({"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}) + "\n"
    for n in range(5)
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with its data beside it, and not in the working directory."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(ROWS)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


def test_check_prints_the_plan(eft: Eft, recipe: Path, tiny_model: Path) -> None:
    done = eft("recipe", "check", recipe, "--model", tiny_model)
    assert done.code == 0, done.err
    rows = {line.split("  ")[0]: line for line in done.out.splitlines() if "  " in line}
    assert "tiny-llama" in rows["base model"]
    assert " 4; " in rows["training rows"]
    assert "steps" in rows
    assert "note: bf16 is ignored" in done.out
    assert "«" in done.out


def test_check_as_json(eft: Eft, recipe: Path, tiny_model: Path) -> None:
    done = eft("recipe", "check", recipe, tiny_model, "--json")
    plan = json.loads(done.out)
    assert done.code == 0
    assert (plan["object"], plan["name"], plan["total_steps"]) == ("job.plan", "", 4)
    summary = plan["summary"]
    assert (summary["train"]["examples"], summary["test"]["examples"]) == (4, 1)
    assert summary["trained_parameters"] > 0
    assert summary["schedule"]["total_steps"] == 4


def test_the_running_server_checks_it(
    eft: Eft, recipe: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `eft train --dry-run` does, and but for the time in the words and the JSON of a check without a server."""
    settings = msgspec.structs.replace(
        tiny_settings(tiny_model), trainer=TrainerSettings(state_dir=str(tmp_path / "state"))
    )
    here = eft("recipe", "check", recipe, "--model", tiny_model)
    here_json = json.loads(eft("recipe", "check", recipe, "--model", tiny_model, "--json").out)
    with RunningServer(settings) as server:
        monkeypatch.setattr("runtime.cli.recipe.DEFAULT_URL", server.url)
        found = eft("recipe", "check", recipe)
        dry = eft("train", recipe, "--url", server.url, "--dry-run")
        named = eft("recipe", "check", recipe, "--url", server.url, "--json")
        assert json.loads(eft("train", recipe, "--url", server.url, "--dry-run", "--json").out) == json.loads(named.out)
        (recipe.parent / "rows.jsonl").write_text(ROWS + "nonsense\n")
        refused = eft("recipe", "check", recipe)
        as_json = eft("recipe", "check", recipe, "--json")
        (recipe.parent / "rows.jsonl").rename(recipe.parent / "row.jsonl")
        missing = eft("recipe", "check", recipe)
        (recipe.parent / "rows.jsonl").mkdir()
        folders = [eft("recipe", "check", recipe), eft("train", recipe, "--url", server.url)]
        asked = httpx.get(f"{server.url}/admin/jobs").json()["data"]
    assert found.code == 0
    assert "eft:" not in found.err
    assert found.out == dry.out
    measured = [line for line in found.out.splitlines(keepends=True) if line.startswith("time ")]
    assert len(measured) == 1  # where nothing trains, nothing is known of the time
    assert found.out.replace(measured[0], "") == here.out
    summary, expected = json.loads(named.out)["summary"], here_json["summary"]
    assert summary["estimate"].pop("seconds") > 0
    assert summary["estimate"].pop("basis") == "trial"
    assert (expected["estimate"].pop("seconds"), expected["estimate"].pop("basis")) == (None, None)
    assert {key: summary[key] for key in expected} == expected
    assert refused.code == 2
    assert "rows.jsonl, row 6: is not JSON" in refused.err
    assert as_json.code == 2
    assert json.loads(as_json.out)["error"]["param"] == "datasets[0]"
    assert missing.code == 2
    assert "rows.jsonl is missing" in missing.err
    assert "did you mean " in missing.err
    assert "row.jsonl?" in missing.err
    assert [done.code for done in folders] == [2, 1]
    for done in folders:
        assert "rows.jsonl is a folder: name the files in it that are the data\n" in done.err
    assert asked == []


def test_a_server_that_does_not_let_us_check(
    eft: Eft, recipe: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunningServer(tiny_settings(tiny_model, api_key=("k",), admin_key=("boss",))) as server:
        monkeypatch.setattr("runtime.cli.recipe.DEFAULT_URL", server.url)
        monkeypatch.setenv("EFT_MODEL_MODEL", str(tiny_model))
        monkeypatch.setenv("EFT_ADMIN_KEY", "wrong")
        done = eft("recipe", "check", recipe)
        named = eft("recipe", "check", recipe, "--url", server.url)
    assert done.code == 0
    assert "does not check it" in done.err
    assert "checking here" in done.err
    assert named.code == 1
    assert "401" in named.err
    assert eft("recipe", "check", recipe, "--url", server.url, "--model", "demo").code == 2


def test_all_problems_and_exit_code_2(eft: Eft, recipe: Path) -> None:
    recipe.write_text(RECIPE + "lora_rr: 3\nmax_steps: 0\n")
    done = eft("recipe", "check", recipe)
    assert (done.code, done.out) == (2, "")
    assert "lora_rr, line 9: unknown key; did you mean lora_r?" in done.err
    assert "max_steps, line 10: expected a whole number of at least 1" in done.err
    found = eft("recipe", "check", recipe, "--json")
    assert found.code == 2
    shown = json.loads(found.out)
    assert [(problem["key"], problem["line"]) for problem in shown["problems"]] == [("lora_rr", 9), ("max_steps", 10)]
    assert shown["error"]["param"] == "lora_rr"


def test_a_bad_row_and_exit_code_2(eft: Eft, recipe: Path, tiny_model: Path) -> None:
    (recipe.parent / "rows.jsonl").write_text(ROWS + "nonsense\n")
    done = eft("recipe", "check", recipe, tiny_model)
    assert done.code == 2
    assert "rows.jsonl, row 6: is not JSON" in done.err


def test_keys_only_needs_no_model_and_no_data(eft: Eft, recipe: Path) -> None:
    (recipe.parent / "rows.jsonl").unlink()
    done = eft("recipe", "check", recipe, "--keys-only", "--model", "absent")
    assert (done.code, "the keys are fine" in done.out) == (0, True)
    assert json.loads(eft("recipe", "check", recipe, "--keys-only", "--json").out)["notes"]


def test_the_rank_is_limited_by_the_settings(eft: Eft, recipe: Path) -> None:
    done = eft("recipe", "check", recipe, "--keys-only", "--max-lora-rank", "2")
    assert "lora_r, line 3: must be at most 2 (adapters.max_lora_rank), got 4" in done.err


def test_a_file_that_is_not_there(eft: Eft) -> None:
    done = eft("recipe", "check", "absent.yaml")
    assert (done.code, "cannot read absent.yaml" in done.err) == (2, True)


def test_new_is_a_recipe_and_overwrites_nothing(eft: Eft, tmp_path: Path) -> None:
    printed = eft("recipe", "new").out
    assert eft("recipe", "new", "--output", "recipe.yaml").code == 0
    assert (tmp_path / "recipe.yaml").read_text() == printed
    assert eft("recipe", "check", "recipe.yaml", "--keys-only").code == 0
    (tmp_path / "recipe.yaml").write_text("mine")
    done = eft("recipe", "new", "--output", "recipe.yaml")
    assert (done.code, "is there already" in done.err) == (2, True)
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    assert eft("recipe", "new", "--output", "absent/recipe.yaml").code == 1


def test_schema_and_docs(eft: Eft) -> None:
    assert json.loads(eft("recipe", "schema").out) == json.loads(json.dumps(json_schema()))
    assert eft("recipe", "docs").out == reference()


def test_check_of_a_model_without_a_family(eft: Eft, recipe: Path, tmp_path: Path) -> None:
    """Its linears are known when it is loaded; what the log says of it is not in the plan."""
    make_fallback(tmp_path / "model", "phi")
    recipe.write_text(RECIPE + "lora_target_modules: [fc1, dense]\nsequence_len: 64\n")
    done = eft("recipe", "check", recipe, "--model", tmp_path / "model", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["summary"]["base_model"] == "model"
    assert "no_native_model" in done.err
    recipe.write_text(RECIPE + "lora_target_modules: [q_proj, newt]\nsequence_len: 64\n")
    refused = eft("recipe", "check", recipe, "--model", tmp_path / "model")
    assert refused.code == 2
    assert "fc1, fc2" in refused.err


def test_keys_only_prints_the_verdict_of_each_key(eft: Eft, recipe: Path) -> None:
    recipe.write_text(RECIPE + "evaluation_strategy: epoch\nwandb_mode:\nflash_attention: true\n")
    done = eft("recipe", "check", recipe, "--keys-only")
    lines = [line.split(maxsplit=2) for line in done.out.splitlines()]
    assert ["lora_r", "works"] in lines
    assert ["wandb_mode", "off"] in [line[:2] for line in lines]
    assert ["flash_attention", "noted", "the server's own kernels compute this"] in lines
    assert ["bf16", "works"] in [line[:2] for line in lines]
    assert ["evaluation_strategy", "renamed", "eval_strategy"] in lines
    assert ["datasets[0].path", "works"] in lines
    as_json = json.loads(eft("recipe", "check", recipe, "--keys-only", "--json").out)
    assert {"key": "lora_r", "verdict": "works", "why": ""} in as_json["keys"]
    recipe.write_text(RECIPE + "use_pose: true\n")
    done = eft("recipe", "check", recipe, "--keys-only")
    assert done.code == 2
    assert ["use_pose", "refused"] in [line.split()[:2] for line in done.out.splitlines()]
    assert "use_pose, line 9: is not supported" in done.err


def test_explain(eft: Eft) -> None:
    done = eft("recipe", "explain", "lora_r")
    assert (done.code, done.out.startswith("lora_r: a whole number of at least 1. Default: 16. Rank")) == (0, True)
    assert "does nothing: the server's own kernels" in eft("recipe", "explain", "flash_attention").out
    assert "refused when it is on" in eft("recipe", "explain", "use_pose").out
    assert "another name, or form, of adam_epsilon" in eft("recipe", "explain", "adam_eps").out
    assert eft("recipe", "explain", "datasets.shards").out.startswith("datasets.shards: a whole number")
    missing = eft("recipe", "explain", "lora_s")
    assert (missing.code, "did you mean lora_r?" in missing.err) == (2, True)


def test_convert(eft: Eft, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"rows": {"file_name": "rows.jsonl"}}')
    job.write_text("model_name_or_path: tiny\nstage: sft\ndataset: rows\nlearning_rate: 1e-4\ncutoff: 3\n")
    made = tmp_path / "recipe.yaml"
    assert eft("recipe", "convert", job, "--output", made).code == 0
    assert made.read_text().startswith("# From job.yaml.\n# cutoff is left out")
    assert "path: rows.jsonl" in made.read_text()
    assert eft("recipe", "check", made, "--keys-only").code == 0
    job.write_text('{"model": "tiny", "training_file": "file-abc"}')
    assert "path: file-abc" in eft("recipe", "convert", job).out
    job.write_text("adapter: lora\n")
    refused = eft("recipe", "convert", job)
    assert (refused.code, "neither a recipe of LLaMA-Factory" in refused.err) == (2, True)
