"""From a checked request and its token ids to running sequences."""

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from litestar import Request

from runtime.api.openai.generation import Generation
from runtime.api.openai.params import choices_of, fit_context, sampling_params, seed_of
from runtime.api.openai.schema import GenerationRequest
from runtime.api.record import RequestRecord, make_id, record_of
from runtime.messages import Submission
from runtime.version import version
from settings.schema import LimitSettings

if TYPE_CHECKING:
    from runtime.service import EngineService


def take_id(request: Request[Any, Any, Any], given: str | None) -> RequestRecord:
    """The request's record. An id in the body wins over the one that the record has already."""
    record = record_of(request)
    if given is not None:
        record.request_id = make_id(given)
    return record


def start(
    service: "EngineService",
    request: GenerationRequest,
    prompts: list[list[int]],
    record: RequestRecord,
    limits: LimitSettings,
    *,
    prompt_field: str,
    default_max: int | None,
) -> Generation:
    """Submit `n` sequences for each prompt. Raises a `RequestError` that names the field at fault."""
    choices = choices_of(request)
    params, max_field = sampling_params(request, vocab_size=service.tokenizer.vocab_size, limits=limits)
    submissions: list[Submission] = []
    for prompt in prompts:
        fitted = fit_context(
            params,
            len(prompt),
            service.max_model_len,
            max_field=max_field,
            prompt_field=prompt_field,
            default=default_max,
        )
        submissions += [
            Submission(
                request_id=_sequence_id(record.request_id, len(submissions) + choice),
                prompt_ids=prompt,
                params=seed_of(fitted, choice),
                cache_salt=request.cache_salt or "",
            )
            for choice in range(choices)
        ]
    return Generation(service, submissions, choices=choices, record=record)


def _sequence_id(request_id: str, index: int) -> str:
    """The first sequence has the request's own id, so that a second request with that id is a conflict."""
    return request_id if index == 0 else f"{request_id}-{index}"


@lru_cache(8)
def fingerprint(model_name: str, dtype: str) -> str:
    """OpenAI's `system_fingerprint`: changes when the same request may give other tokens."""
    return "fp_" + hashlib.blake2b(f"{version()}\0{model_name}\0{dtype}".encode(), digest_size=5).hexdigest()
