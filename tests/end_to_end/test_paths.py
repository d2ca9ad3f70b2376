"""How many files a chat request and a recipe cross, counted while they do."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import runtime
from runtime.cli.client import in_process
from runtime.messages import RidingRow, Row, StepResult
from runtime.trainer.data.example import Example
from runtime.trainer.data.examples import Reader
from runtime.workers.recorded_steps import LaunchedStep
from runtime.workers.worker import Worker
from settings.load import Loaded, load
from tests.jobs import finished, upload

pytestmark = pytest.mark.anyio

PACKAGE = str(Path(runtime.__file__).parent) + "/"
COMMON = (
    "support/", "metrics/", "cli/", "messages.py", "errors.py", "events.py", "files/", "responses.py", "feedback.py",
    "api/admin/jobs.py",
)  # fmt: skip
"""Known to all parts, the upkeep of files, and the harness, which waits for a job's end by asking for it."""

PROTOCOL = ("api/http/", "access/")
"""HTTP itself: what is done to every request before its body is read as one of an endpoint, and after its answer."""

DECODE = ("model/",)
"""The decode step itself, which is behind one call of the worker."""

CHAT, CHAT_WHOLE, RECIPE = 30, 44, 100
"""Bounds, to be lowered with each file that a path no longer crosses. `CHAT` is without PROTOCOL and DECODE."""

OWN = ("api/admin/", "adapters/", "engine/jobs.py", "engine/training_pace.py", "trainer/")
"""Rooms of recipes, jobs, training and adapters…"""
SHARED = (
    "access/", "api/handle.py", "api/http/", "blocks/", "checkpoints/", "engine/", "model/", "scheduler/", "text/",
    "workers/",
)  # fmt: skip
"""…and those that a request crosses too, to the base or to an adapter."""
RECIPE_OWN = 54
"""Bound of a recipe's files in OWN."""

RECIPE_TAIL = "adapter: lora\nlora_r: 4\nlora_target_linear: true\nmax_steps: 2\nlearning_rate: 0.001\nname: ahoy\n"


class Trace:
    """Files of `runtime` in which a function is called, while `on`."""

    def __init__(self) -> None:
        self.on = False
        self.files: dict[str, None] = {}

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if self.on and event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name != "<module>":
            name = code.co_filename.removeprefix(PACKAGE)
            if not name.startswith(COMMON):
                self.files[name] = None


@contextmanager
def traced() -> Iterator[Trace]:
    """Of this thread, and of those that it starts."""
    trace = Trace()
    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        yield trace
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def settings(model: Path, state: Path) -> Loaded:
    return load(flags={"model": str(model), "state_dir": str(state)}, env={})


async def test_a_chat_request_crosses_few_files(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its body to the step that decodes its second token."""
    seen: list[list[str]] = []
    launch = Worker.launch

    def counted(self: Worker, step: int, rows: list[Row], riding: RidingRow | None = None) -> StepResult | LaunchedStep:
        result = launch(self, step, rows, riding)
        if all(row.count == 1 for row in rows):
            seen.append(list(trace.files))
        return result

    monkeypatch.setattr(Worker, "launch", counted)
    body = {"model": tiny_model.name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    with traced() as trace:
        opened = in_process(settings(tiny_model, tmp_path))
        async with opened as client:
            warm = await client.post("/v1/chat/completions", json=body)  # what is made once, is made here
            seen.clear()
            trace.on = True
            answer = await client.post("/v1/chat/completions", json=body)
            trace.on = False
    assert (warm.status_code, answer.status_code) == (200, 200)
    crossed = [name for name in seen[0] if not name.startswith((*PROTOCOL, *DECODE))]
    assert len(crossed) <= CHAT, "\n".join(crossed)
    assert len(seen[0]) <= CHAT_WHOLE, "\n".join(seen[0])
    described = (Path(__file__).parents[2] / "docs/architecture.md").read_text(encoding="utf-8")
    section = described.partition("## A chat request, file by file")[2].partition("\n## ")[0]
    assert not [name for name in crossed if name not in section], "docs/architecture.md does not have the whole path"


async def test_a_recipe_crosses_few_files(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From POST to the adapter that is served; each group of its data is read once."""
    groups: list[str] = []
    read = Reader.read

    def counted(self: Reader, group: str, *args: Any) -> list[Example]:
        groups.append(group)
        return read(self, group, *args)

    monkeypatch.setattr(Reader, "read", counted)
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "ahoy"}]}
    recipe = f"base_model: {tiny_model.name}\ndatasets:\n  - path: a.jsonl\n    type: chat_template\n" + RECIPE_TAIL
    with traced() as trace:
        async with in_process(settings(tiny_model, tmp_path), training=True) as client:
            assert (await client.get("/ready")).status_code == 200  # so the tasks of the server have begun
            trace.on = True
            await finished(client, upload(recipe, [row] * 4))
            trace.on = False
    assert groups == ["datasets", "test_datasets", "generation_datasets"]
    assert len(trace.files) <= RECIPE, "\n".join(sorted(trace.files))
    own = sorted(name for name in trace.files if name.startswith(OWN))
    assert len(own) <= RECIPE_OWN, "\n".join(own)
    described = (Path(__file__).parents[2] / "docs/architecture.md").read_text(encoding="utf-8")
    section = described.partition("## A recipe, file by file")[2].partition("\n## ")[0]
    missing = [name for name in own if f"`{name}`" not in section and f"`{name.rpartition('/')[2]}`" not in section]
    assert not missing, "docs/architecture.md does not have the whole path"
    assert not [name for name in trace.files if not name.startswith(OWN + SHARED)]
