"""Prompt format for a model of a server: that of the rows that its adapter was trained on."""

import re
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
from msgspec import Struct

from runtime.cli.client import admin_client

DEFAULT_MAX_TOKENS = 512
"""Default of `max_tokens` for a text prompt, for which /v1/completions has 16."""
_VERSION = re.compile(r"(.+)[@:]([0-9]+)")


class Asking(Struct, frozen=True, kw_only=True):
    """Prompt format: chat, or text made from a template."""

    format: str = "chat"
    system: str | None = None
    """chat: the system message of every training row."""
    template: str | None = None
    """alpaca: with `{instruction}`; text: with `{prompt}`."""
    max_tokens: int = DEFAULT_MAX_TOKENS

    @property
    def in_chats(self) -> bool:
        return self.format == "chat" or self.template is None

    def prompt(self, question: str) -> str:
        """The prompt of a question."""
        head, _, rest = (self.template or "").partition("{instruction}" if self.format == "alpaca" else "{prompt}")
        return head + question + rest


async def how_to_ask(http: httpx.AsyncClient, model: str) -> Asking:
    """Prompt format that the server behind `http` reports for a model; chat if it reports none."""
    found = await _json(http, f"/v1/models/{quote(model)}")
    format, context = found.get("prompt_format"), found.get("max_model_len")
    if not isinstance(format, str) or found.get("parent") is None:
        return Asking()
    prompt = await _card(str(http.base_url), model)
    half = context // 2 if isinstance(context, int) else DEFAULT_MAX_TOKENS
    texts = {"alpaca": _alpaca(), "text": "{prompt}"}
    return Asking(
        format=format,
        system=prompt.get("system"),
        template=prompt.get("template") or texts.get(format),
        max_tokens=min(DEFAULT_MAX_TOKENS, half),
    )


async def _card(url: str, model: str) -> dict[str, Any]:
    """Prompt of an adapter from /admin, with its system message. Empty without the scope train."""
    match = _VERSION.fullmatch(model)
    name, number = (match[1], int(match[2])) if match else (model, None)
    async with admin_client(url, None) as http:
        adapter = await _json(http, f"/admin/adapters/{quote(name, safe='')}")
    wanted = adapter.get("current") if number is None else number
    versions = [version for version in adapter.get("versions", []) if version.get("number") == wanted]
    return (versions[0].get("prompt") if versions else None) or {}


def _alpaca() -> str:
    from runtime.trainer.data.instructions import ALPACA

    return ALPACA.without


async def _json(http: httpx.AsyncClient, path: str) -> dict[str, Any]:
    try:
        response = await http.get(path)
        return dict(msgspec.json.decode(response.content)) if response.status_code == httpx.codes.OK else {}
    except (httpx.HTTPError, msgspec.DecodeError, TypeError, ValueError):
        return {}
