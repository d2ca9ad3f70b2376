"""Units, and values to text and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from settings import fields, units, values

BYTES = fields.by_key()["cache.kv_memory"]
SECONDS = fields.by_key()["server.header_timeout"]
COUNT = fields.by_key()["scheduler.max_batched_tokens"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.4, "0 s"), (59.6, "1 min 0 s"), (90, "1 min 30 s"), (3600, "1 h 0 min"), (90061, "25 h 1 min")],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert units.show_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "unit", "number"),
    [
        ("32K", "count", 32768),
        ("2m", "count", 2 * 1024**2),
        ("7", "count", 7),
        ("4GiB", "bytes", 4 * 1024**3),
        ("4GB", "bytes", 4_000_000_000),
        ("1.5 MiB", "bytes", 1.5 * 1024**2),
        ("500ms", "seconds", 0.5),
        (" 30s ", "seconds", 30),
        ("5m", "seconds", 300),
        ("2h", "seconds", 7200),
    ],
)
def test_units(text: str, unit: str, number: float) -> None:
    assert units.parse(text, unit) == number


@pytest.mark.parametrize("text", ["", "K", "-1", "1e3", "1..5", "1 2", "4GiBB", "nan", "٣"])
def test_no_number(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number with an optional unit"):
        units.parse(text, "bytes")


@given(st.integers(min_value=1, max_value=2**50))
def test_sizes_and_counts_read_back_as_they_are_shown(number: int) -> None:
    for field in (BYTES, COUNT):
        assert values.from_text(field, values.show(field, number)) == number


@given(st.floats(min_value=1e-6, max_value=1e9))
def test_times_read_back_as_they_are_shown(seconds: float) -> None:
    assert values.from_text(SECONDS, values.show(SECONDS, seconds)) == seconds


@given(st.text(max_size=12), st.sampled_from(fields.fields()))
def test_any_text_is_a_value_in_range_or_a_value_error(text: str, field: fields.Field) -> None:
    try:
        value = values.from_text(field, text)
    except ValueError as error:
        message = str(error)
    else:
        assert values.check(field, value) == value
        return
    assert message.startswith(f"expected {field.expects}, got ")


def test_a_secret_is_never_shown() -> None:
    field = fields.by_key()["server.api_key"]
    assert values.show(field, ("hunter2", "b")) == "2 set (hidden)"
    assert values.show(field, ()) == ""
