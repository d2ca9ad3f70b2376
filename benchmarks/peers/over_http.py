"""Requests to an OpenAI-style server: the same client for every peer that is one."""

import httpx

from runtime.cli.load.exchange import Sample, exchange
from runtime.cli.load.spec import LoadSpec


class HttpDriver:
    """Streams from `/v1/completions`, with prompts as token ids."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model

    async def complete(self, prompt: list[int], output_len: int) -> Sample:
        spec = LoadSpec(endpoint="completions", output_len=output_len)
        return await exchange(self._client, self._model, spec, 0, prompt)
