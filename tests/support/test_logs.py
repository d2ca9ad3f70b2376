"""Log lines: their form, what cannot get into them, and a sink that fails."""

import errno
import io
import json
import logging
from pathlib import Path

import pytest
import structlog

from runtime.support.logs import MAX_VALUE, configure, get_logger
from settings.schema import ObservabilitySettings


def configured(log_format: str = "json", level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    configure(ObservabilitySettings(log_format=log_format, log_level=level), stream)  # type: ignore[arg-type]
    return stream


def test_one_json_object_a_line_with_the_request_id() -> None:
    stream = configured()
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        get_logger("api").info("request", status=200)
    line = json.loads(stream.getvalue())
    assert line["event"] == "request"
    assert (line["request_id"], line["status"], line["level"], line["source"]) == ("r1", 200, "info", "api")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_clients_cannot_start_a_line_or_steer_a_terminal(log_format: str) -> None:
    stream = configured(log_format)
    get_logger().info("request", path="/a\r\n2026 forged\x1b[2J\u2028b")
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()


def test_long_values_are_cut() -> None:
    stream = configured()
    get_logger().info("request", path="x" * 10_000)
    assert len(json.loads(stream.getvalue())["path"]) == MAX_VALUE + 1


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_have_no_local_variables(log_format: str) -> None:
    stream = configured(log_format)
    prompt = "my secret prompt"
    try:
        raise ValueError(len(prompt))
    except ValueError:
        get_logger().exception("failed")
    assert "ValueError: 16" in stream.getvalue()
    assert prompt not in stream.getvalue()


def test_libraries_log_in_the_same_form() -> None:
    stream = configured()
    logging.getLogger("some.library").warning("lost %s", "a\nb")
    line = json.loads(stream.getvalue())
    assert (line["event"], line["logger"], line["level"]) == ("lost ab", "some.library", "warning")


def test_levels() -> None:
    stream = configured(level="warning")
    get_logger().info("small talk")
    logging.getLogger("some.library").info("small talk")
    assert stream.getvalue() == ""


def test_a_logger_made_before_configuration_obeys_it() -> None:
    early = get_logger("early")
    stream = configured()
    early.info("now")
    assert json.loads(stream.getvalue())["source"] == "early"


def test_a_full_disk_loses_lines_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    stream = full.open("w", buffering=1)
    configure(ObservabilitySettings(log_format="json"), stream)
    get_logger().error("lost")
    logging.getLogger("some.library").error("lost")
    with pytest.raises(OSError, match="No space left"):  # it still has the line, and nowhere to put it
        stream.close()
    assert capsys.readouterr() == ("", "")  # where `logging` complains of a handler that fails


def test_lines_after_a_full_disk_are_written() -> None:
    class Filling(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    stream = Filling()
    configure(ObservabilitySettings(log_format="json"), stream)
    get_logger().error("lost")
    stream.full = False
    get_logger().error("ours")
    logging.getLogger("some.library").error("theirs")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["ours", "theirs"]


def test_a_closed_stream_loses_lines_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    stream = configured()
    stream.close()
    get_logger().error("lost")
    logging.getLogger("some.library").error("lost")
    assert capsys.readouterr() == ("", "")
    stream = configured()
    get_logger().error("found")
    assert json.loads(stream.getvalue())["event"] == "found"
