"""POST /tokenize and /detokenize, in vLLM's shape."""

import asyncio

from litestar import Response, post

from runtime.api.docs import BODY
from runtime.api.handle import AnyRequest, api_of
from runtime.api.openai.intake import Intake
from runtime.api.openai.messages import chat_prompt
from runtime.api.openai.prompts import encode_chat, encode_text
from runtime.api.openai.responses import Text, Tokens
from runtime.api.openai.schema import DetokenizeRequest, TokenizeRequest
from runtime.api.openai.served import find_model
from runtime.errors import InvalidRequest

_tokenize = Intake(TokenizeRequest)
_detokenize = Intake(DetokenizeRequest)

LONG_LIST = 4000
"""Tokens; below that a thread costs more than decoding."""


@post("/tokenize", status_code=200, opt={BODY: TokenizeRequest})
async def tokenize(request: AnyRequest) -> Response[Tokens]:
    """The token ids of a text or of a chat."""
    api = api_of(request)
    service = api.handle.require()
    asked = await _tokenize.read(request, api)
    find_model(service, asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidRequest("Send either `prompt` or `messages`.", param="prompt")
    if asked.prompt is not None:
        special = asked.add_special_tokens is not False
        ids = await encode_text(service.tokenizer, asked.prompt, service.max_model_len, add_special_tokens=special)
    else:
        limit = api.settings.limits.max_messages
        chat = chat_prompt(asked, service.tokenizer.chat_template, max_messages=limit)
        ids = await encode_chat(service.tokenizer, chat, service.max_model_len)
    texts = None
    if asked.return_token_strs:
        texts = await asyncio.to_thread(lambda: [service.tokenizer.token_text(id) for id in ids])
    return Response(Tokens(count=len(ids), max_model_len=service.max_model_len, tokens=ids, token_strs=texts))


@post("/detokenize", status_code=200, opt={BODY: DetokenizeRequest})
async def detokenize(request: AnyRequest) -> Response[Text]:
    """The text of token ids, special tokens included."""
    api = api_of(request)
    service = api.handle.require()
    asked = await _detokenize.read(request, api)
    find_model(service, asked.model)
    vocab_size = service.tokenizer.vocab_size
    if any(not 0 <= id < vocab_size for id in asked.tokens):
        raise InvalidRequest(f"Token ids must be from 0 to {vocab_size - 1}.", param="tokens")

    def decode() -> str:
        return service.tokenizer.decode(asked.tokens, skip_special_tokens=False)

    return Response(Text(prompt=await asyncio.to_thread(decode) if len(asked.tokens) > LONG_LIST else decode()))
