"""Prompts of a given number of tokens, for a server whose tokenizer we do not have.

Two ways. Where the server tokenises (`/tokenize`, as in vLLM) and takes token ids (`/v1/completions`),
prompts are lists of ids and their lengths exact. Otherwise they are words of a fixed list, and the
number of tokens per word is measured once, through the `usage` of two small requests.
"""

import math
import random
from typing import Any, Literal, TypeVar

import httpx
import msgspec
from msgspec import Struct

from runtime.cli.client import describe, error_text
from runtime.cli.output import CommandError, UsageError

# -- spec ------------------------------------------------------------------------------------------
#
# Specification of a load on a server.

DEFAULT_CONCURRENCY = 8


class LoadSpec(Struct, frozen=True, kw_only=True):
    """A load, reproducible from its seed. Lengths are in tokens, times in seconds."""

    url: str = "http://127.0.0.1:8000"
    """The server, with or without a trailing /v1."""
    model: str | None = None
    """Default: the first model that the server lists."""
    endpoint: Literal["chat", "completions"] = "chat"
    requests: int = 64
    concurrency: int | None = None
    """Closed loop: this many requests at once, the next one when one ends. Default 8; not with `rate`."""
    rate: float | None = None
    """Open loop: requests a second on average, at Poisson times, however slow the answers are."""
    input_len: int = 128
    """Prompt tokens of each request's own, after the shared prefix."""
    output_len: int = 128
    """Tokens to generate: exactly this number with `ignore_eos`, at most otherwise."""
    ignore_eos: bool = True
    """Send `ignore_eos` and `min_tokens`. Turn off for servers that refuse unknown fields."""
    shared_prefix: int = 0
    """Tokens that every prompt begins with."""
    seed: int = 0
    """Seed of the prompts, the arrival times, and (plus the request's number) the sampling."""
    temperature: float = 0.0
    api_key: str | None = None
    timeout: float = 600.0
    """Seconds after which a request has failed."""

    def verify(self) -> None:
        """Raise `UsageError` naming the first invalid field."""
        least = {"requests": 1, "input_len": 1, "output_len": 1, "shared_prefix": 0}
        for name, limit in least.items():
            if (value := getattr(self, name)) < limit:
                raise UsageError(f"{name} must be at least {limit}, got {value}")
        if self.concurrency is not None and self.concurrency < 1:
            raise UsageError(f"concurrency must be at least 1, got {self.concurrency}")
        if self.rate is not None and not 0.0 < self.rate < math.inf:
            raise UsageError(f"rate must be a number above 0, got {self.rate}")
        if self.rate is not None and self.concurrency is not None:
            raise UsageError("give concurrency (closed loop) or rate (open loop), not both")
        if not 0.0 < self.timeout < math.inf:
            raise UsageError(f"timeout must be a number above 0, got {self.timeout}")
        if not 0.0 <= self.temperature <= 100.0:
            raise UsageError(f"temperature must be from 0 to 100, got {self.temperature}")

    @property
    def in_flight(self) -> int:
        """Most concurrent requests."""
        if self.rate is not None:
            return self.requests
        return min(self.requests, self.concurrency or DEFAULT_CONCURRENCY)

    def due_times(self) -> list[float]:
        """Start time of each request, in seconds from the beginning; all 0 in a closed loop."""
        if self.rate is None:
            return [0.0] * self.requests
        rng = random.Random(f"arrivals {self.seed}")
        now, times = 0.0, []
        for _ in range(self.requests):
            times.append(now)
            now += rng.expovariate(self.rate)
        return times


LoadPrompt = str | list[int]
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
"""Common nouns: each is one token, with its leading space, in the usual vocabularies."""

_PROBES = (32, 160)
"""Words in the two calibration prompts."""

_NOT_THAT_FORM = (ValueError, KeyError, TypeError, msgspec.ValidationError)
"""Exceptions of reading a field from an answer of another form."""


async def make_prompts(client: httpx.AsyncClient, model: str, spec: LoadSpec) -> list[LoadPrompt]:
    """`spec.requests` prompts, the same for the same seed and server.

    Raises `CommandError` if the server does not report the number of tokens of a prompt.
    """
    if spec.endpoint == "completions" and (ids := await _word_ids(client, model)):
        return [*_draw(ids, spec, shared=spec.shared_prefix, own=spec.input_len)]
    fixed, per_word = await _calibrate(client, model, spec)
    shared = round(spec.shared_prefix / per_word)
    own = round((spec.shared_prefix + spec.input_len - fixed) / per_word) - shared
    return [" ".join(words) for words in _draw(WORDS, spec, shared=shared, own=max(1, own))]


def request_body(model: str, spec: LoadSpec, prompt: LoadPrompt, max_tokens: int) -> dict[str, Any]:
    """Request fields that both endpoints need: model, prompt in the endpoint's form, length."""
    form = {"prompt": prompt} if spec.endpoint == "completions" else {"messages": [_user(prompt)]}
    return {"model": model, "max_tokens": max_tokens, "temperature": spec.temperature, **form}


def path_of(spec: LoadSpec) -> str:
    """The path of the endpoint that a load is sent to."""
    return "/v1/completions" if spec.endpoint == "completions" else "/v1/chat/completions"


def _user(prompt: LoadPrompt) -> dict[str, Any]:
    return {"role": "user", "content": prompt}


def _draw(pool: list[T], spec: LoadSpec, *, shared: int, own: int) -> list[list[T]]:
    prefix = random.Random(f"prefix {spec.seed}").choices(pool, k=shared)
    rng = random.Random(f"own {spec.seed}")
    return [prefix + rng.choices(pool, k=own) for _ in range(spec.requests)]


async def _word_ids(client: httpx.AsyncClient, model: str) -> list[int]:
    """Token ids of our words; empty if the server has no `/tokenize` in vLLM's form."""
    asked = {"model": model, "prompt": " " + " ".join(WORDS), "add_special_tokens": False}
    try:
        response = await client.post("/tokenize", json=asked)
        if response.status_code != 200:
            return []
        return sorted(set(msgspec.convert(response.json()["tokens"], list[int])))
    except (httpx.TransportError, *_NOT_THAT_FORM):  # not vLLM's `/tokenize`
        return []


async def _calibrate(client: httpx.AsyncClient, model: str, spec: LoadSpec) -> tuple[float, float]:
    """Number of tokens of an empty prompt (chat template, BOS), and tokens per word."""
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
