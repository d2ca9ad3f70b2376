"""`lora_model_dir`: a job goes on from an adapter of the server, or from a folder of PEFT's."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file

from runtime.cli.client import in_process
from runtime.text.templates import builtin_template
from settings.load import load
from tests.adapter_files import make_adapter
from tests.end_to_end.process import ServerProcess
from tests.jobs import finished, served, upload

ROW = {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In the pond."}]}
DATA = "\n".join([json.dumps(ROW)] * 4)
TAIL = """
adapter: lora
max_steps: 2
learning_rate: 0.001
sequence_len: 256
datasets:
  - {path: a.jsonl, type: chat_template}
"""


async def post(client: httpx.AsyncClient, recipe: str, *, dry: bool = False) -> httpx.Response:
    path = "/admin/train?dry_run=1" if dry else "/admin/train"
    return await client.post(path, files={"recipe": (recipe + TAIL).encode(), "file": ("a.jsonl", DATA)})


async def train(client: httpx.AsyncClient, recipe: str) -> dict[str, Any]:
    return await finished(client, upload(recipe + TAIL, [ROW] * 4))


async def losses(client: httpx.AsyncClient, job: dict[str, Any]) -> list[float]:
    found = (await client.get(f"/admin/jobs/{job['id']}/metrics")).json()["data"]
    return [one["loss"] for one in found if one["type"] == "step"]


FIRST = "name: newt\nlora_r: 4\nlora_alpha: 12\nlora_target_modules: [q_proj, up_proj]\n"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "kind",
    ["", "peft_use_dora: true\n", "peft_use_rslora: true\n", 'lora_rank_pattern: {q_proj: 2, "1.mlp.*": 6}\n'],
)
async def test_a_job_goes_on_from_an_adapter_of_the_server(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """Rank, alpha, kind and targets are the adapter's; its losses go on falling; the version knows it."""
    async with in_process(served(tiny_model, tmp_path), training=True) as client:
        before = await losses(client, await train(client, FIRST + kind))
        job = await train(client, "name: eft\nlora_model_dir: newt\n")
        after = await losses(client, job)
        assert after[0] < before[0]
        assert min(after) < min(before)
        assert any("goes on from newt@1" in note for note in job["summary"]["notes"])
        assert set(job["summary"]["linears"]) == {"self_attn.q_proj", "mlp.up_proj"}
        again = await train(client, "name: newt\nlora_model_dir: newt@1\nlora_r: 4\n")
        assert again["adapter"] == "newt@2"
        versions = {
            view["id"]: view
            for name in ("newt", "eft")
            for view in (await client.get(f"/admin/adapters/{name}")).json()["versions"]
        }
        assert {name: view["went_on_from"] for name, view in versions.items()} == {
            "newt@1": None,
            "newt@2": "newt@1",
            "eft@1": "newt@1",
        }
        files = [Path(versions[name]["path"]) for name in ("newt@1", "eft@1", "newt@2")]
        first, eft, newt = (load_file(folder / "adapter_model.safetensors") for folder in files)
        assert first.keys() == eft.keys() == newt.keys()
        assert any((first[name] != eft[name]).any() for name in first)
        assert all((eft[name] - newt[name]).abs().max() < 1e-5 for name in eft)  # the same rows after the same weights
        assert not (tmp_path / "jobs" / job["id"] / "origin").exists()  # nothing reads it after the end
        answer = await client.post(
            "/v1/chat/completions", json={"model": "eft", "messages": ROW["messages"][:1], "max_tokens": 2}
        )
        assert answer.status_code == 200


@pytest.mark.anyio
async def test_what_the_recipe_says_must_be_what_the_adapter_has(tiny_model: Path, tmp_path: Path) -> None:
    async with in_process(served(tiny_model, tmp_path), training=True) as client:
        await train(client, FIRST)
        for lines, param, says in (
            ("lora_r: 8\n", "lora_r", "lora_r is 8, but newt@1, from which the job goes on (lora_model_dir), has 4"),
            ("lora_alpha: 16\n", "lora_alpha", "lora_alpha is 16, but newt@1"),
            ("peft_use_dora: true\n", "peft_use_dora", "peft_use_dora is true, but newt@1"),
            ("peft_use_rslora: true\n", "peft_use_rslora", "has false: it must be that, or be left out."),
            ("lora_target_modules: [q_proj]\n", "lora_target_modules", "which adapts q_proj, up_proj in 2 layers"),
            ("lora_target_linear: true\n", "lora_target_linear", "names other linears than newt@1"),
            ("peft_init_lora_weights: pissa\n", "peft_init_lora_weights", "has no meaning with lora_model_dir"),
        ):
            answer = await post(client, f"lora_model_dir: newt\n{lines}", dry=True)
            assert answer.status_code == 400, lines
            assert (answer.json()["error"]["param"], says in answer.json()["error"]["message"]) == (param, True), answer
        agreed = "lora_r: 4\nlora_alpha: 12\nlora_target_modules: [q_proj, up_proj]\npeft_use_dora: false\n"
        assert (await post(client, f"lora_model_dir: newt\n{agreed}", dry=True)).status_code == 200
        for name, status, says in (
            ("olm", 400, "neither an adapter of this server (newt) nor a folder under a data root"),
            ("newt@7", 400, "newt has the versions 1"),
            ("../../etc", 403, "a folder outside of the data roots"),
            ("/etc", 403, "a folder outside of the data roots"),
        ):
            answer = await post(client, f"lora_model_dir: {name}\n", dry=True)
            assert answer.status_code == status, answer.text
            assert answer.json()["error"]["param"] == "lora_model_dir"
            assert says in answer.json()["error"]["message"]


@pytest.mark.anyio
async def test_a_job_goes_on_from_a_folder_of_pefts(tiny_model: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    folder = make_adapter(tiny_model, state / "data" / "outputs" / "lora-out", use_dora=True, r=3)
    async with in_process(served(tiny_model, state), training=True) as client:
        job = await train(client, "name: eft\nlora_model_dir: outputs/lora-out\n")
        (view,) = (await client.get("/admin/adapters/eft")).json()["versions"]
        assert (view["went_on_from"], view["rank"]) == ("lora-out", 3)
        first, last = (load_file(path / "adapter_model.safetensors") for path in (folder, Path(view["path"])))
        assert first.keys() == last.keys()
        assert all(0 < (first[name] - last[name]).abs().max() < 0.05 for name in first)
        assert any("goes on from lora-out" in note for note in job["summary"]["notes"])
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "other/model"}))
        answer = await post(client, "lora_model_dir: outputs/lora-out\n", dry=True)
        assert any("made for 'other/model'" in note for note in answer.json()["summary"]["notes"])
        for change, says in (
            ({"rank_pattern": {"q_proj": 7}}, "expected shape"),
            ({"r": 4}, "expected shape"),
            ({"init_lora_weights": "pissa"}, "changes the base model's weights"),
        ):
            (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
            answer = await post(client, "lora_model_dir: outputs/lora-out\n", dry=True)
            assert answer.status_code == 400, change
            assert answer.json()["error"]["param"] == "lora_model_dir"
            assert says in answer.json()["error"]["message"], answer.text
        patterns = {"alpha_pattern": {"q_proj": 7, "absent": 1}}
        (folder / "adapter_config.json").write_text(json.dumps({**config, **patterns}))
        for own, status in (
            ("", 200),
            ("lora_alpha_pattern: {q_proj: 7}\n", 200),
            ("lora_rank_pattern: {o: 2}\n", 400),
        ):
            answer = await post(client, f"lora_model_dir: outputs/lora-out\n{own}", dry=True)
            assert answer.status_code == status, answer.text
        assert "lora_rank_pattern is {o: 2}, but lora-out" in answer.text
        shutil.rmtree(folder)
        assert (await post(client, "lora_model_dir: outputs/lora-out\n", dry=True)).status_code == 400


@pytest.mark.anyio
async def test_the_template_that_goes_with_an_adapter_goes_on_with_it(tiny_model: Path, tmp_path: Path) -> None:
    async with in_process(served(tiny_model, tmp_path), training=True) as client:
        await train(client, FIRST + "chat_template: exaone4\n")
        job = await train(client, "name: eft\nlora_model_dir: newt\n")
        assert any("template that goes with newt@1" in note for note in job["summary"]["notes"])
        card = json.loads((tmp_path / "adapters/eft/1/eft.json").read_text())
        assert card["chat_template"] == builtin_template("exaone4")
        assert card["went_on_from"] == "newt@1"


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["pissa_niter_4", "olora", "loftq"])
async def test_adapters_with_made_first_weights_are_published_for_the_base(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    loaded = load(flags={"model": str(tiny_model), "state_dir": str(tmp_path), "quantization": "int4"}, env={})
    async with in_process(loaded, training=True) as client:
        job = await train(client, f"name: newt\nlora_r: 4\npeft_init_lora_weights: {kind}\n")
        assert job["adapter"] == "newt@1"
        (view,) = (await client.get("/admin/adapters/newt")).json()["versions"]
        assert view["rank"] == (4 if kind == "loftq" else 8)
        config = json.loads((Path(view["path"]) / "adapter_config.json").read_text())
        assert config["init_lora_weights"] is True
        body = {"model": "newt", "messages": ROW["messages"][:1], "max_tokens": 2}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200


@pytest.mark.anyio
async def test_the_example_recipes_run_one_after_the_other(tiny_model: Path, tmp_path: Path) -> None:
    examples = Path(__file__).parents[2] / "settings" / "recipes"
    async with in_process(served(tiny_model, tmp_path), training=True) as client:
        for number, name in enumerate(("dora", "going-on"), 1):
            recipe = (examples / f"{name}.yaml").read_text(encoding="utf-8")
            assert recipe.startswith(f"# eft train settings/recipes/{name}.yaml\n")
            files: Any = [("recipe", recipe.replace("num_epochs", "max_steps").encode())]
            data = [examples / "data" / file for file in ("tickets.jsonl", "tickets-test.jsonl")]
            files += [("file", (f"data/{path.name}", path.read_bytes())) for path in data]
            assert (await finished(client, files))["adapter"] == f"tickets-dora@{number}"


RECIPE = """
adapter: lora
datasets:
  - path: rows.jsonl
    type: chat_template
test_datasets:
  - path: test.jsonl
    type: chat_template
sequence_len: 64
micro_batch_size: 4
max_steps: 5
learning_rate: 2e-3
lr_scheduler: constant
warmup_steps: 0
eval_steps: 5
"""


@pytest.mark.real_model
@pytest.mark.timeout(600)
def test_an_adapter_goes_on_from_another_and_improves(tmp_path: Path) -> None:
    """SmolLM2, with magnitudes: the second job begins where the first one ended, and ends lower on held-out rows."""
    colours, things = ("red", "green", "blue", "white"), ("apple", "house", "river", "stone", "lamp", "boat")
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"A {colour} {thing}."},
                    {"role": "assistant", "content": json.dumps({"thing": thing, "colour": colour})},
                ]
            }
        )
        for colour in colours
        for thing in things
    ]
    files = {"rows.jsonl": "\n".join(lines[:20]).encode(), "test.jsonl": "\n".join(lines[20:]).encode()}
    with ServerProcess("demo", tmp_path / "state") as server:
        found = []
        for extra in (
            "name: one\nlora_r: 8\nlora_alpha: 16\npeft_use_dora: true\nlora_target_modules: [q_proj, v_proj]\n",
            "name: two\nlora_model_dir: one@1\n",
        ):
            job = server.wait_for_job(server.train(extra + RECIPE, files), 250)
            assert job["status"] == "succeeded", job["error"]
            metrics: list[dict[str, Any]] = server.http.get(f"/admin/jobs/{job['id']}/metrics").json()["data"]
            steps = [one["loss"] for one in metrics if one["type"] == "step"]
            found.append((steps, [one["loss"] for one in metrics if one["type"] == "eval"][-1]))
        (first, held), (second, better) = found
        assert second[0] < first[0] - 0.3
        assert better < held - 0.1
        assert server.ask("two", "A blue boat.") != server.ask("SmolLM2-135M-Instruct", "A blue boat.")
