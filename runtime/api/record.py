"""What one HTTP request carries beside its body: its id, warnings for its sender, counts for the log."""

import uuid
from dataclasses import dataclass, field
from typing import Any

from litestar.connection import ASGIConnection
from litestar.types import Scope

MAX_ID = 128
"""Characters of a request id; longer ones are cut."""

_KEY = "eft_record"


@dataclass
class RequestRecord:
    """Made by `runtime.api.observe` before routing, filled by handlers, written out at the end."""

    request_id: str
    tenant: str = ""
    """Label of the API key that was checked; "" where none is asked for."""
    warnings: list[str] = field(default_factory=list)
    log: dict[str, Any] = field(default_factory=dict)
    """Fields of the request's log line. Numbers and names, never text of a prompt or an output."""


def record_of(connection: ASGIConnection[Any, Any, Any, Any]) -> RequestRecord:
    """The record of the request that `connection` belongs to."""
    record: RequestRecord = connection.scope["state"][_KEY]
    return record


def attach(scope: Scope, record: RequestRecord) -> None:
    """Called before routing, for every request."""
    scope.setdefault("state", {})
    scope["state"][_KEY] = record


def make_id(given: str | None = None) -> str:
    """A request id: what the client gave, in printable ASCII without spaces, or a fresh one."""
    kept = "".join(char for char in (given or "")[:MAX_ID] if "!" <= char <= "~")
    return kept or uuid.uuid4().hex
