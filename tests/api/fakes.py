"""A stand-in for the engine service, and a client that speaks ASGI and can leave in the middle."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from runtime.errors import Conflict, EngineUnavailable, RequestError
from runtime.messages import Output, Submission
from runtime.metrics import Metrics
from runtime.stream import OutputStream
from settings.schema import Settings


class FakeTokenizer:
    """One token a byte; id 256 is the only special token."""

    vocab_size = 257
    eos_ids = (256,)
    chat_template: str | None = "a template that does not know the newer role"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(id for id in ids if id < 256).decode("utf-8", "replace")

    def token_text(self, id: int) -> str:
        return self.decode([id])

    def encode_chat(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        self.last_chat = messages, options
        return self.encode("\n".join(f"{message['role']}: {message['content']}" for message in messages))


class FakeService:
    """Answers with the prompt itself, a token at a time, without end unless `max_tokens` ends it."""

    def __init__(self, *, context: int = 200) -> None:
        self.tokenizer = FakeTokenizer()
        self.model_name = "fake"
        self.created = 1
        self.adapters = None
        self.max_model_len = context
        self.num_running = self.num_waiting = 0
        self.kv_usage = 0.0
        self.healthy = self.ready = True
        self.metrics = Metrics("fake", vllm_names=True, max_model_len=context, block_size=16, num_blocks=8)
        self.submitted: list[Submission] = []
        self.aborted: list[str] = []
        self.running: dict[str, OutputStream] = {}
        self.reject: Callable[[Submission], RequestError | None] = lambda submission: None
        self.stall_after: int | None = None
        """Tokens after which every output stands still."""
        self.fail_after: int | None = None
        self.timeout_after: int | None = None
        self.logprobs: list[float] | None = None
        """Of the sequences in order of submission, whose text is then their number."""

    def submit(self, submission: Submission) -> OutputStream:
        if (error := self.reject(submission)) is not None:
            raise error
        if submission.request_id in self.running:
            raise Conflict("This id is in use.", param="request_id")
        self.submitted.append(submission)
        stream = self.running[submission.request_id] = OutputStream(submission.request_id, self._abort)
        asyncio.get_running_loop().call_soon(self._step, submission, 1)
        return stream

    async def reset_prefixes(self) -> int:
        raise EngineUnavailable("There is no engine behind this.")

    def _abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.running.pop(request_id, None)

    def _step(self, submission: Submission, count: int) -> None:
        stream = self.running.get(submission.request_id)
        if stream is None or count - 1 == self.stall_after:
            return
        if count - 1 == self.fail_after:
            del self.running[submission.request_id]
            stream.fail(RequestError("It broke.", code="engine_failure"))
            return
        if count - 1 == self.timeout_after:
            del self.running[submission.request_id]
            stream.put(Output(request_id=submission.request_id, finish_reason="timeout"))
            return
        number = self.submitted.index(submission)
        id = submission.prompt_ids[(count - 1) % len(submission.prompt_ids)]
        last = count == submission.params.max_tokens
        if last:
            del self.running[submission.request_id]
        stream.put(
            Output(
                request_id=submission.request_id,
                text=str(number) if self.logprobs else self.tokenizer.decode([id]),
                token_ids=[id],
                finish_reason="length" if last else None,
                prompt_tokens=len(submission.prompt_ids),
                cached_tokens=1,
                generated_tokens=count,
                cumulative_logprob=self.logprobs[number] if self.logprobs else 0.0,
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
    ) -> None:
        self.sent: list[dict[str, Any]] = []
        self.arrived = asyncio.Event()
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._inbox.put_nowait({"type": "http.request", "body": raw, "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()],
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
    def json(self) -> Any:
        return json.loads(b"".join(message["body"] for message in self.sent[1:]))


async def until(condition: Callable[[], Any]) -> None:
    """Let the loop turn until `condition` holds."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to that")


def settings_with(section: str, **values: Any) -> Settings:
    """The defaults, but for some fields of one section."""
    kind = Settings.__annotations__[section]
    return Settings(**{section: kind(**values)})


def events(text: str) -> list[Any]:
    """The data of a stream of events, parsed; the last one must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
