"""A whole server over a tiny model, with a state directory: files, batches, jobs and adapters."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

from settings.api import FileSettings
from settings.schema import SchedulerSettings, Settings, TrainerSettings
from tests.api.conftest import tiny_settings

ENDED = {"completed", "failed", "expired", "cancelled"}


def stateful_settings(model: Path, state: Path, *, files: FileSettings | None = None, **server: object) -> Settings:
    """Settings of a server over `model` with its state in `state`."""
    settings = tiny_settings(model, **server)
    return Settings(
        model=settings.model,
        cache=settings.cache,
        server=settings.server,
        scheduler=SchedulerSettings(max_batched_tokens=64),
        trainer=TrainerSettings(state_dir=str(state)),
        files=files or FileSettings(),
    )


def jsonl(*lines: Any) -> bytes:
    """Lines of JSON; bytes stay as they are."""
    return b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)


def chat_line(number: int, **body: Any) -> dict[str, Any]:
    """A line of a batch: a greedy chat, another for each number."""
    asked = {
        "messages": [{"role": "user", "content": f"What is the eft number {number}?"}],
        "max_tokens": 8,
        "temperature": 0,
        **body,
    }
    return {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": asked}


def batch_of(client: openai.OpenAI, content: bytes, **options: Any) -> Any:
    """Upload an input file, and create its batch."""
    file = client.files.create(file=("input.jsonl", content), purpose="batch")
    asked = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **options}
    return client.batches.create(input_file_id=file.id, **asked)


def wait_for(find: Callable[[], Any], done: Callable[[Any], bool], seconds: float = 120) -> Any:
    """Ask `find` again and again until its result is `done`."""
    end = time.monotonic() + seconds
    while not done(found := find()):
        assert time.monotonic() < end, f"it never came to that: {found}"
        time.sleep(0.05)
    return found


def ended(client: openai.OpenAI, batch_id: str) -> Any:
    """The batch, once it has ended."""
    return wait_for(lambda: client.batches.retrieve(batch_id), lambda batch: batch.status in ENDED)


def lines_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of an output file; none for no file."""
    return [] if file_id is None else [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
