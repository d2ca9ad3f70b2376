"""Logging: readable on a terminal, one JSON object a line otherwise.

Our own events and the libraries' (uvicorn, asyncio) have the same form, on standard error. Client data can neither
start a new line nor control a terminal. A sink that cannot be written to (disk full, closed pipe) loses lines, never
requests. Prompts and outputs are never logged.
"""

import logging
import sys
from typing import Any, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from settings.schema import ObservabilitySettings

MAX_VALUE = 500
"""Largest number of characters of one logged value; client data can be megabytes."""

if not structlog.is_configured():
    # For scripts, which never call `configure`: structlog's own default shows the local variables of a traceback.
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
        ]
    )


def configure(settings: ObservabilitySettings, stream: TextIO | None = None) -> None:
    """Set up structlog and the standard library's logging. Call once, before the first event."""
    output = _Sink(stream or sys.stderr)
    level = getattr(logging, settings.log_level.upper())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    final = _final_processors(console=_wants_console(settings.log_format, output), colors=output.isatty())
    structlog.configure(
        processors=[*shared, *final],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, output)),
        cache_logger_on_first_use=False,
    )
    _redirect_standard_library(output, shared, final, level)


def get_logger(name: str | None = None) -> FilteringBoundLogger:
    """A logger whose events carry the request id that is bound where they are logged."""
    # Not `.bind(...)`: a module's logger is made before `configure` runs, and must stay lazy until then.
    logger: FilteringBoundLogger = structlog.get_logger(**({"source": name} if name else {}))
    return logger


def clean(value: str) -> str:
    """`value` on one line, without control characters, and no longer than `MAX_VALUE`."""
    short = value if len(value) <= MAX_VALUE else value[:MAX_VALUE] + "…"
    return "".join(char for char in short if char.isprintable())


def _clean_values(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    # The traceback is ours and must keep its lines; JSON escapes them, a console shows them.
    return {
        key: clean(value) if isinstance(value, str) and key != "exception" else value for key, value in event.items()
    }


def _final_processors(*, console: bool, colors: bool) -> list[Processor]:
    if console:
        # A plain traceback: structlog's default prints local variables, and so prompts and keys.
        plain = structlog.dev.plain_traceback
        return [_clean_values, structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
    return [structlog.processors.format_exc_info, _clean_values, structlog.processors.JSONRenderer()]


def _wants_console(log_format: str, output: "_Sink") -> bool:
    return log_format == "console" or (log_format == "auto" and output.isatty())


def _redirect_standard_library(output: "_Sink", shared: list[Processor], final: list[Processor], level: int) -> None:
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))  # libraries log problems alone, not routine
    # A bad request line is the client's fault: it is answered and counted, and a flood of them must not fill the log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


class _Sink:
    """A text stream whose failures are ignored."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            return 0

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def isatty(self) -> bool:
        return self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
