"""Beam search as the OpenAI and vLLM APIs ask for it: `use_beam_search`, and what goes with it."""

from runtime.api.openai.schema import GenerationRequest
from runtime.errors import InvalidRequest
from runtime.messages import BeamSearch

MAX_PENALTY = 10.0
"""Of lengths, either way."""


def check_beams(request: GenerationRequest) -> None:
    """Raise `InvalidRequest` for what a search cannot do, and for a search's fields without a search."""
    penalty = 1.0 if request.length_penalty is None else request.length_penalty
    if not request.use_beam_search:
        if penalty != 1.0:
            raise InvalidRequest(f"length_penalty needs use_beam_search, got {penalty:g}.", param="length_penalty")
        if request.early_stopping:
            given = request.early_stopping
            raise InvalidRequest(f"early_stopping needs use_beam_search, got {given}.", param="early_stopping")
        return
    if not -MAX_PENALTY <= penalty <= MAX_PENALTY:  # NaN fails every comparison
        raise InvalidRequest(
            f"length_penalty must be between {-MAX_PENALTY:g} and {MAX_PENALTY:g}, got {penalty:g}.",
            param="length_penalty",
        )
    if request.stream:
        raise InvalidRequest(
            "use_beam_search cannot be streamed: which sequences are best is only known at the end.", param="stream"
        )
    if request.stop:
        raise InvalidRequest("use_beam_search has no stop strings; give stop_token_ids.", param="stop")
    sampling = {
        "temperature": (request.temperature, (None, 0)),
        "top_p": (request.top_p, (None, 1)),
        "top_k": (request.top_k, (None, 0, -1)),
        "min_p": (request.min_p, (None, 0)),
    }
    for field, (value, neutral) in sampling.items():
        if value not in neutral:
            raise InvalidRequest(
                f"use_beam_search looks for the likeliest sequences and does not sample: leave {field} out, "
                f"or give {neutral[1]}; got {value:g}.",
                param=field,
            )


def beams_of(request: GenerationRequest, choices: int) -> BeamSearch | None:
    """The search that a request asks for: `best_of` beams, of which `choices` are the answer."""
    if not request.use_beam_search:
        return None
    return BeamSearch(
        width=request.best_of or choices,
        best=choices,
        length_penalty=1.0 if request.length_penalty is None else request.length_penalty,
        early_stopping=request.early_stopping or False,
    )
