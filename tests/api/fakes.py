"""A stand-in for the engine service, and a client that speaks ASGI and can leave in the middle."""

import asyncio
import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from runtime.engine.delivery import OutputStream
from runtime.errors import Conflict, ContextLengthExceeded, EngineUnavailable, RequestError
from runtime.messages import Output, SamplingDefaults, Submission, TokenLogprob
from runtime.metrics import CacheShape, Metrics
from runtime.support.machine import Gpu
from runtime.text.tokenizer import InfillTokens
from settings.schema import Settings


class FakeTokenizer:
    """One token a byte; id 256 is the only special token."""

    vocab_size = 257
    eos_ids = (256,)
    chat_template: str | None = "a template that does not know the newer role"
    infill = InfillTokens(prefix=1, suffix=2, middle=3)

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        if max_tokens is not None and len(text) > 4 * max_tokens:
            raise ContextLengthExceeded(f"{len(text)} characters are more than {max_tokens} tokens.")
        return list(text.encode())

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        special = "" if skip_special_tokens else "<s>"
        return special.join(bytes(part).decode("utf-8", "replace") for part in _split(ids, 256))

    def token_string(self, id: int) -> str:
        return f"<{id}>"

    def token_text(self, id: int) -> str:
        return self.decode([id], skip_special_tokens=False)

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < 256 else b"<s>"

    def decode_one(self, id: int, *, skip_special_tokens: bool = True) -> str:
        return self.decode([id], skip_special_tokens=skip_special_tokens)

    def adapt_tools(self, messages: list[dict[str, Any]], tools: Sequence[Any]) -> tuple[list[dict[str, Any]], None]:
        return messages, None

    def encode_chat(
        self, messages: list[dict[str, Any]], *, max_tokens: int | None = None, **options: Any
    ) -> list[int]:
        self.last_chat = messages, options
        text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
        return self.encode(text, max_tokens=max_tokens)


def _split(ids: list[int], separator: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for id in ids:
        if id == separator:
            parts.append([])
        elif id < separator:
            parts[-1].append(id)
    return parts


class FakeService:
    """Answers with the prompt itself, a token at a time, without end unless `max_tokens` ends it."""

    reasoning = None

    def __init__(self, *, context: int = 200) -> None:
        self.tokenizer = FakeTokenizer()
        self.model_name = self.label = "fake"
        self.created = 1
        self.adapters = None
        self.decoder = SimpleNamespace(spec=SimpleNamespace(hidden_size=2))
        self.max_model_len = context
        self.vocab_size = self.tokenizer.vocab_size
        self.eos_ids = self.tokenizer.eos_ids
        self.sampling_defaults = SamplingDefaults()
        self.kernels = "reference"
        self.gpus: list[Gpu] = []
        self.num_blocks, self.block_size = 8, 16
        self.num_running = self.num_waiting = 0
        self.kv_usage = 0.0
        self.healthy = self.ready = True
        shape = CacheShape(max_model_len=context, block_size=16, num_blocks=8)
        self.metrics = Metrics("fake", vllm_names=True, shape=shape)
        self.submitted: list[Submission] = []
        self._numbers: dict[int, int] = {}
        """Id → place in `submitted`."""
        self.aborted: list[int] = []
        self.running: dict[int, OutputStream] = {}
        self.reject: Callable[[Submission], RequestError | None] = lambda submission: None
        self.stall_after: int | None = None
        """Tokens after which every output stands still."""
        self.fail_after: int | None = None
        self.timeout_after: int | None = None
        self.logprobs: list[float] | None = None
        """Of the sequences in order of submission, whose text is then their number."""

    def submit_all(self, submissions: Sequence[Submission]) -> list[OutputStream]:
        alive = {one.request_id for one in self.submitted if one.id in self.running}
        if alive & {one.request_id for one in submissions}:
            raise Conflict("This id is in use.", param="request_id")
        for submission in submissions:
            if (error := self.reject(submission)) is not None:
                raise error
        return [self.submit(submission) for submission in submissions]

    def submit(self, submission: Submission) -> OutputStream:
        self._numbers[submission.id] = len(self.submitted)
        self.submitted.append(submission)
        stream = self.running[submission.id] = OutputStream(submission.id, self._abort)
        asyncio.get_running_loop().call_soon(self._step, submission, 1)
        return stream

    def drain(self) -> None:
        self.ready = False

    def end_drain(self) -> None:
        self.ready = True

    def scrape(self, accept: str) -> tuple[bytes, str]:
        return self.metrics.render(accept)

    async def reset_prefixes(self) -> int:
        raise EngineUnavailable("There is no engine behind this.")

    def _abort(self, sequence: int) -> None:
        self.aborted.append(sequence)
        self.running.pop(sequence, None)

    def _step(self, submission: Submission, count: int) -> None:
        stream = self.running.get(submission.id)
        if stream is None or count - 1 == self.stall_after:
            return
        if count - 1 == self.fail_after:
            del self.running[submission.id]
            stream.fail(RequestError("It broke.", code="engine_failure"))
            return
        if count - 1 == self.timeout_after:
            del self.running[submission.id]
            stream.put(Output(id=submission.id, finish_reason="timeout"))
            return
        if submission.pooling is not None:
            del self.running[submission.id]
            stream.put(Output(id=submission.id, finish_reason="stop", pooled=[1.0, 0.0]))
            return
        number, params, prompt = self._numbers[submission.id], submission.params, submission.prompt_ids
        logprob = TokenLogprob(-0.5, 1, [(97 + rank, -0.5 - rank) for rank in range(params.logprobs or 0)])
        scored = TokenLogprob(-1.5, 2, [(97 + rank, -1.0 - rank) for rank in range(params.prompt_logprobs or 0)])
        id = submission.prompt_ids[(count - 1) % len(submission.prompt_ids)]
        last = count == submission.params.max_tokens
        if last:
            del self.running[submission.id]
        stream.put(
            Output(
                id=submission.id,
                text=str(number) if self.logprobs else self.tokenizer.decode([id]),
                token_ids=[id],
                finish_reason="length" if last else None,
                prompt_tokens=len(submission.prompt_ids),
                cached_tokens=1,
                generated_tokens=count,
                cumulative_logprob=self.logprobs[number] if self.logprobs else 0.0,
                logprobs=[] if params.logprobs is None else [logprob],
                prompt_logprobs=[] if params.prompt_logprobs is None or count > 1 else [scored] * (len(prompt) - 1),
            )
        )
        if not last:
            asyncio.get_running_loop().call_soon(self._step, submission, count + 1)


class Exchange:
    """One request to an ASGI app, whose client can be slow and can leave."""

    def __init__(
        self,
        app: Any,
        path: str,
        body: Any = None,
        *,
        method: str = "POST",
        headers: dict[str, str] | None = None,
        query: str = "",
    ) -> None:
        self.sent: list[dict[str, Any]] = []
        self.arrived = asyncio.Event()
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"content-type": "application/json"} if body is not None else {}
        given |= {name.lower(): value for name, value in (headers or {}).items()}
        self._inbox.put_nowait({"type": "http.request", "body": raw, "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in given.items()],
            "scheme": "http",
            "server": ("test", 80),
            "client": ("127.0.0.1", 1),
            "root_path": "",
            "state": {},
        }
        self.task = asyncio.create_task(app(scope, self._inbox.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.arrived.set()
        await asyncio.sleep(0)

    def leave(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def text(self) -> str:
        return b"".join(message["body"] for message in self.sent[1:]).decode()

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def settings_with(section: str, **values: Any) -> Settings:
    """The defaults, but for some fields of one section."""
    kind = Settings.__annotations__[section]
    return Settings(**{section: kind(**values)})


def events(text: str) -> list[Any]:
    """The data of a stream of events, parsed; the last one must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
