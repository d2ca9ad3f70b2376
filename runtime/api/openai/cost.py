"""What a body would cost to decode, judged before it is decoded.

Decoding holds Python's lock from its first byte to its last, and 32 MB of tiny values take a second, in which
no stream moves. Counting bytes takes milliseconds. The limits are far beyond what fits a context.
"""

from runtime.api.body import Fields
from runtime.errors import InvalidRequest

MAX_STRINGS = 150_000
"""Strings in a body, keys included: the longest chat that is let through has about half of that."""

MAX_FIELD = 1024 * 1024
"""Bytes of a field, unless it holds the prompt."""

MAX_IDS = 2_000_000
"""Token ids in all prompts."""

MAX_LISTS = 20_000
"""Lists of token ids."""

_TEXTS = frozenset({"prompt", "messages"})
_IDS = frozenset({"prompt", "tokens"})


def check_strings(body: bytes, *, max_messages: int) -> None:
    """Raise `InvalidRequest` for a body of too many strings. Quotes inside a text are escaped, and don't count."""
    if body.count(b'"') - body.count(b'\\"') <= 2 * MAX_STRINGS:
        return
    if body.count(b'"role"') > max_messages:
        raise InvalidRequest(f"messages must have at most {max_messages} messages.", param="messages")
    raise InvalidRequest(f"The body holds more than {MAX_STRINGS} strings.")


def check_cost(fields: Fields) -> None:
    """Raise `InvalidRequest` for a field that would take too long to decode."""
    for name, value in fields.items():
        if len(memoryview(value)) <= MAX_FIELD:
            continue
        if name not in _TEXTS | _IDS:
            raise InvalidRequest(f"`{name}` is larger than {MAX_FIELD} bytes.", param=name)
        if name in _IDS:
            _check_ids(name, bytes(value))


def _check_ids(name: str, value: bytes) -> None:
    if not value.startswith(b"[") or value[1:64].lstrip().startswith(b'"'):
        return  # a text, or a list of texts
    if value.count(b",") >= MAX_IDS or value.count(b"[") > MAX_LISTS:
        raise InvalidRequest(f"`{name}` has more than {MAX_IDS} ids or {MAX_LISTS} lists.", param=name)
