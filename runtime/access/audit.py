"""The audit log: a line for each request that changes the server, or that tried to."""

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from runtime.support.logs import get_logger

MAX_TARGET = 200
"""Most characters of an action's object, which clients choose."""

_log = get_logger("audit")


class AuditLog:
    """Writes to the server's log, refusals as warnings, and to a file where there is one."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        # A slow disk delays no stream; one thread keeps the order.
        self._thread = None if file is None else ThreadPoolExecutor(max_workers=1, thread_name_prefix="audit")

    def write(self, *, key: str, action: str, target: str, status: int, client: str, request_id: str) -> None:
        """Record an action: the key's name, method and route, what it was about, and the answer's status."""
        line = {
            "key": key,
            "action": action,
            "target": target[:MAX_TARGET],
            "outcome": "done" if status < 400 else "refused" if status in (401, 403) else "failed",
            "status": status,
            "client": client,
            "request_id": request_id,
        }
        (_log.info if line["outcome"] == "done" else _log.warning)("audit", **line)
        if self._thread is not None:
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            encoded = msgspec.json.encode({"time": time, **line}) + b"\n"
            try:
                self._thread.submit(self._append, encoded)
            except RuntimeError:  # the server is ending, and this request ends after the log was closed
                self._append(encoded)

    def check(self) -> None:
        """Raise `OSError` where the file cannot be written to."""
        if self._file is not None:
            os.close(_open(self._file))

    def close(self) -> None:
        """Have on the disk what was written so far."""
        if self._thread is not None:
            self._thread.shutdown()

    def _append(self, line: bytes) -> None:
        assert self._file is not None
        try:
            # Opened for each line, so that the file can be moved away by whatever rotates logs.
            descriptor = _open(self._file)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            _log.error("audit_not_written", reason=error.strerror or str(error))


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
