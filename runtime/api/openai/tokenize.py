"""POST /tokenize and /detokenize, GET /tokenizer_info, in vLLM's shape."""

from litestar import Response, get, post
from msgspec import Struct

from runtime.api.docs import BODY
from runtime.api.handle import AnyRequest, api_of
from runtime.api.openai.forms import check_shown_tools
from runtime.api.openai.models import resolve_model
from runtime.api.openai.prompts import PromptEncoder, chat_prompt, run_text_work
from runtime.api.openai.responses import DetokenizedText, Tokens
from runtime.api.openai.schema import DetokenizeRequest, Intake, TokenizeRequest
from runtime.errors import InvalidRequest
from runtime.messages import check_ids


class TokenizerInfo(Struct, kw_only=True):
    """The fields that clients look for in a `tokenizer_config.json`."""

    tokenizer_class: str = "PreTrainedTokenizerFast"
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    """The first of `eos_token_ids`."""
    eos_token_ids: list[int]
    """Every id that ends an output."""
    pad_token: None = None
    chat_template: str | None


_tokenize = Intake(TokenizeRequest)
_detokenize = Intake(DetokenizeRequest)


@post("/tokenize", status_code=200, opt={BODY: TokenizeRequest})
async def tokenize(request: AnyRequest) -> Response[Tokens]:
    """The token ids of a text or of a chat, which may exceed the limit of a prompt."""
    api = api_of(request)
    service, limits = api.handle.require(), api.settings.limits
    asked = await _tokenize.read(request, api)
    served = await resolve_model(service, asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidRequest("Send either `prompt` or `messages`.", param="prompt")
    tokenizer, apart = served.tokenizer, served.own_tokenizer is not None
    limit = limits.max_tokenize_chars
    encoder = PromptEncoder(tokenizer, served.vocab_size, None, limit, request.receive, apart=apart)
    if asked.prompt is not None:
        ids = await encoder.text(asked.prompt, add_special_tokens=asked.add_special_tokens is not False)
    else:
        chat = chat_prompt(
            asked,
            tokenizer.chat_template,
            limits,
            tools=check_shown_tools(asked.tools, api.settings),
            trust_template=api.settings.model.trust_request_chat_template,
        )
        ids = await encoder.chat(chat)
    spelled = None
    if asked.return_token_strs:
        spelled = await run_text_work(lambda: [tokenizer.token_string(id) for id in ids], len(ids), request.receive)
    return Response(Tokens(count=len(ids), max_model_len=service.max_model_len, tokens=ids, token_strs=spelled))


@post("/detokenize", status_code=200, opt={BODY: DetokenizeRequest})
async def detokenize(request: AnyRequest) -> Response[DetokenizedText]:
    """The text of token ids, special tokens included."""
    api = api_of(request)
    service, limit = api.handle.require(), api.settings.limits.max_detokenize_tokens
    asked = await _detokenize.read(request, api)
    served = await resolve_model(service, asked.model)
    if len(asked.tokens) > limit:
        raise InvalidRequest(f"tokens must hold at most {limit} ids, got {len(asked.tokens)}.", param="tokens")

    def decode() -> str:
        if asked.tokens:
            check_ids(asked.tokens, served.vocab_size, "tokens")
        return served.tokenizer.decode(asked.tokens, skip_special_tokens=False)

    return Response(DetokenizedText(prompt=await run_text_work(decode, len(asked.tokens), request.receive)))


@get("/tokenizer_info")
async def tokenizer_info(request: AnyRequest) -> Response[TokenizerInfo]:
    """Facts about the tokenizer, as vLLM names them."""
    service = api_of(request).handle.require()
    tokenizer = service.tokenizer
    return Response(
        TokenizerInfo(
            vocab_size=tokenizer.vocab_size,
            model_max_length=service.max_model_len,
            bos_token=None if tokenizer.bos_id is None else tokenizer.token_string(tokenizer.bos_id),
            eos_token=tokenizer.token_string(service.eos_ids[0]) if service.eos_ids else None,
            eos_token_ids=list(service.eos_ids),
            chat_template=tokenizer.chat_template,
        )
    )
