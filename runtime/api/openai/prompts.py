"""From a request's texts to token ids. Long ones are tokenised beside the event loop, not on it."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from runtime.api.openai.messages import ChatPrompt
from runtime.errors import ContextLengthExceeded, InvalidRequest
from runtime.tokenizer import Tokenizer

T = TypeVar("T")
Prompt = str | list[str | int | list[int]]
"""A text, several, token ids, or several lists of them."""

LONG_TEXT = 4000
"""Characters; below that a thread costs more than the tokeniser."""

MAX_TOKEN_CHARS = 256
"""No tokeniser in use has a longer token, so a text of more than so many a token cannot fit the context."""


async def encode_chat(tokenizer: Tokenizer, chat: ChatPrompt, context: int) -> list[int]:
    """The chat's token ids. Raises `InvalidRequest` where the template refuses it, `ContextLengthExceeded`."""
    size = chat.num_chars
    _check_size(size, context, "messages")
    return await _run(
        lambda: tokenizer.encode_chat(
            chat.messages,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            template_kwargs=chat.template_kwargs,
        ),
        size,
    )


async def encode_prompts(
    tokenizer: Tokenizer, prompt: Prompt, context: int, *, add_special_tokens: bool
) -> list[list[int]]:
    """The token ids of every prompt of a completions request. Raises `InvalidRequest`, `ContextLengthExceeded`."""

    def encode() -> list[list[int]]:
        prompts = _split(prompt)
        for index, one in enumerate(prompts):
            _check(one, _param(prompt, index), tokenizer.vocab_size, context)
        return [
            one if isinstance(one, list) else tokenizer.encode(one, add_special_tokens=add_special_tokens)
            for one in prompts
        ]

    return await _run(encode, _size(prompt))


async def encode_text(tokenizer: Tokenizer, text: str, context: int, *, add_special_tokens: bool) -> list[int]:
    """The token ids of one text, which may be empty."""
    _check_size(len(text), context, "prompt")
    return await _run(lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens), len(text))


def count_prompts(prompt: Prompt) -> int:
    """How many prompts `prompt` holds; a list of token ids is one."""
    return len(prompt) if isinstance(prompt, list) and not _is_ids(prompt) else 1


def _split(prompt: Prompt) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        return [[]]
    if _is_ids(prompt):
        ids = [id for id in prompt if isinstance(id, int)]
        if len(ids) == len(prompt):
            return [ids]
    else:
        kind = type(prompt[0])
        others = [one for one in prompt if not isinstance(one, int)]
        if len(others) == len(prompt) and all(isinstance(one, kind) for one in others):
            return others
    raise InvalidRequest("prompt must be all texts, all token ids, or all lists of token ids.", param="prompt")


def _size(prompt: Prompt) -> int:
    """Characters and token ids, or a first part of them that is many already."""
    if isinstance(prompt, str) or len(prompt) > LONG_TEXT:
        return len(prompt)
    return sum(1 if isinstance(one, int) else len(one) for one in prompt)


def _is_ids(prompt: list[str | int | list[int]]) -> bool:
    return bool(prompt) and isinstance(prompt[0], int)


def _param(prompt: Prompt, index: int) -> str:
    return f"prompt[{index}]" if count_prompts(prompt) > 1 else "prompt"


def _check(prompt: str | list[int], param: str, vocab_size: int, context: int) -> None:
    if not prompt:
        raise InvalidRequest("The prompt is empty: it must have at least one token.", param=param)
    if isinstance(prompt, str):
        _check_size(len(prompt), context, param)
        return
    lowest, highest = min(prompt), max(prompt)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise InvalidRequest(f"Token ids must be from 0 to {vocab_size - 1}, got {wrong}.", param=param)


def _check_size(chars: int, context: int, param: str) -> None:
    if chars > context * MAX_TOKEN_CHARS:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens; {chars} characters are more than that.",
            param=param,
        )


async def _run(work: Callable[[], T], chars: int) -> T:
    return await asyncio.to_thread(work) if chars > LONG_TEXT else work()
