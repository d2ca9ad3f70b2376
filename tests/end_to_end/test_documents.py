"""README and the pages of docs/, run: each command in a shell block, each piece of Python, each recipe.

Commands go to one server with a tiny model under the demo model's name. `eft` runs in this process, which saves a
second a command; other programs run in a shell. What cannot run here is in `PARSED` and `NOT_RUN`, with the reason.
"""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime.cli.app import app, run
from runtime.cli.flags import read_settings
from tests.end_to_end.process import ENDED, ServerProcess
from tests.tiny import make_tiny_llama

ROOT = Path(__file__).parents[2]
GENERATED = {"settings.md", "cli.md", "metrics.md"}
PAGES = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md")),
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in GENERATED),
]
MODEL = "SmolLM2-135M-Instruct"
RECIPE = """\
name: tickets
adapter: lora
lora_r: 2
datasets: [{path: data/tickets.jsonl, type: chat_template}]
val_set_size: 2
sequence_len: 256
micro_batch_size: 4
max_steps: 2
learning_rate: 5e-4
"""
LLAMA_FACTORY = f"""\
model_name_or_path: org/{MODEL}
stage: sft
finetuning_type: lora
lora_rank: 8
dataset: identity
template: default
learning_rate: 1e-4
"""
REQUEST = {
    "custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
    "body": {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]},
}  # fmt: skip

PARSED = {
    r"eft serve\b": "a server runs until it is ended; its settings are read here",
    r"eft top$": "it watches until it is ended: tests/cli/test_top.py",
    r"eft train .*--(model|admin-key)": "a second process with the state, a cluster's key: tests/cli/test_train.py",
    r"eft (batch .*results.jsonl$|bench )": "they load the demo model, or load the machine: tests/cli",
    r"eft export ": "it reads the base model's own files: tests/checkpoints/export",
    r"eft models swap ": "it moves to a whole model, which a launched job trains: tests/api/test_swap.py",
    r"eft jobs pause ": "the job has ended: tests/trainer/jobs",
    r"eft state prune ": "the server has the state: tests/cli/test_state.py",
    r"eft doctor$": "tests/cli/test_doctor.py",
}
"""Commands of `eft` whose arguments are parsed, and which are not run."""

NOT_RUN = {
    r"make ": "CI's own steps, and `make serve` is .ci/smoke",
    r"docker |kubectl ": "there is no engine and no cluster: tests/test_container.py, tests/api/test_deploy.py",
    r"torchrun ": "tests/workers/parallel, tests/trainer/launched",
    r"prometheus ": "tests/observability",
    r"pytest ": "the suite",
    r"python -m (benchmarks|venv)|~/peers|CMAKE_ARGS": "by hand, on an idle machine with other engines",
    r"pip download |check/bin/": "for a machine with a GPU and no network: tests/benchmarks",
    r"source ": "the environment is this one",
    r"mkdir -p /srv": "it belongs to an operator",
    r"curl .*https://": "there is no such host: tests/end_to_end/test_reverse_proxy.py",
    r"curl .*admin-token\)": "the state is elsewhere: tests/api/test_local_admin.py and its neighbours",
}
PYTHON_ELSEWHERE = {
    "adding-a-loss.md": "tests/trainer/losses",
    "adding-a-model.md": "tests/plugin",
    "hooks.md": "tests/engine/test_hooks.py",
    "extending.md": "tests/scheduler/test_policies.py",
}


@dataclass
class World:
    server: ServerProcess
    model: Path
    state: Path
    jobs: list[str]
    done: set[str] = field(default_factory=set)
    """Commands that have run: the same one on another page does not run again."""

    def settle(self) -> None:
        """Wait for the jobs that a command has started: their adapters have one name."""
        for job in self.server.http.get("/admin/jobs").json()["data"]:
            if job["status"] not in ENDED:
                self.server.wait_for_job(job["id"])

    def here(self, text: str) -> str:
        """The text with this server's address, and its folder of data in the place of an operator's."""
        text = text.replace("/srv/adapters", str(self.state.parent / "roots"))
        return re.sub(r"\b(127\.0\.0\.1|localhost):8000", self.server.url.removeprefix("http://"), text)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("documents")
    model = make_tiny_llama(folder / "model", max_position_embeddings=2048)
    roots = folder / "roots"
    shutil.copytree(ROOT / "settings" / "recipes", roots)
    recipe = (roots / "tickets.yaml").read_text(encoding="utf-8")  # the same in two steps, published as it comes
    assert "num_epochs: 4" in recipe
    recipe = recipe.replace("num_epochs: 4", "max_steps: 2").replace("when: eval_loss < 0.3", "when: always")
    (roots / "tickets.yaml").write_text(recipe)
    state = folder / "state"
    rows = (roots / "data" / "tickets.jsonl").read_bytes()
    with ServerProcess(str(model), state, served_model_name=MODEL, data_roots=roots) as server:
        jobs = []
        for _ in range(3):  # one after the other, since their adapters have one name
            jobs.append(server.train(RECIPE, {"data/tickets.jsonl": rows}))
            assert server.wait_for_job(jobs[-1])["status"] == "succeeded"
        (version,) = (state / "adapters" / "tickets").glob("1")
        shutil.copytree(version, roots / "billing")
        yield World(server, model, state, jobs)


@pytest.fixture
def folder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that pages name, and no settings but those of the server's state."""
    for name in [name for name in os.environ if name.startswith("EFT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EFT_TRAINER_STATE_DIR", str(world.state))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("sys.stdin", io.StringIO("My card was charged twice!\n"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "recipes").symlink_to(world.state.parent / "roots")
    shutil.copytree(ROOT / "settings" / "recipes" / "data", tmp_path / "data")
    shutil.copy(tmp_path / "data" / "tickets.jsonl", tmp_path / "data" / "rows.jsonl")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(world.model)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "job.yaml").write_text(LLAMA_FACTORY)
    (tmp_path / "requests.jsonl").write_text(json.dumps(REQUEST) + "\n")
    return tmp_path


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def commands(block: str) -> Iterator[str]:
    """The commands of a shell block: a line each, or several between semicolons; quoted lines go on."""
    pending = ""
    for line in re.sub(r"\\\n", " ", re.sub(r"<<'END'\n.*?\nEND\n", "\n", block, flags=re.DOTALL)).splitlines():
        pending = f"{pending}\n{line}" if pending else line
        lexer = shlex.shlex(pending, posix=True, punctuation_chars=";")
        lexer.whitespace_split = True
        lexer.commenters = "#"
        try:
            list(lexer)
        except ValueError:  # within quotes
            continue
        bare = re.sub(r"(^|\s)#.*$", "", pending).strip() if "\n" not in pending else pending.strip()
        pending = ""
        yield from filter(None, map(str.strip, re.split(r"; (?=eft )", bare)))
    assert not pending, pending


def reason(command: str, table: dict[str, str]) -> bool:
    return any(re.match(pattern, command) for pattern in table)


def run_eft(world: World, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One command of `eft`, with the variables before it and the redirection behind it."""
    command, _, target = command.partition(" > ")
    words = shlex.split(command)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    arguments = ["path/to/model" if word == "demo" else word for word in words[1:]]
    ids = iter(world.jobs if "compare" in arguments else [world.jobs[-1] if "rm" in arguments else world.jobs[0]])
    arguments = [next(ids) if word == "ftjob-…" else word for word in arguments]
    _, bound, *_ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    if arguments[0] == "serve":
        given = dict(bound.kwargs)
        read_settings({k: v for k, v in given.items() if k not in ("config", "model")}, given.get("config"))
    if reason(" ".join(words), PARSED):
        return
    takes_url = any("--url" in one.names for one in app.parse_commands(arguments)[1][-1].assemble_argument_collection())
    if takes_url and "--url" not in arguments and not {"--keys-only", "--model"} & set(arguments):
        arguments += ["--url", world.server.url]
    arguments = [world.here(word) for word in arguments]
    code = run(arguments)
    out, err = capsys.readouterr()
    assert code == 0, f"{command}\n{out}\n{err}"
    if target:
        Path(target).write_text(out, encoding="utf-8")


def run_in_shell(world: World, command: str) -> None:
    command = world.here(command).replace("ftjob-…", world.jobs[0]).replace("curl ", "curl -sS --fail-with-body ", 1)
    done = subprocess.run(["bash", "-euc", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(
    page: Path, world: World, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (command for block in blocks(page, "sh") for command in commands(block)):
        command = command.removeprefix(".venv/bin/")
        if command in world.done or reason(command, NOT_RUN):
            continue
        if command.startswith("export "):
            monkeypatch.setenv(*command.removeprefix("export ").split("=", 1))
            continue
        rows = "rows" if "data/rows.jsonl" in command else "tickets"
        (folder / "recipe.yaml").write_text(RECIPE.replace("data/tickets", f"data/{rows}"))
        if "--output recipe.yaml" in command:
            (folder / "recipe.yaml").unlink()
        if re.match(r"([A-Z_]+=\S+ )*eft ", command):
            run_eft(world, command, capsys, monkeypatch)
        else:
            run_in_shell(world, command)
        if "keys" not in command:
            world.done.add(command)
        world.settle()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python(page: Path, world: World, folder: Path) -> None:
    """The blocks of a page run one after the other, in one namespace."""
    if page.name in PYTHON_ELSEWHERE:
        for block in blocks(page, "python"):
            compile(block, page.name, "exec")
        return
    from openai import OpenAI

    names: dict[str, Any] = {
        "client": OpenAI(base_url=f"{world.server.url}/v1", api_key="none"),
        "conversation": [{"role": "user", "content": "What is an eft?"}],
    }
    for block in blocks(page, "python"):
        text = world.here(block).replace('LLM("demo")', f"LLM({str(world.model)!r})")
        exec(compile(text, page.name, "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.name)
def test_recipes(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole recipes, and parts of one beside the keys that every recipe needs."""
    for block in blocks(page, "yaml"):
        given = yaml.safe_load(block)
        whole = given if "datasets" in given else yaml.safe_load(RECIPE) | given
        (folder / "recipe.yaml").write_text(yaml.safe_dump(whole))
        assert run(["recipe", "check", "recipe.yaml", "--keys-only"]) == 0, capsys.readouterr()


def test_other_blocks_are_what_they_say() -> None:
    for page in PAGES:
        for block in blocks(page, "json"):
            assert [json.loads(line) for line in block.splitlines()]
        for block in blocks(page, "toml"):
            assert tomllib.loads(block)
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"^```(\w+)$", text, re.MULTILINE)) <= {"sh", "python", "json", "toml", "yaml", "nginx"}


def test_the_tables_of_what_is_not_run_are_needed() -> None:
    """A reason for a command that no page has any more goes."""
    found = [c.removeprefix(".venv/bin/") for page in PAGES for block in blocks(page, "sh") for c in commands(block)]
    for pattern in (*PARSED, *NOT_RUN):
        assert any(re.match(pattern, command) for command in found), pattern
    assert len(found) > 120
