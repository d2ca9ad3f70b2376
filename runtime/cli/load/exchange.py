"""One streamed request, timed chunk by chunk."""

import asyncio
import time
from typing import Any

import httpx
import msgspec

from runtime.cli.client import describe, error_text
from runtime.cli.load.prompts import Prompt, path_of, request_body
from runtime.cli.load.sample import Sample
from runtime.cli.load.spec import LoadSpec


async def exchange(client: httpx.AsyncClient, model: str, spec: LoadSpec, number: int, prompt: Prompt) -> Sample:
    """Send request `number` and read its stream to the end. Failures are in `Sample.error`, not raised."""
    sample = Sample(started=time.perf_counter())
    try:
        async with asyncio.timeout(spec.timeout):
            await _stream(client, spec, streamed_body(model, spec, number, prompt), sample)
    except TimeoutError:
        sample.error = f"no complete answer in {spec.timeout:g} s"
    except httpx.HTTPError as error:
        sample.error = describe(error)
    except msgspec.DecodeError as error:
        sample.error = f"a chunk that is no JSON of the expected form: {error}"
    sample.finished = time.perf_counter()
    return sample


def streamed_body(model: str, spec: LoadSpec, number: int, prompt: Prompt) -> dict[str, Any]:
    """Of request `number`, whose answer is to be streamed."""
    body = request_body(model, spec, prompt, spec.output_len)
    body |= {"seed": spec.seed + number, "stream": True, "stream_options": {"include_usage": True}}
    if spec.ignore_eos:
        body |= {"ignore_eos": True, "min_tokens": spec.output_len}
    return body


async def _stream(client: httpx.AsyncClient, spec: LoadSpec, body: dict[str, Any], sample: Sample) -> None:
    async with client.stream("POST", path_of(spec), json=body) as response:
        if response.status_code != 200:
            await response.aread()
            sample.error = error_text(response)
            return
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                sample.read(line.removeprefix("data:").strip(), time.perf_counter())
            if sample.error is not None:
                return
    sample.end()
