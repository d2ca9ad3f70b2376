"""Streams whose events have names, as Anthropic and the Responses API send them."""

import json
from typing import Any


def events_of(text: str) -> list[dict[str, Any]]:
    """The data of all events, whose names repeat their types."""
    found = []
    for block in filter(None, text.split("\n\n")):
        name, data = block.split("\n", 1)
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found
