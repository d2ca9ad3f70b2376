"""Requests to an OpenAI-style server: the same client for every peer that is one."""

import time

import msgspec

from benchmarks.peers.events import AnswerError, post
from runtime.cli.load_prompts import LoadSpec, path_of
from runtime.cli.loadgen import Sample, streamed_body


class HttpDriver:
    """Streams from `/v1/completions`, with prompts as token ids."""

    def __init__(self, host: str, port: int, model: str) -> None:
        self._host = host
        self._port = port
        self._model = model

    async def complete(self, prompt: list[int], output_len: int) -> Sample:
        spec = LoadSpec(endpoint="completions", output_len=output_len)
        sample = Sample(started=time.perf_counter())
        body = msgspec.json.encode(streamed_body(self._model, spec, 0, prompt))
        try:
            await post(self._host, self._port, path_of(spec), body, sample.read)
            sample.end()
        except (OSError, AnswerError, msgspec.DecodeError) as error:
            sample.error = str(error)
        sample.finished = time.perf_counter()
        return sample
