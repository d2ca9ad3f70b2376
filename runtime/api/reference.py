"""Every field of the requests of OpenAI's, vLLM's and Anthropic's APIs, and what becomes of it: docs/api.md.

The fields are those of the structs that bodies are decoded into, and the known fields that are refused. What is said of
them here is held by `tests/api/test_reference.py`, which sends each to a running app.
"""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct

from runtime.api.anthropic import schema as anthropic
from runtime.api.openai import schema as openai
from runtime.api.openai.neutral import COMPLETION_NEUTRAL, INSTEAD, NEUTRAL
from runtime.api.openai.pooling import EmbeddingRequest, RerankRequest, ScoreRequest
from runtime.api.responses import schema as responses

Effect = Literal["supported", "no effect", "refused"]
FieldOrigin = Literal["OpenAI", "vLLM", "Anthropic", "Eft"]


class BodyEndpoint(Struct, frozen=True):
    """A path, the struct of its body, and the fields that are refused there."""

    path: str
    body: type[Struct]
    neutral: Mapping[str, tuple[Any, ...]] = {}
    instead: Mapping[str, str] = {}
    openai: frozenset[str] = frozenset()
    """Fields that OpenAI's endpoint has."""
    notes: Mapping[str, str] | None = None
    """Notes of this endpoint's own, in the place of `NO_EFFECT` and `NOTES`."""


class FieldRow(Struct, frozen=True):
    """A row of a table."""

    name: str
    origin: FieldOrigin
    effect: Effect
    note: str


OPENAI = frozenset(
    {
        "audio", "best_of", "echo", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs",
        "max_completion_tokens", "max_tokens", "messages", "metadata", "modalities", "model", "moderation", "n",
        "parallel_tool_calls", "prediction", "presence_penalty", "prompt", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "reasoning_effort", "response_format",
        "safety_identifier", "seed", "service_tier", "stop", "store", "stream", "stream_options", "suffix",
        "temperature", "tool_choice", "tools", "top_logprobs", "top_p", "user", "verbosity", "web_search_options",
    }
)  # fmt: skip
"""Fields of OpenAI's chats and completions."""

OURS = frozenset({"deadline_ms", "early_stopping", "pooling"})
"""Fields of neither OpenAI nor vLLM."""

LABELS = "A label for the client's own records; checked for its length, kept nowhere."
NO_EFFECT: Mapping[str, str] = {
    "user": LABELS,
    "metadata": "A label for the client's own records; checked for its length, kept with a stored chat, else nowhere.",
    "safety_identifier": LABELS,
    "session_id": LABELS,
    "user_profile_id": LABELS,
    "workspace_id": LABELS,
    "spaces_between_special_tokens": "Special tokens have no spaces between them in either case.",
    "prompt_cache_key": "Prefixes are cached for every request; `cache_salt` keeps them apart.",
    "cache_control": "Prefixes are cached for every request.",
}
"""Fields that are accepted although nothing acts on them, and why."""

NOTES: Mapping[str, str] = {
    "best_of": "As many sequences, of which the `n` likeliest are the answer; not streamed above `n`.",
    "cache_salt": "Prefixes are shared only with requests of the same salt.",
    "chat_template": "Where model.trust_request_chat_template allows it, else 400: use `--chat-template`.",
    "chat_template_kwargs": "The variables that are known, each of its type.",
    "deadline_ms": "The request ends with 504 when it is not done by then; policy `deadline` goes by it.",
    "early_stopping": "With `use_beam_search`.",
    "include_metrics": "Times of the answer, for requests of one sequence.",
    "length_penalty": "With `use_beam_search`.",
    "messages": "Text, as a string or in parts.",
    "model": "The served model, an adapter, an alias, or one version: `name@3`. Default: the served model.",
    "priority": "Where scheduler.policy is `priority`; else 400.",
    "return_token_ids": "Token ids beside the texts.",
    "store": "Where there is a state directory; `GET /v1/chat/completions` lists stored chats.",
    "suffix": "Where the tokenizer has tokens for it; not with `echo` or `truncate_prompt_tokens`.",
    "stream_options": "`include_usage`, `continuous_usage_stats`; with `stream`.",
    "truncate_prompt_tokens": "-1 keeps as many as leave room for the answer.",
    "truncation_side": "With `truncate_prompt_tokens`.",
}
"""What is worth knowing of supported fields."""

GIVEN_BACK = "A label; given back with the response."
RESPONSE_NOTES: Mapping[str, str] = {
    "background": "Answered at once, and fetched later; with `stream`, its events can be followed again.",
    "include": "`message.output_text.logprobs`; what belongs to tools that the server does not run adds nothing.",
    "input": "Text; messages, calls, their results and thoughts.",
    "instructions": "Of this response alone.",
    "max_tool_calls": "Limits the calls of tools that the server itself runs: there are none.",
    "metadata": GIVEN_BACK,
    "model": "As in chats.",
    "previous_response_id": "The conversation goes on, with its calls and their results, without its instructions.",
    "prompt_cache_key": GIVEN_BACK,
    "reasoning": "`effort`. There is no `summary`: the thoughts themselves are in the answer.",
    "safety_identifier": GIVEN_BACK,
    "store": "Default: true, where there is a state directory.",
    "text": "`format`; of `verbosity`, `medium`.",
    "tools": "Functions.",
    "user": GIVEN_BACK,
}
"""The same for the fields of responses."""

EMBEDDINGS = frozenset({"dimensions", "encoding_format", "input", "model", "user"})
"""Fields of OpenAI's embeddings."""

FOR_CHATS = "It is for chats."

ENDPOINTS = (
    BodyEndpoint("/v1/chat/completions", openai.ChatRequest, NEUTRAL, INSTEAD, OPENAI),
    BodyEndpoint("/v1/completions", openai.CompletionRequest, COMPLETION_NEUTRAL, INSTEAD, OPENAI),
    BodyEndpoint(
        "/v1/responses",
        responses.ResponseRequest,
        responses.NEUTRAL,
        responses.INSTEAD,
        frozenset({*responses.ResponseRequest.__struct_fields__, *responses.NEUTRAL}),
        RESPONSE_NOTES,
    ),
    BodyEndpoint("/v1/embeddings", EmbeddingRequest, openai=EMBEDDINGS),
    BodyEndpoint("/v1/score", ScoreRequest),
    BodyEndpoint("/v1/rerank", RerankRequest),
    BodyEndpoint("/v1/messages", anthropic.MessageRequest, anthropic.NEUTRAL, anthropic.INSTEAD),
    BodyEndpoint("/tokenize", openai.TokenizeRequest),
    BodyEndpoint("/detokenize", openai.DetokenizeRequest),
)

HEAD = """## Request fields

Generated from the structs of `runtime/api` by `eft config api`; do not edit.

Every field that OpenAI's, vLLM's and Anthropic's clients may send, and what Eft does with it:

- *supported*: acted on. A value of a wrong type or out of range is a 400 that names the field, the limit and the value.
- *no effect*: accepted and not acted on, for the reason given.
- *refused*: a 400 that names the field, unless the value asks for nothing; such values are in the note.

Other fields are unknown: they are named in the header `X-Eft-Warning` and in the log, or refused, as the setting
limits.unknown_fields says. A field that is null counts as absent.
`/v1/responses` takes the sampling fields of a chat too, such as `top_k`, `seed` and `stop`.
`/v1/chat/completions/batch` takes the fields of a chat, with a list of chats in `messages`; `/invocations` takes the
fields of the endpoint that its own fields lead to.
"""


def rows(endpoint: BodyEndpoint) -> list[FieldRow]:
    """The fields of an endpoint: those it acts on first, each group by name."""
    own = sorted(endpoint.body.__struct_fields__)
    found = [_row(endpoint, name) for name in own]
    found += [
        FieldRow(name, _origin(endpoint, name), "refused", _refusal(endpoint, name))
        for name in sorted(endpoint.neutral.keys() - set(own))
    ]
    order: tuple[Effect, ...] = ("supported", "no effect", "refused")
    return sorted(found, key=lambda row: order.index(row.effect))


def reference_page() -> str:
    """The page docs/api.md."""
    return HEAD + "".join(_section(endpoint) for endpoint in ENDPOINTS)


def _row(endpoint: BodyEndpoint, name: str) -> FieldRow:
    origin = _origin(endpoint, name)
    if endpoint.notes is not None:
        return FieldRow(name, origin, "supported", endpoint.notes.get(name, ""))
    if name in NO_EFFECT:
        return FieldRow(name, origin, "no effect", NO_EFFECT[name])
    return FieldRow(name, origin, "supported", "" if origin == "Anthropic" else NOTES.get(name, ""))


def _origin(endpoint: BodyEndpoint, name: str) -> FieldOrigin:
    if issubclass(endpoint.body, anthropic.CountRequest):
        return "Anthropic"
    if name in OURS:
        return "Eft"
    return "OpenAI" if name in endpoint.openai else "vLLM"


def _refusal(endpoint: BodyEndpoint, name: str) -> str:
    neutral = [value for value in endpoint.neutral[name] if value is not None]
    values = ", ".join(f"`{msgspec.json.encode(value).decode()}`" for value in neutral)
    note = endpoint.instead.get(name, FOR_CHATS)
    return f"{note} Accepted: {values}." if values else note


def _section(endpoint: BodyEndpoint) -> str:
    lines = [f"\n### `POST {endpoint.path}`\n\n| field | from | what Eft does | |\n|---|---|---|---|\n"]
    lines += [f"| `{row.name}` | {row.origin} | {row.effect} | {row.note} |\n" for row in rows(endpoint)]
    return "".join(lines)
