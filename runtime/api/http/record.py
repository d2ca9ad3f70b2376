"""Record of one HTTP request: its id, warnings for its sender, counts for the log."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from litestar.connection import ASGIConnection
from litestar.types import Scope

from runtime.access.keys import Principal
from runtime.access.limits import Quota

MAX_ID = 128
"""Characters of a request id; longer ones are cut."""

LOAD_FORMATS = ("TEXT", "JSON")
"""Forms of a load report (ORCA). The third one of the specification, BIN, is protobuf."""

PHASES = ("prepare_ms", "queue_ms", "prefill_ms", "decode_ms")
"""Fields of the log line with a request's phases, one after the other: reading and tokenising it, waiting, to its first
token, to its last."""

_KEY = "eft_record"


@dataclass
class RequestRecord:
    """Record of a request: made by `runtime.api.http.observe` before routing, filled by handlers, logged at the end."""

    request_id: str
    started: float = field(default_factory=time.monotonic)
    """Time at which its headers were there, of the clock `time.monotonic`."""
    tenant: str = ""
    """Label of the API key that was checked; "" if none is required."""
    key: str = ""
    """Name of that key, for logs."""
    is_admin: bool = False
    """True if its key has the scope admin: it may see what belongs to others."""
    may_load: bool = True
    """True if the request may name adapter versions that are not in memory."""
    background: bool = False
    """True if its sequences run only on what others leave."""
    inside: Principal | None = None
    """Holder of the key of a request that the server itself makes (a line of a batch). It was admitted before."""
    salt: str = ""
    """Salt that separates its cached prefixes from those of other keys."""
    quota: Quota | None = None
    """Share of the limits of its key; None if nothing is counted."""
    action: str = ""
    """Method and route for the audit log, of requests that change the server."""
    target: str = ""
    """Object of the action, if the path does not name it."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers to send with every answer, errors included."""
    load_format: str = ""
    """One of LOAD_FORMATS: the answer reports the engine's load in a header of this form; "" for none."""
    warnings: list[str] = field(default_factory=list)
    log: dict[str, Any] = field(default_factory=dict)
    """Fields of the request's log line. Numbers and names, never text of a prompt or an output."""


def visible_to(record: RequestRecord) -> str | None:
    """Owner whose files, batches and jobs a request may see: those of its own key; None, all of them, for an admin
    key."""
    return None if record.is_admin else record.tenant


def record_of(connection: ASGIConnection[Any, Any, Any, Any]) -> RequestRecord:
    """The record of the request that `connection` belongs to."""
    record: RequestRecord = connection.scope["state"][_KEY]
    return record


def attach(scope: Scope, record: RequestRecord) -> None:
    """Store the record in the scope. Called before routing, for every request."""
    scope.setdefault("state", {})
    scope["state"][_KEY] = record


def make_id(given: str | None = None) -> str:
    """A request id: the client's own, reduced to printable ASCII without spaces, or a new one."""
    kept = "".join(char for char in (given or "")[:MAX_ID] if "!" <= char <= "~")
    return kept or uuid.uuid4().hex
