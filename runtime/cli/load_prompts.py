"""Prompts of a wanted number of tokens, for a server whose tokenizer we do not have.

Two ways. Where the server tokenises (`/tokenize`, as in vLLM) and takes token ids (`/v1/completions`),
prompts are lists of ids and their lengths exact. Everywhere else they are words of a fixed list, and how
many words make how many tokens is measured once, through the `usage` of two small requests.
"""

import random
from typing import Any, TypeVar

import httpx
import msgspec

from runtime.cli.client import describe, error_text
from runtime.cli.errors import CommandError
from runtime.cli.load.spec import LoadSpec

Prompt = str | list[int]
T = TypeVar("T")

_NOUNS = (
    "time year people way day man thing woman life child world school state family student group country"
    " problem hand part place case week company system program question work government number night"
    " point home water room mother area money story fact month lot right study book eye job word business"
    " issue side kind head house service friend father power hour game line end member law car city name"
    " team minute idea body information back parent face level office door health person art war history"
    " result change morning reason research girl guy moment air teacher force education"
)
WORDS = _NOUNS.split()
"""Common nouns: with a space before it, each is one token in the usual vocabularies."""

_PROBES = (32, 160)
"""Words in the two calibration prompts."""

_NOT_THAT_FORM = (ValueError, KeyError, TypeError, msgspec.ValidationError)
"""What reading a field of some other server's answer may raise."""


async def make_prompts(client: httpx.AsyncClient, model: str, spec: LoadSpec) -> list[Prompt]:
    """`spec.requests` prompts, the same for the same seed and server.

    Raises `CommandError` when the server does not say how many tokens a prompt has.
    """
    if spec.endpoint == "completions" and (ids := await _word_ids(client, model)):
        return [*_draw(ids, spec, shared=spec.shared_prefix, own=spec.input_len)]
    fixed, per_word = await _calibrate(client, model, spec)
    shared = round(spec.shared_prefix / per_word)
    own = round((spec.shared_prefix + spec.input_len - fixed) / per_word) - shared
    return [" ".join(words) for words in _draw(WORDS, spec, shared=shared, own=max(1, own))]


def request_body(model: str, spec: LoadSpec, prompt: Prompt, max_tokens: int) -> dict[str, Any]:
    """What both endpoints need of a request: model, prompt in the endpoint's form, length."""
    form = {"prompt": prompt} if spec.endpoint == "completions" else {"messages": [_user(prompt)]}
    return {"model": model, "max_tokens": max_tokens, "temperature": spec.temperature, **form}


def path_of(spec: LoadSpec) -> str:
    return "/v1/completions" if spec.endpoint == "completions" else "/v1/chat/completions"


def _user(prompt: Prompt) -> dict[str, Any]:
    return {"role": "user", "content": prompt}


def _draw(pool: list[T], spec: LoadSpec, *, shared: int, own: int) -> list[list[T]]:
    prefix = random.Random(f"prefix {spec.seed}").choices(pool, k=shared)
    rng = random.Random(f"own {spec.seed}")
    return [prefix + rng.choices(pool, k=own) for _ in range(spec.requests)]


async def _word_ids(client: httpx.AsyncClient, model: str) -> list[int]:
    """The ids that our words are made of, or none when the server has no (such) `/tokenize`."""
    asked = {"model": model, "prompt": " " + " ".join(WORDS), "add_special_tokens": False}
    try:
        response = await client.post("/tokenize", json=asked)
        if response.status_code != 200:
            return []
        return sorted(set(msgspec.convert(response.json()["tokens"], list[int])))
    except (httpx.TransportError, *_NOT_THAT_FORM):  # not vLLM's `/tokenize`
        return []


async def _calibrate(client: httpx.AsyncClient, model: str, spec: LoadSpec) -> tuple[float, float]:
    """Tokens of an empty prompt (chat template, BOS), and tokens a word."""
    rng = random.Random(f"calibration {spec.seed}")
    few, many = [await _prompt_tokens(client, model, spec, " ".join(rng.choices(WORDS, k=k))) for k in _PROBES]
    per_word = (many - few) / (_PROBES[1] - _PROBES[0])
    if per_word <= 0:
        raise CommandError(f"{client.base_url} counts {few} and {many} prompt tokens for {_PROBES} words")
    return few - per_word * _PROBES[0], per_word


async def _prompt_tokens(client: httpx.AsyncClient, model: str, spec: LoadSpec, text: str) -> int:
    try:
        body = request_body(model, spec, text, 1)
        response = await client.post(path_of(spec), json=body, timeout=spec.timeout)
    except httpx.TransportError as error:
        raise CommandError(f"no answer from {client.base_url}: {describe(error)}") from error
    if response.status_code != 200:
        raise CommandError(f"{client.base_url}{path_of(spec)} answers {error_text(response)}")
    try:
        return msgspec.convert(response.json()["usage"]["prompt_tokens"], int)
    except _NOT_THAT_FORM as error:
        raise CommandError(f"{client.base_url} reports no usage, so the length of a prompt is unknown") from error
