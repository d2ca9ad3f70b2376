"""A long value in every field of every endpoint that takes JSON: refused in few words, or taken; never sent back."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec

from runtime.api.app import create_app
from runtime.api.docs import BODY
from settings.schema import Settings
from tests.api.blocking import own_doing
from tests.api.conftest import RunningServer
from tests.api.fakes import FakeService

MAX_ANSWER = 2000
"""Most bytes of an error."""

TEXT = "x" * 5000
VALUES: list[Any] = [TEXT, {"type": TEXT}, [{"role": TEXT}]]
LEAST: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 16},
    "/tokenize": {"prompt": "a"},
}
"""Bodies that are answered, by route; the other routes get one field alone."""


def routes() -> Iterator[tuple[str, str]]:
    """(path, field) of all bodies."""
    with own_doing():
        app = create_app(FakeService(), Settings())  # type: ignore[arg-type]
    for route in app.routes:
        for handler in getattr(route, "route_handlers", ()):
            kinds = handler.opt.get(BODY, ())
            for kind in kinds if isinstance(kinds, tuple) else (kinds,):
                for field in msgspec.structs.fields(kind):
                    yield re.sub("{[^}]*}", "x", route.path), field.encode_name


def test_errors_are_short(server: RunningServer) -> None:
    found = sorted(set(routes()))
    assert {path for path, _ in found} >= LEAST.keys()
    wrong = []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for path, field in found:
            for value in VALUES:
                content = msgspec.json.encode({**LEAST.get(path, {}), field: value})
                answer = client.post(path, content=content, headers={"content-type": "application/json"})
                failed = answer.status_code >= 500 and answer.status_code != 503
                if failed or (answer.status_code >= 400 and len(answer.content) > MAX_ANSWER):
                    wrong.append((path, field, str(value)[:20], answer.status_code, len(answer.content)))
    assert not wrong


def test_an_unknown_member_is_named_by_its_beginning(server: RunningServer) -> None:
    answer = httpx.post(server.url + "/v1/completions", json={"prompt": "a", "truncation_side": TEXT})
    error = answer.json()["error"]
    assert error["param"] == "truncation_side"
    assert error["message"].startswith("truncation_side: Invalid enum value 'xxx")
    assert len(error["message"]) < 300
