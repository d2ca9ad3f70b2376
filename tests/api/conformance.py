"""Answers against the types of the `openai` package: strictly valid, and no field that neither it nor `OURS` knows."""

from collections.abc import Iterator
from typing import Any, get_args

import pydantic
from openai.types.responses import ResponseStreamEvent

OURS: dict[str, set[str]] = {
    "ChatCompletion": {"prompt_logprobs"},
    "Choice": {"stop_reason"},
    "ChatCompletionMessage": {"reasoning", "reasoning_content"},
    "CompletionChoice": {"prompt_logprobs", "stop_reason"},
    "ChoiceDelta": {"reasoning", "reasoning_content"},
    "Completion": {"prompt_logprobs"},
    "Logprob": {"bytes"},
    "LogprobTopLogprob": {"bytes"},
    "Usage": {"completion_tokens"},
    "Model": {"default_sampling_params", "max_model_len", "parent", "prompt_format", "root"},
    "Response": {"frequency_penalty", "presence_penalty", "store"},
    "ResponseFunctionCallArgumentsDoneEvent": {"name"},
    "SyncCursorPage": {"first_id", "last_id", "object"},
}
"""Class of the `openai` package → the fields that its objects have here besides, most of them vLLM's."""

EVENTS: dict[str, type[pydantic.BaseModel]] = {
    kind: event
    for event in get_args(get_args(ResponseStreamEvent)[0])
    for kind in get_args(event.model_fields["type"].annotation)
}
"""Type of an event → its class."""


def checked(kind: Any, content: bytes | str) -> Any:
    """The JSON `content` as a `kind`, a class or union of the `openai` package."""
    found = pydantic.TypeAdapter(kind).validate_json(content, strict=True)
    unknown = {one for one in _unknown(found) if one[1] not in OURS.get(one[0], ())}
    assert not unknown, f"fields that OpenAI's {kind} does not have: {sorted(unknown)}"
    return found


def checked_event(content: str) -> Any:
    """An event of a stream of responses."""
    return checked(EVENTS[pydantic.TypeAdapter(dict[str, Any]).validate_json(content)["type"]], content)


def _unknown(value: Any) -> Iterator[tuple[str, str]]:
    """Class and name of each field that was not declared, at any depth."""
    if isinstance(value, pydantic.BaseModel):
        yield from ((type(value).__name__.partition("[")[0], name) for name in value.model_extra or ())
        for name in type(value).model_fields:
            yield from _unknown(getattr(value, name))
    elif isinstance(value, list):
        for one in value:
            yield from _unknown(one)
