"""Everything about access that a server's settings and files say."""

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from runtime.access.audit import AuditLog
from runtime.access.hosts import HostRule, is_loopback
from runtime.access.keys import KeyLimits, KeyRing, KeysFileError, write_private
from runtime.access.limits import Limiter
from runtime.support.event_loop import is_set_within, running
from runtime.support.logs import get_logger
from settings.schema import Settings

WATCH_SECONDS = 2.0
"""Seconds between two looks at the keys file."""

_log = get_logger("access")


class Access:
    """Access rules of a server: made once, and applied to every request."""

    def __init__(self, settings: Settings) -> None:
        """Raises `KeysFileError`."""
        server = settings.server
        # A client of a Unix socket is on this machine, but it may be a proxy that speaks for others.
        self.listen = "localhost" if server.uds is not None else server.host
        self.hosts = HostRule(self.listen, server.allowed_hosts)
        self.cors_origins = frozenset(origin.lower() for origin in server.cors_origins)
        self.keyless_limits = KeyLimits(
            **{name: getattr(server, f"key_{name}") for name in KeyLimits.__struct_fields__}
        )
        file = None if server.keys_file is None else Path(server.keys_file).expanduser()
        self.ring = KeyRing(server.api_key, server.admin_key, file=file, defaults=self.keyless_limits)
        self.limiter = Limiter(max_waiting=settings.scheduler.max_waiting, max_running=settings.scheduler.max_running)
        self.audit = AuditLog(None if server.audit_file is None else Path(server.audit_file).expanduser())
        self.asks_for_keys = bool(server.api_key) or file is not None
        """Inference needs a key."""
        self.local_admin = not (
            self.asks_for_keys
            or server.admin_key
            or server.local_admin == "token"
            or server.uds is not None
            or not is_loopback(self.listen)
        )
        """True if requests from this machine may change the server without a key."""
        self.share_prefixes = settings.cache.share_prefixes
        self.has_file = file is not None
        self._changed = asyncio.Event()

    def report(self) -> None:
        """Log what is open to whom, loudly where that is the network."""
        if not (self.asks_for_keys or is_loopback(self.listen)):
            _log.warning(
                "no_api_key",
                host=self.listen,
                reason="the server listens beyond this machine and asks for no API key: every client that reaches its "
                "port can use the model. Set server.api_key or server.keys_file; server.allowed_hosts names the hosts "
                "that are answered meanwhile, beside IP addresses and localhost",
            )

    def reread(self) -> None:
        """Look at the keys file now."""
        self._changed.set()

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Take changes of the keys file as they come, while the block lasts."""
        try:
            async with running(self._watch()) if self.has_file else contextlib.nullcontext():
                yield
        finally:
            await asyncio.to_thread(self.audit.close)

    async def _watch(self) -> None:
        while True:
            self._changed.clear()
            await self.refresh()
            await is_set_within(self._changed, WATCH_SECONDS)

    async def refresh(self) -> None:
        """Take the keys file's content where it has changed. A broken file changes nothing, and is logged."""
        try:
            found = await asyncio.to_thread(self.ring.read_file)
        except KeysFileError as error:
            self.ring.complain(error)
            return
        if found is not None:
            self.ring.take(found)
            self.limiter.keep(self.ring.labels | {""})


# -- token -----------------------------------------------------------------------------------------
#
# The admin token: a file that only the server's own user can read, so that being on this machine is proved.
#
# A new one is made whenever a server starts, and it goes when the server ends. Its text begins with the server's
# port: the command line sends it to no other port, where another user's program may listen.

FILE = "admin-token"
"""Name of the token's file in the state directory."""

_PREFIX = "eft-admin-"
_MAX_BYTES = 1024


def make_token(port: int) -> str:
    """A new token for the server at `port`: 256 random bits."""
    return f"{_PREFIX}{port}-{secrets.token_urlsafe(32)}"


def write_token(directory: Path, token: str) -> Path:
    """Put `token` in the state directory with mode 0600. Raises `OSError`."""
    path = directory / FILE
    write_private(path, token.encode() + b"\n")
    return path


def remove_token(path: Path, token: str) -> None:
    """Delete the file, unless it holds another server's token by now."""
    with suppress(OSError, ValueError):
        if path.read_text(encoding="ascii").strip() == token:
            path.unlink()


def read_token(directory: Path, port: int) -> str | None:
    """The token of the server at `port`; None where there is none, or none that may be read."""
    try:
        descriptor = os.open(directory / FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            token = file.read(_MAX_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return token if token.startswith(f"{_PREFIX}{port}-") else None
