"""A server under a service manager: its readiness over sd_notify, and settings that it takes again on SIGHUP."""

import asyncio
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from runtime.access import Access
from runtime.api.handle import Api
from runtime.support.logs import configure, get_logger
from settings import fields
from settings.errors import SettingsError
from settings.load import Loaded
from settings.schema import Settings

RELOADED_SECTIONS = ("limits",)
RELOADED_KEYS = tuple(f"observability.{name}" for name in ("log_level", "log_requests", "log_share", "slow_request"))
"""Sections and keys that SIGHUP takes again. The others need a new start, and so do what was made from them."""

_log = get_logger("server")


def notify(*lines: str) -> None:
    """Send lines such as `READY=1` to the service manager; nothing where NOTIFY_SOCKET names none (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # a name without a file
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto("\n".join(lines).encode(), address)


class Reloader:
    """The keys file and the settings, read again when asked. Event-loop thread only."""

    def __init__(self, api: Api, access: Access, read: Callable[[], Loaded] | None) -> None:
        """`read`: reads the settings again; None where they came from no file."""
        self._api = api
        self._access = access
        self._read = read
        self._task: asyncio.Task[None] | None = None

    @property
    def useful(self) -> bool:
        """True if there is something to read again. Else SIGHUP keeps its meaning: closing the terminal ends the
        server."""
        return self._access.has_file or self._read is not None

    def ask(self) -> None:
        """Reload soon; a signal handler."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self.reload())

    async def reload(self) -> None:
        """Take what can be taken, and log what was, and what needs a new start. Faulty settings change nothing."""
        notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        self._access.reread()
        if self._read is not None:
            try:
                loaded = await asyncio.to_thread(self._read)
            except SettingsError as error:
                _log.error("settings_not_reloaded", problems=error.problems)
            else:
                self._take(loaded)
        notify("READY=1")

    def _take(self, loaded: Loaded) -> None:
        before, after = self._api.settings, loaded.settings
        changed = [field.key for field in fields.fields() if _value(before, field) != _value(after, field)]
        taken = [key for key in changed if key in RELOADED_KEYS or key.partition(".")[0] in RELOADED_SECTIONS]
        names = [key.partition(".")[2] for key in RELOADED_KEYS]
        observability = msgspec.structs.replace(
            before.observability, **{name: getattr(after.observability, name) for name in names}
        )
        self._api.settings = msgspec.structs.replace(before, limits=after.limits, observability=observability)
        self._api.origins = {**self._api.origins, **{key: loaded.origins[key] for key in taken}}
        _log.warning("settings_reloaded", changed=taken, need_a_new_start=[key for key in changed if key not in taken])
        if "observability.log_level" in taken:
            configure(observability)


def _value(settings: Settings, field: fields.Field) -> object:
    return getattr(getattr(settings, field.section), field.name)
