"""The largest and most awkward bodies that are let in, on every endpoint that takes text: none blocks the event loop.

That is asserted by the fixture of this folder; here each has its right answer too.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.checkpoints import open_checkpoint
from runtime.text.tokenizer import Tokenizer
from settings.api import ServerSettings
from settings.schema import CacheSettings, ModelSettings, Settings
from tests.api.blocking import own_doing
from tests.api.conftest import RunningServer, client_of
from tests.api.fakes import FakeService

pytestmark = pytest.mark.anyio

CHAT, TEXT, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
CONTEXT = 8192
MEGA = 1024 * 1024
TOO_LONG = (400, "context_length_exceeded")

TEXTS: dict[str, Callable[[], str]] = {
    "words": lambda: "ab cd efg " * (MEGA // 5),
    "one word": lambda: "a" * 2 * MEGA,
    "spaces": lambda: " " * 2 * MEGA,
    "characters of three bytes": lambda: "字符串" * (2 * MEGA // 3),
    "digits": lambda: "0123456789" * (MEGA // 5),
    "beginnings of special tokens": lambda: "<|im_" * (2 * MEGA // 5),
    "angle brackets": lambda: "<" * 2 * MEGA,
    "special tokens": lambda: "<|im_end|>" * (MEGA // 5),
    "nothing that is seen": lambda: "\x00\x01\u200b" * (2 * MEGA // 3),
}


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Tokenizer:
    return open_checkpoint(str(tiny_model)).tokenizer


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return open_checkpoint("demo").tokenizer


@pytest.fixture(params=["tiny", pytest.param("demo", marks=pytest.mark.real_model)])
def service(request: pytest.FixtureRequest) -> FakeService:
    return with_tokenizer(request.getfixturevalue(request.param))


def with_tokenizer(tokenizer: Tokenizer) -> FakeService:
    service = FakeService(context=CONTEXT)
    service.tokenizer = tokenizer  # type: ignore[assignment]
    service.vocab_size, service.eos_ids = tokenizer.vocab_size, tokenizer.eos_ids  # type: ignore[assignment]
    return service


async def post(service: FakeService, path: str, body: Any, **limits: int) -> tuple[int, Any]:
    """The status, and the code of an error or the answer."""
    with own_doing():
        content = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
        client = client_of(service, Settings())
    answer = await client.post(path, content=content, headers={"content-type": "application/json"})
    with own_doing():
        found = answer.json()
    return answer.status_code, found["error"]["code"] if "error" in found else found


async def refused(service: FakeService, path: str, body: Any) -> str:
    """The field that a 400 names."""
    with own_doing():
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        client = client_of(service, Settings())
    answer = await client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text[:300]
    assert len(answer.content) < 2000
    assert not service.submitted
    return str(answer.json()["error"]["param"])


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


REAL = [pytest.param("demo", kind, marks=pytest.mark.real_model) for kind in ("words", "special tokens", "digits")]


@pytest.mark.parametrize(("service", "kind"), [*(("tiny", kind) for kind in TEXTS), *REAL], indirect=["service"])
async def test_two_megabytes(service: FakeService, kind: str) -> None:
    with own_doing():
        text = TEXTS[kind]()
    for path, body in (
        (TEXT, {"prompt": text, "max_tokens": 1}),
        (TEXT, {"prompt": ["a", text], "max_tokens": 1, "echo": True}),
        (CHAT, {"messages": user(text), "max_tokens": 1}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}], "max_tokens": 1}),
    ):
        assert await post(service, path, body) == TOO_LONG
    assert not service.submitted
    for body in ({"prompt": text}, {"messages": user(text[: 2 * MEGA - 100])}):
        status, found = await post(service, TOKENIZE, body)
        if kind in ("characters of three bytes", "nothing that is seen"):  # which are many millions of tokens
            assert (status, found) == TOO_LONG
        else:
            assert status == 200
            assert found["count"] == len(found["tokens"]) > CONTEXT


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["words", "special tokens", "angle brackets"])
async def test_two_megabytes_cut_to_size(tiny: Tokenizer, kind: str, side: str) -> None:
    service = with_tokenizer(tiny)
    with own_doing():
        text = TEXTS[kind]()
        tokens = service.tokenizer.encode(text)
    cut = {"max_tokens": 1, "truncate_prompt_tokens": 100, "truncation_side": side}
    status, found = await post(service, TEXT, {"prompt": text, "echo": True, **cut})
    assert (status, found["usage"]["prompt_tokens"]) == (200, 100)
    assert service.submitted[-1].prompt_ids == (tokens[-100:] if side == "left" else tokens[:100])
    status, found = await post(service, CHAT, {"messages": user(text[:-1000]), **cut})
    assert (status, found["usage"]["prompt_tokens"]) == (200, 100)


async def test_the_largest_body(tiny: Tokenizer) -> None:
    """16 MiB: plain, of escapes, and not a prompt at all."""
    service = with_tokenizer(tiny)
    room = Settings().server.max_body - 100
    with own_doing():
        bodies = [
            (TEXT, b'{"prompt": "' + b"ab cd efg " * (room // 10) + b'"}', "prompt"),
            (TEXT, b'{"prompt": "' + rb"\u5b57" * (room // 6) + b'"}', "prompt"),
            (TEXT, b'{"prompt": "' + b"\\n" * (room // 2) + b'"}', "prompt"),
            (CHAT, b'{"messages": [{"role": "user", "content": "' + b"<|im_end|>" * (room // 10) + b'"}]}', "messages"),
            (TOKENIZE, b'{"prompt": "' + b"a" * room + b'"}', "prompt"),
            (DETOKENIZE, b'{"tokens": [' + b"7," * (room // 2) + b"7]}", "tokens"),
            (TEXT, b'{"prompt": [' + b"7," * (room // 2) + b"7]}", "prompt"),
            (TEXT, b'{"prompt": [' + b"[7]," * (room // 4) + b"[7]]}", "prompt"),
            (TEXT, b'{"prompt": "a", "stop": "' + b"x" * room + b'"}', "stop"),
            (TEXT, b'{"prompt": "a", "colour": [' + b"[]," * (room // 3) + b"1]}", "colour"),
        ]
    for path, body, field in bodies:
        assert await refused(service, path, body) == field


@pytest.mark.parametrize("count", [4097, 18_000, 37_000, 100_000])
async def test_very_many_messages(tiny: Tokenizer, count: int) -> None:
    service = with_tokenizer(tiny)
    with own_doing():
        body = json.dumps({"messages": user("x") * count}).encode()
    for path in (CHAT, TOKENIZE):
        assert await refused(service, path, body) == "messages"


async def test_as_many_messages_and_parts_as_are_taken(tiny: Tokenizer) -> None:
    service = with_tokenizer(tiny)
    for messages in (
        user("x") * 4096,
        [{"role": "user", "content": [{"type": "text", "text": "x"}] * 8192}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}] * 2}] * 4096,
    ):
        status, found = await post(service, TOKENIZE, {"messages": messages})
        assert status == 200
        assert found["count"] > 8000
        assert await post(service, CHAT, {"messages": messages}) == TOO_LONG


async def test_the_largest_variables_in_every_message(tiny_model: Path) -> None:
    template = "{% for m in messages %}{{ date_string }}{{ m.content }}{% endfor %}"
    file = tiny_model.parent / "writes-a-variable.jinja"
    file.write_text(template, encoding="utf-8")
    service = with_tokenizer(open_checkpoint(str(tiny_model), chat_template=str(file)).tokenizer)
    body = {"messages": user("x") * 4096, "chat_template_kwargs": {"date_string": "<|im_end|> " * 85}}
    assert await post(service, CHAT, body) == TOO_LONG
    assert await refused(service, TOKENIZE, body) == "messages"  # of which the client sent a tenth
    few = {"messages": user("x") * 2, "max_tokens": 1, "chat_template_kwargs": {"date_string": "<|im_end|> " * 85}}
    assert (await post(service, CHAT, few))[0] == 200
    many = {**few, "chat_template_kwargs": {"date_string": "x" * MEGA}}
    assert await refused(with_tokenizer(service.tokenizer), CHAT, many) == "chat_template_kwargs"  # type: ignore[arg-type]


async def test_token_ids_as_far_as_they_go(service: FakeService) -> None:
    with own_doing():
        ids = [7 + n % 400 for n in range(MEGA)]
        many = [ids[n : n + 8100] for n in range(240)]
    status, found = await post(service, DETOKENIZE, {"tokens": ids})
    assert status == 200
    assert len(found["prompt"]) > MEGA // 2
    assert await refused(service, DETOKENIZE, {"tokens": [*ids, 7]}) == "tokens"
    assert await refused(service, TEXT, {"prompt": ids}) == "prompt"
    status, found = await post(service, TEXT, {"prompt": many, "echo": True, "max_tokens": 1})
    assert status == 200
    assert len(found["choices"]) == 240
    assert found["usage"]["prompt_tokens"] == 240 * 8100


async def test_prompts_times_choices(tiny: Tokenizer) -> None:
    service = with_tokenizer(tiny)
    ids = [7 + n % 400 for n in range(8100)]
    assert await refused(service, TEXT, {"prompt": [ids] * 17, "n": 64, "max_tokens": 1}) == "n"
    assert (await post(service, TEXT, {"prompt": [ids] * 16, "n": 64, "max_tokens": 1}))[0] == 200
    first, *rest = service.submitted[:64]
    assert all(one.prompt_ids is first.prompt_ids for one in rest)  # one list, whatever the number of choices


async def test_stops_as_far_as_they_go(tiny: Tokenizer) -> None:
    service = with_tokenizer(tiny)
    wide = {"prompt": "a", "use_beam_search": True, "n": 64, "max_tokens": 1}
    assert await refused(service, TEXT, {**wide, "stop_token_ids": list(range(3, 200))}) == "stop_token_ids"
    assert await refused(service, TEXT, {"prompt": "a", "stop_token_ids": [5] * 200_000}) == "stop_token_ids"
    assert await refused(service, TEXT, {"prompt": "a", "stop": ["x" * 60_000] * 16}) == "stop"
    body = {"prompt": "a", "stop": ["x" * 256] * 16, "stop_token_ids": list(range(3, 131)), "max_tokens": 1}
    assert (await post(service, TEXT, body))[0] == 200


def test_over_a_socket(tiny_model: Path) -> None:
    """A real server, with a stream beside it whose tokens keep coming."""
    settings = Settings(
        model=ModelSettings(model=str(tiny_model), threads=1),
        cache=CacheSettings(num_blocks=128),
        server=ServerSettings(port=0, drain_timeout=10.0),
    )
    text = "ab cd <|im_end|> " * (2 * MEGA // 17)
    with RunningServer(settings) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for path, body, status in (
            (TEXT, {"prompt": text}, 400),
            (TEXT, {"prompt": text, "truncate_prompt_tokens": 9, "echo": True, "max_tokens": 2}, 200),
            (CHAT, {"messages": user(text[:-100])}, 400),
            (CHAT, {"messages": user("x") * 100_000}, 400),
            (TOKENIZE, {"prompt": text, "return_token_strs": True}, 200),
            (DETOKENIZE, {"tokens": [7] * MEGA}, 200),
            (TEXT, {"prompt": [[7] * 500] * 256, "n": 4, "max_tokens": 1, "echo": True}, 200),
            (
                TEXT,
                {"prompt": [7], "use_beam_search": True, "n": 64, "stop_token_ids": [3, 4, 5, 6], "max_tokens": 9},
                200,
            ),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code == status, (path, answer.text[:300])
