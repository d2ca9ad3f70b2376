"""Small training jobs: a recipe with its rows, and the job once it has succeeded."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from settings.load import Loaded, load

NEWT_RECIPE = """
name: newt
adapter: lora
lora_r: 4
datasets:
  - path: train.jsonl
    type: completion
sequence_len: 64
micro_batch_size: 2
max_steps: 4
learning_rate: 1e-3
"""
NEWT_ROWS = b"".join(b'{"text": "the newt crosses the road %d"}\n' % n for n in range(8))


def newt_recipe(**keys: object) -> str:
    """`NEWT_RECIPE` with these keys, added or in place of its own."""
    lines = [line for line in NEWT_RECIPE.splitlines() if line.partition(":")[0] not in keys]
    return "\n".join([*lines, *(f"{key}: {json.dumps(value)}" for key, value in keys.items())]) + "\n"


def served(model: Path, state: Path, **flags: object) -> Loaded:
    """Settings of a server of this model, with a state directory of its own."""
    return load(flags={"model": str(model), "state_dir": str(state), **flags}, env={})


def upload(recipe: str, rows: Sequence[dict[str, Any]], name: str = "a.jsonl") -> dict[str, Any]:
    """The parts of a form: the recipe, and its one file of rows."""
    return {"recipe": recipe.encode(), "file": (name, "\n".join(map(json.dumps, rows)))}


async def finished(client: httpx.AsyncClient, files: Any) -> dict[str, Any]:
    """The job of these parts of a form, once it has succeeded."""
    posted = await client.post("/admin/train", files=files)
    assert posted.status_code == 201, posted.text
    while True:
        job: dict[str, Any] = (await client.get(f"/admin/jobs/{posted.json()['id']}")).json()
        if job["status"] == "succeeded":
            return job
        assert job["status"] not in ("failed", "cancelled"), job
        await asyncio.sleep(0.05)
