"""What operators ask for: alive, ready, version, load, metrics, docs."""

import logging

import httpx
import pytest

from runtime.api.app import create_app
from runtime.api.handle import ServiceHandle
from settings.schema import Settings
from tests.api.conftest import client_of
from tests.api.fakes import Exchange, FakeService, settings_with

pytestmark = pytest.mark.anyio


async def test_everything_answers(client: httpx.AsyncClient, service: FakeService) -> None:
    service.num_running, service.num_waiting, service.kv_usage = 2, 3, 0.25
    for path in ("/health", "/ready", "/ping", "/version"):
        assert (await client.get(path)).status_code == 200
    assert (await client.post("/ping")).status_code == 200
    load = (await client.get("/load")).json()
    assert load == {"server_load": 5, "running": 2, "waiting": 3, "kv_cache_usage": 0.25}


async def test_while_the_model_loads() -> None:
    handle = ServiceHandle()
    transport = httpx.ASGITransport(app=create_app(handle, Settings()))
    client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")
    statuses = {path: (await client.get(path)).status_code for path in ("/health", "/ping", "/version", "/load")}
    assert set(statuses.values()) == {200}
    metrics = await client.get("/metrics")
    assert metrics.status_code == 200
    assert "process_resident_memory_bytes" in metrics.text
    for method, path in (("GET", "/ready"), ("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/tokenize")):
        answer = await client.request(method, path)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_unavailable"
    handle.service = FakeService()  # type: ignore[assignment]
    assert (await client.get("/ready")).status_code == 200


async def test_a_dead_engine_and_a_draining_one(client: httpx.AsyncClient, service: FakeService) -> None:
    service.ready = False
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/ready")).status_code == 503
    service.healthy = False
    assert (await client.get("/health")).status_code == 503
    assert (await client.get("/ping")).status_code == 503


async def test_an_operator_drains_a_server(client: httpx.AsyncClient, service: FakeService) -> None:
    service.num_running = 2
    drained = await client.post("/admin/drain")
    assert (drained.status_code, drained.json()) == (200, {"draining": True, "running": 2, "waiting": 0})
    assert (await client.get("/ready")).status_code == 503
    assert (await client.get("/admin/system")).json()["health"] == "draining"
    assert (await client.delete("/admin/drain")).json()["draining"] is False
    assert (await client.get("/ready")).status_code == 200


async def test_metrics_in_both_forms(client: httpx.AsyncClient) -> None:
    plain = await client.get("/metrics")
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "eft:num_requests_running" in plain.text
    accept = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
    openmetrics = await client.get("/metrics", headers=accept)
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert openmetrics.text.endswith("# EOF\n")
    odd = await client.get("/metrics", headers={"accept": "application/openmetrics-text;version=x;escaping=y"})
    assert odd.status_code == 200


async def test_unknown_routes_share_one_label(client: httpx.AsyncClient) -> None:
    for index in range(20):
        await client.get(f"/nowhere/{index}")
        await client.get(f"/v1/models/unknown-{index}")
        await client.request("BREW", "/health")
    lines = [line for line in (await client.get("/metrics")).text.splitlines() if line.startswith("eft:http_requests")]
    counts = {line.partition("{")[2].rpartition("}")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert counts['handler="unmatched",method="GET",status="404"'] == 20
    assert counts['handler="/v1/models/{model_id}",method="GET",status="404"'] == 20
    assert counts['handler="unmatched",method="OTHER",status="405"'] == 20
    assert len(counts) == 3


async def test_errors_of_routing(client: httpx.AsyncClient) -> None:
    missing = await client.get("/nope")
    assert missing.status_code == 404
    assert set(missing.json()["error"]) == {"message", "type", "param", "code"}
    wrong = await client.get("/v1/completions")
    assert wrong.status_code == 405
    assert "POST" in wrong.headers["allow"]
    assert wrong.json()["error"]["code"] == "method_not_allowed"


async def test_an_unexpected_error_shows_an_id_and_nothing_else(
    client: httpx.AsyncClient, service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(submission: object) -> None:
        raise ZeroDivisionError("secret detail in /srv/private")

    service.reject = explode  # type: ignore[assignment]
    answer = await client.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "id-1"})
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error["code"] == "internal_error"
    assert "id-1" in error["message"]
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text


async def test_a_foreign_host_header(client: httpx.AsyncClient) -> None:
    answer = await client.get("/health", headers={"host": "a b<c>"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_contradicting_lengths_and_huge_headers(service: FakeService) -> None:
    app = create_app(service, Settings())
    both = Exchange(app, "/health", method="GET", headers={"content-length": "1", "transfer-encoding": "chunked"})
    await both.task
    assert both.status == 400
    huge = Exchange(app, "/health", method="GET", headers={f"x-{index}": "y" * 100 for index in range(700)})
    await huge.task
    assert huge.status == 431


async def test_request_ids(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health", headers={"x-request-id": "abc"})).headers["x-request-id"] == "abc"
    cleaned = await client.get("/health", headers=[(b"x-request-id", b"a b\tc\xff" + b"d" * 500)])
    assert cleaned.headers["x-request-id"] == "abc" + "d" * 122
    made = {(await client.get("/health")).headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3


async def test_models(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["fake"]
    assert (await client.get("/v1/models/fake")).json() == listed["data"][0]
    for name in ("other", "org/fake", "fake/x", "%00"):
        missing = await client.get(f"/v1/models/{name}")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"


async def test_a_model_name_with_a_slash(client: httpx.AsyncClient, service: FakeService) -> None:
    service.model_name = "org/model"
    assert (await client.get("/v1/models/org/model")).json()["id"] == "org/model"


async def test_docs_describe_every_body_and_load_nothing(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/docs/openapi.json")).json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert "messages" in fields["required"]
    assert "max_completion_tokens" in fields["properties"]
    page = await client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/chat/completions" in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text


async def test_docs_say_what_becomes_of_each_field(client: httpx.AsyncClient) -> None:
    page = (await client.get("/docs")).text
    chat = page.partition("<code>POST</code> /v1/chat/completions<")[2].partition("<h2")[0]
    rows = {row.partition("</code>")[0]: row for row in chat.split("<tr><td><code>")[1:]}
    assert "Where model.trust_request_chat_template allows it" in rows["chat_template"]
    assert "no effect: A label" in rows["user"]
    assert "<td>refused</td>" in rows["functions"]
    assert "tools" in rows["functions"]
    assert chat.count("<tr>") == chat.count("</tr>") == len(rows)


async def test_docs_can_be_off(service: FakeService) -> None:
    client = client_of(service, settings_with("server", docs_enabled=False))
    assert (await client.get("/docs")).status_code == 404
    assert (await client.get("/docs/openapi.json")).status_code == 404
    assert (await client.get("/schema")).status_code == 404


async def test_tokenize_and_detokenize(client: httpx.AsyncClient, service: FakeService) -> None:
    body = (await client.post("/tokenize", json={"prompt": "abc", "return_token_strs": True})).json()
    assert body == {"count": 3, "max_model_len": 200, "tokens": [97, 98, 99], "token_strs": ["<97>", "<98>", "<99>"]}
    messages = [{"role": "user", "content": "Hi"}]
    chat = (await client.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})).json()
    assert chat["tokens"] == list(b"user: Hi")
    assert chat["token_strs"] is None
    assert service.tokenizer.last_chat[1]["add_generation_prompt"] is False
    assert (await client.post("/tokenize", json={"prompt": ""})).json()["tokens"] == []
    assert (await client.post("/detokenize", json={"tokens": [97, 98]})).json() == {"prompt": "ab"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {"tokens": [257]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
    ],
)
async def test_bad_tokenize_requests(client: httpx.AsyncClient, path: str, body: object, param: str) -> None:
    answer = await client.post(path, json=body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_uvicorn_is_quiet_about_bad_requests() -> None:
    from runtime.support.logs import configure
    from settings.schema import ObservabilitySettings

    configure(ObservabilitySettings(log_format="json"))
    assert not logging.getLogger("uvicorn.error").isEnabledFor(logging.WARNING)
