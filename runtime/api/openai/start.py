"""From a checked request and its token ids to running sequences."""

import hashlib
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

from litestar import Request

from runtime.api.openai.beams import beams_of
from runtime.api.openai.generation import Generation
from runtime.api.openai.params import choices_of, fit_context, sampling_params, seed_of, sequences_of
from runtime.api.openai.schema import GenerationRequest
from runtime.api.openai.served import Served
from runtime.api.record import RequestRecord, make_id, record_of
from runtime.errors import AdapterUnavailable, Conflict, ContextLengthExceeded, EngineUnavailable
from runtime.messages import SamplingParams, Submission
from runtime.version import version
from settings.schema import LimitSettings


def take_id(request: Request[Any, Any, Any], given: str | None) -> RequestRecord:
    """The request's record. An id in the body wins over the one that the record has already."""
    record = record_of(request)
    if given is not None:
        record.request_id = make_id(given)
    return record


def start(
    served: Served,
    request: GenerationRequest,
    prompts: list[list[int]],
    record: RequestRecord,
    limits: LimitSettings,
    *,
    prompt_field: str,
    default_max: int | None,
) -> Generation:
    """Submit `n` sequences for each prompt, or `best_of`. `served` is ready, and nothing was awaited since.
    Raises a `RequestError` that names the field at fault."""
    service = served.service
    params, max_field = sampling_params(request, vocab_size=service.tokenizer.vocab_size, limits=limits)
    fit = partial(
        fit_context,
        params,
        context=service.max_model_len,
        max_field=max_field,
        prompt_field=prompt_field,
        default=default_max,
    )
    try:
        submissions = list(_submissions(request, prompts, record, served.key, fit))
        return Generation(service, submissions, choices=sequences_of(request), best=choices_of(request), record=record)
    except (
        ContextLengthExceeded,
        Conflict,
        EngineUnavailable,
        AdapterUnavailable,
    ) as error:  # the engine counts a full queue itself
        service.metrics.on_rejection(error.code or "")
        raise


def _submissions(
    request: GenerationRequest,
    prompts: list[list[int]],
    record: RequestRecord,
    adapter: str,
    fit: Callable[[int], SamplingParams],
) -> Iterator[Submission]:
    """All of one prompt, then all of the next. The first of a prompt computes it for the others."""
    count = sequences_of(request)
    beams = beams_of(request, choices_of(request))
    arrival = time.monotonic()
    deadline = None if request.deadline_ms is None else arrival + request.deadline_ms / 1000
    for index, prompt in enumerate(prompts):
        fitted = fit(len(prompt))
        first = _sequence_id(record.request_id, index * count)
        for choice in range(count):
            yield Submission(
                request_id=_sequence_id(record.request_id, index * count + choice),
                prompt_ids=prompt,
                params=seed_of(fitted, choice),
                adapter=adapter,
                cache_salt=request.cache_salt or "",
                priority=request.priority or 0,
                deadline=deadline,
                tenant=record.tenant,
                fork_of=first if choice else "",
                scored=count > choices_of(request),
                beams=beams,
                arrival=arrival,
            )


def _sequence_id(request_id: str, index: int) -> str:
    """The first sequence has the request's own id, so that a second request with that id is a conflict."""
    return request_id if index == 0 else f"{request_id}-{index}"


@lru_cache(8)
def fingerprint(model_name: str, dtype: str) -> str:
    """OpenAI's `system_fingerprint`: changes when the same request may give other tokens."""
    return "fp_" + hashlib.blake2b(f"{version()}\0{model_name}\0{dtype}".encode(), digest_size=5).hexdigest()
