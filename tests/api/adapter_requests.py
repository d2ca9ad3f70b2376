"""Requests of adapters, and their answers."""

from pathlib import Path
from typing import Any

import httpx
import msgspec

from settings.schema import AdapterSettings, Settings, TrainerSettings
from tests.api.conftest import tiny_settings

ASK: dict[str, Any] = {"prompt": [5, 77, 131, 9, 42], "max_tokens": 8, "temperature": 0, "ignore_eos": True}


def adapter_settings(model: Path, state: Path, data: Path, **server: object) -> Settings:
    return msgspec.structs.replace(
        tiny_settings(model, **server),
        adapters=AdapterSettings(max_loaded=2, max_lora_rank=16),
        trainer=TrainerSettings(state_dir=str(state), data_roots=(str(data),)),
    )


def answer(http: httpx.Client, model: str, **more: Any) -> list[int]:
    response = http.post("/v1/completions", json={**ASK, "model": model, "return_token_ids": True, **more})
    assert response.status_code == 200, response.text
    return list(response.json()["choices"][0]["token_ids"])


def error(response: httpx.Response) -> tuple[int, str | None, str | None]:
    detail = response.json()["error"]
    return response.status_code, detail["param"], detail["code"]
