"""Every request field that we know of and do not act on, and fields that nobody knows.

A field that is accepted and then ignored is a lie to the client. So each of these may only hold a value that
asks for nothing, and any other value is refused by name.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import msgspec
from litestar import Request

from runtime.api.body import Fields
from runtime.api.openai.schema import ChatMessage, StreamOptions
from runtime.api.record import record_of
from runtime.errors import InvalidRequest, Unsupported
from runtime.logs import clean, get_logger

T = TypeVar("T")

_log = get_logger("api")

_NEVER: tuple[Any, ...] = (None,)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # OpenAI: chat and completions
    "audio": _NEVER,
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "moderation": _NEVER,
    "parallel_tool_calls": (None, True, False),  # without tools there are no calls, in parallel or not
    "prediction": _NEVER,
    "presence_penalty": (None, 0),
    "prompt_cache_options": (None, {}),
    "prompt_cache_retention": (None, "in_memory", "in-memory"),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None, "medium"),
    "web_search_options": _NEVER,
    # vLLM's additions
    "add_special_tokens": (None, False),  # in a chat, the template writes them; completions act on the field
    "allowed_token_ids": _NEVER,
    "bad_words": (None, []),
    "chat_template": _NEVER,  # only the operator's: a template is a program
    "documents": (None, []),
    "echo": (None, False),  # completions act on it
    "guided_choice": _NEVER,
    "guided_decoding_backend": _NEVER,
    "guided_grammar": _NEVER,
    "guided_json": _NEVER,
    "guided_regex": _NEVER,
    "guided_whitespace_pattern": _NEVER,
    "include_reasoning": (None, True, False),  # without reasoning there is none to include
    "kv_transfer_params": _NEVER,
    "logits_processors": (None, []),
    "media_io_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),
    "prompt_embeds": _NEVER,
    "prompt_logprobs": _NEVER,
    "repetition_detection": _NEVER,
    "repetition_penalty": (None, 1),
    "return_tokens_as_token_ids": (None, False),
    "spaces_between_special_tokens": (None, True),
    "structural_tag": _NEVER,
    "structured_outputs": _NEVER,
    "thinking_token_budget": _NEVER,
    "vllm_xargs": (None, {}),
}
"""Field name → the values that ask for nothing. A number stands for its integer and float form."""

_MESSAGE_FIELDS = frozenset(ChatMessage.__struct_fields__)
_OPTION_FIELDS = frozenset(StreamOptions.__struct_fields__)
_object = msgspec.json.Decoder(dict[str, msgspec.Raw] | None)
_objects = msgspec.json.Decoder(list[dict[str, msgspec.Raw]] | None)

_MAX_NEUTRAL = 64
"""Bytes of the longest encoded neutral value, with room for spaces; longer ones need no decoding."""

_MAX_NAMED = 8
"""Unknown fields that the warning spells out."""


def check_fields(fields: Fields, known: Iterable[str]) -> list[str]:
    """Raise `Unsupported` for the first field that asks for what we don't do; return the unknown names.

    `known` are the fields that the endpoint acts on.
    """
    unknown = []
    for name, value in fields.items():
        if name in known:
            continue
        if name not in NEUTRAL:
            unknown.append(name)
        elif not _is_neutral(value, NEUTRAL[name]):
            raise Unsupported(f"`{name}` is not supported yet, got {_shown(value)}.", param=name)
    return unknown


def unknown_nested(fields: Fields, *, max_messages: int) -> list[str]:
    """Unknown keys inside messages and stream options, as `messages[0].colour`.

    Of fields that were decoded already, so that their types are known to be right. Also refuses too many messages.
    """
    unknown: list[str] = []
    if options := _value(fields, "stream_options", _object):
        unknown += [f"stream_options.{name}" for name in options if name not in _OPTION_FIELDS]
    messages = _value(fields, "messages", _objects) or []
    if len(messages) > max_messages:
        raise InvalidRequest(
            f"messages must have at most {max_messages} messages, got {len(messages)}.", param="messages"
        )
    for index, message in enumerate(messages):
        unknown += [f"messages[{index}].{name}" for name in message if name not in _MESSAGE_FIELDS]
    return unknown


def _value(fields: Fields, name: str, decoder: msgspec.json.Decoder[T]) -> T | None:
    return decoder.decode(fields[name]) if name in fields else None


def report_unknown(
    request: Request[Any, Any, Any], names: list[str], mode: Literal["ignore", "warn", "reject"]
) -> None:
    """Do with unknown fields what the setting says. Raises `InvalidRequest` for "reject"."""
    if not names or mode == "ignore":
        return
    listed = ", ".join(clean(name[:64]).strip() or '""' for name in names[:_MAX_NAMED])
    if len(names) > _MAX_NAMED:
        listed += f" and {len(names) - _MAX_NAMED} more"
    if mode == "reject":
        raise InvalidRequest(f"Unknown fields: {listed}.", param=names[0], code="unknown_parameter")
    record_of(request).warnings.append(f"unknown fields: {listed}")
    _log.warning("unknown_fields", fields=listed)


def _is_neutral(value: msgspec.Raw, neutral: tuple[Any, ...]) -> bool:
    if len(bytes(value)) > _MAX_NEUTRAL:
        return False
    given = msgspec.json.decode(value)
    return any(given == one and isinstance(given, bool) == isinstance(one, bool) for one in neutral)


def _shown(value: msgspec.Raw) -> str:
    text = bytes(value)[:400].decode("utf-8", "ignore")
    return text if len(text) <= 100 else text[:100] + "…"
